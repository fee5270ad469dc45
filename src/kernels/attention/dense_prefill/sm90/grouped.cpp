// Host side of gqa_attention with many queries on Hopper: what it takes, tensor maps.

#include "kernels/attention/dense_prefill/sm90/grouped.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_prefill/sm90/grouped_launch.h"
#include "kernels/ptx/tensor_map.h"

namespace flash_mla::sm90 {
namespace {

using prefill::GroupedLaunch;

/// Of positions and windows, so that their sums stay in 32 bits.
constexpr std::int64_t kMost = 1'000'000'000;

using Launch = void (*)(const GroupedLaunch&);

struct Kernel {
  int d_qk, d_v, tile_keys;
  Launch launch;
};
template <int kDqk, int kDv>
constexpr Kernel kernel() {
  return {kDqk, kDv, prefill::GroupedHeads<kDqk, kDv, false>::kTileKeys, prefill::launch_grouped<kDqk, kDv>};
}
constexpr Kernel kKernels[] = {kernel<64, 64>(), kernel<128, 128>(), kernel<192, 128>(), kernel<256, 256>()};

const Kernel* kernel_for(std::int64_t d_qk, std::int64_t d_v) {
  const auto* const found = std::find_if(std::begin(kKernels), std::end(kKernels),
                                         [&](const Kernel& k) { return k.d_qk == d_qk && k.d_v == d_v; });
  return found != std::end(kKernels) ? found : nullptr;
}

bool paged(const GqaArgs& a) { return a.block_table.defined() || a.page_indices.defined(); }

/// Rows of a copy: a tile's, or a page's if it has fewer.
int copy_keys(const GqaArgs& a, const Kernel& kernel) {
  if (!paged(a)) return kernel.tile_keys;
  return static_cast<int>(std::min<std::int64_t>(a.k.size(1), kernel.tile_keys));
}

/// (64 columns, tokens, chunks, heads, pages); a copy takes `tokens` of one head, and all chunks if `chunks`.
CUtensorMap map_of(const char* name, const TensorView& t, const TensorView& q, int tokens, bool chunks) {
  TensorView from = t;
  if (t.numel() == 0) from.data = q.data;  // no copy follows the map, but it has to be sound
  const int head = t.rank - 2, count = static_cast<int>(t.size(t.rank - 1)) / 64;
  const bool pages = t.rank == 4;
  const int token = pages ? 1 : 0;
  return tensor_map<5>(name, from,
                       {{{64, 0, 64},
                         {std::max<std::int64_t>(t.size(token), 1), t.stride(token) * 2, tokens},
                         {count, 128, chunks ? count : 1},
                         {t.size(head), t.stride(head) * 2, 1},
                         {pages ? std::max<std::int64_t>(t.size(0), 1) : 1, t.stride(0) * 2, 1}}});
}

/// (64 columns, heads of a block, tokens, chunks, blocks of heads).
CUtensorMap map_of_queries(const TensorView& q, int pack_log2) {
  const int pack = 1 << pack_log2, chunks = static_cast<int>(q.size(2)) / 64;
  return tensor_map<5>("q", q,
                       {{{64, 0, 64},
                         {pack, q.stride(1) * 2, pack},
                         {q.size(0), q.stride(0) * 2, prefill::kTileRows / pack},
                         {chunks, 128, chunks},
                         {q.size(1) / pack, q.stride(1) * 2 * pack, 1}}});
}

bool steps_forward(const TensorView& t) {
  for (int d = 0; d + 1 < t.rank; ++d) {
    if (t.size(d) > 1 && t.stride(d) <= 0) return false;
  }
  return true;
}

int num_sms(const GqaArgs& a) { return gpus()[static_cast<std::size_t>(a.q.device.index)].sms; }

std::int64_t batch_of(const GqaArgs& a) {
  return a.seqlens_k.defined() ? a.seqlens_k.size(0) : a.cu_seqlens_k.size(0) - 1;
}

/// The most that the sequences can have in all.
std::int64_t max_items(const GqaArgs& a) {
  const std::int64_t pack = grouped_prefill_heads(a);
  const std::int64_t row_tiles =
      (a.q.size(0) * pack + (prefill::kTileRows - 1) * batch_of(a)) / prefill::kTileRows;
  return row_tiles * (a.q.size(1) / pack);
}

/// The most that a sequence can have.
std::int64_t max_keys(const GqaArgs& a) {
  if (a.block_table.defined()) return a.block_table.size(1) * a.k.size(1);
  if (a.page_indices.defined()) return a.page_indices.size(0) * a.k.size(1);
  return a.k.rank == 3 ? a.k.size(0) : a.k.size(1);
}

/// Enough for all multiprocessors, and no part of fewer than 4 tiles if the longest sequence is as long as it can be.
int num_splits(const GqaArgs& a) {
  constexpr std::int64_t kLeastTiles = 4;
  const std::int64_t tiles = max_keys(a) / kernel_for(a.q.size(2), a.out.size(2))->tile_keys;
  const std::int64_t items = std::max<std::int64_t>(max_items(a), 1);
  return static_cast<int>(
      std::clamp<std::int64_t>(std::min(num_sms(a) / items, tiles / kLeastTiles), 1, prefill::kMaxSplits));
}

constexpr std::size_t kCounterBytes = 256;

}  // namespace

bool grouped_prefill_takes(const GqaArgs& a) {
  const Kernel* const kernel = kernel_for(a.q.size(2), a.out.size(2));
  if (kernel == nullptr || a.mask.defined() || a.alibi_slopes.defined()) return false;
  if (!steps_forward(a.q) || !steps_forward(a.k) || !steps_forward(a.v)) return false;
  if (paged(a)) {
    const std::int64_t page = a.k.size(1);
    const bool parts = page >= 8 && kernel->tile_keys % page == 0;
    if (!parts && page % kernel->tile_keys != 0) return false;
  }
  const std::int64_t keys = a.k.size(0) * (a.k.rank == 4 ? a.k.size(1) : 1);
  return a.q.size(0) < kMost && keys < kMost && a.q.size(0) * a.q.size(1) < kMost;
}

int grouped_prefill_heads(const GqaArgs& a) {
  return 1 << prefill::pack_log2(static_cast<unsigned>(a.q.size(1) / a.k.size(a.k.rank - 2)));
}

std::size_t grouped_prefill_workspace_size(const GqaArgs& a) {
  const int splits = num_splits(a);
  if (splits == 1) return kCounterBytes;
  const auto rows = static_cast<std::size_t>(splits * a.q.size(0) * a.q.size(1));
  return kCounterBytes + rows * static_cast<std::size_t>(a.out.size(2) + 1) * sizeof(float);
}

void grouped_prefill(const GqaArgs& a, const flash_mla::gqa::Problem& problem, void* workspace,
                     void* stream) {
  const Kernel& kernel = *kernel_for(problem.d_qk, problem.d_v);
  const bool whole_tiles = copy_keys(a, kernel) == kernel.tile_keys;
  GroupedLaunch call{};
  call.params = prefill::grouped_params(problem, copy_keys(a, kernel));
  call.params.taken = static_cast<std::int32_t*>(workspace);
  call.q = map_of_queries(a.q, call.params.pack_log2);
  call.k = map_of("k", a.k, a.q, copy_keys(a, kernel), whole_tiles);
  call.v = map_of("v", a.v, a.q, copy_keys(a, kernel), whole_tiles);
  call.bf16 = a.q.dtype == DType::kBFloat16;
  call.stream = stream;
  call.max_items = max_items(a);
  call.sms = num_sms(a);
  call.params.splits = num_splits(a);
  call.params.total_q = a.q.size(0);
  const std::int64_t rows = call.params.splits * a.q.size(0) * a.q.size(1);
  call.params.partial_out = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + kCounterBytes);
  call.params.partial_lse = call.params.partial_out + rows * problem.d_v;
  kernel.launch(call);
}

}  // namespace flash_mla::sm90
