#include "kernels/attention/dense_decode/cpu/dense_decode.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <numbers>
#include <utility>

#include "base/element.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/cpu/isa.h"
#include "kernels/attention/dense_decode/cpu/tile.h"
#include "kernels/cache/cpu/dequantise.h"
#include "schedule/walk.h"

#if defined(_OPENMP)
#include <omp.h>
#include <unistd.h>
#endif

// The schedule's parts are handed to threads; each part walks its requests, and within a request its splits.
// A split that is all of its request writes `out` itself. Otherwise it leaves (O normalised, lse) of every
// row in a slot of the workspace, and after a barrier the slots of each split request are combined.
//
// Keys of a cache in another type than q's become rows of the tile kernel's own arithmetic, one tile at a time: bf16 with AVX512_BF16,
// else fp32, with the queries in fp32 too.
//
// Workspace: num_threads x scratch (tile buffers, see TileScratch), then the slots. Without fixed split
// points at most two requests per part are split, so there are at most 2 * num_parts slots however long the
// requests are.

namespace flash_mla::cpu {
namespace {

constexpr std::size_t kAlignment = 64;
#if defined(_OPENMP)
// Fewer multiply-adds than this are not worth waking a second thread for (about 10 us of one).
constexpr double kSingleThreadWork = 1e6;
#endif
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int round_up(int x, int to) { return (x + to - 1) / to * to; }

/// Sizes that a call's shapes fix.
struct Problem {
  const DenseDecodeArgs& args;
  const DecodeScheduleView& schedule;
  const DenseDecodeParams& params;
  const TileKernel& kernel;
  std::int64_t batch, s_q, h_q, h_kv, group, page_size;
  int d_qk, d_v;
  bool widened;    // queries and keys in fp32, whatever their dtype
  int rows;        // query rows that share one latent head
  int block_rows;  // rows of a full block

  Problem(const DenseDecodeArgs& a, const DecodeScheduleView& s, const DenseDecodeParams& p)
      : args(a),
        schedule(s),
        params(p),
        kernel(select_tile_kernel(a.q.dtype, static_cast<int>(a.d_qk()))),
        batch(a.q.size(0)),
        s_q(a.q.size(1)),
        h_q(a.q.size(2)),
        h_kv(a.k_cache.size(2)),
        group(h_q / h_kv),
        page_size(a.k_cache.size(1)),
        d_qk(static_cast<int>(a.d_qk())),
        d_v(static_cast<int>(a.out.size(3))),
        widened(p.pool != nullptr && kernel.element_bytes == sizeof(float)),
        rows(static_cast<int>(s_q * group)),
        block_rows(std::min(rows, kMaxRows)) {}

  std::int32_t length(std::int64_t req) const { return args.cache_seqlens.ptr<const std::int32_t>()[req]; }
  std::int64_t splits(std::int64_t req) const {
    const auto* s = schedule.num_splits.ptr<const std::int32_t>();
    return s[req + 1] - s[req];
  }
  std::size_t slot_floats() const {
    return static_cast<std::size_t>(s_q * h_q) * (static_cast<std::size_t>(d_v) + 1);
  }
};

/// The workspace of one thread, as offsets into it.
struct ScratchLayout {
  std::size_t q, kv, scores, p, out, row_max, row_sum, alpha, limit, keys, next_keys, q_rows, tokens,
      next_tokens, key_rows, whole_q, bytes;

