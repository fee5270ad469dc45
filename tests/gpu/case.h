#pragma once

// One decode problem in device memory, and what it takes to run and verify it.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "flash_mla/decode.h"
#include "flash_mla/schedule.h"

namespace flash_mla::gpu_test {

struct CaseShape {
  std::vector<std::int32_t> lengths;
  int s_q = 1, h_q = 16, h_kv = 1, page_size = 64;
  DType dtype = DType::kBFloat16;
  bool causal = false;
  float scale = 0.1352338f;
  std::int64_t min_pages = 0;  ///< the pool has at least as many, and requests lie at both of its ends
  unsigned seed = 1;

  std::string text() const;
};

/// Schedule and workspace of a call.
struct Plan {
  ScheduleOptions options;
  DeviceMemory parts, num_splits;
  DecodeScheduleView view;

  /// num_parts 0: as many as suit the GPU.
  Plan(const DenseDecodeArgs& args, int num_parts, int fixed_split_blocks = 0,
       PartUnit unit = PartUnit::kBlocks);
  void build(const DenseDecodeArgs& args, void* stream = nullptr) {
    build_decode_schedule(args.cache_seqlens, options, view, stream);
  }
};

/// Random inputs as the conformance suite has them: permuted pages, NaN in every slot without a token, -1 and
/// 2147480000 in unused table entries, NaN in the outputs.
class Case {
 public:
  explicit Case(CaseShape shape);

  const CaseShape& shape() const { return shape_; }
  const DenseDecodeArgs& args() const { return args_; }
  DenseDecodeOptions options(void* stream = nullptr) const;

  /// NaN into out and lse.
  void poison();
  /// Plans on the device and decodes into poisoned outputs with a poisoned workspace.
  void run(int num_parts = 0, int fixed_split_blocks = 0, PartUnit unit = PartUnit::kBlocks);
  /// "" if the outputs agree with the reference, for the lengths now in device memory.
  std::string difference() const;
  /// Other lengths, each at most what the case began with.
  void set_lengths(std::vector<std::int32_t> lengths);
  /// This case's requests `which`, over the same pool.
  Case selected(const std::vector<std::size_t>& which) const;

  std::vector<std::uint8_t> out_bits() const { return out_->download<std::uint8_t>(); }
  std::vector<std::uint32_t> lse_bits() const { return lse_->download<std::uint32_t>(); }
  std::vector<std::uint16_t> q_bits() const { return q_->download<std::uint16_t>(); }
  std::vector<std::uint16_t> pool_bits() const { return pool_->download<std::uint16_t>(); }
  const std::vector<std::int32_t>& table() const { return host_table_; }

 private:
  Case() = default;
  void allocate();

  CaseShape shape_;
  std::int64_t max_pages_ = 0;
  int max_length_ = 0;
  std::vector<std::int32_t> host_table_;
  std::shared_ptr<DeviceMemory> q_, pool_, table_, lengths_, out_, lse_;
  DenseDecodeArgs args_;
};

inline constexpr Device kGpu{DeviceType::kCuda, 0};

}  // namespace flash_mla::gpu_test
