// Host side of the Hopper backend: what it accepts, and how the work is shaped.

#include "kernels/attention/gqa/sm90/gqa.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numbers>

#include "base/cuda/device.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_prefill/sm90/grouped.h"
#include "kernels/attention/gqa/sm90/launch.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::int64_t kMaxGrid = 65535;
constexpr std::size_t kAlignment = 256;

std::size_t align_up(std::size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

std::int64_t batch_of(const GqaArgs& a) {
  return a.seqlens_k.defined() ? a.seqlens_k.size(0) : a.cu_seqlens_k.size(0) - 1;
}

std::int64_t max_queries(const GqaArgs& a, const GqaOptions& o) {
  const std::int64_t b = std::max<std::int64_t>(batch_of(a), 1);
  if (!a.cu_seqlens_q.defined()) return a.q.size(0) / b;
  return o.max_seqlen_q > 0 ? std::min<std::int64_t>(o.max_seqlen_q, a.q.size(0)) : a.q.size(0);
}

/// Keys that a sequence may have at most.
std::int64_t most_keys(const GqaArgs& a) {
  if (a.block_table.defined()) return a.block_table.size(1) * a.k.size(1);
  if (a.page_indices.defined()) return a.page_indices.size(0) * a.k.size(1);
  return a.k.rank == 3 ? a.k.size(0) : a.k.size(1);
}

std::int64_t num_slots(const GqaArgs& a, const DecodeScheduleView& s) {
  if (!s.parts.defined()) return 0;
  if (s.fixed_split_blocks == 0) return s.parts.size(0) > 1 ? 2 * s.parts.size(0) : 0;
  const std::int64_t split = std::int64_t{s.fixed_split_blocks} * s.block_size;
  return batch_of(a) * std::max<std::int64_t>((most_keys(a) + split - 1) / split, 1);
}

/// Rows of a sequence and key head from which on a tile of 128 pays.
constexpr std::int64_t kPrefillRows = 64;

/// Fixed splits are for bits that do not depend on the batch; which kernel does would.
bool is_prefill(const GqaArgs& a, const DecodeScheduleView& s) {
  // Of one query to a sequence a schedule knows better how keys are to be divided.
  if (s.parts.defined() && a.q.size(0) <= batch_of(a)) return false;
  return s.fixed_split_blocks == 0 && grouped_prefill_takes(a) &&
         a.q.size(0) * grouped_prefill_heads(a) >= kPrefillRows * batch_of(a);
}

struct Partial {
  std::size_t out_bytes, lse_bytes;
};
Partial partial_of(const GqaArgs& a, const DecodeScheduleView& s, const GqaOptions& o) {
  const auto rows = static_cast<std::size_t>(num_slots(a, s) * max_queries(a, o) * a.q.size(1));
  return {align_up(rows * static_cast<std::size_t>(a.out.size(2)) * sizeof(float)),
          align_up(rows * sizeof(float))};
}

/// Rows that are read or written 16 bytes at a time.
void require_rows(const TensorView& t, const char* name) {
  if (t.numel() == 0) return;
  if (reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0) {
    throw InvalidArgument(fmt::format("{}.data is {}, expected a pointer aligned to 16 bytes", name, t.data));
  }
  for (int d = 0; d + 1 < t.rank; ++d) {
    if (t.size(d) > 1 && t.stride(d) % 8 != 0) {
      throw InvalidArgument(
          fmt::format("{}.stride[{}] is {}, expected a multiple of 8", name, d, t.stride(d)));
    }
  }
}

void require_at_most(std::int64_t value, std::int64_t most, const char* name) {
  if (value > most)
    throw Unsupported(fmt::format("{} is {}; the sm90 backend takes up to {}", name, value, most));
}

void check_schedule(const DecodeScheduleView& s) {
  if (s.block_size != gqa::kBlockTokens) {
    throw Unsupported(
        fmt::format("schedule.block_size is {}; the sm90 backend takes {}", s.block_size, gqa::kBlockTokens));
  }
  require_at_most(s.parts.size(0), kMaxGrid, "schedule.parts.shape[0]");
  if (s.parts.size(0) > 1 && s.parts.stride(0) != 8) {
    throw InvalidArgument(
        fmt::format("schedule.parts.stride[0] is {}, expected 8 (contiguous)", s.parts.stride(0)));
  }
  if (reinterpret_cast<std::uintptr_t>(s.parts.data) % 16 != 0) {
    throw InvalidArgument(
        fmt::format("schedule.parts.data is {}, expected a pointer aligned to 16 bytes", s.parts.data));
  }
}

}  // namespace

