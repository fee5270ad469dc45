#include "kernels/attention/sparse_decode/cpu/sparse_decode.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "base/element.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/sparse_decode/cpu/list_attention.h"
#include "kernels/attention/sparse_decode/cpu/team.h"

// A task is one query token (all its heads) and one split of its lists. Where there are query tokens enough
// for the threads, or only one split, a task writes `out` itself; otherwise it leaves (O normalised, lse) of
// every head in a slot of the workspace, and the slots of each query token are combined when all tasks are
// done.
//
// Workspace: num_threads x scratch (ListAttention's, and the pointers to a block's query rows), then the
// slots.

namespace flash_mla::cpu {
namespace {

constexpr int kBlock = 64;  // entries of a list, the unit in which it is cut
constexpr int kMinBlocksPerSplit =
    4;  // 2 tiles of the largest kernel: shorter splits are mostly their combination
constexpr std::int64_t kMaxSplits = 512;  // where batch invariance does not ask for more
// Fewer multiply-adds than this are not worth waking a second thread for (about 10 us of one).
constexpr double kSingleThreadWork = 1e6;
constexpr std::size_t kAlignment = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Sizes that a call's shapes fix.
struct Problem {
  const SparseDecodeArgs& args;
  const SparseParams& params;
  kv::Pool pool, extra_pool;
  std::int64_t batch, s_q, h_q, d_v;
  std::int64_t max_blocks;  // of the longest list
  std::int64_t splits;      // of every query token; the last ones may be empty
  ListProblem list;

  Problem(const SparseDecodeArgs& a, const SparseParams& p)
      : args(a),
        params(p),
        pool(kv::make_pool(a.keys.cache)),
        extra_pool(kv::make_pool(a.extra.cache)),
        batch(a.q.size(0)),
        s_q(a.q.size(1)),
        h_q(a.q.size(2)),
        d_v(a.out.size(3)),
        max_blocks(ceil_div(a.keys.indices.size(2), kBlock) +
                   (a.extra.defined() ? ceil_div(a.extra.indices.size(2), kBlock) : 0)) {
    splits = choose_splits();
    list.dtype = a.q.dtype;
    list.d_qk = static_cast<int>(a.q.size(3));
    list.d_v = static_cast<int>(d_v);
    list.block_rows = static_cast<int>(std::min<std::int64_t>(h_q, kMaxRows));
    list.any_fp8 = kv::is_fp8(a.keys.cache.format) || (a.extra.defined() && kv::is_fp8(a.extra.cache.format));
    list.softmax_scale = p.softmax_scale;
  }

  std::int64_t rows() const { return batch * s_q; }

  std::size_t slot_floats() const {
    return static_cast<std::size_t>(h_q) * (static_cast<std::size_t>(d_v) + 1) + 1;
  }

  std::size_t scratch_bytes() const {
    return ListAttention::scratch_bytes(list) +
           align_up(static_cast<std::size_t>(std::max<std::int64_t>(list.block_rows, 1)) * sizeof(void*)) +
           align_up(static_cast<std::size_t>(d_v) * sizeof(float));
  }

 private:
  std::int64_t choose_splits() const {
    if (params.fixed_split_blocks > 0)
      return std::max<std::int64_t>(ceil_div(max_blocks, params.fixed_split_blocks), 1);
    // The fewest that keep the threads busy nine tenths of the time.
    const std::int64_t most = std::max<std::int64_t>(max_blocks / kMinBlocksPerSplit, 1),
                       threads = params.num_threads;
    std::int64_t best = 1;
    double best_use = 0;
    const std::int64_t limit = std::min({most, 8 * threads, kMaxSplits});
    for (std::int64_t s = 1; s <= limit && best_use < 0.9; ++s) {
      const double rounds = static_cast<double>(ceil_div(rows() * s, threads));
      const double use = static_cast<double>(rows() * s) / (rounds * static_cast<double>(threads));
      if (use > best_use + 0.01) best = s, best_use = use;
    }
    return best;
  }
};

/// Entries of one query token's lists, block by block: `keys` first, then `extra`.
class EntrySource {
 public:
  /// Blocks [begin, end) of query token i of request req.
  EntrySource(const Problem& p, std::int64_t req, std::int64_t i, std::int64_t begin, std::int64_t end) {
    const std::int64_t own = ceil_div(length(p.args.keys, req), kBlock);
    set(parts_[0], p.pool, p.args.keys, req, i, begin, std::min(end, own));
    if (p.args.extra.defined()) {
      set(parts_[1], p.extra_pool, p.args.extra, req, i, std::max(begin, own) - own, end - own);
    }
  }

  static std::int64_t length(const SparseKeys& keys, std::int64_t req) {
    if (!keys.defined()) return 0;
    return keys.topk_length.defined() ? keys.topk_length.ptr<const std::int32_t>()[req]
                                      : keys.indices.size(2);
  }

  int take(SelectedKey* to, int n) {
    int count = 0;
    for (Part& part : parts_) {
      for (; part.entry < part.end && count < n; ++part.entry) {
        if (*part.entry >= 0) to[count++] = {kv::locate(*part.pool, *part.entry), part.pool};
      }
    }
    return count;
  }

