#pragma once

// Which slot an entry of a prefill's list names: the three ways of SparsePrefillArgs. Host tensors.

#include <algorithm>
#include <cstdint>

#include "flash_mla/sparse.h"

namespace flash_mla {

class PrefillSelection {
 public:
  explicit PrefillSelection(const SparsePrefillArgs& args)
      : args_(args),
        page_size_(args.cache.data.size(1)),
        slots_(args.cache.data.size(0) * args.cache.data.size(1)) {}

  /// Entries of query token i's list that are looked at.
  std::int64_t length(std::int64_t i) const {
    const TensorView& t = args_.topk_length;
    return t.defined() ? t.ptr<const std::int32_t>()[i * t.stride(0)] : args_.indices.size(1);
  }

  const std::int32_t* entries(std::int64_t i) const {
    // Empty lists may lie nowhere.
    if (args_.indices.size(1) == 0) return nullptr;
    return args_.indices.ptr<const std::int32_t>() + i * args_.indices.stride(0);
  }

  /// The request that query token i belongs to; 0 without cu_seqlens_q.
  std::int64_t request(std::int64_t i) const {
    const TensorView& t = args_.cu_seqlens_q;
    if (!t.defined()) return 0;
    // The last request that begins at or before i; those before it that begin there as well are empty.
    std::int64_t low = 0, high = t.size(0) - 1;
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      (value(t, middle) <= i ? low : high) = middle;
    }
    return low;
  }

  /// The slot that `entry` of a list of `request` names; -1: none.
  std::int64_t slot(std::int64_t request, std::int32_t entry) const {
    if (entry < 0) return -1;
    if (args_.block_table.defined()) {
      if (entry >= value(args_.cache_seqlens, request)) return -1;
      const TensorView& t = args_.block_table;
      const std::int64_t page = t.ptr<const std::int32_t>()[request * t.stride(0) + entry / page_size_];
      return page * page_size_ + entry % page_size_;
    }
    if (args_.cu_seqlens_k.defined()) {
      const std::int64_t begin = value(args_.cu_seqlens_k, request);
      return begin + entry < value(args_.cu_seqlens_k, request + 1) ? begin + entry : -1;
    }
    return entry < slots_ ? entry : -1;
  }

 private:
  static std::int64_t value(const TensorView& t, std::int64_t i) {
    return t.ptr<const std::int32_t>()[i * t.stride(0)];
  }

  const SparsePrefillArgs& args_;
  std::int64_t page_size_;
  std::int64_t slots_;
};

}  // namespace flash_mla
