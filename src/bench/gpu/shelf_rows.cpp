// Problems of what stands around attention: pages, norms, RoPE, routing. Each is checked against the same call on the CPU.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/element.h"
#include "bench/gpu/kernels.h"
#include "bench/gpu/shelf_problem.h"
#include "bench/problem.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/pages.h"
#include "flash_mla/routing.h"
#include "flash_mla/rows.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kPage = 64;

using Half = std::uint16_t;

/// bfloat16 on both sides, from a fill on the GPU.
Both<Half> normal(std::int64_t count, std::uint64_t seed, const Stream& stream) {
  Both<Half> both;
  both.gpu = DeviceArray<Half>(size(count));
  fill_normal(both.gpu.data(), DType::kBFloat16, count, seed, stream.get());
  stream.wait();
  both.host = to_host(both.gpu);
  return both;
}

template <class T>
Both<T> poison(std::int64_t count) {
  std::vector<T> values(size(count));
  std::fill_n(reinterpret_cast<unsigned char*>(values.data()), values.size() * sizeof(T), 0xFF);
  return Both(std::move(values));
}

/// One rounding of difference, relative, and what a rotation leaves of a cancelled sum.
std::string difference(const char* name, const Both<Half>& tensor, double& max_abs_error) {
  const std::vector<Half> got = to_host(tensor.gpu);
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double x = double{to_float(Bf16{got[i]})}, want = double{to_float(Bf16{tensor.host[i]})};
    if (std::isnan(want) && got[i] == tensor.host[i]) continue;  // what neither side writes
    max_abs_error = std::max(max_abs_error, std::abs(x - want));
    if (!(std::abs(x - want) <= 0x1p-7 * std::abs(want) + 1e-4))
      return fmt::format("element {} of {} is {}, expected {}, the CPU's", i, name, x, want);
  }
  return "";
}

/// Requests that get a few tokens each behind a prefix, in pages that are dealt out at random.
struct Pages {
  Pages(int tokens, std::uint64_t seed) {
    const int requests = std::min(tokens, 32), each = (tokens + requests - 1) / requests;
    constexpr int kPrefix = 100;
    const int per_request = (kPrefix + each + kPage - 1) / kPage;
    count = requests * per_request;
    std::vector<std::int32_t> at(size(requests + 1)), table(size(count)), batch, position;
    for (int i = 0; i <= requests; ++i) at[size(i)] = i * per_request;
    std::iota(table.begin(), table.end(), 0);
    Random random(seed);
    for (std::size_t i = table.size() - 1; i > 0; --i)
      std::swap(table[i], table[size(random.integer(0, static_cast<std::int64_t>(i)))]);
    std::vector<std::int64_t> slot;
    for (int t = 0; t < tokens; ++t) {
      batch.push_back(t / each);
      position.push_back(kPrefix + t % each);
      slot.push_back(std::int64_t{table[size(t / each * per_request + position.back() / kPage)]} * kPage +
                     position.back() % kPage);
    }
    indptr = Both(std::move(at));
    indices = Both(std::move(table));
    batches = Both(std::move(batch));
    positions = Both(std::move(position));
    slots = Both(std::move(slot));
  }
  std::int64_t count = 0;
  Both<std::int32_t> indptr, indices, batches, positions;
  Both<std::int64_t> slots;
};

/// What every problem here does: the call on either side, and tensors that are compared.
class Rows : public CaseProblem {
 public:
  explicit Rows(const ShelfCase& c) : shape_(c) {}
  void call(const Stream& stream) const override { const_cast<Rows&>(*this).run(true, stream.get()); }
  std::string wrong(double& max_abs_error, const Stream&) const override {
    Rows& self = const_cast<Rows&>(*this);  // its host memory is written
    self.run(false, nullptr);
    return self.compare(max_abs_error);
  }

 protected:
  virtual void run(bool on_gpu, void* stream) = 0;
  virtual std::string compare(double& max_abs_error) = 0;

  ShelfCase shape_;
};

class PageAppend : public Rows {
 public:
  PageAppend(const ShelfCase& c, std::uint64_t seed, const Stream& stream)
      : Rows(c),
        pages_(c.tokens, seed),
        key_(normal(row() * c.tokens, 2 * seed, stream)),
        value_(normal(row() * c.tokens, 2 * seed + 1, stream)),
        k_cache_(poison<Half>(pages_.count * kPage * row())),
        v_cache_(poison<Half>(pages_.count * kPage * row())) {}

