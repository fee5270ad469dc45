// Host side of sparse decode on Hopper: what it accepts, the workspace, how the work is shaped.

#include "kernels/attention/sparse_decode/sm90/sparse_decode.h"

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <numbers>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_decode/sm90/launch.h"
#include "kernels/attention/sparse_decode/sm90/launch.h"
#include "kernels/attention/sparse_decode/sm90/split_tables.h"
#include "kernels/ptx/tensor_map.h"
#include "kv/format.h"
#include "schedule/device_schedule.h"
#include "schedule/uniform_plan.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr int kUnit = 16;  // bytes

std::size_t align_up(std::size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

/// Rows of one query token's heads: a query token has lists of its own.
RowBlocks blocks_of(const SparseDecodeArgs& a) {
  const int h_q = static_cast<int>(a.q.size(2)), heads = std::min(h_q, kTileRows);
  return {1, heads, (h_q + heads - 1) / heads, static_cast<int>(a.q.size(1))};
}

int tiles_of(const SparseKeys& keys) {
  return keys.defined() ? static_cast<int>((keys.indices.size(2) + kTileTokens - 1) / kTileTokens) : 0;
}

/// A kernel reads rows of one format, and of one scale where the caller gives it.
bool is_one_format(const SparseDecodeArgs& a) {
  const KvCacheView &first = a.keys.cache, &second = a.extra.cache;
  return !a.extra.defined() || (first.format == second.format &&
                                (first.format != KvFormat::kFp8Tensor || first.scale == second.scale));
}

/// How a call is cut, from shapes alone.
struct Shape {
  int sms;  // of the device
  RowBlocks blocks;
  ScheduleOptions options;
  int passes;  // 2: a kernel for each list, and the splits of a request are those of both
  std::size_t parts_bytes, splits_bytes;  // of a pass
  std::size_t splits_at, out_at, stats_at,
      bytes;  // of the workspace: num_splits, partial results; the parts are first
};

/// Tiles of a split where both lists are cut, and the caller does not say how: few requests keep the device busy.
int split_of_passes(const SparseDecodeArgs& a, int num_parts) {
  const int tiles = std::max({tiles_of(a.keys), tiles_of(a.extra), 1});
  const auto batch = static_cast<int>(std::max<std::int64_t>(a.q.size(0), 1));
  const int splits = (num_parts + batch - 1) / batch;
  return std::max((tiles + splits - 1) / splits, std::min(tiles, 2));
}

Shape shape_of(const SparseDecodeArgs& a, int fixed_split_blocks) {
  Shape s{};
  check(multiprocessors(s.sms), "cudaDeviceGetAttribute");
  s.blocks = blocks_of(a);
  const std::int64_t batch = a.q.size(0);
  s.options = schedule_options(static_cast<int>(batch), s.sms, s.blocks, 1);
  s.options.block_size = kTileTokens;
  s.passes = is_one_format(a) ? 1 : 2;
  if (s.passes == 2 && fixed_split_blocks == 0) fixed_split_blocks = split_of_passes(a, s.options.num_parts);
  s.options.fixed_split_blocks = fixed_split_blocks;
  if (fixed_split_blocks > 0) s.options.whole_requests_percent = 0;
  const auto passes = static_cast<std::size_t>(s.passes);
  s.parts_bytes = align_up(static_cast<std::size_t>(s.options.num_parts) * 8 * sizeof(std::int32_t));
  s.splits_bytes = align_up(static_cast<std::size_t>(batch + 1) * sizeof(std::int32_t));
  s.splits_at = passes * s.parts_bytes;
  s.out_at = s.splits_at + passes * s.splits_bytes;
  std::int64_t slots = s.options.num_parts > 1 ? 2 * std::int64_t{s.options.num_parts} : 0;
  if (fixed_split_blocks > 0) {
    const auto splits = [&](int tiles) {
      return (std::max(tiles, 1) + fixed_split_blocks - 1) / fixed_split_blocks;
    };
    const int first = tiles_of(a.keys), second = tiles_of(a.extra);
    slots = batch * (s.passes == 2 ? splits(first) + splits(second) : splits(first + second));
  }
  const auto rows = static_cast<std::size_t>(slots * s.blocks.count() * row_groups(s.blocks)) * 16;
  s.stats_at = s.out_at + align_up(rows * kHeadDimV * sizeof(float));
  s.bytes = s.stats_at + align_up(rows * 2 * sizeof(float)) + kAlignment;  // the workspace is aligned to less
  return s;
}

void check_pool(const SparseKeys& keys, const char* name) {
  const kv::Pool pool = kv::make_pool(keys.cache);
  const TensorView& t = keys.cache.data;
  if (reinterpret_cast<std::uintptr_t>(t.data) % kUnit != 0) {
    throw InvalidArgument(fmt::format("{}.cache.data is {}, expected a pointer aligned to {} bytes", name,
                                      fmt::ptr(t.data), kUnit));
  }
  for (const auto& [stride, index] : {std::pair(pool.page_stride, 0), std::pair(pool.token_stride, 1)}) {
    if (stride % kUnit != 0 || stride < 0) {
      throw InvalidArgument(fmt::format("{}.cache.stride[{}] is {} bytes, expected a multiple of {}", name,
                                        index, stride, kUnit));
    }
  }
  // 32 bits count units of 16 bytes, and V4's scales in units of 8.
  const std::int64_t most = std::int64_t{pool.format == KvFormat::kFp8V4 ? 32 : 64} << 30;
  if (const std::int64_t bytes =
          pool.page_stride * std::max<std::int64_t>(pool.num_pages, 1) + pool.token_stride * pool.page_size;
      bytes >= most || pool.num_slots() > INT32_MAX) {
    throw Unsupported(
        fmt::format("{}.cache is {}, {} bytes from end to end; sparse_decode on sm90 takes less than {}",
                    name, t.describe(), bytes, most));
  }
}

ListedKeys listed(const SparseKeys& keys) {
  ListedKeys k{};
  if (!keys.defined()) return k;
  const kv::Pool pool = kv::make_pool(keys.cache);
  k.cache = pool.data;
  k.page_units = static_cast<std::uint32_t>(pool.page_stride / kUnit);
  k.token_units = static_cast<std::uint32_t>(pool.token_stride / kUnit);
  set_page_size(k, static_cast<int>(std::max<std::int64_t>(pool.page_size, 1)));
  k.topk = static_cast<int>(keys.indices.size(2));
  k.indices = keys.indices.ptr<const std::int32_t>();
  k.indices_stride_b = keys.indices.stride(0);
  k.indices_stride_s = keys.indices.stride(1);
  if (keys.topk_length.defined()) k.topk_length = keys.topk_length.ptr<const std::int32_t>();
  return k;
}

float scale_of(const SparseKeys& keys) {
  return keys.cache.format == KvFormat::kFp8Tensor ? keys.cache.scale : 1.0f;
}

ListLengths lists_of(const SparseDecodeParams& p) {
  ListLengths lists{};
  for (int i = 0; i < 2; ++i) {
    lists.topk_length[i] = p.keys[i].topk_length;
    lists.topk[i] = p.keys[i].topk;
  }
  return lists;
}

/// Queues the kernel that makes the parts and num_splits of p's lists.
void plan_lists(const SparseDecodeParams& p, const ScheduleOptions& options, void* stream) {
  ScheduleParams schedule{};
  schedule.batch = p.batch;
  set_options(schedule, options);
  schedule.parts = const_cast<std::int32_t*>(p.parts);
  schedule.num_splits = const_cast<std::int32_t*>(p.num_splits);
  schedule.lists = lists_of(p);
  launch_list_schedule(schedule, stream);
}

}  // namespace

