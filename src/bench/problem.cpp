#include "bench/problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>

#include "base/element.h"
#include "flash_mla/schedule.h"

namespace flash_mla::bench {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class T>
void fill_with(void* data, std::int64_t count, T value) {
  std::fill_n(static_cast<T*>(data), count, value);
}

void fill_nan(void* data, DType dtype, std::int64_t count) {
  visit_float_type(dtype, [&](auto element) {
    using T = decltype(element);
    fill_with(data, count, from_double<T>(kNaN));
  });
}

template <class T>
void fill_random(T* data, std::int64_t count, Random& random) {
  for (std::int64_t i = 0; i < count; ++i) {
    data[i] = from_double<T>(std::clamp(random.normal() / 10.0f, -1.0f, 1.0f));
  }
}

std::size_t bytes_for(std::int64_t count, DType dtype) {
  return static_cast<std::size_t>(count) * dtype_size(dtype);
}

TensorView strided(void* data, DType dtype, std::array<std::int64_t, 4> shape,
                   std::array<std::int64_t, 4> strides) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = 4;
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  std::copy(strides.begin(), strides.end(), view.strides.begin());
  return view;
}

// The view with dimension `dim` cut down to element `index`.
TensorView narrow(TensorView view, int dim, std::int64_t index) {
  const auto d = static_cast<std::size_t>(dim);
  view.data =
      view.ptr<std::byte>() + index * view.strides[d] * static_cast<std::int64_t>(dtype_size(view.dtype));
  view.shape[d] = 1;
  return view;
}

}  // namespace

std::uint64_t Random::bits() {
  // SplitMix64 (Steele, Lea and Flood, 2014).
  std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

std::int64_t Random::integer(std::int64_t lowest, std::int64_t highest) {
  const auto span = static_cast<std::uint64_t>(highest - lowest) + 1;
  return lowest + static_cast<std::int64_t>(bits() % span);
}

double Random::uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

float Random::normal() {
  if (has_spare_) {
    has_spare_ = false;
    return spare_;
  }
  // Box-Muller in float: two values from one draw of 64 bits.
  const std::uint64_t b = bits();
  const float u = (static_cast<float>(b >> 40) + 0.5f) * 0x1p-24f;
  const float angle = static_cast<float>((b >> 8) & 0xFFFFFFu) * (0x1p-23f * std::numbers::pi_v<float>);
  const float radius = std::sqrt(-2.0f * std::log(u));
  spare_ = radius * std::sin(angle);
  has_spare_ = true;
  return radius * std::cos(angle);
}

Buffer::Buffer(std::size_t bytes)
    : data_(::operator new (std::max<std::size_t>(bytes, 1), std::align_val_t{kAlignment})), bytes_(bytes) {}

std::int64_t ProblemSpec::tokens() const {
  return std::accumulate(cache_seqlens.begin(), cache_seqlens.end(), std::int64_t{0});
}

double ProblemSpec::flop() const { return 2.0 * h_q * s_q * static_cast<double>(tokens()) * (d_qk() + d_v); }

double ProblemSpec::bytes() const {
  const double rows = static_cast<double>(batch()) * s_q * h_q;
  const double elements = rows * d_qk() + static_cast<double>(tokens()) * h_kv * d_qk() + rows * d_v;
  return elements * static_cast<double>(dtype_size(dtype));
}

std::vector<std::int32_t> draw_lengths(int b, int s_k, bool varlen, std::uint64_t seed) {
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(b), s_k);
  if (!varlen) return lengths;
  Random random(seed);
  for (std::int32_t& length : lengths) {
    const double drawn = s_k * (1.0 + 0.5 * double{random.normal()});
    length = static_cast<std::int32_t>(std::clamp(std::round(drawn), 1.0, 2.0 * s_k));
  }
  return lengths;
}

Problem::Problem(const ProblemSpec& spec) : spec_(spec) {
  const std::int64_t b = spec.batch(), page = spec.page_size, d_qk = spec.d_qk();
  std::int64_t used = 0, longest = 0;
  for (const std::int64_t length : spec.cache_seqlens) {
    const std::int64_t blocks = (length + page - 1) / page;
    used += blocks;
    longest = std::max(longest, blocks);
  }
  const std::int64_t num_blocks = std::max<std::int64_t>(used + spec.spare_pages, 1);
  const std::int64_t max_blocks = longest + 2;
  const std::int64_t page_stride = page * spec.h_kv * d_qk + spec.page_gap;
  const std::int64_t q_head = d_qk + spec.head_gap;

  const std::int64_t q_count = b * spec.s_q * spec.h_q * q_head;
  const std::int64_t out_count = b * spec.s_q * spec.h_q * spec.d_v;
  const std::int64_t lse_count = b * spec.h_q * spec.s_q;
  q_ = Buffer(bytes_for(q_count, spec.dtype));
  k_cache_ = Buffer(bytes_for(num_blocks * page_stride, spec.dtype));
  block_table_ = Buffer(bytes_for(b * max_blocks, DType::kInt32));
  cache_seqlens_ = Buffer(bytes_for(b, DType::kInt32));
  out_ = Buffer(bytes_for(out_count, spec.dtype));
  lse_ = Buffer(bytes_for(lse_count, DType::kFloat32));

  args_.q = strided(q_.data(), spec.dtype, {b, spec.s_q, spec.h_q, d_qk},
                    {spec.s_q * spec.h_q * q_head, spec.h_q * q_head, q_head, 1});
  args_.k_cache = strided(k_cache_.data(), spec.dtype, {num_blocks, page, spec.h_kv, d_qk},
                          {page_stride, spec.h_kv * d_qk, d_qk, 1});
  args_.block_table = TensorView::contiguous(block_table_.data(), DType::kInt32, {b, max_blocks});
  args_.cache_seqlens = TensorView::contiguous(cache_seqlens_.data(), DType::kInt32, {b});
  args_.out = TensorView::contiguous(out_.data(), spec.dtype, {b, spec.s_q, spec.h_q, spec.d_v});
  args_.lse = TensorView::contiguous(lse_.data(), DType::kFloat32, {b, spec.h_q, spec.s_q});

  Random random(spec.seed);
  std::copy(spec.cache_seqlens.begin(), spec.cache_seqlens.end(), args_.cache_seqlens.ptr<std::int32_t>());
  fill_block_table(random, max_blocks, num_blocks);
  fill_nan(q_.data(), spec.dtype, q_count);
  visit_float_type(spec.dtype, [&](auto element) {
    using T = decltype(element);
    for (std::int64_t row = 0; row < b * spec.s_q * spec.h_q; ++row) {
      fill_random(args_.q.ptr<T>() + row * q_head, d_qk, random);
    }
  });
  fill_cache(random);
  fill_nan(out_.data(), spec.dtype, out_count);
  fill_nan(lse_.data(), DType::kFloat32, lse_count);
}