  explicit ScratchLayout(const Problem& problem) {
    const TileKernel& k = problem.kernel;
    const auto rows = static_cast<std::size_t>(round_up(problem.block_rows, k.row_lanes));
    const auto d_qk = static_cast<std::size_t>(round_up(problem.d_qk, k.panel));
    const auto d_v = static_cast<std::size_t>(round_up(problem.d_v, k.panel));
    const auto n_tokens = static_cast<std::size_t>(k.tile_tokens);
    const auto element = static_cast<std::size_t>(k.element_bytes);
    bytes = 0;
    const auto take = [this](std::size_t n) {
      const std::size_t at = bytes;
      bytes += align_up(n);
      return at;
    };
    q = take(rows * d_qk * element);
    kv = take(n_tokens * d_qk * element);
    scores = take(n_tokens * rows * sizeof(float));
    p = take(n_tokens * rows * element);
    out = take(rows * d_v * sizeof(float));
    row_max = take(rows * sizeof(float));
    row_sum = take(rows * sizeof(float));
    alpha = take(rows * sizeof(float));
    limit = take(rows * sizeof(std::int32_t));
    keys = take(n_tokens * sizeof(void*));
    next_keys = take(n_tokens * sizeof(void*));
    q_rows = take(rows * sizeof(void*));
    const bool converts = problem.params.pool != nullptr;
    tokens = take(converts ? n_tokens * sizeof(kv::Token) : 0);
    next_tokens = take(converts ? n_tokens * sizeof(kv::Token) : 0);
    // In fp32 the dequantised keys are where the kernel would copy them to.
    key_rows = problem.widened ? kv : take(converts ? n_tokens * d_qk * element : 0);
    whole_q = take(problem.widened || problem.args.q_rope.defined() ? rows * d_qk * sizeof(float) : 0);
  }

  TileScratch at(std::byte* base) const {
    TileScratch s;
    s.q = base + q;
    s.kv = base + kv;
    s.scores = reinterpret_cast<float*>(base + scores);
    s.p = base + p;
    s.out = reinterpret_cast<float*>(base + out);
    s.row_max = reinterpret_cast<float*>(base + row_max);
    s.row_sum = reinterpret_cast<float*>(base + row_sum);
    s.alpha = reinterpret_cast<float*>(base + alpha);
    s.limit = reinterpret_cast<std::int32_t*>(base + limit);
    s.keys = reinterpret_cast<const void**>(base + keys);
    s.next_keys = reinterpret_cast<const void**>(base + next_keys);
    return s;
  }
};

const std::byte* address(const TensorView& t, std::int64_t i, std::int64_t j, std::int64_t k) {
  return static_cast<const std::byte*>(t.data) + (i * t.stride(0) + j * t.stride(1) + k * t.stride(2)) *
                                                     static_cast<std::int64_t>(dtype_size(t.dtype));
}

/// One thread's view of a call.
class Worker {
 public:
  Worker(const Problem& problem, const ScratchLayout& layout, std::byte* scratch, float* slots)
      : p_(problem),
        scratch_(layout.at(scratch)),
        q_rows_(reinterpret_cast<const void**>(scratch + layout.q_rows)),
        tokens_(reinterpret_cast<kv::Token*>(scratch + layout.tokens)),
        next_tokens_(reinterpret_cast<kv::Token*>(scratch + layout.next_tokens)),
        key_rows_(scratch + layout.key_rows),
        whole_q_(scratch + layout.whole_q),
        slots_(slots) {}

  void run_part(const DecodePart& part) {
    if (part.begin_req >= p_.batch || part.begin_req > part.end_req) return;
    std::int64_t slot = 0;  // of the request's first split, when it has several
    for (std::int64_t r = 0; r < part.begin_req; ++r) slot += p_.splits(r) > 1 ? p_.splits(r) : 0;
    const std::int64_t block_size = p_.schedule.block_size;
    const auto walk = walk_part(part, p_.args.cache_seqlens.ptr<const std::int32_t>(),
                                p_.schedule.num_splits.ptr<const std::int32_t>(), p_.schedule.block_size,
                                p_.schedule.fixed_split_blocks);
    std::int64_t req = part.begin_req;
    for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
      for (; req < item.req; ++req) slot += p_.splits(req) > 1 ? p_.splits(req) : 0;
      run_split(
          item.req, item.begin_block * block_size, std::min(item.end_block * block_size, item.length),
          item.is_split ? slots_ + static_cast<std::size_t>(slot + item.slot) * p_.slot_floats() : nullptr);
    }
  }

