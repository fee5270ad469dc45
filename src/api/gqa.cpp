#include "flash_mla/gqa.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "api/call.h"
#include "api/gqa_checks.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/gqa/cpu/gqa.h"
#include "kernels/attention/gqa/reference/gqa.h"
#include "kernels/attention/gqa/sm90/gqa.h"

namespace flash_mla {
namespace {

float scale_of(const GqaArgs& args, const GqaOptions& options) {
  return options.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(args.q.size(2))));
}

/// Sequences that the schedule is of.
std::int64_t scheduled(const GqaArgs& args, const DecodeScheduleView& schedule, const GqaOptions& options) {
  if (!schedule.parts.defined()) return 0;
  return options.num_scheduled < 0 ? api::gqa_batch(args) : options.num_scheduled;
}

Backend check_shapes(const GqaArgs& args, const DecodeScheduleView& schedule, const GqaOptions& options) {
  api::check_gqa_shapes(args, options, /*allow_reference_types=*/false);
  if (schedule.parts.defined()) {
    if (!args.seqlens_k.defined()) api::invalid("seqlens_k is not given, expected it with a schedule");
    if (const std::int64_t b = api::gqa_batch(args); options.num_scheduled > b) {
      api::invalid("num_scheduled is {}, expected up to b = {}", options.num_scheduled, b);
    }
    api::check_schedule_shapes(schedule, scheduled(args, schedule, options), args.q);
  }
  return api::backend_of(options.backend, args.q, "q");
}

TensorView slice(const TensorView& t, int dim, std::int64_t begin, std::int64_t end) {
  if (!t.defined()) return t;
  TensorView part = t;
  part.shape[static_cast<std::size_t>(dim)] = end - begin;
  part.data = static_cast<std::byte*>(t.data) +
              begin * t.stride(dim) * static_cast<std::int64_t>(dtype_size(t.dtype));
  return part;
}

/// The call of sequences [begin, end) alone. Offsets stay what they are, and so do the tensors that they count in.
GqaArgs sequences(const GqaArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t b = api::gqa_batch(args);
  GqaArgs part = args;
  for (TensorView* t : {&part.seqlens_k, &part.block_table}) *t = slice(*t, 0, begin, end);
  for (TensorView* t : {&part.cu_seqlens_q, &part.cu_seqlens_k, &part.page_indptr, &part.mask_indptr}) {
    *t = slice(*t, 0, begin, end + 1);
  }
  if (!args.cu_seqlens_q.defined() && b > 0) {
    const std::int64_t queries = args.q.size(0) / b;
    for (TensorView* t : {&part.q, &part.out}) *t = slice(*t, 0, begin * queries, end * queries);
    part.lse = slice(args.lse, 1, begin * queries, end * queries);
  }
  if (args.k.rank == 4 && !args.block_table.defined() && !args.page_indices.defined()) {
    part.k = slice(args.k, 0, begin, end);
    part.v = slice(args.v, 0, begin, end);
  }
  return part;
}

/// A call that has a schedule for all of its sequences, or none.
struct Share {
  GqaArgs args;
  DecodeScheduleView schedule;
  GqaOptions options;
};

/// What a call is made of, one after the other: the sequences that have a schedule, and the others. They share a workspace.
class Shares {
 public:
  Shares(const GqaArgs& args, const DecodeScheduleView& schedule, const GqaOptions& options) {
    const std::int64_t b = api::gqa_batch(args), n = scheduled(args, schedule, options);
    if (n > 0) {
      Share& first = shares_[count_++];
      first = {n == b ? args : sequences(args, 0, n), schedule, options};
      if (options.max_scheduled_q > 0) first.options.max_seqlen_q = options.max_scheduled_q;
    }
    if (n < b) shares_[count_++] = {n == 0 ? args : sequences(args, n, b), {}, options};
  }
  const Share* begin() const { return shares_.data(); }
  const Share* end() const { return shares_.data() + count_; }

 private:
  std::array<Share, 2> shares_;
  std::size_t count_ = 0;
};

