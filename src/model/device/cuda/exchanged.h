#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "comm/communicator.h"

namespace flash_mla::model {

/// What every rank says, of the host's memory; all call it alike.
template <class T>
std::vector<T> exchanged(comm::Communicator& ranks, const T& mine) {
  static_assert(std::is_trivially_copyable_v<T>);
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(T));
  std::vector<T> all(static_cast<std::size_t>(ranks.size()));
  T own = mine;
  ranks.all_gather({reinterpret_cast<std::byte*>(&own), DType::kUInt8, 1, kBytes, kBytes},
                   {reinterpret_cast<std::byte*>(all.data()), DType::kUInt8, ranks.size(), kBytes, kBytes});
  return all;
}

}  // namespace flash_mla::model