  /// Combines the slots of one row of a split request: out = sum_s O_s exp(lse_s - lse).
  void combine_row(std::int64_t req, std::int64_t slot, std::int64_t row) {
    const std::int64_t n = p_.splits(req), all_rows = p_.s_q * p_.h_q;
    const auto lse_of = [&](std::int64_t s) {
      return slots_[static_cast<std::size_t>(slot + s) * p_.slot_floats() +
                    static_cast<std::size_t>(all_rows * p_.d_v + row)];
    };
    float highest = -kInfinity;
    for (std::int64_t s = 0; s < n; ++s) highest = std::max(highest, lse_of(s));
    // No split has a weight: subtract 0, so that -inf - -inf never arises. A split that is NaN stays NaN.
    const float base = highest == -kInfinity ? 0.0f : highest;
    float* acc = scratch_.out;
    std::fill(acc, acc + p_.d_v, 0.0f);
    float sum = 0;
    for (std::int64_t s = 0; s < n; ++s) {
      const float weight = std::exp2(lse_of(s) - base);
      sum += weight;
      const float* o = slots_ + static_cast<std::size_t>(slot + s) * p_.slot_floats() +
                       static_cast<std::size_t>(row * p_.d_v);
      for (int c = 0; c < p_.d_v; ++c) acc[c] += weight * o[c];
    }
    const std::int64_t i = row / p_.h_q, h = row % p_.h_q;
    if (sum == 0) return write_weightless_row(req, i, h);
    visit_float_type(p_.args.out.dtype, [&](auto element) {
      using Out = decltype(element);
      auto* dst = const_cast<Out*>(reinterpret_cast<const Out*>(address(p_.args.out, req, i, h)));
      for (int c = 0; c < p_.d_v; ++c) dst[c] = from_double<Out>(acc[c] * (1.0f / sum));
    });
    write_lse(req, i, h, base + std::log2(sum));
  }

 private:
  // Tokens [begin, end) of one request, all its heads and query tokens. `slot`: where the partial result
  // goes; nullptr: straight to out and lse.
  void run_split(std::int64_t req, std::int64_t begin, std::int64_t end, float* slot) {
    for (std::int64_t head = 0; head < p_.h_kv; ++head) {
      for (int row = 0; row < p_.rows; row += kMaxRows) {
        run_block(req, head, row, std::min(p_.rows - row, kMaxRows), begin, end, slot);
      }
    }
  }

