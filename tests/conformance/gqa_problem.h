#pragma once

// A random call of gqa_attention on the host, run on a backend and compared with the definition.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "base/element.h"
#include "flash_mla/gqa.h"
#include "guarded.h"

namespace flash_mla::conformance {

enum class KeyLayout { kRagged, kTable, kCsr, kStretch };

struct GqaLengths {
  int q, k;
};

struct GqaShape {
  std::vector<GqaLengths> seqs{{1, 100}};
  int h_q = 8, h_kv = 2, d_qk = 128, d_v = 128;
  DType dtype = DType::kBFloat16;
  KeyLayout layout = KeyLayout::kTable;
  int page_size = 16;
  bool hnd = false;      ///< pages as (h_kv, page_size, d)
  bool uniform = false;  ///< no cu_seqlens_q
  bool sinks = false, alibi = false, mask = false, with_lse = true;
  int num_parts = 0;  ///< > 0: with a schedule
  int fixed_split_blocks = 0;
  int num_scheduled = -1;  ///< sequences that the schedule is of
  GqaOptions options{};
  unsigned seed = 1;

  std::string text() const {
    std::ostringstream t;
    t << h_q << '/' << h_kv << " heads of " << d_qk << '/' << d_v << ' ' << dtype_name(dtype) << " layout "
      << static_cast<int>(layout) << " page " << page_size << (hnd ? " HND" : "") << (sinks ? " sinks" : "")
      << (alibi ? " alibi" : "") << (mask ? " mask" : "") << " parts " << num_parts << '/'
      << fixed_split_blocks << " of " << num_scheduled << (options.causal ? " causal" : "") << " window "
      << options.window_left << ',' << options.window_right << " cap " << options.soft_cap << " (q, k):";
    for (const GqaLengths& s : seqs) t << " (" << s.q << ", " << s.k << ')';
    return t.str();
  }
};

struct GqaResult {
  std::vector<float> out, lse;
  std::vector<std::uint8_t> bits;
};

class GqaProblem {
 public:
  explicit GqaProblem(GqaShape shape) : s(std::move(shape)) {
    std::mt19937 rng(s.seed);
    std::normal_distribution<float> normal;
    b = static_cast<std::int64_t>(s.seqs.size());
    for (const GqaLengths& l : s.seqs) {
      starts_q.push_back(starts_q.back() + l.q);
      starts_k.push_back(starts_k.back() + l.k);
      lengths.push_back(l.k);
      longest = std::max(longest, l.k);
    }
    total_q = starts_q.back();
    q = random(total_q * s.h_q * s.d_qk, rng);
    place_keys(rng);
    if (s.sinks) {
      for (int h = 0; h < s.h_q; ++h) sinks.push_back(normal(rng) + 2);
    }
    if (s.alibi) {
      for (int h = 0; h < s.h_q; ++h)
        slopes.push_back(std::exp2(-8.0f * static_cast<float>(h + 1) / static_cast<float>(s.h_q)));
    }
    if (s.mask) make_mask(rng);
    if (s.num_parts > 0) {
      ScheduleOptions options;
      options.num_parts = s.num_parts;
      options.fixed_split_blocks = s.fixed_split_blocks;
      options.fixed_overhead_blocks = 1;
      const auto n = s.num_scheduled < 0 ? lengths.size() : static_cast<std::size_t>(s.num_scheduled);
      schedule = DecodeSchedule::build(std::span(lengths).first(n), options);
    }
  }