void Problem::fill_block_table(Random& random, std::int64_t max_blocks, std::int64_t num_blocks) {
  std::vector<std::int32_t> pages(static_cast<std::size_t>(num_blocks));
  std::iota(pages.begin(), pages.end(), 0);
  for (std::size_t i = pages.size(); i > 1; --i) {
    std::swap(pages[i - 1], pages[static_cast<std::size_t>(random.integer(0, static_cast<int>(i) - 1))]);
  }
  auto* table = args_.block_table.ptr<std::int32_t>();
  std::size_t next = 0;
  for (std::int64_t r = 0; r < spec_.batch(); ++r) {
    const std::int64_t length = spec_.cache_seqlens[static_cast<std::size_t>(r)];
    const std::int64_t blocks = (length + spec_.page_size - 1) / spec_.page_size;
    for (std::int64_t n = 0; n < max_blocks; ++n) {
      table[r * max_blocks + n] = n < blocks ? pages[next++] : (n % 2 == 0 ? 2147480000 : -1);
    }
  }
}

void Problem::fill_cache(Random& random) {
  const std::int64_t page = spec_.page_size, row = std::int64_t{spec_.h_kv} * spec_.d_qk();
  const std::int64_t stride = args_.k_cache.stride(0);
  visit_float_type(spec_.dtype, [&](auto element) {
    using T = decltype(element);
    T* cache = args_.k_cache.ptr<T>();
    const T nan = from_double<T>(kNaN);
    std::vector<char> written(static_cast<std::size_t>(args_.k_cache.size(0)), 0);
    for (std::int64_t r = 0; r < spec_.batch(); ++r) {
      const std::int64_t length = spec_.cache_seqlens[static_cast<std::size_t>(r)];
      for (std::int64_t first = 0; first < length; first += page) {
        const std::int32_t number =
            args_.block_table.ptr<std::int32_t>()[r * args_.block_table.stride(0) + first / page];
        const std::int64_t filled = std::min(page, length - first) * row;
        fill_random(cache + number * stride, filled, random);
        fill_with(cache + number * stride + filled, stride - filled, nan);
        written[static_cast<std::size_t>(number)] = 1;
      }
    }
    for (std::size_t p = 0; p < written.size(); ++p) {
      if (written[p] == 0) fill_with(cache + static_cast<std::int64_t>(p) * stride, stride, nan);
    }
  });
}

DenseDecodeOptions Problem::options() const {
  DenseDecodeOptions options;
  options.causal = spec_.causal;
  options.softmax_scale = spec_.softmax_scale;
  return options;
}

DenseDecodeArgs slice_head(const DenseDecodeArgs& args, std::int64_t request, std::int64_t head) {
  const std::int64_t group = args.q.size(2) / args.k_cache.size(2);
  DenseDecodeArgs slice;
  slice.q = narrow(narrow(args.q, 0, request), 2, head);
  slice.k_cache = narrow(args.k_cache, 2, head / group);
  slice.block_table = narrow(args.block_table, 0, request);
  slice.cache_seqlens = narrow(args.cache_seqlens, 0, request);
  slice.out = narrow(narrow(args.out, 0, request), 2, head);
  slice.lse = narrow(narrow(args.lse, 0, request), 1, head);
  return slice;
}

DecodeRun::DecodeRun(const Problem& problem, int num_threads, int fixed_split_blocks, int num_parts)
    : args_(problem.args()), options_(problem.options()) {
  options_.num_threads = num_threads;
  ScheduleOptions plan = cpu_schedule_options(num_threads);
  plan.fixed_split_blocks = fixed_split_blocks;
  if (num_parts > 0) plan.num_parts = num_parts;
  schedule_ = DecodeSchedule::build(problem.spec().cache_seqlens, plan);
  workspace_ = Buffer(dense_decode_workspace_size(args_, schedule_.view(), options_));
}

}  // namespace flash_mla::bench
