// Host side of the Hopper backend: what it accepts, tensor maps, how the work is shaped.

#include "kernels/attention/dense_decode/sm90/dense_decode.h"

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numbers>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/call.h"
#include "kernels/attention/dense_decode/sm90/launch.h"
#include "kernels/ptx/tensor_map.h"
#include "schedule/device_schedule.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::size_t kAlignment = 256;

/// What the CUDA runtime sees, asked for once. A machine without a GPU or a driver is no error: it has none.
struct Gpus {
  std::vector<Gpu> all;
  std::string why_none;

  Gpus() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
      cudaGetLastError();  // not to be found by the next caller
      why_none = fmt::format("no CUDA device: {}", cudaGetErrorString(error));
      return;
    }
    if (count == 0) why_none = "no CUDA device";
    for (int i = 0; i < std::min(count, kMaxDevices); ++i) {
      cudaDeviceProp prop{};
      check(cudaGetDeviceProperties(&prop, i), "cudaGetDeviceProperties");
      all.push_back({prop.name, prop.major, prop.minor, prop.multiProcessorCount, prop.totalGlobalMem});
    }
  }
};

const Gpus& known_gpus() {
  static const Gpus kGpus;
  return kGpus;
}

const Gpu& gpu(int index) {
  const Gpus& known = known_gpus();
  if (known.all.empty()) {
    throw Unsupported(
        fmt::format("cuda:{} cannot be used, this machine has {}: pass CPU tensors", index, known.why_none));
  }
  if (index < 0 || index >= static_cast<int>(known.all.size())) {
    throw InvalidArgument(
        fmt::format("CUDA device index is {}, expected 0 to {}", index, known.all.size() - 1));
  }
  return known.all[static_cast<std::size_t>(index)];
}

/// (columns of a chunk, tokens, chunks, latent heads, pages)
CUtensorMap key_map(const TensorView& k, int box_tokens, int box_chunks) {
  return tensor_map<5>("k_cache", k,
                       {{{64, 0, 64},
                         {k.size(1), k.stride(1) * 2, box_tokens},
                         {kHeadDim / 64, 128, box_chunks},
                         {k.size(2), k.stride(2) * 2, 1},
                         {k.size(0), k.stride(0) * 2, 1}}});
}

/// (columns of a chunk, heads, tokens, chunks, requests)
CUtensorMap query_map(const char* name, const TensorView& q, const RowBlocks& blocks, int box_chunks) {
  return tensor_map<5>(name, q,
                       {{{64, 0, 64},
                         {q.size(2), q.stride(2) * 2, blocks.heads},
                         {q.size(1), q.stride(1) * 2, blocks.tokens},
                         {q.size(3) / 64, 128, box_chunks},
                         {q.size(0), q.stride(0) * 2, 1}}});
}

RowBlocks blocks_of(const DenseDecodeArgs& a) {
  return row_blocks(static_cast<int>(a.q.size(1)), static_cast<int>(a.q.size(2) / a.k_cache.size(2)));
}