void check_supported(const SparseDecodeArgs& a, int fixed_split_blocks) {
  require_device(a.q.device.index);
  check_pool(a.keys, "keys");
  if (a.extra.defined()) check_pool(a.extra, "extra");
  require_stride(a.q, "q");
  require_stride(a.out, "out");
  const DeviceGuard guard(a.q.device.index);
  const Shape s = shape_of(a, fixed_split_blocks);
  const std::int64_t batch = a.q.size(0);
  if (!s.blocks.divides_exactly() || combine_row_groups(s.blocks, 1) > 65535 || batch > 65535 ||
      schedule_words(batch, s.options.num_parts) > kMaxScheduleWords) {
    throw Unsupported(
        fmt::format("q.shape is ({}, {}, {}, {}); sparse_decode on sm90 takes fewer requests (about "
                    "11000) or query rows per request",
                    batch, a.q.size(1), a.q.size(2), a.q.size(3)));
  }
  if (s.stats_at - s.out_at > static_cast<std::size_t>(kMaxPartialBytes)) {
    throw Unsupported(
        fmt::format("the partial results of fixed_split_blocks = {} take {} bytes; sparse_decode on sm90 "
                    "takes up to {}: choose longer splits",
                    s.options.fixed_split_blocks, s.stats_at - s.out_at, kMaxPartialBytes));
  }
}