  void run_block(std::int64_t req, std::int64_t head, int first_row, int rows, std::int64_t begin,
                 std::int64_t end, float* slot) {
    TileProblem tile;
    tile.dtype = p_.widened ? DType::kFloat32 : p_.args.q.dtype;
    if (p_.params.pool != nullptr) tile.key_bytes = kv::token_bytes(p_.params.pool->format, p_.d_qk);
    tile.rows = rows;
    tile.rows_padded = round_up(rows, p_.kernel.row_lanes);
    tile.d_qk = p_.d_qk;
    tile.d_v = p_.d_v;
    tile.scale_log2 = p_.params.softmax_scale * std::numbers::log2e_v<float>;

    const auto visible_to = [&](int row) {
      return visible(req, (first_row + std::min(row, rows - 1)) / p_.group);
    };
    const std::int64_t stop =
        std::min(end, visible_to(rows - 1));  // rows are token-major: the last sees most
    bool first = true;
    if (begin < stop) {
      for (int r = 0; r < rows; ++r) {
        const std::int64_t i = (first_row + r) / p_.group, g = (first_row + r) % p_.group;
        q_rows_[r] = address(p_.args.q, req, i, head * p_.group + g);
      }
      if (p_.args.q_rope.defined()) join_queries(req, head, first_row, rows);
      if (p_.widened) widen_queries(rows);
      p_.kernel.pack_q(tile, q_rows_, scratch_);
    }
    const auto locate = [&](std::int64_t t) {
      const std::int64_t count = std::clamp<std::int64_t>(stop - t, 0, p_.kernel.tile_tokens);
      locate_keys(req, head, t, static_cast<int>(count), scratch_.next_keys);
      return static_cast<int>(count);
    };
    scratch_.next_count = locate(begin);
    for (std::int64_t t = begin; t < stop; t += p_.kernel.tile_tokens) {
      const int count = scratch_.next_count;
      std::swap(scratch_.keys, scratch_.next_keys);
      if (p_.params.pool != nullptr) {
        std::swap(tokens_, next_tokens_);
        dequantise_keys(count);
      }
      scratch_.next_count = locate(t + count);
      for (int r = 0; r < tile.rows_padded; ++r) {
        scratch_.limit[r] = static_cast<std::int32_t>(std::clamp<std::int64_t>(visible_to(r) - t, 0, count));
      }
      p_.kernel.attend(tile, scratch_, count, first, visible_to(0) < t + count);
      first = false;
    }

    for (int r = 0; r < rows; ++r) {
      const std::int64_t i = (first_row + r) / p_.group, h = head * p_.group + (first_row + r) % p_.group;
      const float sum = first ? 0.0f : scratch_.row_sum[r];
      if (slot != nullptr) {
        float* dst = slot + (i * p_.h_q + h) * p_.d_v;
        slot[p_.s_q * p_.h_q * p_.d_v + i * p_.h_q + h] =
            sum == 0 ? -kInfinity : scratch_.row_max[r] + std::log2(sum);
        if (sum == 0) {
          std::fill_n(dst, p_.d_v, 0.0f);  // O may hold anything
        } else {
          p_.kernel.store_row(tile, scratch_, r, 1.0f / sum, DType::kFloat32, dst);
        }
      } else if (sum == 0) {
        write_weightless_row(req, i, h);
      } else {
        p_.kernel.store_row(tile, scratch_, r, 1.0f / sum, p_.args.out.dtype,
                            const_cast<std::byte*>(address(p_.args.out, req, i, h)));
        write_lse(req, i, h, scratch_.row_max[r] + std::log2(sum));
      }
    }
  }

  /// Copies of the block's query rows, which lie in two parts, take their place.
  void join_queries(std::int64_t req, std::int64_t head, int first_row, int rows) {
    const auto element = static_cast<std::size_t>(dtype_size(p_.args.q.dtype));
    const std::size_t first_bytes = static_cast<std::size_t>(p_.d_v) * element,
                      bytes = static_cast<std::size_t>(p_.d_qk) * element;
    for (int r = 0; r < rows; ++r) {
      const std::int64_t i = (first_row + r) / p_.group, g = (first_row + r) % p_.group;
      std::byte* to = whole_q_ + static_cast<std::size_t>(r) * bytes;
      std::memcpy(to, q_rows_[r], first_bytes);
      std::memcpy(to + first_bytes, address(p_.args.q_rope, req, i, head * p_.group + g),
                  bytes - first_bytes);
      q_rows_[r] = to;
    }
  }

  /// Copies of the block's query rows in fp32 take their place.
  void widen_queries(int rows) {
    visit_float_type(p_.args.q.dtype, [&](auto element) {
      for (int r = 0; r < rows; ++r) {
        const auto* from = static_cast<const decltype(element)*>(q_rows_[r]);
        float* to = reinterpret_cast<float*>(whole_q_) + static_cast<std::ptrdiff_t>(r) * p_.d_qk;
        for (int d = 0; d < p_.d_qk; ++d) to[d] = static_cast<float>(to_float(from[d]));
        q_rows_[r] = to;
      }
    });
  }

  /// Rows of the kernel's arithmetic take the place of the keys' addresses in the cache.
  void dequantise_keys(int count) {
    const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(p_.d_qk) * p_.kernel.element_bytes;
    for (int i = 0; i < count; ++i) {
      std::byte* row = key_rows_ + i * row_bytes;
      if (p_.widened) {
        dequantise(*p_.params.pool, tokens_[i], reinterpret_cast<float*>(row));
      } else {
        dequantise_avx512_bf16(*p_.params.pool, tokens_[i], reinterpret_cast<Bf16*>(row));
      }
      scratch_.keys[i] = row;
    }
  }

