#include "flash_mla/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "flash_mla/error.h"
#include "schedule/options.h"
#include "schedule/walk.h"

namespace flash_mla {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t blocks_of(std::int32_t length, const ScheduleOptions& o) {
  return std::max<std::int64_t>(ceil_div(length, o.block_size), o.min_blocks_per_request);
}

// Blocks of all requests, the overhead of each included.
std::int64_t total_of(std::span<const std::int32_t> lengths, const ScheduleOptions& o) {
  // Everything in a schedule is an int32. A request is at least one split, also one that counts as no block,
  // and every part may add a cut.
  const std::int64_t limit = std::numeric_limits<std::int32_t>::max() - std::int64_t{o.num_parts};
  std::int64_t total = 0, counted = 0;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0) {
      throw InvalidArgument(fmt::format("cache_seqlens[{}] is {}, expected >= 0", i, lengths[i]));
    }
    const std::int64_t blocks = blocks_of(lengths[i], o);
    total += blocks + o.fixed_overhead_blocks;
    counted += std::max<std::int64_t>(blocks, 1) + o.fixed_overhead_blocks;
    if (counted > limit) {
      throw InvalidArgument(fmt::format(
          "cache_seqlens adds up to more than {} blocks of block_size = {} (fixed_overhead_blocks = {} each "
          "included), expected at most as many",
          limit, o.block_size, o.fixed_overhead_blocks));
    }
  }
  return total;
}

// What every part is given.
struct Share {
  std::int64_t payload = 0;  // blocks, the overhead included
  std::int64_t whole = 0;    // requests that are not cut; 0: they are
};

Share share_of(std::span<const std::int32_t> lengths, std::int64_t total, const ScheduleOptions& o) {
  if (o.whole_requests_percent > 0 && o.fixed_split_blocks == 0 && !lengths.empty()) {
    const std::int64_t each = ceil_div(std::ssize(lengths), o.num_parts);
    const std::int64_t most = each * (blocks_of(std::ranges::max(lengths), o) + o.fixed_overhead_blocks);
    if (most * o.num_parts <= total + total * o.whole_requests_percent / 100) return {most, each};
  }
  const std::int64_t least = std::min<std::int64_t>(o.min_blocks_per_part, total);
  return {std::max(ceil_div(total, o.num_parts), least) + o.fixed_overhead_blocks, 0};
}

// Where a part begins: `block` of request `req`, which is `split` of it.
struct Position {
  std::int32_t req = 0;
  std::int64_t block = 0;
  std::int32_t split = 0;
  friend bool operator==(const Position&, const Position&) = default;
};

// The part from `begin` to `end`. Split flags need the final split counts.
DecodePart part_between(const Position& begin, const Position& end, std::span<const std::int32_t> lengths,
                        const ScheduleOptions& o, std::span<const std::int32_t> num_splits) {
  const auto batch = static_cast<std::int32_t>(lengths.size());
  DecodePart part;
  // The blocks a request has, not those it counts as: FlashMLA's rows of an empty request end at block 0.
  part.end_block = static_cast<std::int32_t>(
      end.block > 0 ? end.block
      : end.req > 0 ? schedule_blocks(lengths[static_cast<std::size_t>(end.req) - 1], o.block_size)
                    : 0);
  if (begin.req >= batch || begin == end) {
    // Nothing to do: begin_req > end_req.
    part.begin_req = batch;
    part.end_req = batch - 1;
    return part;
  }
  const auto is_split = [&](std::int32_t r) {
    return num_splits[static_cast<std::size_t>(r) + 1] - num_splits[static_cast<std::size_t>(r)] > 1;
  };
  part.begin_req = begin.req;
  part.begin_block = static_cast<std::int32_t>(begin.block);
  part.begin_split = begin.split;
  part.end_req = end.block > 0 ? end.req : end.req - 1;
  part.first_is_split = is_split(part.begin_req);
  part.last_is_split = is_split(part.end_req);
  return part;
}