 private:
  std::int64_t row() const { return std::int64_t{shape_.h_kv} * shape_.d; }
  void run(bool on_gpu, void* stream) override {
    const std::int64_t n = shape_.tokens, h = shape_.h_kv, d = shape_.d;
    const auto bf16 = [&](Both<Half>& both, std::initializer_list<std::int64_t> shape) {
      return both.view(on_gpu, DType::kBFloat16, shape);
    };
    const auto ints = [&](Both<std::int32_t>& both) {
      return both.view(on_gpu, DType::kInt32, {static_cast<std::int64_t>(both.host.size())});
    };
    PageAppendArgs a;
    a.key = bf16(key_, {n, h, d});
    a.value = bf16(value_, {n, h, d});
    a.batch_indices = ints(pages_.batches);
    a.positions = ints(pages_.positions);
    a.page_indptr = ints(pages_.indptr);
    a.page_indices = ints(pages_.indices);
    a.k_cache = bf16(k_cache_, {pages_.count, kPage, h, d});
    a.v_cache = bf16(v_cache_, {pages_.count, kPage, h, d});
    append_pages(a, {.stream = stream});
  }
  std::string compare(double& max_abs_error) override {
    const std::string keys = difference("k_cache", k_cache_, max_abs_error);
    return keys.empty() ? difference("v_cache", v_cache_, max_abs_error) : keys;
  }

  Pages pages_;
  Both<Half> key_, value_, k_cache_, v_cache_;
};

class LatentAppend : public Rows {
 public:
  LatentAppend(const ShelfCase& c, std::uint64_t seed, const Stream& stream)
      : Rows(c),
        pages_(c.tokens, seed),
        latents_(normal(std::int64_t{c.tokens} * kWidth, seed, stream)),
        cache_(poison<Half>(pages_.count * kPage * kWidth)) {}

 private:
  static constexpr int kWidth = 576, kRope = 64;

  void run(bool on_gpu, void* stream) override {
    const std::int64_t n = shape_.tokens;
    KvAppendArgs a;
    a.latent = a.rope = latents_.view(on_gpu, DType::kBFloat16, {n, kWidth});
    a.latent.shape[1] = kWidth - kRope;
    a.rope.shape[1] = kRope;
    a.rope.data = a.latent.ptr<Half>() + (kWidth - kRope);
    a.slot_mapping = pages_.slots.view(on_gpu, DType::kInt64, {n});
    a.cache.format = KvFormat::kBFloat16;
    a.cache.data = cache_.view(on_gpu, DType::kBFloat16, {pages_.count, kPage, 1, kWidth});
    append_kv(a, {.stream = stream});
  }
  std::string compare(double& max_abs_error) override {
    return difference("the cache", cache_, max_abs_error);
  }

  Pages pages_;
  Both<Half> latents_, cache_;
};

class Norm : public Rows {
 public:
  Norm(const ShelfCase& c, std::uint64_t seed, const Stream& stream)
      : Rows(c),
        x_(normal(std::int64_t{c.tokens} * c.d, 3 * seed, stream)),
        residual_(normal(std::int64_t{c.tokens} * c.d, 3 * seed + 1, stream)),
        weight_(normal(c.d, 3 * seed + 2, stream)),
        out_(poison<Half>(std::int64_t{c.tokens} * c.d)) {}

 private:
  void run(bool on_gpu, void* stream) override {
    const std::int64_t n = shape_.tokens, d = shape_.d;
    const auto rows = [&](Both<Half>& both) { return both.view(on_gpu, DType::kBFloat16, {n, d}); };
    const TensorView weight = weight_.view(on_gpu, DType::kBFloat16, {d});
    if (shape_.operation == ShelfOperation::kAddRmsNorm) {
      add_rms_norm(rows(x_), rows(residual_), weight, rows(out_), {}, {.stream = stream});
    } else {
      rms_norm(rows(x_), weight, rows(out_), {}, {.stream = stream});
    }
  }
  std::string compare(double& max_abs_error) override {
    const std::string out = difference("out", out_, max_abs_error);
    return out.empty() ? difference("residual", residual_, max_abs_error) : out;
  }