  /// First token of a request that query token i does not see: bottom-right aligned causal mask.
  std::int64_t visible(std::int64_t req, std::int64_t i) const {
    const std::int64_t length = p_.length(req);
    return p_.params.causal ? std::max<std::int64_t>(length - p_.s_q + i + 1, 0) : length;
  }

  // A row whose weights add up to 0. It sees no key: out = 0, lse = +inf. Or every score it sees is -inf, and
  // 0 / 0 is NaN.
  void write_weightless_row(std::int64_t req, std::int64_t i, std::int64_t h) {
    const bool empty = visible(req, i) == 0;
    visit_float_type(p_.args.out.dtype, [&](auto element) {
      using Out = decltype(element);
      auto* dst = const_cast<Out*>(reinterpret_cast<const Out*>(address(p_.args.out, req, i, h)));
      std::fill_n(dst, p_.d_v, from_double<Out>(empty ? 0.0 : std::numeric_limits<double>::quiet_NaN()));
    });
    write_lse(req, i, h, empty ? kInfinity : std::numeric_limits<float>::quiet_NaN());
  }

  void locate_keys(std::int64_t req, std::int64_t head, std::int64_t token, int count, const void** keys) {
    if (count == 0) return;
    const auto* pages = p_.args.block_table.ptr<const std::int32_t>() + req * p_.args.block_table.stride(0);
    // The stride of a dimension of one element may be anything, and means nothing.
    const std::int64_t row_stride = p_.page_size > 1 ? p_.args.k_cache.stride(1) : 0;
    const std::int64_t row_bytes = row_stride * static_cast<std::int64_t>(dtype_size(p_.args.k_cache.dtype));
    std::int64_t page = token / p_.page_size, offset = token % p_.page_size;
    if (p_.params.pool != nullptr) {
      for (int i = 0; i < count; ++page, offset = 0) {
        for (; offset < p_.page_size && i < count; ++offset, ++i) {
          next_tokens_[i] = kv::locate(*p_.params.pool, pages[page], offset);
          keys[i] = next_tokens_[i].latent;
        }
      }
      return;
    }
    for (int i = 0; i < count; ++page, offset = 0) {
      const std::byte* key = address(p_.args.k_cache, pages[page], offset, head);
      for (; offset < p_.page_size && i < count; ++offset, ++i, key += row_bytes) keys[i] = key;
    }
  }

  // `lse` is in base 2.
  void write_lse(std::int64_t req, std::int64_t i, std::int64_t h, float lse) {
    const TensorView& t = p_.args.lse;
    if (!t.defined()) return;
    t.ptr<float>()[req * t.stride(0) + h * t.stride(1) + i * t.stride(2)] = lse * std::numbers::ln2_v<float>;
  }

  const Problem& p_;
  TileScratch scratch_;
  const void** q_rows_;
  kv::Token* tokens_;  // of this tile and the next, where they are dequantised
  kv::Token* next_tokens_;
  std::byte* key_rows_;  // this tile's keys, dequantised
  std::byte* whole_q_;   // query rows, of one part and widened where need be
  float* slots_;
};

std::size_t num_slots(const Problem& p) {
  const std::int64_t parts = p.schedule.parts.size(0);
  if (p.schedule.fixed_split_blocks == 0) return parts > 1 ? static_cast<std::size_t>(2 * parts) : 0;
  std::size_t slots = 0;
  for (std::int64_t r = 0; r < p.batch; ++r) {
    if (p.splits(r) > 1) slots += static_cast<std::size_t>(p.splits(r));
  }
  return slots;
}

/// The whole call as seen from thread `thread` of `threads`, in two halves with a barrier between them.
class Call {
 public:
  Call(const Problem& problem, std::byte* workspace)
      : p_(problem),
        layout_(problem),
        scratch_(workspace),
        slots_(reinterpret_cast<float*>(workspace + static_cast<std::size_t>(problem.params.num_threads) *
                                                        layout_.bytes)) {}