 private:
  struct Part {
    const std::int32_t* entry = nullptr;
    const std::int32_t* end = nullptr;
    const kv::Pool* pool = nullptr;
  };

  static void set(Part& part, const kv::Pool& pool, const SparseKeys& keys, std::int64_t req, std::int64_t i,
                  std::int64_t begin, std::int64_t end) {
    const std::int64_t n = length(keys, req);
    if (begin * kBlock >= n || end <= begin) return;
    const auto* list =
        keys.indices.ptr<const std::int32_t>() + req * keys.indices.stride(0) + i * keys.indices.stride(1);
    part.entry = list + begin * kBlock;
    part.end = list + std::min(end * kBlock, n);
    part.pool = &pool;
  }

  Part parts_[2];
};

/// The whole call.
class Call {
 public:
  Call(const Problem& problem, std::byte* workspace)
      : p_(problem),
        workspace_(workspace),
        scratch_bytes_(problem.scratch_bytes()),
        slots_(reinterpret_cast<float*>(workspace + static_cast<std::size_t>(problem.params.num_threads) *
                                                        scratch_bytes_)) {}

  void attend(int thread, std::int64_t task) const {
    const std::int64_t row = task / p_.splits, split = task % p_.splits;
    const std::int64_t req = row / p_.s_q, i = row % p_.s_q;
    const std::int64_t blocks = ceil_div(EntrySource::length(p_.args.keys, req), kBlock) +
                                ceil_div(EntrySource::length(p_.args.extra, req), kBlock);
    const std::int64_t step = p_.params.fixed_split_blocks > 0
                                  ? p_.params.fixed_split_blocks
                                  : std::max<std::int64_t>(ceil_div(blocks, p_.splits), 1);
    std::byte* scratch = workspace_ + static_cast<std::size_t>(thread) * scratch_bytes_;
    ListAttention attention(p_.list, scratch);
    auto** q_rows = reinterpret_cast<const void**>(scratch + ListAttention::scratch_bytes(p_.list));
    for (std::int64_t head = 0; head < p_.h_q; head += kMaxRows) {
      const int rows = static_cast<int>(std::min<std::int64_t>(p_.h_q - head, kMaxRows));
      EntrySource source(p_, req, i, std::min(split * step, blocks), std::min((split + 1) * step, blocks));
      for (int r = 0; r < rows; ++r) {
        const TensorView& q = p_.args.q;
        q_rows[r] =
            q.ptr<const std::byte>() + (req * q.stride(0) + i * q.stride(1) + (head + r) * q.stride(2)) *
                                           static_cast<std::int64_t>(dtype_size(q.dtype));
      }
      attention.begin(q_rows, rows);
      const std::int64_t keys = attention.attend(source);
      for (int r = 0; r < rows; ++r) {
        if (p_.splits == 1) {
          write_row(attention, keys, r, req, i, head + r);
        } else {
          write_slot(attention, keys, r, slot(row, split), head + r);
        }
      }
    }
  }

  /// Combines the slots of one head of one query token: out = sum_s O_s exp(lse_s - lse).
  void combine(int thread, std::int64_t task) const {
    const std::int64_t row = task / p_.h_q, head = task % p_.h_q;
    const std::int64_t req = row / p_.s_q, i = row % p_.s_q;
    const auto lse_of = [&](std::int64_t s) { return slot(row, s)[p_.h_q * p_.d_v + head]; };
    float highest = -kInfinity, keys = 0;
    for (std::int64_t s = 0; s < p_.splits; ++s) {
      highest = std::max(highest, lse_of(s));
      keys += slot(row, s)[p_.slot_floats() - 1];
    }
    if (keys == 0) return write_empty(req, i, head);
    // No split has a weight: subtract 0, so that -inf - -inf never arises. A split that is NaN stays NaN.
    const float base = highest == -kInfinity ? 0.0f : highest;
    auto* acc = reinterpret_cast<float*>(workspace_ + static_cast<std::size_t>(thread + 1) * scratch_bytes_ -
                                         align_up(static_cast<std::size_t>(p_.d_v) * sizeof(float)));
    std::fill_n(acc, p_.d_v, 0.0f);
    float sum = 0;
    for (std::int64_t s = 0; s < p_.splits; ++s) {
      const float weight = std::exp2(lse_of(s) - base);
      sum += weight;
      const float* o = slot(row, s) + head * p_.d_v;
      for (std::int64_t c = 0; c < p_.d_v; ++c) acc[c] += weight * o[c];
    }
    const float lse = sum == 0 ? std::numeric_limits<float>::quiet_NaN() : base + std::log2(sum);
    const float factor = sink_factor(head, lse) / sum;  // all scores -inf: 0 / 0 is NaN
    visit_float_type(p_.args.out.dtype, [&](auto element) {
      using Out = decltype(element);
      auto* to = static_cast<Out*>(out_at(req, i, head));
      for (std::int64_t c = 0; c < p_.d_v; ++c) to[c] = from_double<Out>(acc[c] * factor);
    });
    write_lse(req, i, head, lse);
  }

