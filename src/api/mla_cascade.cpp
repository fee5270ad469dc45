#include "flash_mla/mla_cascade.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "api/call.h"
#include "flash_mla/gqa.h"
#include "flash_mla/merge.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/mla_cascade/cpu/mla_cascade.h"

namespace flash_mla {
namespace {

using api::check_size;
using api::check_tensor;

constexpr std::int64_t kMaxHeads = 1 << 16, kMaxWidth = 4096, kMaxTokens = (std::int64_t{1} << 31) - 1;

void check_device(const TensorView& t, const char* name, const char* function) {
  if (t.device.type == DeviceType::kCpu) return;
  throw Unsupported(fmt::format("{} is {}; {} runs on the CPU alone", name, t.describe(), function));
}

void check_width(std::int64_t value, const char* name, std::int64_t least) {
  if (value < least || value > kMaxWidth)
    api::invalid("{} is {}, expected {} to {}", name, value, least, kMaxWidth);
}

/// d_nope, d_rope, d_v and the rank.
struct Widths {
  std::int64_t nope, rope, v, rank;
};

/// kv_b with keys or queries of width d_qk, values of width d_v, and a cache.
Widths check_widths(const TensorView& kv_b, const TensorView& k_cache, DType dtype, std::int64_t h,
                    std::int64_t d_qk, std::int64_t d_v, const char* d_qk_name) {
  check_tensor(kv_b, "kv_b", 3, {dtype});
  api::check_last_dim_contiguous(kv_b, "kv_b");
  check_size(kv_b, "kv_b", 0, h, "the number of heads");
  const Widths w{kv_b.size(1) - d_v, d_qk - kv_b.size(1) + d_v, d_v, kv_b.size(2)};
  check_width(w.v, "d_v", 1);
  check_width(w.rank, "kv_b.shape[2] (rank)", 1);
  check_width(w.nope, "kv_b.shape[1] - d_v (d_nope)", 1);
  if (w.rope < 0) api::invalid("{} is {}, expected at least d_nope = {}", d_qk_name, d_qk, w.nope);
  check_width(d_qk, d_qk_name, 1);
  check_tensor(k_cache, "k_cache", 4, {dtype});
  api::check_last_dim_contiguous(k_cache, "k_cache");
  check_size(k_cache, "k_cache", 2, 1, "one latent head");
  check_size(k_cache, "k_cache", 3, w.rank + w.rope, "rank + d_rope");
  if (k_cache.size(1) < 1) api::invalid("k_cache.shape[1] (page_size) is {}, expected >= 1", k_cache.size(1));
  return w;
}

void check_threads(int num_threads) {
  if (num_threads < 0) api::invalid("num_threads is {}, expected >= 0", num_threads);
}

constexpr std::initializer_list<DType> kDtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

Widths check(const MlaCascadeArgs& a, const DecodeScheduleView& schedule, const MlaCascadeOptions& options) {
  check_tensor(a.q, "q", 4, kDtypes);
  check_device(a.q, "q", "mla_cascade");
  api::check_last_dim_contiguous(a.q, "q");
  const std::int64_t b = a.q.size(0), s_q = a.q.size(1), h = a.q.size(2);
  if (h < 1 || h > kMaxHeads) api::invalid("q.shape[2] (h) is {}, expected 1 to {}", h, kMaxHeads);
  if (s_q < 1 || b * s_q > kMaxTokens) api::invalid("q.shape[1] (s_q) is {}, expected >= 1", s_q);
  check_tensor(a.prefix_k, "prefix_k", 3, {a.q.dtype});
  check_tensor(a.prefix_v, "prefix_v", 3, {a.q.dtype});
  check_tensor(a.out, "out", 4, {a.q.dtype});
  const Widths w = check_widths(a.kv_b, a.k_cache, a.q.dtype, h, a.q.size(3), a.prefix_v.size(2),
                                "q.shape[3] (d_nope + d_rope)");
  check_size(a.prefix_k, "prefix_k", 1, h, "q.shape[2] (h)");
  check_size(a.prefix_k, "prefix_k", 2, a.q.size(3), "q.shape[3] (d_nope + d_rope)");
  check_size(a.prefix_v, "prefix_v", 0, a.prefix_k.size(0), "prefix_k.shape[0]");
  check_size(a.prefix_v, "prefix_v", 1, h, "q.shape[2] (h)");
  if (a.prefix_k.size(0) > kMaxTokens)
    api::invalid("prefix_k.shape[0] is {}, expected up to {}", a.prefix_k.size(0), kMaxTokens);
  for (const auto& [dim, size] : {std::pair{0, b}, std::pair{1, s_q}, std::pair{2, h}, std::pair{3, w.v}}) {
    check_size(a.out, "out", dim, size, dim == 3 ? "prefix_v.shape[2] (d_v)" : "the same dimension of q");
  }
  if (a.lse.defined()) {
    check_tensor(a.lse, "lse", 3, {DType::kFloat32});
    check_size(a.lse, "lse", 0, b, "q.shape[0] (b)");
    check_size(a.lse, "lse", 1, h, "q.shape[2] (h)");
    check_size(a.lse, "lse", 2, s_q, "q.shape[1] (s_q)");
    api::check_no_overlap(a.lse, "lse");
    api::check_same_device(a.lse, "lse", a.q, "q");
  }
  for (const auto& [t, name] :
       {std::pair{&a.prefix_k, "prefix_k"}, std::pair{&a.prefix_v, "prefix_v"}, std::pair{&a.out, "out"}}) {
    api::check_last_dim_contiguous(*t, name);
    api::check_same_device(*t, name, a.q, "q");
  }
  api::check_no_overlap(a.out, "out");
  api::check_same_device(a.kv_b, "kv_b", a.q, "q");
  if (options.softmax_scale && !(*options.softmax_scale > 0.0f && *options.softmax_scale < 1e30f)) {
    api::invalid("softmax_scale is {}, expected a positive finite number", *options.softmax_scale);
  }
  check_threads(options.num_threads);
  api::check_schedule_shapes(schedule, b, a.q);
  return w;
}

/// The calls that a cascade is made of, their tensors in its workspace.
class Cascade {
 public:
  Cascade(const MlaCascadeArgs& a, const DecodeScheduleView& schedule, const MlaCascadeOptions& o,
          const Widths& w, void* workspace)
      : args_(a), schedule_(schedule), base_(static_cast<std::byte*>(workspace)) {
    const std::int64_t b = a.q.size(0), s_q = a.q.size(1), h = a.q.size(2), total = b * s_q;
    threads_ = cpu::threads_of_call(o.num_threads);
    const float scale = o.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(a.q.size(3))));
    decode_.q = take(a.q.dtype, {b, s_q, h, w.rank + w.rope});
    decode_.k_cache = a.k_cache;
    decode_.block_table = a.block_table;
    decode_.cache_seqlens = a.cache_seqlens;
    decode_.out = take(a.q.dtype, {b, s_q, h, w.rank});
    decode_.lse = take(DType::kFloat32, {b, h, s_q});
    decode_options_.softmax_scale = scale;
    decode_options_.causal = o.causal;
    decode_options_.num_threads = o.num_threads;