  GqaArgs host_args() {
    GqaArgs a;
    const auto ints = [](std::vector<std::int32_t>& values) {
      return TensorView::contiguous(values.data(), DType::kInt32, {static_cast<std::int64_t>(values.size())});
    };
    a.q = TensorView::contiguous(q.data(), s.dtype, {total_q, s.h_q, s.d_qk});
    a.k = key_view(k, s.d_qk);
    a.v = key_view(v, s.d_v);
    if (!s.uniform) a.cu_seqlens_q = ints(starts_q);
    if (s.layout == KeyLayout::kRagged) a.cu_seqlens_k = ints(starts_k);
    if (s.layout != KeyLayout::kRagged || s.num_parts > 0) a.seqlens_k = ints(lengths);
    if (s.layout == KeyLayout::kTable) {
      a.block_table = TensorView::contiguous(table.data(), DType::kInt32, {b, table_width});
    }
    if (s.layout == KeyLayout::kCsr) {
      a.page_indptr = ints(page_starts);
      a.page_indices = ints(table);
    }
    if (s.sinks) a.sinks = TensorView::contiguous(sinks.data(), DType::kFloat32, {s.h_q});
    if (s.alibi) a.alibi_slopes = TensorView::contiguous(slopes.data(), DType::kFloat32, {s.h_q});
    if (s.mask) {
      a.mask = TensorView::contiguous(mask.data(), DType::kUInt8, {static_cast<std::int64_t>(mask.size())});
      a.mask_indptr = ints(mask_starts);
    }
    return a;
  }

  GqaResult run(BackendUnderTest& backend, int num_threads = 2) {
    GqaArgs a = host_args();
    std::vector<std::unique_ptr<Guarded>> memory;
    const auto upload = [&](TensorView& t, std::size_t bytes, const void* from) {
      memory.push_back(std::make_unique<Guarded>(backend, bytes));
      memory.back()->upload(from);
      t.data = memory.back()->data();
      t.device = backend.device();
      return memory.back().get();
    };
    for (TensorView* t :
         {&a.q, &a.cu_seqlens_q, &a.cu_seqlens_k, &a.seqlens_k, &a.block_table, &a.page_indptr,
          &a.page_indices, &a.sinks, &a.alibi_slopes, &a.mask, &a.mask_indptr}) {
      if (t->defined()) upload(*t, static_cast<std::size_t>(t->numel()) * dtype_size(t->dtype), t->data);
    }
    upload(a.k, k.size(), k.data());
    upload(a.v, v.size(), v.data());
    const std::size_t element = dtype_size(s.dtype);
    const std::vector<std::uint8_t> out_fill(static_cast<std::size_t>(total_q * s.h_q * s.d_v) * element,
                                             0xFF);
    const std::vector<std::uint8_t> lse_fill(static_cast<std::size_t>(total_q * s.h_q) * sizeof(float), 0xFF);
    a.out = TensorView::contiguous(nullptr, s.dtype, {total_q, s.h_q, s.d_v});
    const Guarded* out = upload(a.out, out_fill.size(), out_fill.data());
    a.lse = TensorView::contiguous(nullptr, DType::kFloat32, {s.h_q, total_q});
    const Guarded* lse = upload(a.lse, lse_fill.size(), lse_fill.data());
    if (!s.with_lse) a.lse = {};
    DecodeScheduleView plan{};
    if (s.num_parts > 0) {
      plan = schedule.view();
      upload(plan.parts, static_cast<std::size_t>(plan.parts.numel()) * 4, plan.parts.data);
      upload(plan.num_splits, static_cast<std::size_t>(plan.num_splits.numel()) * 4, plan.num_splits.data);
    }
    GqaOptions options = s.options;
    options.num_threads = num_threads;
    for (const GqaLengths& l : s.seqs) options.max_seqlen_q = std::max(options.max_seqlen_q, l.q);
    options.num_scheduled = s.num_scheduled;
    for (int r = 0; r < s.num_scheduled; ++r) {
      options.max_scheduled_q = std::max(options.max_scheduled_q, s.seqs[static_cast<std::size_t>(r)].q);
    }
    const std::size_t bytes = gqa_workspace_size(a, plan, options);
    Guarded workspace(backend, bytes);
    const std::vector<std::uint8_t> poison(bytes, 0xFF);
    workspace.upload(poison.data());
    gqa_attention(a, plan, workspace.data(), bytes, options);
    workspace.download();
    GqaResult r;
    r.bits = out->download();
    for (std::size_t i = 0; i < r.bits.size(); i += element) r.out.push_back(number(&r.bits[i]));
    const std::vector<std::uint8_t> raw = lse->download();
    r.lse.resize(raw.size() / sizeof(float));
    if (!raw.empty()) std::memcpy(r.lse.data(), raw.data(), raw.size());
    r.bits.insert(r.bits.end(), raw.begin(), raw.end());
    return r;
  }