 private:
  float* slot(std::int64_t row, std::int64_t split) const {
    return slots_ + static_cast<std::size_t>(row * p_.splits + split) * p_.slot_floats();
  }

  void* out_at(std::int64_t req, std::int64_t i, std::int64_t head) const {
    const TensorView& t = p_.args.out;
    return t.ptr<std::byte>() + (req * t.stride(0) + i * t.stride(1) + head * t.stride(2)) *
                                    static_cast<std::int64_t>(dtype_size(t.dtype));
  }

  /// What the sink leaves of out; `lse` is in base 2, the sink in base e.
  float sink_factor(std::int64_t head, float lse) const {
    const TensorView& t = p_.args.attn_sink;
    if (!t.defined()) return 1.0f;
    const float sink = t.ptr<const float>()[head];
    return 1.0f / (1.0f + std::exp2(sink * std::numbers::log2e_v<float> - lse));
  }

  void write_row(const ListAttention& attention, std::int64_t keys, int r, std::int64_t req, std::int64_t i,
                 std::int64_t head) const {
    if (keys == 0) return write_empty(req, i, head);
    const float sum = attention.row_sum(r);
    // Every score -inf: 0 / 0 is NaN.
    const float lse =
        sum == 0 ? std::numeric_limits<float>::quiet_NaN() : attention.row_max(r) + std::log2(sum);
    const float factor = sink_factor(head, lse) / sum;
    attention.store(r, sum == 0 ? std::numeric_limits<float>::quiet_NaN() : factor, p_.args.out.dtype,
                    out_at(req, i, head));
    write_lse(req, i, head, lse);
  }

  void write_slot(const ListAttention& attention, std::int64_t keys, int r, float* to,
                  std::int64_t head) const {
    const float sum = keys == 0 ? 0.0f : attention.row_sum(r);
    to[p_.slot_floats() - 1] = keys == 0 ? 0.0f : 1.0f;
    to[p_.h_q * p_.d_v + head] = sum == 0 ? -kInfinity : attention.row_max(r) + std::log2(sum);
    float* o = to + head * p_.d_v;
    if (sum == 0) {
      std::fill_n(o, p_.d_v, 0.0f);  // O may hold anything
    } else {
      attention.store(r, 1.0f / sum, DType::kFloat32, o);
    }
  }

  void write_empty(std::int64_t req, std::int64_t i, std::int64_t head) const {
    std::fill_n(static_cast<std::byte*>(out_at(req, i, head)),
                static_cast<std::size_t>(p_.d_v) * dtype_size(p_.args.out.dtype), std::byte{0});
    write_lse(req, i, head, kInfinity);
  }

  // `lse` is in base 2.
  void write_lse(std::int64_t req, std::int64_t i, std::int64_t head, float lse) const {
    const TensorView& t = p_.args.lse;
    if (!t.defined()) return;
    t.ptr<float>()[req * t.stride(0) + head * t.stride(1) + i * t.stride(2)] =
        lse * std::numbers::ln2_v<float>;
  }

  const Problem& p_;
  std::byte* workspace_;
  std::size_t scratch_bytes_;
  float* slots_;
};

}  // namespace

std::size_t sparse_decode_workspace_size(const SparseDecodeArgs& args, const SparseParams& params) {
  const Problem p(args, params);
  const std::size_t scratch = static_cast<std::size_t>(params.num_threads) * p.scratch_bytes();
  if (p.splits == 1 || p.rows() == 0) return scratch;
  std::size_t slots = 0, bytes = 0;
  if (__builtin_mul_overflow(static_cast<std::size_t>(p.rows()), static_cast<std::size_t>(p.splits),
                             &slots) ||
      __builtin_mul_overflow(slots, p.slot_floats() * sizeof(float), &bytes) ||
      bytes > std::numeric_limits<std::ptrdiff_t>::max() - scratch - kAlignment) {
    throw InvalidArgument(
        fmt::format("fixed_split_blocks is {}, which asks for {} partial results of {} query tokens, "
                    "expected a workspace that "
                    "fits a 64-bit address space",
                    params.fixed_split_blocks, p.splits, p.rows()));
  }
  return scratch + align_up(bytes);
}

void sparse_decode(const SparseDecodeArgs& args, void* workspace, const SparseParams& params) {
  const Problem p(args, params);
  const Call call(p, static_cast<std::byte*>(workspace));
  const std::int64_t tasks = p.rows() * p.splits, combined = p.splits > 1 ? p.rows() * p.h_q : 0;
  const double work = static_cast<double>(p.rows() * p.max_blocks * kBlock) * static_cast<double>(p.h_q) *
                      static_cast<double>(p.list.d_qk + p.list.d_v);
  const bool alone = work < kSingleThreadWork || is_forked_child();
  run_team(
      alone ? 1 : params.num_threads, tasks, [&](int thread, std::int64_t i) { call.attend(thread, i); },
      combined, [&](int thread, std::int64_t i) { call.combine(thread, i); });
}

}  // namespace flash_mla::cpu
