// What a dense decode refuses: by name, value and what was expected (contract 10).

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "flash_mla/error.h"
#include "problem.h"

namespace flash_mla::conformance {
namespace {

// Each wrong argument in turn: refused by name, and nothing written.
class BadInput : public ::testing::Test {
 protected:
  Problem p{{.lengths = {100, 20}, .s_q = 2, .h_q = 6, .h_kv = 2}};
  std::vector<std::uint8_t> out;
  std::vector<float> lse;
  DenseDecodeArgs a = p.host_args(out, lse);
  DecodeSchedule schedule = DecodeSchedule::build(p.shape().lengths, cpu_schedule_options(2));
  DecodeScheduleView view = schedule.view();
  DenseDecodeOptions options;
  std::vector<std::uint8_t> memory = std::vector<std::uint8_t>(dense_decode_workspace_size(a, view) + 64);
  void* workspace = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
  std::size_t bytes = memory.size() - 64;

  void expect_refused(const std::string& part) {
    try {
      dense_decode(a, view, workspace, bytes, options);
      ADD_FAILURE() << "accepted, expected a message with \"" << part << "\"";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
    EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](std::uint8_t x) { return x == 0xFF; }));
    EXPECT_TRUE(std::all_of(lse.begin(), lse.end(), [](float x) { return std::isnan(x); }));
    a = p.host_args(out, lse);
    view = schedule.view();
    options = {};
  }
};

TEST_F(BadInput, IsNamedAndNothingIsWritten) {
  a.q.dtype = DType::kInt32;
  expect_refused("q is int32");
  a.q.rank = 3;
  expect_refused("q is");
  a.q.data = nullptr;
  expect_refused("q is");
  a.q.strides[3] = 2;
  expect_refused("q.stride[3] is 2");
  a.q.strides[1] = -576;
  expect_refused("q.stride[1] is -576");
  a.q.shape[1] = 65;
  expect_refused("q.shape[1] (s_q) is 65");
  a.q.shape[1] = 0;
  expect_refused("q.shape[1] (s_q) is 0");
  a.q.shape[2] = 5;
  expect_refused("q.shape[2] (h_q) is 5");
  a.k_cache.dtype = DType::kFloat16;
  expect_refused("k_cache is float16");
  a.k_cache.shape[3] = 512;
  expect_refused("k_cache.shape[3] is 512");
  a.k_cache.shape[1] = 257;
  expect_refused("k_cache.shape[1] (page_size) is 257");
  a.k_cache.shape[2] = 0;
  expect_refused("k_cache.shape[2] (h_kv) is 0");
  a.block_table.dtype = DType::kInt64;
  expect_refused("block_table is int64");
  a.block_table.shape[0] = 1;
  expect_refused("block_table.shape[0] is 1");
  a.block_table.strides[1] = 2;
  expect_refused("block_table.stride[1] is 2");
  a.cache_seqlens.shape[0] = 3;
  expect_refused("cache_seqlens.shape[0] is 3");
  const auto apart = [&] {
    a.q.shape[3] = 512;
    a.q_rope = a.q;
    a.q_rope.shape[3] = 64;
  };
  apart();
  a.q_rope.dtype = DType::kFloat16;
  expect_refused("q_rope is float16");
  apart();
  a.q.shape[3] = 500;
  expect_refused("k_cache.shape[3] is 576, expected q.shape[3] (d_qk)");
  apart();
  a.q.shape[3] = 448;
  a.q_rope.shape[3] = 128;
  expect_refused("q.shape[3] is 448");
  apart();
  a.q_rope.shape[1] = 1;
  expect_refused("q_rope.shape[1] is 1");
  apart();
  a.q_rope.strides[3] = 2;
  expect_refused("q_rope.stride[3] is 2");
  apart();
  a.q_rope.device = {DeviceType::kCuda, 0};
  expect_refused("q_rope is bfloat16");
  a.out.dtype = DType::kFloat32;
  expect_refused("out is float32");
  a.out.shape[3] = 400;
  expect_refused("q.shape[3] (d_qk) is 576");
  a.out.strides[2] = 0;
  expect_refused("out.stride[2] is 0");
  a.out.shape[0] = 1;
  expect_refused("out.shape[0] is 1");
  a.lse.dtype = DType::kBFloat16;
  expect_refused("lse is bfloat16");
  a.lse.shape[1] = 2;
  expect_refused("lse.shape[1] is 2");
  a.lse.strides[0] = 0;
  expect_refused("lse.stride[0] is 0");
  a.k_cache.device = {DeviceType::kCuda, 0};
  expect_refused("k_cache is bfloat16");
  options.softmax_scale = std::numeric_limits<float>::quiet_NaN();
  expect_refused("softmax_scale is nan");
  options.num_threads = -1;
  expect_refused("num_threads is -1");
  options.backend = Backend::kSm90;
  expect_refused("q is");
  view.parts.shape[1] = 7;
  expect_refused("schedule.parts.shape[1] is 7");
  view.num_splits.shape[0] = 2;
  expect_refused("schedule.num_splits.shape[0] is 2");
  view.block_size = 0;
  expect_refused("schedule.block_size is 0");
  view.block_size = 32;
  expect_refused("other lengths");
}

