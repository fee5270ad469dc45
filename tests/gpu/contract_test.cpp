// What holds around a call on the GPU: graphs, streams, refusals, the C ABI.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "case.h"
#include "flash_mla/c_api.h"
#include "flash_mla/dlpack.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"

namespace flash_mla::gpu_test {
namespace {

std::vector<std::int32_t> random_lengths(std::mt19937& rng, int b, int longest) {
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(b));
  for (std::int32_t& n : lengths) n = static_cast<std::int32_t>(rng() % static_cast<unsigned>(longest + 1));
  return lengths;
}

// A decoding step of 61 layers, planned and decoded inside one graph. Every layer has its own outputs;
// replays find other lengths, which the captured plan has to follow.
void replay_with_other_lengths(int h_q, int fixed_split_blocks) {
  constexpr int kLayers = 61;
  std::mt19937 rng(4);
  Case c({.lengths = std::vector<std::int32_t>(16, 3000), .s_q = 2, .h_q = h_q, .causal = true});
  Plan plan(c.args(), 0, fixed_split_blocks);
  const std::size_t bytes = dense_decode_workspace_size(c.args(), plan.view, c.options());
  DeviceMemory workspace(bytes);
  const std::size_t out_bytes = c.out_bits().size();
  DeviceMemory outs(out_bytes * kLayers);
  workspace.poison();
  outs.poison();
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");

  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  // Global mode: anything that allocates or synchronises fails.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  plan.build(c.args(), stream);
  for (int layer = 0; layer < kLayers; ++layer) {
    DenseDecodeArgs a = c.args();
    a.out.data = outs.as<std::uint8_t>() + static_cast<std::size_t>(layer) * out_bytes;
    dense_decode(a, plan.view, workspace.as<void>(), bytes, c.options(stream));
  }
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  for (int replay = 0; replay < 6; ++replay) {
    c.set_lengths(replay == 0   ? std::vector<std::int32_t>(16, 3000)
                  : replay == 1 ? std::vector<std::int32_t>(16, 0)
                                : random_lengths(rng, 16, 3000));
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    // Not captured, with the same plan: the same bits, and those are right.
    c.run(0, fixed_split_blocks);
    ASSERT_EQ(c.difference(), "") << replay;
    const auto expected = c.out_bits();
    const auto all = outs.download<std::uint8_t>();
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      ASSERT_TRUE(std::equal(expected.begin(), expected.end(),
                             all.begin() + static_cast<std::ptrdiff_t>(layer * out_bytes)))
          << "replay " << replay << " layer " << layer;
    }
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST(Graph, SixtyOneLayersFollowRefilledLengths) {
  replay_with_other_lengths(128, 0);
  replay_with_other_lengths(16, 0);
  replay_with_other_lengths(128, 8);
}

TEST(Graph, WorkspaceIsBoundedByPartsOrByTheBlockTable) {
  const auto bytes = [](std::int32_t length, int parts, int fixed) {
    Case c({.lengths = {length, 10}, .h_q = 4});
    Plan plan(c.args(), parts, fixed);
    return dense_decode_workspace_size(c.args(), plan.view, c.options());
  };
  EXPECT_EQ(bytes(100, 8, 0), bytes(50000, 8, 0));
  EXPECT_EQ(bytes(100, 1, 0), 0u);
  // (8192 / 64 + 2) pages of one block each, in splits of 10 blocks: 13 for each of two requests, whose 4
  // rows take up to a block of 64.
  EXPECT_GE(bytes(8192, 5, 10), 2u * 13 * 4 * (512 * 4 + 4));
  EXPECT_LE(bytes(8192, 5, 10), 2u * 13 * 64 * (512 * 4 + 4) + 512);
  EXPECT_GT(bytes(8192, 5, 10), bytes(1000, 5, 10));
  EXPECT_EQ(bytes(8192, 5, 10), bytes(8192, 132, 10));
}

TEST(Refusals, NameArgumentValueAndExpectation) {
  Case c({.lengths = {100, 20}, .h_q = 8});
  Plan plan(c.args(), 4);
  DeviceMemory workspace(1 << 20);
  const auto expect_refused = [&](const DenseDecodeArgs& a, const DecodeScheduleView& s, void* memory,
                                  std::size_t bytes, const std::string& part) {
    try {
      dense_decode(a, s, memory, bytes, c.options());
      ADD_FAILURE() << "accepted, expected a message with \"" << part << "\"";
    } catch (const std::exception& e) {
      EXPECT_TRUE(dynamic_cast<const InvalidArgument*>(&e) || dynamic_cast<const Unsupported*>(&e));
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  const auto with_args = [&](auto change, const std::string& part) {
    DenseDecodeArgs a = c.args();
    change(a);
    expect_refused(a, plan.view, workspace.as<void>(), workspace.bytes(), part);
  };
  with_args([](auto& a) { a.k_cache.shape[1] = 48; }, "page_size is 48");
  with_args([](auto& a) { a.q.dtype = a.k_cache.dtype = a.out.dtype = DType::kFloat32; }, "q is float32");
  with_args([](auto& a) { a.q.shape[3] = a.k_cache.shape[3] = 512; }, "head dimensions are 512 / 512");
  with_args(
      [](auto& a) {
        a.q.strides[1] = 576 * 8 + 4;
        a.q.shape[1] = a.out.shape[1] = 2;
        a.out.strides[0] *= 2;
        a.lse = {};
      },
      "q.stride[1] is 4612");
  with_args([](auto& a) { a.k_cache.strides[0] = 0; }, "k_cache.stride[0] is 0");
  with_args([](auto& a) { a.out.data = a.out.template ptr<std::uint16_t>() + 1; }, "out.data is");
  with_args([](auto& a) { a.cache_seqlens.device = {}; }, "cache_seqlens is int32 (2,) on cpu");
  with_args([](auto& a) { a.block_table.device.index = 1; }, "block_table is");
  with_args(
      [](auto& a) {
        for (TensorView* v : {&a.q, &a.k_cache, &a.block_table, &a.cache_seqlens, &a.out, &a.lse})
          v->device.index = 63;
      },
      "schedule.parts is");
  const auto with_schedule = [&](auto change, const std::string& part) {
    DecodeScheduleView s = plan.view;
    change(s);
    expect_refused(c.args(), s, workspace.as<void>(), workspace.bytes(), part);
  };
  with_schedule([](auto& s) { s.block_size = 32; }, "schedule.block_size is 32");
  with_schedule([](auto& s) { s.parts.strides[0] = 16; }, "schedule.parts.stride[0] is 16");
  with_schedule([](auto& s) { s.parts.data = s.parts.template ptr<std::int32_t>() + 1; },
                "schedule.parts.data is");
  with_schedule([](auto& s) { s.num_splits.shape[0] = 2; }, "schedule.num_splits.shape[0] is 2");
  DenseDecodeArgs wide = c.args();
  wide.block_table.shape[1] = wide.block_table.strides[0] = 1 << 21;
  DecodeScheduleView every_block = plan.view;
  every_block.fixed_split_blocks = 1;
  expect_refused(wide, every_block, workspace.as<void>(), workspace.bytes(),
                 "schedule.fixed_split_blocks = 1");
  expect_refused(c.args(), plan.view, workspace.as<void>(), 10, "workspace_bytes is 10");
  expect_refused(c.args(), plan.view, nullptr, workspace.bytes(), "workspace is null");
  EXPECT_THROW(cuda_schedule_options(63, 1, 1, 1), InvalidArgument);
  EXPECT_THROW(cuda_schedule_options(0, 1, 5, 2), InvalidArgument);
  // Nothing was launched, let alone broken.
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const auto out = c.out_bits();
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](std::uint8_t x) { return x == 0xFF; }));
}

TEST(Info, ListsTheGpu) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  int listed = 0;
  for (const BackendInfo& b : backends()) {
    if (b.backend != Backend::kSm90) continue;
    ++listed;
    EXPECT_TRUE(b.available);
    EXPECT_NE(b.detail.find("compute capability 9.0"), std::string::npos) << b.detail;
  }
  EXPECT_EQ(listed, count);
}

