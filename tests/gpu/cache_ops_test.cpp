// append_kv, gather_kv and merge_states on the GPU: graphs, streams, pools beyond 32 bits. Their numbers are the
// conformance suite's.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "base/element.h"
#include "device.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/merge.h"

namespace flash_mla::gpu_test {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};
constexpr int kTokens = 130, kSlots = 256;

std::vector<std::uint16_t> random_bf16(std::mt19937& rng, std::size_t n) {
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> x(n);
  for (std::uint16_t& v : x) v = to_bf16(normal(rng)).bits;
  return x;
}

/// Tokens of V3.2 on host and GPU, appended there and here with norm and RoPE.
struct Append {
  Append()
      : latent(kTokens * 512u * 2),
        rope(kTokens * 64u * 2),
        slots(kTokens * 4u),
        positions(kTokens * 4u),
        weight(512 * 4),
        cos_sin(kSlots * 64u * 4),
        cache(kSlots * 656u) {
    std::normal_distribution<float> normal;
    host_weight.resize(512);
    host_cos_sin.resize(kSlots * 64u);
    for (float& x : host_weight) x = 1 + normal(rng) / 4;
    for (float& x : host_cos_sin) x = normal(rng);
    weight.upload(host_weight.data(), weight.bytes());
    cos_sin.upload(host_cos_sin.data(), cos_sin.bytes());
    refill();
  }
  /// New tokens, slots and positions, in the same memory.
  void refill() {
    host_latent = random_bf16(rng, kTokens * 512u);
    host_rope = random_bf16(rng, kTokens * 64u);
    host_slots.resize(kTokens);
    host_positions.resize(kTokens);
    std::vector<std::int32_t> order(kSlots);
    for (int i = 0; i < kSlots; ++i) order[static_cast<std::size_t>(i)] = i;
    std::shuffle(order.begin(), order.end(), rng);
    for (std::size_t i = 0; i < kTokens; ++i) {
      host_slots[i] = rng() % 5 == 0 ? -1 : order[i];
      host_positions[i] = host_slots[i] < 0 ? 2147480000 : static_cast<std::int32_t>(rng() % kSlots);
    }
    host_cache.assign(kSlots * 656u, 0xFF);
    latent.upload(host_latent.data(), latent.bytes());
    rope.upload(host_rope.data(), rope.bytes());
    slots.upload(host_slots.data(), slots.bytes());
    positions.upload(host_positions.data(), positions.bytes());
    cache.poison();
    append_kv(args(/*on_gpu=*/false));
  }
  KvAppendArgs args(bool on_gpu) {
    const auto view = [&](auto& host, DeviceMemory& gpu, DType dtype,
                          std::initializer_list<std::int64_t> shape) {
      return TensorView::contiguous(on_gpu ? gpu.as<void>() : host.data(), dtype, shape,
                                    on_gpu ? kGpu : Device{});
    };
    KvAppendArgs a;
    a.latent = view(host_latent, latent, DType::kBFloat16, {kTokens, 512});
    a.rope = view(host_rope, rope, DType::kBFloat16, {kTokens, 64});
    a.slot_mapping = view(host_slots, slots, DType::kInt32, {kTokens});
    a.positions = view(host_positions, positions, DType::kInt32, {kTokens});
    a.norm_weight = view(host_weight, weight, DType::kFloat32, {512});
    a.cos_sin = view(host_cos_sin, cos_sin, DType::kFloat32, {kSlots, 64});
    a.cache.format = KvFormat::kFp8V32;
    a.cache.data = view(host_cache, cache, DType::kUInt8, {kSlots / 64, 64, 1, 656});
    return a;
  }

  std::mt19937 rng{17};
  std::vector<std::uint16_t> host_latent, host_rope;
  std::vector<std::int32_t> host_slots, host_positions;
  std::vector<float> host_weight, host_cos_sin;
  std::vector<std::uint8_t> host_cache;
  DeviceMemory latent, rope, slots, positions, weight, cos_sin, cache;
};