std::size_t sparse_decode_workspace_size(const SparseDecodeArgs& a, int fixed_split_blocks) {
  const DeviceGuard guard(a.q.device.index);
  return shape_of(a, fixed_split_blocks).bytes;
}

void sparse_decode(const SparseDecodeArgs& a, void* workspace, float softmax_scale, int fixed_split_blocks,
                   void* stream) {
  const DeviceGuard guard(a.q.device.index);
  const Shape s = shape_of(a, fixed_split_blocks);
  const std::size_t behind = reinterpret_cast<std::uintptr_t>(workspace) % kAlignment;
  std::byte* const memory = static_cast<std::byte*>(workspace) + (kAlignment - behind) % kAlignment;
  const int batch = static_cast<int>(a.q.size(0)), d_qk = static_cast<int>(a.q.size(3));

  SparseDecodeParams p{};
  p.blocks = s.blocks;
  p.groups_inverse = 1.0f / static_cast<float>(row_groups(p.blocks));
  p.count_inverse = 1.0f / static_cast<float>(p.blocks.count());
  p.batch = batch;
  p.s_q = static_cast<int>(a.q.size(1));
  p.h_q = p.group = static_cast<int>(a.q.size(2));
  p.num_parts = s.options.num_parts;
  p.split_tiles = s.options.fixed_split_blocks;
  p.scale_log2 = softmax_scale * std::numbers::log2e_v<float>;
  p.parts = reinterpret_cast<const std::int32_t*>(memory);
  p.num_splits = reinterpret_cast<const std::int32_t*>(memory + s.splits_at);
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
  p.partial_out = reinterpret_cast<float*>(memory + s.out_at);
  p.partial_stats = reinterpret_cast<float*>(memory + s.stats_at);
  p.keys[0] = listed(a.keys);
  p.keys[1] = listed(a.extra);
  if (a.attn_sink.defined()) p.attn_sink = a.attn_sink.ptr<const float>();

  const DecodePlan plan = plan_decode(batch, s.sms, p.blocks, 1, p.num_parts, p.split_tiles > 0);
  const CUtensorMap q_map = tensor_map<5>("q", a.q,
                                          {{{64, 0, 64},
                                            {a.q.size(2), a.q.stride(2) * 2, p.blocks.heads},
                                            {a.q.size(1), a.q.stride(1) * 2, 1},
                                            {d_qk / 64, 128, 1},
                                            {a.q.size(0), a.q.stride(0) * 2, 1}}});
  if (s.passes == 1) {
    if (p.keys[0].topk_length == nullptr && p.keys[1].topk_length == nullptr)
      p.uniform = uniform_plan(batch, tiles_of(a.keys) + tiles_of(a.extra), s.options);
    if (p.uniform.blocks == 0) plan_lists(p, s.options, stream);
    p.cache_scale = scale_of(a.keys);
    launch_sparse_decode(p, a.q, q_map, a.keys.cache.format, plan, stream);
  } else {
    SparseDecodeParams passes[2] = {p, p};
    SplitTables tables{batch, p.split_tiles, lists_of(p), {}};
    for (std::size_t i = 0; i < 2; ++i) {
      SparseDecodeParams& pass = passes[i];
      pass.keys[0] = p.keys[i];
      pass.keys[1] = {};
      pass.cache_scale = scale_of(i == 0 ? a.keys : a.extra);
      pass.parts = reinterpret_cast<const std::int32_t*>(memory + i * s.parts_bytes);
      pass.num_splits = tables.num_splits[i] =
          reinterpret_cast<std::int32_t*>(memory + s.splits_at + i * s.splits_bytes);
      plan_lists(pass, s.options, stream);
    }
    launch_split_tables(tables, stream);
    launch_sparse_decode(passes[0], a.q, q_map, a.keys.cache.format, plan, stream);
    launch_sparse_decode(passes[1], a.q, q_map, a.extra.cache.format, plan, stream);
  }
  if (plan.combines) launch_combine_lists(p, p, a.q.dtype == DType::kBFloat16, plan, stream);
}

}  // namespace flash_mla::sm90
