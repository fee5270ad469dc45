#include "flash_mla/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "cpu/dense_decode.h"
#include "flash_mla/error.h"
#include "schedule/options.h"
#include "schedule/walk.h"

namespace flash_mla {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

void check_schedule_options(const ScheduleOptions& o) {
  const auto require = [](bool ok, const char* name, int value, const char* expected) {
    if (!ok) throw InvalidArgument(fmt::format("{} is {}, expected {}", name, value, expected));
  };
  require(o.num_parts >= 1, "num_parts", o.num_parts, ">= 1");
  require(o.block_size >= 1, "block_size", o.block_size, ">= 1");
  require(o.fixed_overhead_blocks >= 0, "fixed_overhead_blocks", o.fixed_overhead_blocks, ">= 0");
  require(o.min_blocks_per_request == 0 || o.min_blocks_per_request == 1, "min_blocks_per_request",
          o.min_blocks_per_request, "0 or 1");
  require(o.fixed_split_blocks >= 0, "fixed_split_blocks", o.fixed_split_blocks, ">= 0");
}

namespace {

std::int64_t blocks_of(std::int32_t length, const ScheduleOptions& o) {
  return std::max<std::int64_t>(ceil_div(length, o.block_size), o.min_blocks_per_request);
}

std::int64_t payload_of(std::span<const std::int32_t> lengths, const ScheduleOptions& o) {
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
  return ceil_div(total, o.num_parts) + o.fixed_overhead_blocks;
}

// One pass over the requests, filling each part up to `payload` blocks. A request that does not fit into
// what is left of a part is cut there, and the cut costs the next part the overhead again.
void plan(std::span<const std::int32_t> lengths, const ScheduleOptions& o, std::int64_t payload,
          std::span<DecodePart> parts, std::span<std::int32_t> num_splits) {
  const auto batch = static_cast<std::int32_t>(lengths.size());
  std::int32_t req = 0;     // request the next part starts with
  std::int64_t block = 0;   // ... at this block
  std::int32_t split = 0;   // ... which is this split of it
  std::int32_t splits = 0;  // splits of all requests before `req`
  num_splits[0] = 0;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    DecodePart part;
    part.begin_req = req;
    part.begin_block = static_cast<std::int32_t>(block);
    part.begin_split = split;
    // The last part takes all that rounding to fixed split points has left over.
    std::int64_t room = p + 1 == parts.size() ? std::numeric_limits<std::int64_t>::max() / 2 : payload;
    const auto has_work = [&] { return req != part.begin_req || block != part.begin_block; };
    while (req < batch) {
      const std::int64_t step = o.fixed_split_blocks;
      const std::int64_t left = blocks_of(lengths[static_cast<std::size_t>(req)], o) - block;
      // With fixed split points a part that has nothing yet takes at least one whole split.
      const bool last_step = step > 0 && left <= step && !has_work();
      if (room >= left + o.fixed_overhead_blocks || last_step) {
        room -= left + o.fixed_overhead_blocks;
        split += step > 0 ? static_cast<std::int32_t>(std::max<std::int64_t>(ceil_div(left, step), 1)) : 1;
        splits += split;
        num_splits[static_cast<std::size_t>(req) + 1] = splits;
        ++req;
        block = 0;
        split = 0;
        continue;
      }
      std::int64_t take = room - o.fixed_overhead_blocks;
      if (step > 0) {
        // To the nearest split point, short of the end of the request.
        std::int64_t steps = std::min((std::max<std::int64_t>(take, 0) + step / 2) / step,
                                      std::max<std::int64_t>(left - 1, 0) / step);
        if (steps == 0 && !has_work()) steps = 1;
        take = steps * step;
        split += static_cast<std::int32_t>(steps);
      } else if (take > 0) {
        ++split;
      }
      if (take > 0) block += take;
      break;
    }
    part.end_req = block > 0 ? req : req - 1;
    // The blocks a request has, not those it counts as: FlashMLA's rows of an empty request end at block 0.
    part.end_block = static_cast<std::int32_t>(
        block > 0 ? block
        : req > 0 ? schedule_blocks(lengths[static_cast<std::size_t>(req) - 1], o.block_size)
                  : 0);
    parts[p] = part;
  }
  // Split flags need the final split counts.
  for (DecodePart& part : parts) {
    if (part.begin_req >= batch || part.begin_req > part.end_req) {
      // Nothing to do: begin_req > end_req.
      const std::int32_t end_block = part.end_block;
      part = DecodePart{};
      part.begin_req = batch;
      part.end_req = batch - 1;
      part.end_block = end_block;
      continue;
    }
    const auto count = [&](std::int32_t r) {
      return num_splits[static_cast<std::size_t>(r) + 1] - num_splits[static_cast<std::size_t>(r)];
    };
    part.first_is_split = count(part.begin_req) > 1;
    part.last_is_split = count(part.end_req) > 1;
  }
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
  plan(cache_seqlens, options, payload_of(cache_seqlens, options), parts, num_splits);
}

DecodeSchedule DecodeSchedule::build(std::span<const std::int32_t> cache_seqlens,
                                     const ScheduleOptions& options) {
  check_schedule_options(options);
  DecodeSchedule s;
  s.options_ = options;
  s.payload_blocks_ = payload_of(cache_seqlens, options);
  s.parts_.resize(static_cast<std::size_t>(options.num_parts));
  s.num_splits_.resize(cache_seqlens.size() + 1);
  plan(cache_seqlens, options, s.payload_blocks_, s.parts_, s.num_splits_);
  return s;
}

ScheduleOptions cpu_schedule_options(int num_threads) {
  if (num_threads < 0) throw InvalidArgument(fmt::format("num_threads is {}, expected >= 0", num_threads));
  ScheduleOptions options;
  options.num_parts = num_threads > 0 ? num_threads : cpu::default_num_threads();
  options.fixed_overhead_blocks = 1;  // a request costs a CPU worker little beside its tokens
  return options;
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

std::vector<std::int32_t> DecodeSchedule::to_token_rows(std::span<const std::int32_t> cache_seqlens) const {
  if (cache_seqlens.size() + 1 != num_splits_.size()) {
    throw InvalidArgument(fmt::format("cache_seqlens has {} elements, expected the {} of the schedule",
                                      cache_seqlens.size(), num_splits_.size() - 1));
  }
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
