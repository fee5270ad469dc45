#include "grammar/subset_construction.h"

#include <algorithm>
#include <utility>

namespace flash_mla::grammar {

SubsetConstruction::SubsetConstruction(const Nfa& nfa) : nfa_(nfa), closed_(nfa) { find_classes(); }

// Runs of bytes between which no edge begins or ends.
void SubsetConstruction::find_classes() {
  std::array<bool, 257> begins{};
  for (const auto& of_state : nfa_.edges) {
    for (const Nfa::Edge& edge : of_state) {
      if (edge.first < 0) continue;
      begins[static_cast<std::size_t>(edge.first)] = begins[static_cast<std::size_t>(edge.last) + 1] = true;
    }
  }
  std::uint8_t now = 0;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    if (byte > 0 && begins[byte]) ++now;
    byte_class_[byte] = now;
  }
  targets_.resize(std::size_t{now} + 1);
}

std::int32_t SubsetConstruction::add(std::vector<int> set) {
  closed_.close(set);
  const auto [it, is_new] = states_.try_emplace(std::move(set), static_cast<std::int32_t>(sets_.size()));
  if (is_new) {
    sets_.push_back(&it->first);
    row_begin_.push_back(kUnknown);
  }
  return it->second;
}

const std::int32_t* SubsetConstruction::row(std::int32_t state) {
  const auto s = static_cast<std::size_t>(state);
  if (row_begin_[s] == kUnknown) {
    for (auto& of_class : targets_) of_class.clear();
    for (const int from : *sets_[s]) {
      for (const Nfa::Edge& edge : nfa_.edges[static_cast<std::size_t>(from)]) {
        ++num_edges_;
        if (edge.first < 0) continue;
        const std::size_t last = byte_class_[static_cast<std::size_t>(edge.last)];
        for (std::size_t c = byte_class_[static_cast<std::size_t>(edge.first)]; c <= last; ++c) {
          targets_[c].push_back(edge.target);
          ++num_edges_;
        }
      }
    }
    row_begin_[s] = static_cast<std::int64_t>(rows_.size());
    for (const auto& of_class : targets_) rows_.push_back(of_class.empty() ? kDead : add(of_class));
  }
  return rows_.data() + row_begin_[s];
}

bool SubsetConstruction::accepts(std::int32_t state) const {
  return std::ranges::binary_search(*sets_[static_cast<std::size_t>(state)], nfa_.end);
}

}  // namespace flash_mla::grammar