    // All queries of the batch are one sequence over the prefix.
    prefix_q_ = take(a.q.dtype, {total, h, a.q.size(3)});
    prefix_.q = prefix_q_;
    prefix_.k = a.prefix_k;
    prefix_.v = a.prefix_v;
    prefix_.out = take(a.q.dtype, {total, h, w.v});
    prefix_.lse = take(DType::kFloat32, {h, total});
    prefix_.cu_seqlens_k = take(DType::kInt32, {2});
    prefix_options_.softmax_scale = scale;
    prefix_options_.num_threads = o.num_threads;
    inner_ = used_;
  }

  /// Reads lengths and num_splits: they have been checked.
  std::size_t bytes() {
    set_starts(host_starts_);
    GqaArgs prefix = prefix_;
    prefix.cu_seqlens_k.data = host_starts_;
    inner_bytes_ = std::max(dense_decode_workspace_size(decode_, schedule_, decode_options_),
                            gqa_workspace_size(prefix, {}, prefix_options_));
    return inner_ + inner_bytes_;
  }

  void run() {
    std::byte* inner = base_ + inner_;
    cpu::absorb_queries(args_.q, args_.kv_b, decode_.q, threads_);
    dense_decode(decode_, schedule_, inner, inner_bytes_, decode_options_);
    set_starts(prefix_.cu_seqlens_k.ptr<std::int32_t>());
    gather_queries();
    gqa_attention(prefix_, {}, inner, inner_bytes_, prefix_options_);
    cpu::project_values(decode_.out, args_.kv_b, args_.out, threads_);
    const std::int64_t b = args_.q.size(0), s_q = args_.q.size(1), h = args_.q.size(2);
    TensorView out = prefix_.out, lse = prefix_.lse;
    out.rank = 4;
    out.shape = {b, s_q, h, args_.out.size(3)};
    out.strides = {s_q * prefix_.out.stride(0), prefix_.out.stride(0), prefix_.out.stride(1), 1};
    lse.rank = 3;
    lse.shape = {b, h, s_q};
    lse.strides = {s_q, b * s_q, 1};
    merge_states(out, lse, args_.out, decode_.lse, args_.out, args_.lse.defined() ? args_.lse : decode_.lse);
  }

