#pragma once

// Random decode problems in the GPU's memory.

#include "bench/gpu/resources.h"
#include "bench/preset.h"
#include "flash_mla/decode.h"

namespace flash_mla::bench::gpu {

/// Lengths as draw_lengths says, then scaled so that their mean is s_k to the token: the time then compares
/// with that of equal lengths.
std::vector<std::int32_t> lengths_of(const Shape& shape, std::uint64_t seed);

/// Allocates and fills a problem. q and cache are clamp(N(0, 1) / 2, -1, 1), so that the softmax is far
/// from uniform and a wrong weight shows, and few elements are the clamp's, whose bits would save power.
/// Whatever the library must not look at is poison, as in bench::Problem; so are outputs and workspace. Pages
/// are dealt out in random order. Returns with everything in place.
class Problem {
 public:
  Problem(const Shape& shape, std::vector<std::int32_t> lengths, std::uint64_t seed, const Stream& stream);

  const Shape& shape() const { return shape_; }
  const std::vector<std::int32_t>& lengths() const { return lengths_; }
  std::int32_t longest() const;
  const DenseDecodeArgs& args() const { return args_; }
  const ScheduleOptions& schedule_options() const { return schedule_options_; }
  std::size_t workspace_bytes() const { return workspace_.bytes(); }

  void build_schedule(const Stream& stream) const {
    build_decode_schedule(args_.cache_seqlens, schedule_options_, schedule_, stream.get());
  }
  void decode(const Stream& stream) const;
  /// Makes the requests empty, on the device alone: a call then costs the host what it always does, and the
  /// GPU next to nothing.
  void empty_requests(const Stream& stream);

  static constexpr float kSoftmaxScale = 0.1352338f;

 private:
  void fill_block_table(std::uint64_t seed);

  Shape shape_;
  std::vector<std::int32_t> lengths_;
  std::int64_t max_blocks_ = 0, num_blocks_ = 0;
  DeviceArray<std::byte> q_, k_cache_, out_, workspace_;
  DeviceArray<float> lse_;
  DeviceArray<std::int32_t> block_table_, cache_seqlens_, parts_, num_splits_;
  DenseDecodeArgs args_;
  ScheduleOptions schedule_options_;
  DecodeScheduleView schedule_;
};

}  // namespace flash_mla::bench::gpu
