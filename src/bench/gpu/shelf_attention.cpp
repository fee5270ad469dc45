// Problems of dense_prefill and gqa_attention.

#include <fmt/format.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "bench/compare.h"
#include "bench/gpu/kernels.h"
#include "bench/gpu/shelf_kernels.h"
#include "bench/gpu/shelf_problem.h"
#include "bench/problem.h"
#include "flash_mla/dense_prefill.h"
#include "flash_mla/gqa.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kSampledRows = 48;
constexpr std::size_t kHalf = 2;
constexpr int kNope = 128, kRope = 64;

/// What both operations share: q, out, a check.
class OwnKeys : public CaseProblem {
 public:
  OwnKeys(const ShelfCase& c, std::uint64_t seed, const Stream& stream) : shape_(c), seed_(seed) {
    q_ = normal(queries() * c.h_q * c.d_qk(), 0, stream);
    out_ = DeviceArray<std::uint16_t>(size(queries() * c.h_q * c.d_v()));
    out_.set(0xFF);
    scale_ = static_cast<float>(1 / std::sqrt(static_cast<double>(c.d_qk())));
  }
  std::size_t workspace_bytes() const override { return workspace_.bytes(); }
  std::string wrong(double& max_abs_error, const Stream& stream) const override;

 protected:
  /// Where keys and values are; slots are slots_.
  virtual OwnKeysProblem keys() const = 0;

