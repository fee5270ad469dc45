#include "kernels/gemm/cpu/gemm.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "base/parallel.h"
#include "kernels/gemm/cpu/panel_weight.h"

// Tile heights, measured on an AVX-512 machine with bf16 weights of 2048 x 2048 that fit its L3: 1 to 4 rows
// take the same 40 us, 64 rows run at the peak rate, and more rows at once are slower again. So tiles are at
// most 64 rows, and the batch-invariant mode takes tiles of 4, which costs a single row nothing.

namespace flash_mla::cpu {
namespace {

using Desc = dnnl::memory::desc;
using Type = dnnl::memory::data_type;
using Tag = dnnl::memory::format_tag;

constexpr std::int64_t kMaxTileRows = 64;
constexpr std::int64_t kInvariantTileRows = 4;

Type type_of(DType dtype) { return dtype == DType::kBFloat16 ? Type::bf16 : Type::f32; }

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

/// Scratch memory of one thread that grows and stays.
class Scratch {
 public:
  std::byte* get(std::size_t bytes) {
    if (bytes > size_) {
      data_.reset(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Delete> data_;
  std::size_t size_ = 0;
};

std::size_t row_bytes(const Matrix& m) { return static_cast<std::size_t>(m.columns) * dtype_size(m.dtype); }

void copy_rows(const Matrix& from, std::byte* to) {
  for (std::int64_t i = 0; i < from.rows; ++i) {
    std::memcpy(to + static_cast<std::size_t>(i) * row_bytes(from), from.row(i), row_bytes(from));
  }
}

void copy_rows(const std::byte* from, const Matrix& to) {
  for (std::int64_t i = 0; i < to.rows; ++i) {
    std::memcpy(to.row(i), from + static_cast<std::size_t>(i) * row_bytes(to), row_bytes(to));
  }
}

/// oneDNN plans for, and runs on, as many threads as OpenMP would use.
class ThreadLimit {
 public:
#if defined(_OPENMP)
  explicit ThreadLimit(int threads) : before_(omp_get_max_threads()) { omp_set_num_threads(threads); }
  ~ThreadLimit() { omp_set_num_threads(before_); }
#else
  explicit ThreadLimit(int) {}
  ~ThreadLimit() {}
#endif
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;

 private:
  [[maybe_unused]] int before_ = 1;
};

/// Blocked layout of a (in_features, out_features) operand; it does not depend on the rows of the other.
Desc blocked_weights(std::int64_t out_features, std::int64_t in_features, Type type) {
  const ThreadLimit limit(1);
  const Desc x({kMaxTileRows, in_features}, type, Tag::ab);
  const Desc w({in_features, out_features}, type, Tag::any);
  const Desc y({kMaxTileRows, out_features}, type, Tag::ab);
  return dnnl::matmul::primitive_desc(dnnl::matmul::desc(x, w, y), cpu_engine()).weights_desc();
}

}  // namespace

struct PackedWeight::Memory {
  dnnl::memory memory;
  DType dtype = DType::kFloat32;
  std::unique_ptr<PanelWeight> panels;  ///< instead of `memory`
};

PackedWeight::PackedWeight() = default;
PackedWeight::PackedWeight(PackedWeight&&) noexcept = default;
PackedWeight& PackedWeight::operator=(PackedWeight&&) noexcept = default;
PackedWeight::~PackedWeight() = default;

bool PackedWeight::worth_threads(std::int64_t rows) const {
  return flash_mla::worth_threads(out_features_ * in_features_, rows);
}

std::size_t PackedWeight::bytes() const {
  return memory_->panels ? memory_->panels->bytes() : memory_->memory.get_desc().get_size();
}

struct Gemm::Impl {
  // m, n, k, operand type, result type, layout of the weights, bias, accumulate, threads
  enum Layout { kBlocked, kPlain, kTransposed };
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, DType, DType, Layout, bool, bool, int>;

  struct Kernel {
    dnnl::matmul primitive;
    Desc x, weights, bias, y, scratchpad;
    std::uint64_t id = 0;
  };

  /// A kernel's operands on one thread. Making them anew costs as much as a small product.
  struct Operands {
    dnnl::memory x, weights, bias, y, scratchpad;

    explicit Operands(const Kernel& kernel)
        : x(unset(kernel.x)),
          weights(unset(kernel.weights)),
          bias(unset(kernel.bias)),
          y(unset(kernel.y)),
          scratchpad(unset(kernel.scratchpad)) {}

    static dnnl::memory unset(const Desc& desc) { return {desc, cpu_engine(), nullptr}; }
  };

  const Kernel& kernel(const Key& key) {
    const std::lock_guard lock(mutex);
    const auto at = kernels.find(key);
    if (at != kernels.end()) return at->second;
    return kernels.emplace(key, make(key)).first->second;
  }

  static Kernel make(const Key& key) {
    const auto [m, n, k, operand, result, layout, has_bias, accumulate, threads] = key;
    const ThreadLimit limit(threads);
    Kernel out;
    const Type type = type_of(operand);
    out.x = Desc({m, k}, type, Tag::ab);
    out.weights = layout == kBlocked ? blocked_weights(n, k, type)
                                     : Desc({k, n}, type, layout == kPlain ? Tag::ab : Tag::ba);
    out.bias = Desc({1, n}, Type::f32, Tag::ab);
    out.y = Desc({m, n}, type_of(result), Tag::ab);
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const dnnl::matmul::desc desc = has_bias ? dnnl::matmul::desc(out.x, out.weights, out.bias, out.y)
                                             : dnnl::matmul::desc(out.x, out.weights, out.y);
    const dnnl::matmul::primitive_desc primitive(desc, attributes, cpu_engine());
    out.scratchpad = primitive.scratchpad_desc();
    out.primitive = dnnl::matmul(primitive);
    static std::atomic<std::uint64_t> count{0};
    out.id = ++count;
    return out;
  }

  /// `packed`: the weights; nullptr: they are at `plain`.
  static void execute(const Kernel& kernel, const void* x, const dnnl::memory* packed, const void* plain,
                      const float* bias, void* y, int threads) {
    const ThreadLimit limit(threads);
    thread_local dnnl::stream stream(cpu_engine());
    thread_local Scratch scratchpad;
    thread_local std::unordered_map<std::uint64_t, Operands> all_operands;
    const Operands& operands = all_operands.try_emplace(kernel.id, kernel).first->second;
    operands.x.set_data_handle(const_cast<void*>(x));
    operands.y.set_data_handle(y);
    operands.scratchpad.set_data_handle(scratchpad.get(kernel.scratchpad.get_size()));
    if (packed == nullptr) operands.weights.set_data_handle(const_cast<void*>(plain));
    std::array<dnnl_exec_arg_t, 5> arguments = {
        {{DNNL_ARG_SRC, operands.x.get()},
         {DNNL_ARG_WEIGHTS, packed != nullptr ? packed->get() : operands.weights.get()},
         {DNNL_ARG_DST, operands.y.get()},
         {DNNL_ARG_SCRATCHPAD, operands.scratchpad.get()},
         {DNNL_ARG_BIAS, operands.bias.get()}}};
    if (bias != nullptr) operands.bias.set_data_handle(const_cast<float*>(bias));
    dnnl::error::wrap_c_api(dnnl_primitive_execute(kernel.primitive.get(), stream.get(),
                                                   bias != nullptr ? 5 : 4, arguments.data()),
                            "a matrix product failed");
  }

  std::mutex mutex;
  std::map<Key, Kernel> kernels;
};

Gemm::Gemm() : impl_(std::make_unique<Impl>()) {}
Gemm::~Gemm() = default;

bool Gemm::native_bfloat16() {
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

bool Gemm::supports_bfloat16() {
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return native_bfloat16() || isa == dnnl::cpu_isa::avx512_core || isa == dnnl::cpu_isa::avx512_core_vnni;
}

PackedWeight Gemm::pack(const float* weight, std::int64_t out_features, std::int64_t in_features,
                        DType dtype) const {
  if (dtype == DType::kBFloat16 && panel::multiplies_bfloat16_pairs()) {
    return pack_panels(weight, out_features, in_features, dtype);
  }
  PackedWeight out;
  out.out_features_ = out_features;
  out.in_features_ = in_features;
  out.memory_ = std::make_unique<PackedWeight::Memory>();
  out.memory_->dtype = dtype;
  dnnl::memory plain(Desc({in_features, out_features}, Type::f32, Tag::ba), cpu_engine(),
                     const_cast<float*>(weight));
  out.memory_->memory =
      dnnl::memory(blocked_weights(out_features, in_features, type_of(dtype)), cpu_engine());
  // A small matrix is packed sooner than threads wake, and a model has thousands.
  const ThreadLimit limit(out.worth_threads(1) ? default_threads() : 1);
  dnnl::stream stream(cpu_engine());
  dnnl::reorder(plain, out.memory_->memory).execute(stream, plain, out.memory_->memory);
  stream.wait();
  return out;
}

PackedWeight Gemm::pack_panels(const float* weight, std::int64_t out_features, std::int64_t in_features,
                               DType dtype) const {
  PackedWeight out;
  out.out_features_ = out_features;
  out.in_features_ = in_features;
  out.memory_ = std::make_unique<PackedWeight::Memory>();
  out.memory_->dtype = dtype;
  out.memory_->panels =
      std::make_unique<PanelWeight>(weight, out_features, in_features, dtype, PanelWeight::Form::kPlain);
  return out;
}

PackedWeight Gemm::pack_int8(const float* weight, std::int64_t out_features, std::int64_t in_features,
                             DType dtype) const {
  PackedWeight out;
  out.out_features_ = out_features;
  out.in_features_ = in_features;
  out.memory_ = std::make_unique<PackedWeight::Memory>();
  out.memory_->dtype = dtype;
  out.memory_->panels =
      std::make_unique<PanelWeight>(weight, out_features, in_features, dtype, PanelWeight::Form::kInt8);
  return out;
}

PackedWeight Gemm::pack_quantized(const std::uint8_t* codes, const float* scales,
                                  const QuantizedFormat& format, std::int64_t out_features,
                                  std::int64_t in_features, DType dtype) const {
  PackedWeight out;
  out.out_features_ = out_features;
  out.in_features_ = in_features;
  out.memory_ = std::make_unique<PackedWeight::Memory>();
  out.memory_->dtype = dtype;
  out.memory_->panels =
      std::make_unique<PanelWeight>(codes, scales, format, out_features, in_features, dtype);
  return out;
}

bool Gemm::takes(const QuantizedFormat& format, std::int64_t in_features, DType dtype) {
  return PanelWeight::takes(format, in_features, dtype);
}

void Gemm::run(const Matrix& x, const PackedWeight& weight, const float* bias, const Matrix& y,
               const GemmMode& mode) {
  if (weight.memory_->panels) {
    weight.memory_->panels->multiply(x, bias, y, mode.threads, mode.accumulate);
    return;
  }
  // Full tiles first; without batch invariance the rest is cut into powers of two.
  const std::int64_t tile = mode.batch_invariant ? kInvariantTileRows : kMaxTileRows;
  const std::int64_t full = x.rows / tile;
  // How a tile is computed depends on its height alone, never on how many there are.
  const auto threads_of = [&](std::int64_t height) {
    return weight.worth_threads(height) ? mode.threads : 1;
  };
  const bool spread = threads_of(tile) == 1 && weight.worth_threads(x.rows);
  parallel_for(full, spread ? mode.threads : 1,
               [&](std::int64_t i) { run_rows(x, weight, bias, y, mode, i * tile, tile, threads_of(tile)); });
  for (std::int64_t i = full * tile; i < x.rows;) {
    std::int64_t height = tile;
    if (!mode.batch_invariant) {
      while (height > x.rows - i) height /= 2;
    }
    run_rows(x, weight, bias, y, mode, i, height, threads_of(height));
    i += height;
  }
}

void Gemm::run_rows(const Matrix& x, const PackedWeight& weight, const float* bias, const Matrix& y,
                    const GemmMode& mode, std::int64_t first, std::int64_t height, int threads) {
  thread_local Scratch x_scratch, y_scratch;
  const std::int64_t count = std::min(height, x.rows - first);
  const Matrix x_rows = x.row_range(first, count), y_rows = y.row_range(first, count);
  // oneDNN's fast kernels take dense operands only; a strided or short tile goes through a copy.
  const bool copy_x = count < height || (count > 1 && x.stride != x.columns);
  const bool copy_y = count < height || (count > 1 && y.stride != y.columns);
  std::byte* x_at = x_rows.data;
  std::byte* y_at = y_rows.data;
  if (copy_x) {
    const auto bytes = static_cast<std::size_t>(height) * row_bytes(x);
    x_at = x_scratch.get(bytes);
    copy_rows(x_rows, x_at);
    const std::size_t used = static_cast<std::size_t>(count) * row_bytes(x);
    std::memset(x_at + used, 0, bytes - used);
  }
  if (copy_y) {
    const auto bytes = static_cast<std::size_t>(height) * row_bytes(y);
    y_at = y_scratch.get(bytes);
    if (mode.accumulate) {
      copy_rows(y_rows, y_at);
      const std::size_t used = static_cast<std::size_t>(count) * row_bytes(y);
      std::memset(y_at + used, 0, bytes - used);
    }
  }
  const Impl::Kernel& kernel =
      impl_->kernel({height, weight.out_features(), weight.in_features(), weight.memory_->dtype, y.dtype,
                     Impl::kBlocked, bias != nullptr, mode.accumulate, threads});
  Impl::execute(kernel, x_at, &weight.memory_->memory, nullptr, bias, y_at, threads);
  if (copy_y) copy_rows(y_at, y_rows);
}

void Gemm::run_tile(const void* a, const void* b, bool transpose_b, float* y, std::int64_t m, std::int64_t n,
                    std::int64_t k, DType dtype, bool accumulate) {
  const Impl::Kernel& kernel =
      impl_->kernel({m, n, k, dtype, DType::kFloat32, transpose_b ? Impl::kTransposed : Impl::kPlain, false,
                     accumulate, 1});
  Impl::execute(kernel, a, nullptr, b, nullptr, y, 1);
}

}  // namespace flash_mla::cpu
