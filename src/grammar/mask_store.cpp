#include "grammar/mask_store.h"

#include <utility>

namespace flash_mla::grammar {

std::size_t MaskStore::Hash::operator()(const std::shared_ptr<const Mask>& mask) const {
  std::size_t hash = 0;
  for (const std::uint32_t word : *mask) hash = (hash ^ word) * 0x9e3779b97f4a7c15U;
  return hash ^ (hash >> 32);
}

std::shared_ptr<const MaskStore::Mask> MaskStore::find(std::int32_t state, std::size_t words) const {
  const std::lock_guard lock(mutex_);
  const auto found = by_state_.find(state);
  return found != by_state_.end() && found->second->size() == words ? found->second : nullptr;
}

std::shared_ptr<const MaskStore::Mask> MaskStore::keep(std::int32_t state, std::shared_ptr<const Mask> mask) {
  const std::lock_guard lock(mutex_);
  if (num_bytes_ > kMaxBytes) return mask;
  // The places of a counted group differ in what follows much later, and no token is so long.
  const std::size_t bytes = mask->size() * sizeof(std::uint32_t);
  const auto [same, is_new] = masks_.insert(std::move(mask));
  num_bytes_ += (is_new ? bytes : 0) + sizeof(*by_state_.begin());
  by_state_.insert_or_assign(state, *same);
  return *same;
}

std::size_t MaskStore::num_bytes() const {
  const std::lock_guard lock(mutex_);
  return num_bytes_;
}

}  // namespace flash_mla::grammar
