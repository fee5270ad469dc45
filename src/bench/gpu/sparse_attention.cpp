// Problems of sparse_decode, sparse_prefill and dense_fp8_decode.

#include <fmt/format.h>

#include <numeric>
#include <vector>

#include "bench/compare.h"
#include "bench/gpu/kernels.h"
#include "bench/gpu/sparse_kernels.h"
#include "bench/gpu/sparse_problem.h"
#include "bench/problem.h"
#include "flash_mla/dense_fp8.h"
#include "flash_mla/sparse.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kDimV = 512;
constexpr int kSampledRows = 48;
constexpr float kSoftmaxScale = 0.1352338f;
constexpr std::size_t kHalf = 2;

/// A pool with `tokens` for each of `requests`: those of request r begin at slot r * slots_per_request.
class CachePool {
 public:
  CachePool() = default;
  CachePool(KvFormat format, int d_qk, int requests, int tokens, int page_size, std::uint64_t seed,
            const Stream& stream) {
    const std::int64_t pages_per_request = (std::int64_t{tokens} + page_size - 1) / page_size;
    const bool fp8 = kv::is_fp8(format);
    const std::int64_t width = fp8 ? kv::token_bytes(format, d_qk) : d_qk;
    slots_per_request = pages_per_request * page_size;
    const std::int64_t pages = requests * pages_per_request;
    memory_ = DeviceArray<std::byte>(size(pages * page_size * width) * (fp8 ? 1 : kHalf));
    view.format = format;
    if (format == KvFormat::kFp8Tensor) view.scale = 0.0045f;  // 448 of it are four deviations
    view.data = TensorView::contiguous(memory_.data(), fp8 ? DType::kUInt8 : DType::kBFloat16,
                                       {pages, page_size, 1, width}, kFirstGpu);
    fill_tokens(kv::make_pool(view), seed, stream.get());
  }
  KvCacheView view;
  std::int64_t slots_per_request = 0;

 private:
  DeviceArray<std::byte> memory_;
};

/// Lists of `topk` distinct tokens out of a request's, in random order, for each of its query tokens: slots.
std::vector<std::int32_t> draw_lists(const SparseCase& c, int topk, std::int64_t slots_per_request,
                                     Random& random) {
  std::vector<std::int32_t> lists, tokens(size(c.s_kv));
  lists.reserve(size(std::int64_t{c.b} * c.s_q * topk));
  std::iota(tokens.begin(), tokens.end(), 0);
  for (int r = 0; r < c.b; ++r) {
    for (int i = 0; i < c.s_q; ++i) {
      for (int j = 0; j < topk; ++j) {
        std::swap(tokens[size(j)], tokens[size(random.integer(j, c.s_kv - 1))]);
        lists.push_back(static_cast<std::int32_t>(r * slots_per_request) + tokens[size(j)]);
      }
    }
  }
  return lists;
}

/// As verify.cpp's: values here have a deviation of 0.48 to the 0.1 of tolerance_for.
Tolerance tolerance() {
  Tolerance t = tolerance_for(DType::kBFloat16);
  t.out_abs *= 4.8;
  return t;
}

/// What the three operations share: q, outputs, a check.
class Attention : public CaseProblem {
 public:
  Attention(const SparseCase& c, std::uint64_t seed, const Stream& stream) : shape_(c), seed_(seed) {
    const std::int64_t rows = std::int64_t{c.b} * c.s_q * c.h_q;
    q_ = DeviceArray<std::byte>(size(rows * c.d_qk()) * kHalf);
    out_ = DeviceArray<std::byte>(size(rows * kDimV) * kHalf);
    lse_ = DeviceArray<float>(size(rows));
    fill_normal(q_.data(), DType::kBFloat16, rows * c.d_qk(), 2 * seed + 1, stream.get());
    stream.wait();
    out_.set(0xFF);
    lse_.set(0xFF);
  }
  std::size_t workspace_bytes() const override { return workspace_.bytes(); }
  std::string wrong(double& max_abs_error, const Stream& stream) const override;

 protected:
  /// The slots that query token (r, i) attends to, of both caches.
  virtual std::vector<std::int32_t> slots_of(int r, int i, int& count) const = 0;
  /// Where lse of (request, query token, head) is.
  virtual std::size_t lse_at(int r, int i, int h) const {
    return size((std::int64_t{r} * shape_.h_q + h) * shape_.s_q + i);
  }
  virtual kv::Pool pool(int which) const = 0;

