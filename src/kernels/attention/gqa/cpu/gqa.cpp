#include "kernels/attention/gqa/cpu/gqa.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "base/element.h"
#include "base/parallel.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/gqa/cpu/rows.h"
#include "schedule/walk.h"

// Without a schedule a (sequence, key head, block of rows) is an item of work, and its result goes straight to `out`. With
// one, a part is: each of its splits leaves (O normalised, log2 of the sum) of every row in a slot of the workspace, and
// afterwards the slots of each split sequence are combined.
//
// Workspace: num_threads x GqaRows::bytes, then the slots. Bits do not depend on which thread takes what.

namespace flash_mla::cpu {
namespace {

using gqa::Problem;

// Fewer multiply-adds than this are not worth waking a second thread for.
constexpr double kSingleThreadWork = 1e6;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int64_t most_queries(const Problem& p) {
  std::int64_t most = p.uniform_q;
  for (std::int64_t r = 0; p.cu_q != nullptr && r < p.batch; ++r) {
    most = r == 0 ? p.queries(r) : std::max(most, p.queries(r));
  }
  return most;
}

int this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

class Call {
 public:
  Call(const GqaCall& call, std::byte* workspace)
      : call_(call),
        p_(call.problem),
        max_queries_(most_queries(p_)),
        scratch_bytes_(GqaRows::bytes(call)),
        scratch_(workspace) {}

  std::size_t bytes() const {
    return static_cast<std::size_t>(call_.num_threads) * scratch_bytes_ +
           (static_cast<std::size_t>(num_slots()) * slot_floats() * sizeof(float) + 63) / 64 * 64;
  }

  void run() const {
    const int threads = useful_threads();
    const std::int64_t blocks = (max_queries_ * p_.group + kMaxRows - 1) / kMaxRows;
    if (!call_.schedule.parts.defined()) {
      return parallel_for(std::int64_t{p_.batch} * p_.h_kv * blocks, threads, [&](std::int64_t item) {
        const std::int64_t req = item / (p_.h_kv * blocks), rest = item % (p_.h_kv * blocks);
        // The last blocks of a prompt see most: first.
        run_block(req, rest / blocks, blocks - 1 - rest % blocks, 0, p_.keys(req), nullptr);
      });
    }
    parallel_for(call_.schedule.parts.size(0), threads, [&](std::int64_t part) { run_part(part); });
    parallel_for(p_.batch, threads, [&](std::int64_t req) {
      if (splits(req) > 1) combine(req);
    });
  }

 private:
  GqaRows rows() const {
    return {call_, scratch_ + static_cast<std::size_t>(this_thread()) * scratch_bytes_};
  }

  std::int64_t splits(std::int64_t req) const {
    const auto* s = call_.schedule.num_splits.ptr<const std::int32_t>();
    return s[req + 1] - s[req];
  }
  // Of the first of a sequence's slots.
  std::int64_t first_slot(std::int64_t req) const {
    std::int64_t slot = 0;
    for (std::int64_t r = 0; r < req; ++r) slot += splits(r) > 1 ? splits(r) : 0;
    return slot;
  }
  std::int64_t num_slots() const {
    if (!call_.schedule.parts.defined()) return 0;
    if (call_.schedule.fixed_split_blocks > 0) return first_slot(p_.batch);
    return call_.schedule.parts.size(0) > 1 ? 2 * call_.schedule.parts.size(0) : 0;
  }
  // Rows of a slot are queries times heads: all outputs, then all statistics.
  std::size_t slot_floats() const {
    return static_cast<std::size_t>(max_queries_ * p_.h_q) * (static_cast<std::size_t>(p_.d_v) + 1);
  }
  float* slot(std::int64_t index) const {
    std::byte* slots = scratch_ + static_cast<std::size_t>(call_.num_threads) * scratch_bytes_;
    return reinterpret_cast<float*>(slots) + static_cast<std::size_t>(index) * slot_floats();
  }
  float& statistic(float* of_slot, std::int64_t row) const {
    return of_slot[max_queries_ * p_.h_q * p_.d_v + row];
  }

  int useful_threads() const {
    if (call_.num_threads == 1 || is_forked_child()) return 1;
    double pairs = 0;
    for (std::int64_t r = 0; r < p_.batch; ++r) {
      pairs += static_cast<double>(p_.queries(r)) * static_cast<double>(p_.keys(r));
    }
    return pairs * p_.h_q * (p_.d_qk + p_.d_v) < kSingleThreadWork ? 1 : call_.num_threads;
  }

  void run_part(std::int64_t index) const {
    const DecodeScheduleView& s = call_.schedule;
    const DecodePart part = schedule_part(s, index);
    if (part.begin_req >= p_.batch || part.begin_req > part.end_req) return;
    if (p_.lengths == nullptr) return;  // never: a schedule comes with them
    const auto walk = walk_part(part, p_.lengths, s.num_splits.ptr<const std::int32_t>(), s.block_size,
                                s.fixed_split_blocks);
    for (auto item = walk.first(); walk.holds(item); item = walk.next(item)) {
      float* to = item.is_split ? slot(first_slot(item.req) + item.slot) : nullptr;
      const std::int64_t blocks = (p_.queries(item.req) * p_.group + kMaxRows - 1) / kMaxRows;
      for (std::int64_t head = 0; head < p_.h_kv; ++head) {
        for (std::int64_t block = 0; block < blocks; ++block) {
          run_block(item.req, head, block, item.begin_block * s.block_size,
                    std::min(item.end_block * s.block_size, item.length), to);
        }
      }
    }
  }