std::size_t align_up(std::size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

PartialLayout partial_layout(const DenseDecodeArgs& a, const DecodeScheduleView& s) {
  std::int64_t slots = 2 * s.parts.size(0);
  if (s.fixed_split_blocks > 0) {
    const std::int64_t split_tokens = std::int64_t{s.fixed_split_blocks} * s.block_size;
    const std::int64_t tokens = a.block_table.size(1) * a.k_cache.size(1);
    slots = a.q.size(0) * std::max<std::int64_t>((tokens + split_tokens - 1) / split_tokens, 1);
  }
  const RowBlocks blocks = blocks_of(a);
  const auto slot_blocks = static_cast<std::size_t>(slots * blocks.count() * a.k_cache.size(2));
  return {
      align_up(slot_blocks * static_cast<std::size_t>(row_groups(blocks)) * 16 * kHeadDimV * sizeof(float)),
      align_up(slot_blocks * static_cast<std::size_t>(row_groups(blocks)) * 16 * 2 * sizeof(float))};
}

std::vector<Gpu> gpus() { return known_gpus().all; }

std::string why_no_gpus() { return known_gpus().why_none; }

std::string reject_reason(const Gpu& g) {
  if (g.major == 9 && g.minor == 0) return "";
  return fmt::format(
      "the sm90 kernels (dense_decode, decode schedule) need compute capability 9.0 (H100, H200, H800, H20); "
      "{} has {}.{}: pass CPU tensors",
      g.name, g.major, g.minor);
}

void require_device(int index) {
  const std::string reason = reject_reason(gpu(index));
  if (!reason.empty()) throw Unsupported(reason);
}

ScheduleOptions schedule_options(int device, int s_q, int h_q, int h_kv, int batch) {
  return schedule_options(batch, gpu(device).sms, row_blocks(s_q, h_q / h_kv), h_kv);
}

void check_schedule_layout(const DecodeScheduleView& s) {
  if (s.parts.size(0) > 1 && s.parts.stride(0) != 8) {
    throw InvalidArgument(
        fmt::format("schedule.parts.stride[0] is {}, expected 8 (contiguous)", s.parts.stride(0)));
  }
  if (reinterpret_cast<std::uintptr_t>(s.parts.data) % 16 != 0) {
    throw InvalidArgument(
        fmt::format("schedule.parts.data is {}, expected a pointer aligned to 16 bytes", s.parts.data));
  }
}

void check_supported(const DenseDecodeArgs& a, const DecodeScheduleView& s) {
  require_device(a.q.device.index);
  if (a.q.dtype == DType::kFloat32)
    throw Unsupported("q is float32; the sm90 backend takes bfloat16 and float16");
  if (a.d_qk() != kHeadDim || a.out.size(3) != kHeadDimV) {
    throw Unsupported(fmt::format("head dimensions are {} / {}; the sm90 backend takes 576 / 512", a.d_qk(),
                                  a.out.size(3)));
  }
  const std::int64_t page = a.k_cache.size(1);
  if (page != 16 && page != 32 && page % kTileTokens != 0) {
    throw Unsupported(
        fmt::format("page_size is {}; the sm90 backend takes 16, 32 and multiples of 64", page));
  }
  check_work(a, s);
  require_stride(a.k_cache, "k_cache");
}

void check_work(const DenseDecodeArgs& a, const DecodeScheduleView& s) {
  if (a.q.size(0) > 65535)
    throw Unsupported(fmt::format("b is {}; the sm90 backend takes up to 65535", a.q.size(0)));
  if (s.block_size != kTileTokens) {
    throw Unsupported(
        fmt::format("schedule.block_size is {}; the sm90 backend takes {}", s.block_size, kTileTokens));
  }
  if (s.parts.size(0) > 65535) {
    throw Unsupported(
        fmt::format("schedule.parts.shape[0] is {}; the sm90 backend takes up to 65535", s.parts.size(0)));
  }
  const RowBlocks blocks = blocks_of(a);
  if (!blocks.divides_exactly() || combine_row_groups(blocks, a.k_cache.size(2)) > 65535) {
    throw Unsupported(fmt::format(
        "q.shape is ({}, {}, {}, {}) over {} latent heads; the sm90 backend takes fewer query rows per "
        "request (s_q times heads, in blocks of {})",
        a.q.size(0), a.q.size(1), a.q.size(2), a.d_qk(), a.k_cache.size(2), kTileRows));
  }
  const std::size_t partial = partial_layout(a, s).out_bytes;
  if (partial > static_cast<std::size_t>(kMaxPartialBytes)) {
    throw Unsupported(fmt::format(
        "the partial results of schedule.fixed_split_blocks = {}, schedule.parts.shape[0] = {} and "
        "block_table.shape = ({}, {}) take {} bytes; the sm90 backend takes up to {}: choose longer splits",
        s.fixed_split_blocks, s.parts.size(0), a.block_table.size(0), a.block_table.size(1), partial,
        kMaxPartialBytes));
  }
  check_schedule_layout(s);
  require_stride(a.q, "q");
  if (a.q_rope.defined()) require_stride(a.q_rope, "q_rope");
  require_stride(a.out, "out");
}

std::size_t dense_decode_workspace_size(const DenseDecodeArgs& a, const DecodeScheduleView& s) {
  if (s.parts.size(0) == 1 && s.fixed_split_blocks == 0) return 0;
  const PartialLayout layout = partial_layout(a, s);
  return layout.out_bytes + layout.stats_bytes;
}

DecodeParams decode_params(const DenseDecodeArgs& a, const DecodeScheduleView& s, void* workspace,
                           float softmax_scale, bool causal) {
  DecodeParams p{};
  p.blocks = blocks_of(a);
  p.groups_inverse = 1.0f / static_cast<float>(row_groups(p.blocks));
  p.count_inverse = 1.0f / static_cast<float>(p.blocks.count());
  p.batch = static_cast<int>(a.q.size(0));
  p.s_q = static_cast<int>(a.q.size(1));
  p.h_q = static_cast<int>(a.q.size(2));
  p.group = p.h_q / static_cast<int>(a.k_cache.size(2));
  p.page_size = static_cast<int>(a.k_cache.size(1));
  p.num_parts = static_cast<int>(s.parts.size(0));
  p.split_tiles = s.fixed_split_blocks;
  p.token_rows = s.unit == PartUnit::kTokens;
  p.causal = causal;
  p.scale_log2 = softmax_scale * std::numbers::log2e_v<float>;
  p.block_table = a.block_table.ptr<const std::int32_t>();
  p.block_table_stride = a.block_table.stride(0);
  p.table_width = static_cast<int>(a.block_table.size(1));
  p.cache_seqlens = a.cache_seqlens.ptr<const std::int32_t>();
  p.parts = s.parts.ptr<const std::int32_t>();
  p.num_splits = s.num_splits.ptr<const std::int32_t>();
  p.out = a.out.data;
  p.out_stride_b = a.out.stride(0);
  p.out_stride_s = a.out.stride(1);
  p.out_stride_h = a.out.stride(2);
  if (a.lse.defined()) {
    p.lse = a.lse.ptr<float>();
    p.lse_stride_b = a.lse.stride(0);
    p.lse_stride_h = a.lse.stride(1);
    p.lse_stride_s = a.lse.stride(2);
  }
  p.partial_out = static_cast<float*>(workspace);
  p.partial_stats =
      reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + partial_layout(a, s).out_bytes);
  return p;
}