  void attend(int thread, int threads) const {
    Worker worker = worker_of(thread);
    for (std::int64_t part = thread; part < p_.schedule.parts.size(0); part += threads) {
      worker.run_part(schedule_part(p_.schedule, part));
    }
  }

  void combine(int thread, int threads) const {
    Worker worker = worker_of(thread);
    std::int64_t slot = 0, item = 0;
    for (std::int64_t req = 0; req < p_.batch; ++req) {
      if (p_.splits(req) <= 1) continue;
      for (std::int64_t row = 0; row < p_.s_q * p_.h_q; ++row, ++item) {
        if (item % threads == thread) worker.combine_row(req, slot, row);
      }
      slot += p_.splits(req);
    }
  }

 private:
  Worker worker_of(int thread) const {
    return Worker(p_, layout_, scratch_ + static_cast<std::size_t>(thread) * layout_.bytes, slots_);
  }

  const Problem& p_;
  ScratchLayout layout_;
  std::byte* scratch_;
  float* slots_;
};

#if defined(_OPENMP)
const pid_t loaded_by = getpid();

int useful_threads(const Problem& p) {
  if (is_forked_child()) return 1;
  double tokens = 0;
  for (std::int64_t r = 0; r < p.batch; ++r) tokens += p.length(r);
  const double work = tokens * static_cast<double>(p.s_q * p.h_q) * (p.d_qk + p.d_v);
  return work < kSingleThreadWork ? 1 : p.params.num_threads;
}
#endif

}  // namespace

bool is_forked_child() {
#if defined(_OPENMP)
  return getpid() != loaded_by;
#else
  return false;
#endif
}

int default_num_threads() {
#if defined(_OPENMP)
  return is_forked_child() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

std::size_t dense_decode_workspace_size(const DenseDecodeArgs& args, const DecodeScheduleView& schedule,
                                        const DenseDecodeParams& params) {
  const Problem problem(args, schedule, params);
  const std::size_t scratch = static_cast<std::size_t>(params.num_threads) * ScratchLayout(problem).bytes;
  const std::size_t slots = num_slots(problem), slot_bytes = problem.slot_floats() * sizeof(float);
  // Only num_splits, which counts up to 2^31 in batch-invariant mode, can ask for this much.
  constexpr std::size_t kMost = std::numeric_limits<std::ptrdiff_t>::max() - kAlignment;
  if (scratch > kMost || (slots > 0 && slot_bytes > (kMost - scratch) / slots)) {
    throw InvalidArgument(fmt::format(
        "schedule.num_splits asks for {} partial results of {} bytes, expected a workspace that fits "
        "a 64-bit address space",
        slots, slot_bytes));
  }
  return scratch + align_up(slots * slot_bytes);
}

void dense_decode(const DenseDecodeArgs& args, const DecodeScheduleView& schedule, void* workspace,
                  const DenseDecodeParams& params) {
  const Problem problem(args, schedule, params);
  const Call call(problem, static_cast<std::byte*>(workspace));
#if defined(_OPENMP)
  const int wanted = useful_threads(problem);
  if (wanted > 1) {
    // The atomics say to a race detector what OpenMP's own, uninstrumented, synchronisation guarantees.
    std::atomic<int> phase{0};
    phase.fetch_add(1, std::memory_order_release);
#pragma omp parallel num_threads(wanted) default(none) shared(call, phase)
    {
      phase.load(std::memory_order_acquire);
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      call.attend(thread, threads);
      phase.fetch_add(1, std::memory_order_acq_rel);
#pragma omp barrier
      phase.load(std::memory_order_acquire);
      call.combine(thread, threads);
      phase.fetch_add(1, std::memory_order_release);
    }
    phase.load(std::memory_order_acquire);
    return;
  }
#endif
  // Little work, or a build without OpenMP: all parts on this thread, however many threads were asked for.
  call.attend(0, 1);
  call.combine(0, 1);
}

}  // namespace flash_mla::cpu