cpu::GqaCall cpu_call(const Share& share) {
  const auto& [args, schedule, options] = share;
  cpu::GqaCall call;
  call.problem = gqa::problem_of(args, options, scale_of(args, options));
  call.dtype = args.q.dtype;
  call.schedule = schedule;
  call.num_threads = options.num_threads > 0 ? options.num_threads : cpu::default_num_threads();
  return call;
}

/// What the size of the workspace is read from.
void check_cpu_values(const GqaArgs& args, const DecodeScheduleView& schedule, const GqaOptions& options) {
  api::check_gqa_values(args);
  if (schedule.parts.defined()) {
    api::check_schedule_values(schedule, slice(args.seqlens_k, 0, 0, scheduled(args, schedule, options)));
  }
}

/// The most that any share needs, for they run one after the other.
std::size_t workspace_size(Backend backend, const Shares& all) {
  std::size_t most = 0;
  for (const Share& share : all) {
    most = std::max(most, backend == Backend::kSm90
                              ? sm90::gqa_workspace_size(share.args, share.schedule, share.options)
                              : cpu::gqa_workspace_size(cpu_call(share)));
  }
  return most;
}

/// Everything that can be checked without running.
Backend check(const GqaArgs& args, const DecodeScheduleView& schedule, const GqaOptions& options) {
  const Backend backend = check_shapes(args, schedule, options);
  if (backend == Backend::kSm90) {
    sm90::check_supported(args, schedule);
  } else {
    check_cpu_values(args, schedule, options);
  }
  return backend;
}

}  // namespace

std::size_t gqa_workspace_size(const GqaArgs& args, const DecodeScheduleView& schedule,
                               const GqaOptions& options) {
  const Backend backend = check(args, schedule, options);
  return workspace_size(backend, Shares(args, schedule, options));
}

void gqa_attention(const GqaArgs& args, const DecodeScheduleView& schedule, void* workspace,
                   std::size_t workspace_bytes, const GqaOptions& options) {
  const Backend backend = check(args, schedule, options);
  const Shares all(args, schedule, options);
  api::check_workspace_bytes(workspace, workspace_bytes, workspace_size(backend, all), "gqa_workspace_size");
  if (args.q.size(0) == 0) return;
  for (const Share& share : all) {
    if (share.args.q.size(0) == 0) continue;
    if (backend == Backend::kSm90) {
      sm90::gqa_attention(share.args, share.schedule, workspace, share.options,
                          scale_of(args, share.options));
    } else {
      cpu::gqa_attention(cpu_call(share), workspace);
    }
  }
}

ScheduleOptions gqa_schedule_options(int device_index, int max_seqlen_q, int num_heads_q, int num_heads_k,
                                     int head_dim) {
  for (const auto& [value, name] :
       {std::pair{max_seqlen_q, "max_seqlen_q"}, std::pair{num_heads_q, "num_heads_q"},
        std::pair{num_heads_k, "num_heads_k"}, std::pair{head_dim, "head_dim"}}) {
    if (value < 1) api::invalid("{} is {}, expected >= 1", name, value);
  }
  if (num_heads_q % num_heads_k != 0) {
    api::invalid("num_heads_q is {}, expected a multiple of num_heads_k = {}", num_heads_q, num_heads_k);
  }
  return sm90::gqa_schedule_options(device_index, max_seqlen_q, num_heads_q, num_heads_k, head_dim);
}

namespace reference {

void gqa_attention(const GqaArgs& args, const GqaOptions& options) {
  api::check_gqa_shapes(args, options, /*allow_reference_types=*/true);
  if (args.q.device.type != DeviceType::kCpu)
    api::invalid("q is {}, expected a CPU tensor", args.q.describe());
  api::check_gqa_values(args);
  const double scale = options.softmax_scale ? double{*options.softmax_scale}
                                             : 1.0 / std::sqrt(static_cast<double>(args.q.size(2)));
  gqa_attention(args, gqa::problem_of(args, options, static_cast<float>(scale)), scale);
}

}  // namespace reference

}  // namespace flash_mla