  // `to`: a slot, or null for out and lse.
  void run_block(std::int64_t req, std::int64_t head, std::int64_t block, std::int64_t begin,
                 std::int64_t end, float* to) const {
    const std::int64_t all = p_.queries(req) * p_.group, first = block * kMaxRows;
    if (first >= all) return;
    GqaRows rows = this->rows();
    const int count = static_cast<int>(std::min<std::int64_t>(all - first, kMaxRows));
    rows.attend({req, head, first, count}, begin, end);
    for (int r = 0; r < count; ++r) {
      const std::int64_t i = (first + r) / p_.group, h = head * p_.group + (first + r) % p_.group;
      const float lse = rows.log_sum(r);
      if (to == nullptr) {
        rows.store_row(r, sink_factor(h, lse), call_.dtype, out_row(req, i, h));
        finish_row(req, i, h, lse);
      } else {
        rows.store_row(r, 1.0f, DType::kFloat32, to + (i * p_.h_q + h) * p_.d_v);
        statistic(to, i * p_.h_q + h) = lse;
      }
    }
  }

  void combine(std::int64_t req) const {
    const std::int64_t first = first_slot(req);
    for (std::int64_t i = 0; i < p_.queries(req); ++i) {
      for (std::int64_t h = 0; h < p_.h_q; ++h) combine_row(req, first, i, h);
    }
  }

  void combine_row(std::int64_t req, std::int64_t first, std::int64_t i, std::int64_t h) const {
    const std::int64_t n = splits(req), row = i * p_.h_q + h;
    float highest = -kInfinity;
    for (std::int64_t s = 0; s < n; ++s) highest = std::max(highest, statistic(slot(first + s), row));
    // No split has a weight: subtract 0, so that -inf - -inf never arises. A split that is NaN stays NaN.
    const float base = highest == -kInfinity ? 0.0f : highest;
    float* acc =
        reinterpret_cast<float*>(scratch_ + static_cast<std::size_t>(this_thread()) * scratch_bytes_);
    std::fill_n(acc, p_.d_v, 0.0f);
    float sum = 0;
    for (std::int64_t s = 0; s < n; ++s) {
      const float weight = std::exp2(statistic(slot(first + s), row) - base);
      const float* o = slot(first + s) + row * p_.d_v;
      sum += weight;
      for (int c = 0; c < p_.d_v; ++c) acc[c] += weight * o[c];
    }
    const float lse = sum == 0 ? -kInfinity : base + std::log2(sum);
    const float factor = sum == 0 ? 0.0f : sink_factor(h, lse) / sum;
    visit_float_type(call_.dtype, [&](auto element) {
      using Out = decltype(element);
      auto* out = static_cast<Out*>(out_row(req, i, h));
      for (int c = 0; c < p_.d_v; ++c) out[c] = from_double<Out>(static_cast<double>(acc[c] * factor));
    });
    finish_row(req, i, h, lse);
  }

  void* out_row(std::int64_t req, std::int64_t i, std::int64_t h) const {
    return static_cast<std::byte*>(p_.out) +
           ((p_.first_query(req) + i) * p_.out_strides.token + h * p_.out_strides.head) *
               static_cast<std::int64_t>(dtype_size(call_.dtype));
  }

  /// What a sink leaves of the output of a row with this log2 of its sum.
  float sink_factor(std::int64_t h, float lse) const {
    if (p_.sinks == nullptr) return 1.0f;
    return 1.0f / (1.0f + std::exp2(p_.sinks[h] * std::numbers::log2e_v<float> - lse));
  }

  /// Writes lse, and NaN to out where all scores that the row sees are -inf: 0 / 0.
  void finish_row(std::int64_t req, std::int64_t i, std::int64_t h, float lse) const {
    float natural = lse * std::numbers::ln2_v<float>;
    if (lse == -kInfinity) {
      const bool empty = !sees_a_key(req, i);
      natural = empty ? kInfinity : std::numeric_limits<float>::quiet_NaN();
      if (!empty) {
        visit_float_type(call_.dtype, [&](auto element) {
          using Out = decltype(element);
          std::fill_n(static_cast<Out*>(out_row(req, i, h)), p_.d_v,
                      from_double<Out>(std::numeric_limits<double>::quiet_NaN()));
        });
      }
    }
    if (p_.lse == nullptr) return;
    p_.lse[h * p_.lse_head_stride + (p_.first_query(req) + i) * p_.lse_token_stride] = natural;
  }

  bool sees_a_key(std::int64_t req, std::int64_t i) const {
    const std::int64_t m = p_.keys(req);
    const gqa::Range seen = p_.visible(i, p_.queries(req), m);
    for (std::int64_t j = seen.begin; j < seen.end; ++j) {
      if (p_.unmasked(req, i, j, m)) return true;
    }
    return false;
  }

  const GqaCall& call_;
  const Problem& p_;
  std::int64_t max_queries_;
  std::size_t scratch_bytes_;
  std::byte* scratch_;
};

}  // namespace

std::size_t gqa_workspace_size(const GqaCall& call) { return Call(call, nullptr).bytes(); }

void gqa_attention(const GqaCall& call, void* workspace) {
  Call(call, static_cast<std::byte*>(workspace)).run();
}

}  // namespace flash_mla::cpu