  /// "" if it agrees with the definition, as far as rounding P and the result allows.
  std::string difference(const GqaResult& got) {
    GqaArgs a = host_args();
    std::vector<double> want(got.out.size()), size(got.out.size()), lse(got.lse.size());
    a.out = TensorView::contiguous(want.data(), DType::kFloat64, {total_q, s.h_q, s.d_v});
    a.lse = TensorView::contiguous(lse.data(), DType::kFloat64, {s.h_q, total_q});
    reference::gqa_attention(a, s.options);
    // What the weights' rounding errors add up to at most: the same average of the values' magnitudes.
    std::vector<std::uint8_t> magnitudes = v;
    const std::size_t element = dtype_size(s.dtype);
    for (std::size_t i = element - 1; i < magnitudes.size(); i += element) magnitudes[i] &= 0x7F;
    a.v = key_view(magnitudes, s.d_v);
    a.out.data = size.data();
    reference::gqa_attention(a, s.options);
    const double unit = s.dtype == DType::kBFloat16  ? 1.0 / 256
                        : s.dtype == DType::kFloat16 ? 1.0 / 2048
                                                     : 4e-6;
    std::ostringstream text;
    int wrong = 0;
    const auto check = [&](const char* what, std::size_t i, double x, double y, double bound) {
      const bool good = std::isnan(y) ? std::isnan(x) : x == y || std::abs(x - y) <= bound;
      if (!good && ++wrong <= 3) text << what << '[' << i << "] is " << x << ", not " << y << "; ";
    };
    for (std::size_t i = 0; i < want.size(); ++i) {
      check("out", i, got.out[i], want[i], 1.05 * unit * (size[i] + std::abs(want[i])) + 3e-5);
    }
    for (std::size_t i = 0; s.with_lse && i < lse.size(); ++i) {
      check("lse", i, got.lse[i], lse[i], 3e-5 + 4e-6 * std::abs(lse[i]));
    }
    if (wrong > 3) text << wrong << " in all";
    return text.str();
  }

  GqaShape s;
  std::int64_t b = 0, total_q = 0, table_width = 0, num_pages = 0;
  int longest = 0;
  std::vector<std::int32_t> starts_q{0}, starts_k{0}, lengths, table, page_starts{0}, mask_starts{0};
  std::vector<std::uint8_t> q, k, v, mask;
  std::vector<float> sinks, slopes;
  DecodeSchedule schedule;

 private:
  static constexpr int kGap = 8;  // elements between rows

  void put(std::uint8_t* at, float x) const {
    visit_float_type(s.dtype, [&](auto element) {
      element = from_double<decltype(element)>(static_cast<double>(x));
      std::memcpy(at, &element, sizeof(element));
    });
  }
  float number(const std::uint8_t* at) const {
    return visit_float_type(s.dtype, [&](auto element) {
      std::memcpy(&element, at, sizeof(element));
      return static_cast<float>(to_float(element));
    });
  }
  std::vector<std::uint8_t> random(std::int64_t n, std::mt19937& rng) const {
    std::normal_distribution<float> normal;
    const std::size_t element = dtype_size(s.dtype);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(n) * element);
    for (std::size_t i = 0; i < bytes.size(); i += element) put(&bytes[i], normal(rng));
    return bytes;
  }

  TensorView key_view(std::vector<std::uint8_t>& bytes, int d) const {
    const std::int64_t row = d + kGap;
    TensorView t;
    if (s.layout == KeyLayout::kRagged) {
      t = TensorView::contiguous(bytes.data(), s.dtype, {num_pages, s.h_kv, d});
      t.strides = {s.h_kv * row, row, 1};
      return t;
    }
    const std::int64_t page = s.layout == KeyLayout::kStretch ? std::max(longest, 1) : s.page_size;
    t = TensorView::contiguous(bytes.data(), s.dtype, {num_pages, page, s.h_kv, d});
    const std::int64_t token = s.hnd ? row : s.h_kv * row, head = s.hnd ? page * row : row;
    t.strides = {page * s.h_kv * row + kGap, token, head, 1};
    return t;
  }

