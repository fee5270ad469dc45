#include "kernels/attention/sparse_prefill/cpu/sparse_prefill.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "base/element.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/sparse_decode/cpu/list_attention.h"
#include "kernels/attention/sparse_decode/cpu/team.h"
#include "kernels/attention/sparse_prefill/selection.h"

// A task is one query token, all its heads and its whole list. Workspace: num_threads x scratch
// (ListAttention's, and the pointers to a block's query rows).

namespace flash_mla::cpu {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

ListProblem list_problem(const SparsePrefillArgs& a, const SparseParams& params) {
  ListProblem p;
  p.dtype = a.q.dtype;
  p.d_qk = static_cast<int>(a.q.size(2));
  p.d_v = static_cast<int>(a.out.size(2));
  p.block_rows = static_cast<int>(std::min<std::int64_t>(a.q.size(1), kMaxRows));
  p.any_fp8 = kv::is_fp8(a.cache.format);
  p.softmax_scale = params.softmax_scale;
  return p;
}

std::size_t scratch_bytes(const ListProblem& p) {
  const std::size_t pointers = static_cast<std::size_t>(p.block_rows) * sizeof(void*);
  return ListAttention::scratch_bytes(p) + (pointers + kAlignment - 1) / kAlignment * kAlignment;
}

/// The tokens that one query token's list selects.
class EntrySource {
 public:
  EntrySource(const PrefillSelection& selection, const kv::Pool& pool, std::int64_t i)
      : selection_(selection),
        pool_(pool),
        request_(selection.request(i)),
        entry_(selection.entries(i)),
        end_(entry_ + selection.length(i)) {}

  int take(SelectedKey* to, int n) {
    int count = 0;
    for (; entry_ < end_ && count < n; ++entry_) {
      const std::int64_t slot = selection_.slot(request_, *entry_);
      if (slot >= 0) to[count++] = {kv::locate(pool_, slot), &pool_};
    }
    return count;
  }

 private:
  const PrefillSelection& selection_;
  const kv::Pool& pool_;
  std::int64_t request_;
  const std::int32_t* entry_;
  const std::int32_t* end_;
};

class Call {
 public:
  Call(const SparsePrefillArgs& args, const ListProblem& list, std::byte* workspace)
      : a_(args),
        list_(list),
        pool_(kv::make_pool(args.cache)),
        selection_(args),
        workspace_(workspace),
        scratch_bytes_(scratch_bytes(list)) {}

  void attend(int thread, std::int64_t i) const {
    std::byte* scratch = workspace_ + static_cast<std::size_t>(thread) * scratch_bytes_;
    ListAttention attention(list_, scratch);
    auto** q_rows = reinterpret_cast<const void**>(scratch + ListAttention::scratch_bytes(list_));
    const std::int64_t h_q = a_.q.size(1);
    for (std::int64_t head = 0; head < h_q; head += kMaxRows) {
      const int rows = static_cast<int>(std::min<std::int64_t>(h_q - head, kMaxRows));
      for (int r = 0; r < rows; ++r) q_rows[r] = element(a_.q, i, head + r);
      EntrySource source(selection_, pool_, i);
      attention.begin(q_rows, rows);
      const bool empty = attention.attend(source) == 0;
      for (int r = 0; r < rows; ++r) write_row(attention, empty, r, i, head + r);
    }
  }

 private:
  static std::byte* element(const TensorView& t, std::int64_t i, std::int64_t head) {
    return t.ptr<std::byte>() +
           (i * t.stride(0) + head * t.stride(1)) * static_cast<std::int64_t>(dtype_size(t.dtype));
  }

  void write_row(const ListAttention& attention, bool empty, int r, std::int64_t i, std::int64_t head) const {
    std::byte* out = element(a_.out, i, head);
    if (empty) {
      std::fill_n(out, static_cast<std::size_t>(list_.d_v) * dtype_size(a_.out.dtype), std::byte{0});
      return write_statistics(i, head, -kInfinity, kInfinity);
    }
    const float sum = attention.row_sum(r), row_max = attention.row_max(r);  // base 2
    const float lse = sum == 0 ? kNan : row_max + std::log2(sum);            // every score -inf: 0 / 0
    float factor = sum == 0 ? kNan : 1.0f / sum;
    if (a_.attn_sink.defined()) {
      const float sink = a_.attn_sink.ptr<const float>()[head] * std::numbers::log2e_v<float>;
      factor /= 1.0f + std::exp2(sink - lse);
    }
    attention.store(r, factor, a_.out.dtype, out);
    write_statistics(i, head, row_max * std::numbers::ln2_v<float>, lse * std::numbers::ln2_v<float>);
  }

  void write_statistics(std::int64_t i, std::int64_t head, float max_logit, float lse) const {
    if (a_.max_logits.defined()) *reinterpret_cast<float*>(element(a_.max_logits, i, head)) = max_logit;
    if (a_.lse.defined()) *reinterpret_cast<float*>(element(a_.lse, i, head)) = lse;
  }

  const SparsePrefillArgs& a_;
  const ListProblem& list_;
  kv::Pool pool_;
  PrefillSelection selection_;
  std::byte* workspace_;
  std::size_t scratch_bytes_;
};

}  // namespace

std::size_t sparse_prefill_workspace_size(const SparsePrefillArgs& args, const SparseParams& params) {
  return static_cast<std::size_t>(params.num_threads) * scratch_bytes(list_problem(args, params));
}

void sparse_prefill(const SparsePrefillArgs& args, void* workspace, const SparseParams& params) {
  const ListProblem list = list_problem(args, params);
  const Call call(args, list, static_cast<std::byte*>(workspace));
  run_team(
      is_forked_child() ? 1 : params.num_threads, args.q.size(0),
      [&](int thread, std::int64_t i) { call.attend(thread, i); }, 0, [](int, std::int64_t) {});
}

}  // namespace flash_mla::cpu