// One pass over the requests, filling each part up to `payload` blocks. A request that does not fit into
// what is left of a part is cut there, and the cut costs the next part the overhead again.
void plan_balanced(std::span<const std::int32_t> lengths, const ScheduleOptions& o, std::int64_t total,
                   std::span<DecodePart> parts, std::span<std::int32_t> num_splits) {
  const auto batch = static_cast<std::int32_t>(lengths.size());
  const auto [payload, whole] = share_of(lengths, total, o);
  Position at;
  num_splits[0] = 0;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    parts[p].begin_req = at.req;  // parked here until the split counts are known
    parts[p].begin_block = static_cast<std::int32_t>(at.block);
    parts[p].begin_split = at.split;
    // Nothing is left over for the last part: the sum of all payloads covers every cut's overhead.
    std::int64_t room = payload;
    const auto stop =
        whole > 0 ? static_cast<std::int32_t>(std::min<std::int64_t>(at.req + whole, batch)) : batch;
    while (at.req < stop) {
      const std::int64_t left = blocks_of(lengths[static_cast<std::size_t>(at.req)], o) - at.block;
      if (room < left + o.fixed_overhead_blocks) {
        const std::int64_t take = room - o.fixed_overhead_blocks;
        if (take > 0) {
          at.block += take;
          ++at.split;
        }
        break;
      }
      room -= left + o.fixed_overhead_blocks;
      num_splits[static_cast<std::size_t>(at.req) + 1] =
          num_splits[static_cast<std::size_t>(at.req)] + at.split + 1;
      at = {at.req + 1, 0, 0};
    }
  }
  Position end{batch, 0, 0};
  for (std::size_t p = parts.size(); p-- > 0;) {
    const Position begin{parts[p].begin_req, parts[p].begin_block, parts[p].begin_split};
    parts[p] = part_between(begin, end, lengths, o, num_splits);
    end = begin;
  }
}

// Requests lie on a line, each as long as its blocks and the overhead. The line is cut into equal lengths,
// each cut moved to the nearest split point of the request it falls into.
void plan_fixed(std::span<const std::int32_t> lengths, const ScheduleOptions& o, std::int64_t total,
                std::span<DecodePart> parts, std::span<std::int32_t> num_splits) {
  const auto batch = static_cast<std::int32_t>(lengths.size());
  const std::int64_t step = o.fixed_split_blocks;
  const std::int64_t stride = ceil_div(total, o.num_parts);
  const auto blocks = [&](std::int32_t r) { return blocks_of(lengths[static_cast<std::size_t>(r)], o); };
  num_splits[0] = 0;
  for (std::int32_t r = 0; r < batch; ++r) {
    num_splits[static_cast<std::size_t>(r) + 1] =
        num_splits[static_cast<std::size_t>(r)] +
        static_cast<std::int32_t>(std::max<std::int64_t>(ceil_div(blocks(r), step), 1));
  }
  std::int32_t req = 0;
  std::int64_t start = 0;  // of request `req` on the line
  const auto advance_to = [&](std::int64_t x) {
    while (req < batch && start + blocks(req) + o.fixed_overhead_blocks <= x) {
      start += blocks(req) + o.fixed_overhead_blocks;
      ++req;
    }
  };
  Position begin;
  for (std::size_t p = 1; p <= parts.size(); ++p) {
    Position end{batch, 0, 0};
    if (p < parts.size()) {
      const std::int64_t cut = static_cast<std::int64_t>(p) * stride;
      advance_to(cut);
      std::int64_t steps = req < batch ? (std::max<std::int64_t>(cut - start, 0) + step / 2) / step : 0;
      if (steps > 0 && steps * step >= blocks(req)) {
        advance_to(start + blocks(req) + o.fixed_overhead_blocks);
        steps = 0;
      }
      end = {req, steps * step, static_cast<std::int32_t>(steps)};
    }
    parts[p - 1] = part_between(begin, end, lengths, o, num_splits);
    begin = end;
  }
}

void plan(std::span<const std::int32_t> lengths, const ScheduleOptions& o, std::int64_t total,
          std::span<DecodePart> parts, std::span<std::int32_t> num_splits) {
  (o.fixed_split_blocks > 0 ? plan_fixed : plan_balanced)(lengths, o, total, parts, num_splits);
}

}  // namespace