  TensorView view(const DeviceArray<std::byte>& array, std::initializer_list<std::int64_t> shape) const {
    return TensorView::contiguous(array.data(), DType::kBFloat16, shape, kFirstGpu);
  }
  void make_workspace(std::size_t bytes) {
    workspace_ = DeviceArray<std::byte>(bytes);
    workspace_.set(0xFF);
    // Copies and fills were on another stream than what follows.
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  SparseCase shape_;
  std::uint64_t seed_;
  DeviceArray<std::byte> q_, out_, workspace_;
  DeviceArray<float> lse_;
};

std::string Attention::wrong(double& max_abs_error, const Stream& stream) const {
  const SparseCase& c = shape_;
  Random random(seed_);
  struct Place {
    int r, i, h;
  };
  // The last row, which is where a tail goes wrong, and random ones.
  std::vector<Place> places{{c.b - 1, c.s_q - 1, c.h_q - 1}};
  while (places.size() < kSampledRows) {
    places.push_back({static_cast<int>(random.integer(0, c.b - 1)),
                      static_cast<int>(random.integer(0, c.s_q - 1)),
                      static_cast<int>(random.integer(0, c.h_q - 1))});
  }
  std::vector<ListedRow> rows;
  std::vector<std::int32_t> slots;
  std::int64_t longest = 0;
  for (const Place& p : places) {
    int count = 0;
    const std::vector<std::int32_t> own = slots_of(p.r, p.i, count);
    const auto length = static_cast<std::int64_t>(own.size());
    rows.push_back({(std::int64_t{p.r} * c.s_q + p.i) * c.h_q + p.h, static_cast<std::int64_t>(slots.size()),
                    count, static_cast<int>(length) - count});
    slots.insert(slots.end(), own.begin(), own.end());
    longest = std::max(longest, length);
  }
  const auto d_rows = DeviceArray<ListedRow>::of(rows);
  const auto d_slots = DeviceArray<std::int32_t>::of(slots);
  const DeviceArray<double> scores(rows.size() * size(longest));
  const DeviceArray<float> d_out(rows.size() * kDimV), d_lse(rows.size());
  const DeviceArray<unsigned long long> nan_count(1);
  nan_count.set(0);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  reference_listed_rows({q_.data(),
                         {pool(0), pool(1)},
                         d_slots.data(),
                         d_rows.data(),
                         static_cast<int>(rows.size()),
                         double{kSoftmaxScale},
                         scores.data(),
                         longest,
                         d_out.data(),
                         d_lse.data()},
                        stream.get());
  count_nan(out_.data(), DType::kBFloat16, static_cast<std::int64_t>(out_.bytes() / kHalf), nan_count.data(),
            stream.get());
  count_nan(lse_.data(), DType::kFloat32, static_cast<std::int64_t>(lse_.bytes() / sizeof(float)),
            nan_count.data(), stream.get());
  stream.wait();
  std::vector<float> ref_out = to_host(d_out), ref_lse = to_host(d_lse), lse = to_host(lse_);
  std::vector<std::uint16_t> out(kDimV);
  std::string failure;
  for (std::size_t n = 0; n < rows.size(); ++n) {
    check(cudaMemcpy(out.data(), out_.data() + size(rows[n].query * kDimV) * kHalf, kDimV * kHalf,
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    const auto row_of = [](void* data, DType dtype) {
      return TensorView::contiguous(data, dtype, {1, 1, 1, kDimV});
    };
    const auto scalar = [](float* data) { return TensorView::contiguous(data, DType::kFloat32, {1, 1, 1}); };
    const Place& p = places[n];
    const Comparison compared =
        compare_outputs(row_of(out.data(), DType::kBFloat16), scalar(&lse[lse_at(p.r, p.i, p.h)]),
                        row_of(&ref_out[n * kDimV], DType::kFloat32), scalar(&ref_lse[n]), tolerance());
    max_abs_error = std::max(max_abs_error, compared.out_max_abs);
    if (!compared.ok && failure.empty())
      failure = fmt::format("request {}, query {}, head {}: {}", p.r, p.i, p.h, compared.failure);
  }
  if (const unsigned long long found = to_host(nan_count)[0]; found > 0 && failure.empty())
    failure = fmt::format("{} NaN in out and lse, expected none", found);
  return failure;
}

/// Decode or prefill over lists.
class OverLists : public Attention {
 public:
  OverLists(const SparseCase& c, std::uint64_t seed, const Stream& stream)
      : Attention(c, seed, stream),
        keys_(c.format, c.d_qk(), c.b, c.s_kv, c.page_size, 2 * seed + 2, stream) {
    Random random(seed);
    lists_ = draw_lists(c, c.topk, keys_.slots_per_request, random);
    indices_ = DeviceArray<std::int32_t>::of(lists_);
    if (c.extra_topk > 0) {
      extra_ = CachePool(c.format, c.d_qk(), c.b, c.s_kv, c.extra_page_size, 2 * seed + 3, stream);
      extra_lists_ = draw_lists(c, c.extra_topk, extra_.slots_per_request, random);
      extra_indices_ = DeviceArray<std::int32_t>::of(extra_lists_);
    }
    stream.wait();
  }

 protected:
  std::vector<std::int32_t> slots_of(int r, int i, int& count) const override {
    const auto part = [&](const std::vector<std::int32_t>& lists, int topk) {
      const auto begin = lists.begin() + (std::int64_t{r} * shape_.s_q + i) * topk;
      return std::vector<std::int32_t>(begin, begin + topk);
    };
    std::vector<std::int32_t> slots = part(lists_, shape_.topk);
    count = shape_.topk;
    if (shape_.extra_topk > 0) {
      const std::vector<std::int32_t> extra = part(extra_lists_, shape_.extra_topk);
      slots.insert(slots.end(), extra.begin(), extra.end());
    }
    return slots;
  }
  kv::Pool pool(int which) const override { return kv::make_pool(which == 0 ? keys_.view : extra_.view); }

  CachePool keys_, extra_;
  std::vector<std::int32_t> lists_, extra_lists_;
  DeviceArray<std::int32_t> indices_, extra_indices_;
};

class SparseDecodeProblem : public OverLists {
 public:
  SparseDecodeProblem(const SparseCase& c, std::uint64_t seed, const Stream& stream)
      : OverLists(c, seed, stream) {
    const auto lists = [&](const DeviceArray<std::int32_t>& memory, int topk) {
      return TensorView::contiguous(memory.data(), DType::kInt32, {c.b, c.s_q, topk}, kFirstGpu);
    };
    args_.q = view(q_, {c.b, c.s_q, c.h_q, c.d_qk()});
    args_.keys = {keys_.view, lists(indices_, c.topk)};
    if (c.extra_topk > 0) args_.extra = {extra_.view, lists(extra_indices_, c.extra_topk)};
    args_.out = view(out_, {c.b, c.s_q, c.h_q, kDimV});
    args_.lse = TensorView::contiguous(lse_.data(), DType::kFloat32, {c.b, c.h_q, c.s_q}, kFirstGpu);
    make_workspace(sparse_decode_workspace_size(args_, {.softmax_scale = kSoftmaxScale}));
  }
  void call(const Stream& stream) const override {
    sparse_decode(args_, workspace_.data(), workspace_.bytes(),
                  {.softmax_scale = kSoftmaxScale, .stream = stream.get()});
  }

 private:
  SparseDecodeArgs args_;
};

class SparsePrefillProblem : public OverLists {
 public:
  SparsePrefillProblem(const SparseCase& c, std::uint64_t seed, const Stream& stream)
      : OverLists(c, seed, stream) {
    const std::int64_t n = std::int64_t{c.b} * c.s_q;
    max_logits_ = DeviceArray<float>(size(n * c.h_q));
    args_.q = view(q_, {n, c.h_q, c.d_qk()});
    args_.cache = keys_.view;
    args_.indices = TensorView::contiguous(indices_.data(), DType::kInt32, {n, c.topk}, kFirstGpu);
    args_.out = view(out_, {n, c.h_q, kDimV});
    args_.lse = TensorView::contiguous(lse_.data(), DType::kFloat32, {n, c.h_q}, kFirstGpu);
    args_.max_logits = TensorView::contiguous(max_logits_.data(), DType::kFloat32, {n, c.h_q}, kFirstGpu);
    make_workspace(sparse_prefill_workspace_size(args_, {.softmax_scale = kSoftmaxScale}));
  }
  void call(const Stream& stream) const override {
    sparse_prefill(args_, workspace_.data(), workspace_.bytes(),
                   {.softmax_scale = kSoftmaxScale, .stream = stream.get()});
  }

 private:
  std::size_t lse_at(int r, int i, int h) const override {
    return size((std::int64_t{r} * shape_.s_q + i) * shape_.h_q + h);
  }

  DeviceArray<float> max_logits_;
  SparsePrefillArgs args_;
};

class DenseFp8Problem : public Attention {
 public:
  DenseFp8Problem(const SparseCase& c, std::uint64_t seed, const Stream& stream)
      : Attention(c, seed, stream),
        keys_(c.format, c.d_qk(), c.b, c.s_kv, c.page_size, 2 * seed + 2, stream) {
    const std::int64_t pages = keys_.view.data.size(0), per_request = pages / c.b;
    table_.resize(size(pages));
    std::iota(table_.begin(), table_.end(), 0);
    Random random(seed);
    for (std::size_t i = table_.size() - 1; i > 0; --i)
      std::swap(table_[i], table_[size(random.integer(0, static_cast<std::int64_t>(i)))]);
    block_table_ = DeviceArray<std::int32_t>::of(table_);
    cache_seqlens_ = DeviceArray<std::int32_t>::of(std::vector<std::int32_t>(size(c.b), c.s_kv));
    args_.q = view(q_, {c.b, c.s_q, c.h_q, c.d_qk()});
    args_.cache = keys_.view;
    args_.block_table =
        TensorView::contiguous(block_table_.data(), DType::kInt32, {c.b, per_request}, kFirstGpu);
    args_.cache_seqlens = TensorView::contiguous(cache_seqlens_.data(), DType::kInt32, {c.b}, kFirstGpu);
    args_.out = view(out_, {c.b, c.s_q, c.h_q, kDimV});
    args_.lse = TensorView::contiguous(lse_.data(), DType::kFloat32, {c.b, c.h_q, c.s_q}, kFirstGpu);
    options_.softmax_scale = kSoftmaxScale;
    const ScheduleOptions plan = cuda_schedule_options(0, c.s_q, c.h_q, 1, c.b);
    parts_ = DeviceArray<std::int32_t>(size(plan.num_parts) * 8);
    num_splits_ = DeviceArray<std::int32_t>(size(c.b + 1));
    schedule_.parts = TensorView::contiguous(parts_.data(), DType::kInt32, {plan.num_parts, 8}, kFirstGpu);
    schedule_.num_splits = TensorView::contiguous(num_splits_.data(), DType::kInt32, {c.b + 1}, kFirstGpu);
    build_decode_schedule(args_.cache_seqlens, plan, schedule_, stream.get());
    stream.wait();
    make_workspace(dense_fp8_decode_workspace_size(args_, schedule_, options_));
  }
  void call(const Stream& stream) const override {
    DenseFp8DecodeOptions options = options_;
    options.stream = stream.get();
    dense_fp8_decode(args_, schedule_, workspace_.data(), workspace_.bytes(), options);
  }

 private:
  std::vector<std::int32_t> slots_of(int r, int i, int& count) const override {
    static_cast<void>(i);  // without a causal mask every query token sees all
    const auto per_request = static_cast<std::int64_t>(table_.size()) / shape_.b;
    std::vector<std::int32_t> slots;
    slots.reserve(size(shape_.s_kv));
    for (int t = 0; t < shape_.s_kv; ++t) {
      slots.push_back(table_[size(r * per_request + t / shape_.page_size)] * shape_.page_size +
                      t % shape_.page_size);
    }
    count = shape_.s_kv;
    return slots;
  }
  kv::Pool pool(int which) const override { return which == 0 ? kv::make_pool(keys_.view) : kv::Pool{}; }

  CachePool keys_;
  std::vector<std::int32_t> table_;
  DeviceArray<std::int32_t> block_table_, cache_seqlens_, parts_, num_splits_;
  DenseFp8DecodeArgs args_;
  DenseFp8DecodeOptions options_;
  DecodeScheduleView schedule_;
};

}  // namespace

std::unique_ptr<CaseProblem> make_attention_problem(const SparseCase& c, std::uint64_t seed,
                                                    const Stream& stream) {
  const std::int64_t token = kv::token_bytes(c.format, c.d_qk()), rows = std::int64_t{c.b} * c.s_q * c.h_q;
  require_memory(c.name, size(std::int64_t{c.b} * c.s_kv * token * (c.extra_topk > 0 ? 2 : 1)) +
                             size(rows * (c.d_qk() + kDimV)) * kHalf);
  switch (c.operation) {
    case SparseOperation::kSparsePrefill:
      return std::make_unique<SparsePrefillProblem>(c, seed, stream);
    case SparseOperation::kDenseFp8Decode:
      return std::make_unique<DenseFp8Problem>(c, seed, stream);
    default:
      return std::make_unique<SparseDecodeProblem>(c, seed, stream);
  }
}

}  // namespace flash_mla::bench::gpu