  std::int64_t queries() const { return std::int64_t{shape_.b} * shape_.s_q; }
  DeviceArray<std::uint16_t> normal(std::int64_t count, std::uint64_t which, const Stream& stream) const {
    DeviceArray<std::uint16_t> array(size(count));
    fill_normal(array.data(), DType::kBFloat16, count, 4 * seed_ + which, stream.get());
    stream.wait();
    return array;
  }
  TensorView view(const DeviceArray<std::uint16_t>& array, std::initializer_list<std::int64_t> shape) const {
    return TensorView::contiguous(array.data(), DType::kBFloat16, shape, kFirstGpu);
  }
  /// 0, length, 2 length, ...
  DeviceArray<std::int32_t> offsets(int length) const {
    std::vector<std::int32_t> at(size(shape_.b + 1));
    for (std::size_t i = 0; i < at.size(); ++i) at[i] = static_cast<std::int32_t>(i) * length;
    return DeviceArray<std::int32_t>::of(at);
  }
  TensorView ints(const DeviceArray<std::int32_t>& array, std::initializer_list<std::int64_t> shape) const {
    return TensorView::contiguous(array.data(), DType::kInt32, shape, kFirstGpu);
  }
  void make_workspace(std::size_t bytes) {
    workspace_ = DeviceArray<std::byte>(bytes);
    workspace_.set(0xFF);
    // Copies and fills were on another stream than what follows.
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  ShelfCase shape_;
  std::uint64_t seed_;
  float scale_ = 1;
  DeviceArray<std::uint16_t> q_, out_;
  DeviceArray<std::int32_t> slots_;
  DeviceArray<std::byte> workspace_;
};

std::string OwnKeys::wrong(double& max_abs_error, const Stream& stream) const {
  const ShelfCase& c = shape_;
  Random random(seed_);
  // The last row, which is where a tail goes wrong, and random ones.
  std::vector<OutputRow> rows{{c.b - 1, c.s_q - 1, c.h_q - 1}};
  while (rows.size() < kSampledRows) {
    rows.push_back({static_cast<int>(random.integer(0, c.b - 1)),
                    static_cast<int>(random.integer(0, c.s_q - 1)),
                    static_cast<int>(random.integer(0, c.h_q - 1))});
  }
  const auto device_rows = DeviceArray<OutputRow>::of(rows);
  const DeviceArray<float> scores(rows.size() * size(c.s_k)), expected(rows.size() * size(c.d_v()));
  const DeviceArray<unsigned long long> nan_count(1);
  nan_count.set(0);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  OwnKeysProblem p = keys();
  p.q = q_.data();
  p.slots = slots_.data();
  p.s_q = c.s_q;
  p.s_k = c.s_k;
  p.h_q = c.h_q;
  p.h_kv = c.h_kv;
  p.d_v = c.d_v();
  p.causal = c.causal;
  p.scale = scale_;
  reference_own_keys(p, device_rows.data(), static_cast<int>(rows.size()), scores.data(), expected.data(),
                     stream.get());
  count_nan(out_.data(), DType::kBFloat16, queries() * c.h_q * c.d_v(), nan_count.data(), stream.get());
  stream.wait();

  std::vector<float> ref = to_host(expected);
  std::vector<std::uint16_t> out(size(c.d_v()));
  float no_lse = 0;
  // Values here have a deviation of 0.48 to the 0.1 of tolerance_for.
  Tolerance tolerance = tolerance_for(DType::kBFloat16);
  tolerance.out_abs *= 4.8;
  std::string failure;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const OutputRow& r = rows[i];
    const std::int64_t at = (std::int64_t{r.request} * c.s_q + r.query) * c.h_q + r.head;
    check(cudaMemcpy(out.data(), out_.data() + at * c.d_v(), out.size() * kHalf, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    const auto row_of = [&](void* data, DType dtype) {
      return TensorView::contiguous(data, dtype, {1, 1, 1, c.d_v()});
    };
    const TensorView lse = TensorView::contiguous(&no_lse, DType::kFloat32, {1, 1, 1});
    const Comparison compared =
        compare_outputs(row_of(out.data(), DType::kBFloat16), lse,
                        row_of(&ref[i * out.size()], DType::kFloat32), lse, tolerance);
    max_abs_error = std::max(max_abs_error, compared.out_max_abs);
    if (!compared.ok && failure.empty())
      failure =
          fmt::format("request {}, query {}, head {}: {}", r.request, r.query, r.head, compared.failure);
  }
  if (const unsigned long long found = to_host(nan_count)[0]; found > 0 && failure.empty())
    failure = fmt::format("{} NaN in out, expected none", found);
  return failure;
}

/// k_nope and v as the halves of one product, k_rope as columns of the latents.
class MlaPrefill : public OwnKeys {
 public:
  MlaPrefill(const ShelfCase& c, std::uint64_t seed, const Stream& stream) : OwnKeys(c, seed, stream) {
    const std::int64_t n = std::int64_t{c.b} * c.s_k;
    kv_ = normal(n * c.h_q * 2 * kNope, 1, stream);
    latents_ = normal(n * kLatent, 2, stream);
    cu_q_ = offsets(c.s_q);
    cu_k_ = offsets(c.s_k);
    std::vector<std::int32_t> slots(size(n));
    std::iota(slots.begin(), slots.end(), 0);
    slots_ = DeviceArray<std::int32_t>::of(slots);
    args_.q = view(q_, {queries(), c.h_q, kNope + kRope});
    args_.k_nope = view(kv_, {n, c.h_q, kNope});
    args_.k_nope.strides = {std::int64_t{c.h_q} * 2 * kNope, 2 * kNope, 1};
    args_.v = args_.k_nope;
    args_.v.data = kv_.data() + kNope;
    args_.k_rope = view(latents_, {n, kRope});
    args_.k_rope.strides[0] = kLatent;
    args_.k_rope.data = latents_.data() + (kLatent - kRope);
    args_.out = view(out_, {queries(), c.h_q, kNope});
    args_.cu_seqlens_q = ints(cu_q_, {c.b + 1});
    args_.cu_seqlens_k = ints(cu_k_, {c.b + 1});
    make_workspace(dense_prefill_workspace_size());
  }
  void call(const Stream& stream) const override {
    dense_prefill(args_, workspace_.data(), workspace_.bytes(),
                  {.softmax_scale = scale_, .causal = shape_.causal, .stream = stream.get()});
  }

 private:
  static constexpr int kLatent = 576;

  OwnKeysProblem keys() const override {
    OwnKeysProblem p{};
    p.k = args_.k_nope.data;
    p.v = args_.v.data;
    p.k_row = p.v_row = args_.k_nope.stride(0);
    p.k_head = p.v_head = args_.k_nope.stride(1);
    p.k_rope = args_.k_rope.data;
    p.k_rope_row = kLatent;
    p.d_k = kNope;
    p.d_rope = kRope;
    return p;
  }

  DeviceArray<std::uint16_t> kv_, latents_;
  DeviceArray<std::int32_t> cu_q_, cu_k_;
  DensePrefillArgs args_;
};

class Gqa : public OwnKeys {
 public:
  Gqa(const ShelfCase& c, std::uint64_t seed, const Stream& stream) : OwnKeys(c, seed, stream) {
    const std::int64_t row = std::int64_t{c.h_kv} * c.d;
    if (c.page_size > 0) {
      page_keys(row, stream);
    } else {
      const std::int64_t n = std::int64_t{c.b} * c.s_k;
      k_ = normal(n * row, 1, stream);
      v_ = normal(n * row, 2, stream);
      cu_k_ = offsets(c.s_k);
      std::vector<std::int32_t> slots(size(n));
      std::iota(slots.begin(), slots.end(), 0);
      slots_ = DeviceArray<std::int32_t>::of(slots);
      args_.k = view(k_, {n, c.h_kv, c.d});
      args_.cu_seqlens_k = ints(cu_k_, {c.b + 1});
    }
    args_.v = args_.k;
    args_.v.data = v_.data();
    args_.q = view(q_, {queries(), c.h_q, c.d});
    args_.out = view(out_, {queries(), c.h_q, c.d});
    options_.softmax_scale = scale_;
    options_.causal = c.causal;
    if (c.s_q == 1) make_schedule(stream);
    make_workspace(gqa_workspace_size(args_, schedule_, options_));
  }
  void call(const Stream& stream) const override {
    GqaOptions options = options_;
    options.stream = stream.get();
    gqa_attention(args_, schedule_, workspace_.data(), workspace_.bytes(), options);
  }

 private:
  void page_keys(std::int64_t row, const Stream& stream) {
    const ShelfCase& c = shape_;
    const std::int64_t per_request = (c.s_k + c.page_size - 1) / c.page_size, pages = c.b * per_request;
    k_ = normal(pages * c.page_size * row, 1, stream);
    v_ = normal(pages * c.page_size * row, 2, stream);
    std::vector<std::int32_t> table(size(pages)), slots;
    std::iota(table.begin(), table.end(), 0);
    Random random(seed_);
    for (std::size_t i = table.size() - 1; i > 0; --i)
      std::swap(table[i], table[size(random.integer(0, static_cast<std::int64_t>(i)))]);
    slots.reserve(size(std::int64_t{c.b} * c.s_k));
    for (int r = 0; r < c.b; ++r) {
      for (int j = 0; j < c.s_k; ++j)
        slots.push_back(table[size(r * per_request + j / c.page_size)] * c.page_size + j % c.page_size);
    }
    slots_ = DeviceArray<std::int32_t>::of(slots);
    table_ = DeviceArray<std::int32_t>::of(table);
    lengths_ = DeviceArray<std::int32_t>::of(std::vector<std::int32_t>(size(c.b), c.s_k));
    args_.k = view(k_, {pages, c.page_size, c.h_kv, c.d});
    args_.block_table = ints(table_, {c.b, per_request});
    args_.seqlens_k = ints(lengths_, {c.b});
  }
  void make_schedule(const Stream& stream) {
    const ShelfCase& c = shape_;
    if (!args_.seqlens_k.defined()) {
      lengths_ = DeviceArray<std::int32_t>::of(std::vector<std::int32_t>(size(c.b), c.s_k));
      args_.seqlens_k = ints(lengths_, {c.b});
    }
    const ScheduleOptions plan = gqa_schedule_options(0, c.s_q, c.h_q, c.h_kv, c.d);
    parts_ = DeviceArray<std::int32_t>(size(plan.num_parts) * 8);
    num_splits_ = DeviceArray<std::int32_t>(size(c.b + 1));
    schedule_.parts = ints(parts_, {plan.num_parts, 8});
    schedule_.num_splits = ints(num_splits_, {c.b + 1});
    build_decode_schedule(args_.seqlens_k, plan, schedule_, stream.get());
    stream.wait();
  }
  OwnKeysProblem keys() const override {
    OwnKeysProblem p{};
    p.k = k_.data();
    p.v = v_.data();
    p.k_row = p.v_row = std::int64_t{shape_.h_kv} * shape_.d;
    p.k_head = p.v_head = shape_.d;
    p.d_k = shape_.d;
    return p;
  }

  DeviceArray<std::uint16_t> k_, v_;
  DeviceArray<std::int32_t> cu_k_, table_, lengths_, parts_, num_splits_;
  GqaArgs args_;
  GqaOptions options_;
  DecodeScheduleView schedule_;
};

}  // namespace

std::unique_ptr<CaseProblem> make_shelf_attention(const ShelfCase& c, std::uint64_t seed,
                                                  const Stream& stream) {
  require_memory(c.name, static_cast<std::size_t>(c.bytes()));
  if (c.operation == ShelfOperation::kMlaPrefill) return std::make_unique<MlaPrefill>(c, seed, stream);
  return std::make_unique<Gqa>(c, seed, stream);
}

}  // namespace flash_mla::bench::gpu