// Products that pass 2^63: refused, where UBSan would otherwise see them or a small workspace be allowed.
TEST_F(BadInput, ExtentsNearTwoToThe63) {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t huge : {kHuge, kHuge / 2, kHuge / 576, std::int64_t{1} << 55}) {
    a.q.shape[0] = huge;
    expect_refused("q.shape[");
  }
  for (const std::int64_t huge : {kHuge, kHuge / 2}) {
    a.q.strides[0] = huge;
    expect_refused("q.shape[0] is 2 with stride");
  }
  a.k_cache.shape[0] = kHuge;
  expect_refused("k_cache.shape[");
  a.k_cache.strides[0] = kHuge;
  expect_refused("k_cache.shape[0] is");
  a.out.strides[0] = kHuge / 2;
  expect_refused("out.shape[0] is 2 with stride");
  a.lse.strides[0] = kHuge / 4;
  expect_refused("lse.shape[0] is 2 with stride");
  a.q.shape[2] = a.out.shape[2] = a.lse.shape[1] = std::int64_t{1} << 33;
  a.q.strides = {0, 0, 0, 1};
  expect_refused("(h_q) is 8589934592");
  view.parts.shape[0] = std::int64_t{1} << 57;
  view.parts.strides[0] = 0;
  expect_refused("schedule.parts.shape[0] is 144115188075855872");
  view.parts.data = reinterpret_cast<void*>(std::numeric_limits<std::uintptr_t>::max() - 31);
  expect_refused("schedule.parts.shape[");
}

TEST_F(BadInput, ABlockTableOfAnyWidthIsFine) {
  // max_blocks * page_size passes 2^63; the columns past the lengths are never read.
  a.block_table.shape[1] = std::int64_t{1} << 59;
  EXPECT_NO_THROW(dense_decode(a, view, workspace, bytes, options));
  EXPECT_NE(out[0] & out[1], 0xFF);
}

TEST_F(BadInput, AWorkspacePastTheAddressSpace) {
  // Shapes alone: nothing of these tensors is read. 2^26 rows of 1025 floats for each of 2^31 splits.
  constexpr std::int64_t kHeads = 1 << 20;
  a.q.shape = {1, 64, kHeads, 1024};
  a.q.strides = {0, 0, 0, 1};
  a.k_cache.shape = {1, 64, 1, 1024};
  a.k_cache.strides = {0, 0, 0, 1};
  a.block_table.shape[0] = a.cache_seqlens.shape[0] = 1;
  a.out = TensorView::contiguous(out.data(), DType::kBFloat16, {1, 64, kHeads, 1024});
  a.lse = {};
  std::vector<std::int32_t> splits{0, std::numeric_limits<std::int32_t>::max()};
  view.num_splits = TensorView::contiguous(splits.data(), DType::kInt32, {2});
  view.fixed_split_blocks = 1;
  EXPECT_THROW(dense_decode_workspace_size(a, view), InvalidArgument);
  splits[1] = 1;
  EXPECT_GT(dense_decode_workspace_size(a, view), 0u);
}

TEST_F(BadInput, ValuesAreCheckedToo) {
  std::vector<std::int32_t> lengths = p.shape().lengths, table = p.table;
  const auto with_values = [&] {
    a.cache_seqlens.data = lengths.data();
    a.block_table.data = table.data();
  };
  lengths[1] = -1;
  with_values();
  expect_refused("cache_seqlens[1] is -1");
  lengths[1] = 64 * static_cast<std::int32_t>(p.max_blocks) + 1;
  with_values();
  expect_refused("cache_seqlens[1] is");
  lengths = p.shape().lengths;
  table[1] = static_cast<std::int32_t>(p.num_pages);
  with_values();
  expect_refused("block_table[0][1] is");
  table[1] = -1;
  with_values();
  expect_refused("block_table[0][1] is -1");
}

TEST_F(BadInput, ScheduleOfOtherLengthsAndSmallWorkspace) {
  const auto other = DecodeSchedule::build(std::vector<std::int32_t>{20, 100}, cpu_schedule_options(2));
  view = other.view();
  expect_refused("schedule");
  --bytes;
  expect_refused("workspace_bytes is");
  ++bytes;
  workspace = static_cast<std::uint8_t*>(workspace) + 1;
  expect_refused("workspace is");
  workspace = nullptr;
  expect_refused("workspace is null");
}

}  // namespace
}  // namespace flash_mla::conformance