DecodePlan plan_of(const DenseDecodeArgs& a, const DecodeParams& p) {
  return plan_decode(p.batch, gpu(a.q.device.index).sms, p.blocks, static_cast<int>(a.k_cache.size(2)),
                     p.num_parts, p.split_tiles > 0);
}

void dense_decode(const DenseDecodeArgs& a, const DecodeScheduleView& s, void* workspace, float softmax_scale,
                  bool causal, void* stream) {
  const DeviceGuard guard(a.q.device.index);
  DecodeParams p = decode_params(a, s, workspace, softmax_scale, causal);
  const int h_kv = static_cast<int>(a.k_cache.size(2));
  const DecodePlan plan = plan_of(a, p);
  // One copy brings a third of Q where a chunk has 64 rows; else the chunks, 64 rows apart, come one by one, and so
  // they do where the last one is of another tensor.
  const bool in_parts = a.q_rope.defined();
  p.q_box_chunks = p.blocks.tokens * p.blocks.heads == kTileRows && !in_parts ? 3 : 1;
  const CUtensorMap q_map = query_map("q", a.q, p.blocks, p.q_box_chunks);
  const CUtensorMap q_rope_map = in_parts ? query_map("q_rope", a.q_rope, p.blocks, 1) : q_map;
  // Rows of a block go out as they came in, clipped at the last head and token; where the clip would have to
  // be at the last head of a group of several, they are stored one by one.
  const bool clips = p.group <= kTileRows || p.group % kTileRows == 0 || h_kv == 1;
  p.out_box_chunks = !clips ? 0 : p.blocks.tokens * p.blocks.heads == kTileRows ? 4 : 1;
  const CUtensorMap out_map = tensor_map<5>("out", a.out,
                                            {{{64, 0, 64},
                                              {a.out.size(2), a.out.stride(2) * 2, p.blocks.heads},
                                              {a.out.size(1), a.out.stride(1) * 2, p.blocks.tokens},
                                              {kHeadDimV / 64, 128, std::max(p.out_box_chunks, 1)},
                                              {a.out.size(0), a.out.stride(0) * 2, 1}}});
  TensorView k = a.k_cache;
  if (k.size(0) == 0) {
    // A pool without pages serves requests without keys: nothing follows the map, but it has to be sound.
    k = TensorView::contiguous(a.q.data, k.dtype, {1, k.size(1), k.size(2), k.size(3)}, k.device);
  }
  const int piece = std::min(p.page_size, kTileTokens);
  const CUtensorMap k_piece_map = key_map(k, piece, 1);
  const CUtensorMap k_map =
      p.page_size < kTileTokens ? k_piece_map : key_map(k, kTileTokens, 4 / plan.cluster);
  const bool bf16 = a.q.dtype == DType::kBFloat16;
  launch_dense_decode(p, {q_map, q_rope_map, k_map, k_piece_map, out_map, in_parts ? 0 : kHeadDimV / 64},
                      bf16, plan, stream);
}

void build_schedule(const TensorView& cache_seqlens, const ScheduleOptions& options,
                    const DecodeScheduleView& s, void* stream) {
  require_device(cache_seqlens.device.index);
  check_schedule_layout(s);
  if (schedule_words(cache_seqlens.size(0), options.num_parts) > kMaxScheduleWords) {
    throw Unsupported(fmt::format(
        "b + 3 * num_parts is {} for b = {} and num_parts = {}; a schedule on the device takes up to {}",
        cache_seqlens.size(0) + 3 * std::int64_t{options.num_parts}, cache_seqlens.size(0), options.num_parts,
        kMaxScheduleWords - schedule_words(0, 0)));
  }
  const DeviceGuard guard(cache_seqlens.device.index);
  ScheduleParams p{};
  p.cache_seqlens = cache_seqlens.ptr<const std::int32_t>();
  p.batch = static_cast<int>(cache_seqlens.size(0));
  set_options(p, options);
  p.token_rows = s.unit == PartUnit::kTokens;
  p.parts = s.parts.ptr<std::int32_t>();
  p.num_splits = s.num_splits.ptr<std::int32_t>();
  launch_schedule(p, stream);
}

}  // namespace flash_mla::sm90