void build_decode_schedule(std::span<const std::int32_t> cache_seqlens, const ScheduleOptions& options,
                           std::span<DecodePart> parts, std::span<std::int32_t> num_splits) {
  check_schedule_options(options);
  if (parts.size() != static_cast<std::size_t>(options.num_parts)) {
    throw InvalidArgument(
        fmt::format("parts has {} rows, expected num_parts = {}", parts.size(), options.num_parts));
  }
  if (num_splits.size() != cache_seqlens.size() + 1) {
    throw InvalidArgument(fmt::format("num_splits has {} elements, expected b + 1 = {}", num_splits.size(),
                                      cache_seqlens.size() + 1));
  }
  plan(cache_seqlens, options, total_of(cache_seqlens, options), parts, num_splits);
}

DecodeSchedule DecodeSchedule::build(std::span<const std::int32_t> cache_seqlens,
                                     const ScheduleOptions& options) {
  check_schedule_options(options);
  DecodeSchedule s;
  s.options_ = options;
  const std::int64_t total = total_of(cache_seqlens, options);
  s.payload_blocks_ = share_of(cache_seqlens, total, options).payload;
  s.parts_.resize(static_cast<std::size_t>(options.num_parts));
  s.num_splits_.resize(cache_seqlens.size() + 1);
  plan(cache_seqlens, options, total, s.parts_, s.num_splits_);
  return s;
}

DecodeScheduleView DecodeSchedule::view() const {
  DecodeScheduleView v;
  v.parts = TensorView::contiguous(const_cast<DecodePart*>(parts_.data()), DType::kInt32,
                                   {static_cast<std::int64_t>(parts_.size()), 8});
  v.num_splits = TensorView::contiguous(const_cast<std::int32_t*>(num_splits_.data()), DType::kInt32,
                                        {static_cast<std::int64_t>(num_splits_.size())});
  v.block_size = options_.block_size;
  v.fixed_split_blocks = options_.fixed_split_blocks;
  return v;
}

namespace {

void check_same_batch(std::span<const std::int32_t> lengths, std::span<const std::int32_t> num_splits) {
  if (lengths.size() + 1 != num_splits.size()) {
    throw InvalidArgument(fmt::format("cache_seqlens has {} elements, expected the {} of the schedule",
                                      lengths.size(), num_splits.size() - 1));
  }
}

}  // namespace

double DecodeSchedule::balance(std::span<const std::int32_t> cache_seqlens) const {
  check_same_batch(cache_seqlens, num_splits_);
  std::int64_t busiest = 0, all = 0;
  for (const DecodePart& part : parts_) {
    const auto walk = walk_part(part, cache_seqlens.data(), num_splits_.data(), options_.block_size,
                                options_.fixed_split_blocks);
    std::int64_t blocks = 0;
    for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
      blocks += item.end_block - item.begin_block;
    }
    busiest = std::max(busiest, blocks);
    all += blocks;
  }
  return busiest == 0 ? 0 : static_cast<double>(all) / static_cast<double>(busiest * std::ssize(parts_));
}

std::vector<std::int32_t> DecodeSchedule::to_token_rows(std::span<const std::int32_t> cache_seqlens) const {
  check_same_batch(cache_seqlens, num_splits_);
  std::vector<std::int32_t> rows(parts_.size() * 8, 0);
  for (std::size_t p = 0; p < parts_.size(); ++p) {
    const DecodePart& part = parts_[p];
    std::int32_t* row = &rows[p * 8];
    row[0] = part.begin_req;
    row[1] = static_cast<std::int32_t>(std::int64_t{part.begin_block} * options_.block_size);
    row[2] = part.end_req;
    if (part.end_req >= 0) {
      // The end of the last block may be past the largest int32, where no length is.
      row[3] = static_cast<std::int32_t>(
          std::min<std::int64_t>(std::int64_t{part.end_block} * options_.block_size,
                                 cache_seqlens[static_cast<std::size_t>(part.end_req)]));
    }
    row[4] = part.begin_split;
  }
  return rows;
}

}  // namespace flash_mla