 private:
  TensorView take(DType dtype, std::initializer_list<std::int64_t> shape) {
    constexpr std::size_t kAlignment = 64;
    // Without a workspace a size is asked for, and nothing is read there.
    alignas(kAlignment) static std::byte nowhere[kAlignment];
    std::byte* at = base_ != nullptr ? base_ + used_ : nowhere;
    const TensorView t = TensorView::contiguous(at, dtype, shape);
    used_ +=
        (static_cast<std::size_t>(t.numel()) * dtype_size(dtype) + kAlignment - 1) / kAlignment * kAlignment;
    return t;
  }
  void set_starts(std::int32_t* starts) const {
    starts[0] = 0;
    starts[1] = static_cast<std::int32_t>(args_.prefix_k.size(0));
  }
  /// (b, s_q) is one dimension to gqa_attention, which any strides of q need not make one.
  void gather_queries() const {
    const TensorView& q = args_.q;
    const auto element = static_cast<std::int64_t>(dtype_size(q.dtype));
    const std::int64_t heads = q.size(2), width = q.size(3);
    auto* to = static_cast<std::byte*>(prefix_q_.data);
    for (std::int64_t i = 0; i < q.size(0) * q.size(1); ++i) {
      for (std::int64_t head = 0; head < heads; ++head, to += width * element) {
        const std::byte* from =
            static_cast<const std::byte*>(q.data) +
            (i / q.size(1) * q.stride(0) + i % q.size(1) * q.stride(1) + head * q.stride(2)) * element;
        std::copy_n(from, width * element, to);
      }
    }
  }

  const MlaCascadeArgs& args_;
  const DecodeScheduleView& schedule_;
  std::byte* base_;
  std::size_t used_ = 0, inner_ = 0, inner_bytes_ = 0;
  int threads_ = 1;
  std::int32_t host_starts_[2] = {};
  TensorView prefix_q_;
  DenseDecodeArgs decode_;
  DenseDecodeOptions decode_options_;
  GqaArgs prefix_;
  GqaOptions prefix_options_;
};

void check_lengths(const MlaCascadeArgs& a, const MlaCascadeOptions& o) {
  const std::int64_t s_q = a.q.size(1);
  if (!o.causal || s_q == 1) return;
  for (std::int64_t i = 0; i < a.cache_seqlens.size(0); ++i) {
    const std::int64_t length = a.cache_seqlens.ptr<const std::int32_t>()[i];
    if (length < s_q) {
      api::invalid("cache_seqlens[{}] is {}, expected at least s_q = {} with causal", i, length, s_q);
    }
  }
}

}  // namespace

void expand_latents(const ExpandArgs& a, int num_threads) {
  check_tensor(a.k, "k", 3, kDtypes);
  check_device(a.k, "k", "expand_latents");
  check_tensor(a.v, "v", 3, {a.k.dtype});
  const std::int64_t h = a.k.size(1);
  if (h < 1 || h > kMaxHeads) api::invalid("k.shape[1] (h) is {}, expected 1 to {}", h, kMaxHeads);
  check_size(a.v, "v", 0, a.k.size(0), "k.shape[0]");
  check_size(a.v, "v", 1, h, "k.shape[1] (h)");
  check_widths(a.kv_b, a.k_cache, a.k.dtype, h, a.k.size(2), a.v.size(2), "k.shape[2] (d_nope + d_rope)");
  check_tensor(a.pages, "pages", 1, {DType::kInt32});
  api::check_last_dim_contiguous(a.pages, "pages");
  for (const auto& [t, name] : {std::pair{&a.k, "k"}, std::pair{&a.v, "v"}}) {
    api::check_last_dim_contiguous(*t, name);
    api::check_no_overlap(*t, name);
  }
  for (const auto& [t, name] : {std::pair{&a.v, "v"}, std::pair{&a.kv_b, "kv_b"},
                                std::pair{&a.k_cache, "k_cache"}, std::pair{&a.pages, "pages"}}) {
    api::check_same_device(*t, name, a.k, "k");
  }
  check_threads(num_threads);
  const std::int64_t page_size = a.k_cache.size(1), needed = (a.k.size(0) + page_size - 1) / page_size;
  if (a.pages.size(0) < needed) {
    api::invalid("pages.shape[0] is {}, expected at least {} for k.shape[0] = {} tokens", a.pages.size(0),
                 needed, a.k.size(0));
  }
  for (std::int64_t i = 0; i < needed; ++i) {
    const std::int32_t page = a.pages.ptr<const std::int32_t>()[i];
    if (page < 0 || page >= a.k_cache.size(0)) {
      api::invalid("pages[{}] is {}, expected 0 to {}", i, page, a.k_cache.size(0) - 1);
    }
  }
  cpu::expand_latents(a, cpu::threads_of_call(num_threads));
}

std::size_t mla_cascade_workspace_size(const MlaCascadeArgs& args, const DecodeScheduleView& schedule,
                                       const MlaCascadeOptions& options) {
  const Widths widths = check(args, schedule, options);
  return Cascade(args, schedule, options, widths, nullptr).bytes();
}

void mla_cascade(const MlaCascadeArgs& args, const DecodeScheduleView& schedule, void* workspace,
                 std::size_t workspace_bytes, const MlaCascadeOptions& options) {
  const Widths widths = check(args, schedule, options);
  const std::size_t needed = Cascade(args, schedule, options, widths, nullptr).bytes();
  api::check_workspace_bytes(workspace, workspace_bytes, needed, "mla_cascade_workspace_size");
  check_lengths(args, options);
  if (args.q.size(0) == 0) return;
  Cascade cascade(args, schedule, options, widths, workspace);
  cascade.bytes();
  cascade.run();
}

}  // namespace flash_mla