TEST(CacheOperations, AGraphFollowsItsRefilledTensors) {
  Append p;
  DeviceMemory rows(kTokens * 576u * 2), out(kTokens * 576u * 2), lse(kTokens * 4u);
  std::vector<float> zeros(kTokens, 0.0f);
  lse.upload(zeros.data(), lse.bytes());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  KvGatherArgs g;
  g.cache = p.args(true).cache;
  g.slots = p.args(true).slot_mapping;
  g.out = TensorView::contiguous(rows.as<void>(), DType::kBFloat16, {kTokens, 576}, kGpu);
  const auto state = [&](void* data) {
    return TensorView::contiguous(data, DType::kBFloat16, {kTokens, 1, 1, 576}, kGpu);
  };
  const TensorView lse_view = TensorView::contiguous(lse.as<void>(), DType::kFloat32, {kTokens, 1, 1}, kGpu);
  DeviceMemory merged_lse(kTokens * 4u);
  TensorView merged = lse_view;
  merged.data = merged_lse.as<void>();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  // Global mode: anything that allocates or synchronises fails.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  append_kv(p.args(true), {.stream = stream});
  gather_kv(g, {.stream = stream});
  merge_states(state(rows.as<void>()), lse_view, state(rows.as<void>()), lse_view, state(out.as<void>()),
               merged, LseBase::kTwo, stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  for (int replay = 0; replay < 5; ++replay) {
    if (replay > 0) p.refill();
    rows.poison();
    out.poison();
    merged_lse.poison();
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    ASSERT_TRUE(p.cache.download<std::uint8_t>() == p.host_cache) << replay;
    std::vector<std::uint16_t> expected(kTokens * 576u);
    KvGatherArgs host;
    host.cache = p.args(false).cache;
    host.slots = p.args(false).slot_mapping;
    host.out = TensorView::contiguous(expected.data(), DType::kBFloat16, {kTokens, 576});
    gather_kv(host);
    ASSERT_TRUE(rows.download<std::uint16_t>() == expected) << replay;
    // A state merged with itself.
    ASSERT_TRUE(out.download<std::uint16_t>() == expected) << replay;
    for (const float x : merged_lse.download<float>()) ASSERT_EQ(x, 1.0f);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// Pages so far apart that byte offsets pass 2^32, and a tensor of states that does.
TEST(CacheOperations, AddressesBeyond32Bits) {
  Append p;
  constexpr std::int64_t kStride = (std::int64_t{3} << 30) + 16;  // two of them are past 2^32
  DeviceMemory pool(3 * static_cast<std::size_t>(kStride) + 64 * 656);
  KvAppendArgs a = p.args(true);
  a.cache.data.data = pool.as<void>();
  a.cache.data.strides[0] = kStride;
  append_kv(a);
  DeviceMemory rows(kTokens * 576u * 2);
  rows.poison();
  KvGatherArgs g{a.cache, a.slot_mapping,
                 TensorView::contiguous(rows.as<void>(), DType::kBFloat16, {kTokens, 576}, kGpu)};
  gather_kv(g);
  check(cudaDeviceSynchronize(), "gather_kv");
  std::vector<std::uint16_t> expected(kTokens * 576u);
  KvGatherArgs host;
  host.cache = p.args(false).cache;
  host.slots = p.args(false).slot_mapping;
  host.out = TensorView::contiguous(expected.data(), DType::kBFloat16, {kTokens, 576});
  gather_kv(host);
  EXPECT_TRUE(rows.download<std::uint16_t>() == expected);

  TensorView far = TensorView::contiguous(pool.as<void>(), DType::kBFloat16, {3, 1, 2, 576}, kGpu);
  far.strides[0] = kStride / 2;
  DeviceMemory lse(6 * 4), out(6 * 576 * 2);
  const std::vector<float> zeros(6, 0.0f);
  lse.upload(zeros.data(), lse.bytes());
  const std::vector<std::uint16_t> row = random_bf16(p.rng, 2 * 576);
  for (int i = 0; i < 3; ++i) {
    check(
        cudaMemcpy(pool.as<std::uint8_t>() + i * kStride, row.data(), row.size() * 2, cudaMemcpyHostToDevice),
        "cudaMemcpy");
  }
  out.poison();
  const TensorView lses = TensorView::contiguous(lse.as<void>(), DType::kFloat32, {3, 2, 1}, kGpu);
  merge_states(far, lses, far, lses,
               TensorView::contiguous(out.as<void>(), DType::kBFloat16, {3, 1, 2, 576}, kGpu), lses);
  check(cudaDeviceSynchronize(), "merge_states");
  const std::vector<std::uint16_t> merged = out.download<std::uint16_t>();
  for (std::size_t i = 0; i < merged.size(); ++i) ASSERT_EQ(merged[i], row[i % row.size()]) << i;
}

// On a GPU the slots and positions are the caller's; an empty call is none.
TEST(CacheOperations, OfNothingIsNothing) {
  Append p;
  KvAppendArgs a = p.args(true);
  for (TensorView* t : {&a.latent, &a.rope, &a.slot_mapping, &a.positions}) t->shape[0] = 0;
  append_kv(a);
  KvGatherArgs g{a.cache, a.slot_mapping, TensorView::contiguous(nullptr, DType::kBFloat16, {0, 576}, kGpu)};
  gather_kv(g);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  for (const std::uint8_t byte : p.cache.download<std::uint8_t>()) ASSERT_EQ(byte, 0xFF);
}

}  // namespace
}  // namespace flash_mla::gpu_test