TEST(CApi, PlansAndDecodesOnAStream) {
  Case c({.lengths = {700, 0, 64}, .s_q = 2, .h_q = 16, .causal = true});
  std::int32_t num_parts = 0;
  ASSERT_EQ(flash_mla_num_parts({kDLCUDA, 0}, 2, 16, 1, &num_parts), FLASH_MLA_OK) << flash_mla_last_error();
  Plan plan(c.args(), num_parts);
  DenseDecodeArgs a = c.args();
  DLTensor t[8];
  int i = 0;
  for (TensorView* v : {&a.q, &a.k_cache, &a.block_table, &a.cache_seqlens, &a.out, &a.lse, &plan.view.parts,
                        &plan.view.num_splits}) {
    t[i++] = to_dlpack(*v);
  }
  cudaStream_t stream = nullptr;
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  flash_mla_schedule_options schedule;
  flash_mla_schedule_options_init(&schedule);
  schedule.stream = stream;
  ASSERT_EQ(flash_mla_build_decode_schedule(&t[3], &schedule, &t[6], &t[7]), FLASH_MLA_OK)
      << flash_mla_last_error();
  flash_mla_dense_decode_options options;
  flash_mla_dense_decode_options_init(&options);
  options.softmax_scale = c.shape().scale;
  options.causal = 1;
  options.stream = stream;
  const flash_mla_dense_decode_args args{&t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7]};
  std::size_t bytes = 0;
  ASSERT_EQ(flash_mla_dense_decode_workspace_size(&args, &options, &bytes), FLASH_MLA_OK);
  DeviceMemory workspace(bytes);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  ASSERT_EQ(flash_mla_dense_decode(&args, &options, workspace.as<void>(), bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  EXPECT_EQ(c.difference(), "");
  t[0].device.device_id = 40;
  EXPECT_EQ(flash_mla_dense_decode(&args, &options, workspace.as<void>(), bytes), FLASH_MLA_INVALID_ARGUMENT);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace flash_mla::gpu_test
