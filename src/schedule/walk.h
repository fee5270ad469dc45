#pragma once

// How a schedule is read: a part in either unit, and the one walk over what it has to do. For the host and
// for kernels alike, where the functions are inlined.

#include <cstdint>
#include <type_traits>

#include "flash_mla/schedule.h"

namespace flash_mla {

/// Blocks of `block_size` tokens that `length` tokens take. Int: of 32 bits in kernels, whose lengths are far
/// below 2^31.
template <class Int = std::int64_t>
constexpr Int schedule_blocks(std::type_identity_t<Int> length, int block_size) {
  return (length + block_size - 1) / block_size;
}

/// The smaller one. In kernels by the compiler's own minimum: a selection costs them registers.
template <class Int>
constexpr Int least(std::type_identity_t<Int> a, std::type_identity_t<Int> b) {
#ifdef __CUDA_ARCH__
  return ::min(a, b);
#else
  return a < b ? a : b;
#endif
}

/// The first four words of a DecodePart: what a worker walks.
struct PartRange {
  std::int32_t begin_req, end_req;  ///< end_req inclusive; before begin_req in a part without work
  std::int32_t begin_block;         ///< of begin_req
  std::int32_t end_block;           ///< of end_req, exclusive
};

/// The same from the first four words of a row, whichever unit the rows are in.
template <class Int>
constexpr PartRange part_range(std::int32_t w0, std::int32_t w1, std::int32_t w2, std::int32_t w3,
                               bool token_rows, int block_size) {
  if (!token_rows) return {w0, w1, w2, w3};
  return {w0, w2, w1 / block_size, static_cast<std::int32_t>(schedule_blocks<Int>(w3, block_size))};
}

/// The work of a part on one request or, where split points are fixed, on one split of it: blocks
/// [begin_block, end_block). There are none for a request without keys, whose output still has to be written.
template <class Int>
struct PartItem {
  Int req;
  Int length;
  Int begin_block, end_block;
  bool is_split;  ///< the request has other items, of this or other parts
  Int slot;       ///< of the partial result
};

/// The walk over a part's items:
///
///   for (auto item = walk.first(); walk.holds(item); item = walk.next(item))
///
/// Tables: what a walk reads, when it is needed and no earlier (a kernel waits for each):
///   block_size(), fixed_split_blocks()
///   length(req)                     tokens of a request
///   splits_before(req)              num_splits[req]
///   begin_split()                   column 4 of the part's row
///   slot(req, before, split, fixed) where the partial result of a split goes; before: splits_before(req),
///                                   fixed: split points are fixed
template <class Int, class Tables>
struct PartWalk {
  PartRange part;
  Tables tables;

  constexpr PartItem<Int> first() const { return at(part.begin_req, part.begin_block); }
  constexpr bool holds(const PartItem<Int>& item) const { return item.req <= part.end_req; }
  constexpr PartItem<Int> next(const PartItem<Int>& item) const {
    const bool more = tables.fixed_split_blocks() > 0 && item.end_block < stop(item.req, item.length);
    return at(more ? item.req : item.req + 1, more ? item.end_block : 0);
  }

 private:
  // Where the part stops working on a request.
  constexpr Int stop(Int req, Int length) const {
    const Int blocks = schedule_blocks<Int>(length, tables.block_size());
    return req == part.end_req ? least<Int>(part.end_block, blocks) : blocks;
  }
  // The item of request `req` that begins at `begin_block`; past the part's last request only `req` is set.
  constexpr PartItem<Int> at(Int req, Int begin_block) const {
    PartItem<Int> item;
    item.req = req;
    if (req > part.end_req) return item;
    item.length = tables.length(req);
    item.begin_block = begin_block;
    item.end_block = stop(req, item.length);
    const Int before = tables.splits_before(req);
    item.is_split = tables.splits_before(req + 1) - before > 1;
    if (tables.fixed_split_blocks() > 0) {
      item.end_block = least<Int>(item.end_block, begin_block + tables.fixed_split_blocks());
      item.slot = tables.slot(req, before, begin_block / tables.fixed_split_blocks(), true);
    } else {
      const Int split = req != part.begin_req || begin_block == 0 ? 0 : tables.begin_split();
      item.slot = tables.slot(req, before, split, false);
    }
    return item;
  }
};

/// Row p of a host schedule, in blocks.
inline DecodePart schedule_part(const DecodeScheduleView& s, std::int64_t p) {
  const auto* row = s.parts.ptr<const std::int32_t>() + p * s.parts.stride(0);
  const PartRange range =
      part_range<std::int64_t>(row[0], row[1], row[2], row[3], s.unit == PartUnit::kTokens, s.block_size);
  DecodePart part;
  part.begin_req = range.begin_req;
  part.end_req = range.end_req;
  part.begin_block = range.begin_block;
  part.end_block = range.end_block;
  part.begin_split = row[4];
  return part;
}

/// Tables of a host schedule and the part in one of its rows; an item's slot is the number of its split.
struct HostTables {
  const std::int32_t* lengths;
  const std::int32_t* num_splits;
  int of_block, of_split;  ///< block_size, fixed_split_blocks
  std::int32_t of_part;    ///< begin_split

  constexpr int block_size() const { return of_block; }
  constexpr int fixed_split_blocks() const { return of_split; }
  constexpr std::int64_t length(std::int64_t req) const { return lengths[req]; }
  constexpr std::int64_t splits_before(std::int64_t req) const { return num_splits[req]; }
  constexpr std::int64_t begin_split() const { return of_part; }
  static constexpr std::int64_t slot(std::int64_t, std::int64_t, std::int64_t split, bool) { return split; }
};

/// The walk over a part of a host schedule.
inline PartWalk<std::int64_t, HostTables> walk_part(const DecodePart& part, const std::int32_t* lengths,
                                                    const std::int32_t* num_splits, int block_size,
                                                    int fixed_split_blocks) {
  return {{part.begin_req, part.end_req, part.begin_block, part.end_block},
          {lengths, num_splits, block_size, fixed_split_blocks, part.begin_split}};
}

}  // namespace flash_mla