  // Tokens of the sequences are random, all else is NaN.
  void place_keys(std::mt19937& rng) {
    std::vector<std::pair<std::int64_t, std::int64_t>> places;  // page and offset
    if (s.layout == KeyLayout::kRagged) {
      num_pages = starts_k.back() + 3;
      for (std::int64_t i = 0; i < starts_k.back(); ++i) places.emplace_back(i, 0);
    } else if (s.layout == KeyLayout::kStretch) {
      num_pages = b;
      for (std::int64_t r = 0; r < b; ++r) {
        for (int j = 0; j < s.seqs[static_cast<std::size_t>(r)].k; ++j) places.emplace_back(r, j);
      }
    } else {
      place_pages(rng, places);
    }
    for (auto [bytes, d] : {std::pair{&k, s.d_qk}, std::pair{&v, s.d_v}}) {
      const TensorView t = key_view(*bytes, d);
      const auto element = static_cast<std::int64_t>(dtype_size(s.dtype));
      std::int64_t last = d;
      for (int i = 0; i + 1 < t.rank; ++i) last += (t.size(i) - 1) * t.stride(i);
      bytes->assign(static_cast<std::size_t>(std::max<std::int64_t>(last, 0) * element), 0xFF);
      const bool ragged = t.rank == 3;
      for (const auto& [page, offset] : places) {
        for (int h = 0; h < s.h_kv; ++h) {
          const std::int64_t at =
              page * t.stride(0) + (ragged ? 0 : offset * t.stride(1)) + h * t.stride(ragged ? 1 : 2);
          const std::vector<std::uint8_t> row = random(d, rng);
          std::copy(row.begin(), row.end(), bytes->begin() + at * element);
        }
      }
    }
  }

  void place_pages(std::mt19937& rng, std::vector<std::pair<std::int64_t, std::int64_t>>& places) {
    std::int64_t used = 0;
    for (const GqaLengths& l : s.seqs) used += (l.k + s.page_size - 1) / s.page_size;
    num_pages = used + 3;
    std::vector<std::int32_t> pages(static_cast<std::size_t>(num_pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), rng);
    table_width = (longest + s.page_size - 1) / s.page_size + 1;
    if (s.layout == KeyLayout::kTable) table.assign(static_cast<std::size_t>(b * table_width), 2147480000);
    std::size_t next = 0;
    for (std::size_t r = 0; r < s.seqs.size(); ++r) {
      for (int j = 0; j < s.seqs[r].k; ++j) {
        if (j % s.page_size == 0) {
          const std::int32_t page = pages[next++];
          if (s.layout == KeyLayout::kTable) {
            table[r * static_cast<std::size_t>(table_width) + static_cast<std::size_t>(j / s.page_size)] =
                page;
          } else {
            table.push_back(page);
          }
        }
        places.emplace_back(pages[next - 1], j % s.page_size);
      }
      page_starts.push_back(static_cast<std::int32_t>(table.size()));
    }
  }

  // Most keys of most rows, none of some rows.
  void make_mask(std::mt19937& rng) {
    for (const GqaLengths& l : s.seqs) {
      std::vector<std::uint8_t> bits(static_cast<std::size_t>((l.q * l.k + 7) / 8));
      for (int i = 0; i < l.q; ++i) {
        const bool none = rng() % 8 == 0;
        for (int j = 0; j < l.k; ++j) {
          const auto bit =
              static_cast<std::size_t>(i) * static_cast<std::size_t>(l.k) + static_cast<std::size_t>(j);
          if (!none && rng() % 3 != 0)
            bits[bit / 8] = static_cast<std::uint8_t>(bits[bit / 8] | 1u << (bit % 8));
        }
      }
      mask.insert(mask.end(), bits.begin(), bits.end());
      mask_starts.push_back(static_cast<std::int32_t>(mask.size()));
    }
  }
};

}  // namespace flash_mla::conformance