void check_supported(const GqaArgs& a, const DecodeScheduleView& s) {
  require_device(a.q.device.index);
  if (a.q.dtype == DType::kFloat32)
    throw Unsupported("q is float32; the sm90 backend takes bfloat16 and float16");
  const auto d_qk = static_cast<int>(a.q.size(2)), d_v = static_cast<int>(a.out.size(2));
  if (!gqa::has_kernel(d_qk, d_v)) {
    throw Unsupported(fmt::format(
        "head dimensions are {} / {}; the sm90 backend takes 64 / 64, 96 / 96, 128 / 128, 192 / 128, 192 / 192 and 256 / 256",
        d_qk, d_v));
  }
  require_at_most(batch_of(a), kMaxGrid, "b");
  require_at_most(a.k.size(a.k.rank - 2), kMaxGrid, "h_kv");
  require_at_most(a.q.size(0) * a.q.size(1), std::numeric_limits<std::int32_t>::max(), "total_q * h_q");
  if (s.parts.defined()) check_schedule(s);
  require_rows(a.q, "q");
  require_rows(a.k, "k");
  require_rows(a.v, "v");
  require_rows(a.out, "out");
}

std::size_t gqa_workspace_size(const GqaArgs& a, const DecodeScheduleView& s, const GqaOptions& o) {
  if (is_prefill(a, s)) return grouped_prefill_workspace_size(a);
  const Partial partial = partial_of(a, s, o);
  return partial.out_bytes + partial.lse_bytes;
}

void gqa_attention(const GqaArgs& a, const DecodeScheduleView& s, void* workspace, const GqaOptions& o,
                   float scale) {
  const DeviceGuard guard(a.q.device.index);
  gqa::Params p{};
  p.problem = flash_mla::gqa::problem_of(a, o, scale);
  if (is_prefill(a, s)) return grouped_prefill(a, p.problem, workspace, o.stream);
  p.max_queries = static_cast<int>(max_queries(a, o));
  p.scale_log2 = scale * std::numbers::log2e_v<float>;
  if (s.parts.defined()) {
    p.parts = s.parts.ptr<const std::int32_t>();
    p.num_splits = s.num_splits.ptr<const std::int32_t>();
    p.num_parts = static_cast<int>(s.parts.size(0));
    p.split_blocks = s.fixed_split_blocks;
    p.token_rows = s.unit == PartUnit::kTokens;
    p.partial_out = static_cast<float*>(workspace);
    p.partial_lse = p.partial_out + partial_of(a, s, o).out_bytes / sizeof(float);
  }
  gqa::launch(p, a.q.dtype, o.stream);
}

ScheduleOptions gqa_schedule_options(int device_index, int max_seqlen_q, int num_heads_q, int num_heads_k,
                                     int head_dim) {
  require_device(device_index);
  const std::int64_t rows = std::int64_t{max_seqlen_q} * (num_heads_q / num_heads_k);
  const std::int64_t ctas = (rows + gqa::kTileRows - 1) / gqa::kTileRows * num_heads_k;
  const int sms = gpus()[static_cast<std::size_t>(device_index)].sms;
  ScheduleOptions options;
  options.num_parts =
      static_cast<int>(std::max<std::int64_t>(std::int64_t{sms} * gqa::ctas_per_sm(head_dim) / ctas, 1));
  options.fixed_overhead_blocks = 2;
  options.min_blocks_per_part = 2;
  options.whole_requests_percent = 3;
  return options;
}

}  // namespace flash_mla::sm90