  Both<Half> x_, residual_, weight_, out_;
};

class Rope : public Rows {
 public:
  Rope(const ShelfCase& c, std::uint64_t seed, const Stream& stream)
      : Rows(c), x_(normal(std::int64_t{c.tokens} * c.h_q * c.d, seed, stream)) {
    std::vector<std::int32_t> positions(size(c.tokens));
    std::iota(positions.begin(), positions.end(), 0);
    positions_ = Both(std::move(positions));
  }

 private:
  void run(bool on_gpu, void* stream) override {
    const std::int64_t n = shape_.tokens;
    const TensorView x = x_.view(on_gpu, DType::kBFloat16, {n, shape_.h_q, shape_.d});
    apply_rope(x, positions_.view(on_gpu, DType::kInt32, {n}), {}, x, {}, {.stream = stream});
  }
  std::string compare(double& max_abs_error) override { return difference("x", x_, max_abs_error); }

  Both<Half> x_;
  Both<std::int32_t> positions_;
};

/// As DeepSeek-V3 has it: sigmoid, a bias that chooses, 4 of 8 groups by their two best.
class Routing : public Rows {
 public:
  Routing(const ShelfCase& c, std::uint64_t seed) : Rows(c) {
    Random random(seed);
    std::vector<float> logits(size(std::int64_t{c.tokens} * c.d)), bias(size(c.d));
    for (float& x : logits) x = random.normal();
    for (float& x : bias) x = random.normal() / 8;
    logits_ = Both(std::move(logits));
    bias_ = Both(std::move(bias));
    ids_ = poison<std::int32_t>(std::int64_t{c.tokens} * c.topk);
    weights_ = poison<float>(std::int64_t{c.tokens} * c.topk);
  }

 private:
  void run(bool on_gpu, void* stream) override {
    const std::int64_t n = shape_.tokens;
    RoutingArgs a;
    a.logits = logits_.view(on_gpu, DType::kFloat32, {n, shape_.d});
    a.bias = bias_.view(on_gpu, DType::kFloat32, {shape_.d});
    a.ids = ids_.view(on_gpu, DType::kInt32, {n, shape_.topk});
    a.weights = weights_.view(on_gpu, DType::kFloat32, {n, shape_.topk});
    RoutingOptions options;
    options.scores = ExpertScores::kSigmoid;
    options.num_groups = 8;
    options.groups_kept = 4;
    options.groups_by_best_two = true;
    options.normalise = true;
    options.scale = 2.5f;
    options.stream = stream;
    choose_experts(a, options);
  }
  std::string compare(double& max_abs_error) override {
    const std::vector<std::int32_t> ids = to_host(ids_.gpu);
    const std::vector<float> weights = to_host(weights_.gpu);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] != ids_.host[i])
        return fmt::format("ids[{}] is {}, expected {}, the CPU's", i, ids[i], ids_.host[i]);
      const double off = std::abs(double{weights[i]} - double{weights_.host[i]});
      max_abs_error = std::max(max_abs_error, off);
      if (!(off <= 1e-5))
        return fmt::format("weights[{}] is {}, expected {}, the CPU's", i, weights[i], weights_.host[i]);
    }
    return "";
  }

  Both<float> logits_, bias_, weights_;
  Both<std::int32_t> ids_;
};

}  // namespace

std::unique_ptr<CaseProblem> make_shelf_rows(const ShelfCase& c, std::uint64_t seed, const Stream& stream) {
  require_memory(c.name, 2 * static_cast<std::size_t>(c.bytes()));
  std::unique_ptr<CaseProblem> problem;
  switch (c.operation) {
    case ShelfOperation::kAppendPages:
      problem = std::make_unique<PageAppend>(c, seed, stream);
      break;
    case ShelfOperation::kAppendLatents:
      problem = std::make_unique<LatentAppend>(c, seed, stream);
      break;
    case ShelfOperation::kRope:
      problem = std::make_unique<Rope>(c, seed, stream);
      break;
    case ShelfOperation::kRouting:
      problem = std::make_unique<Routing>(c, seed);
      break;
    default:
      problem = std::make_unique<Norm>(c, seed, stream);
  }
  // The copies were on another stream than what follows.
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return problem;
}

}  // namespace flash_mla::bench::gpu
