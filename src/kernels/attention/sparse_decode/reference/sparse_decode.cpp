#include "kernels/attention/sparse_decode/reference/sparse_decode.h"

#include "kernels/attention/sparse_decode/reference/attend.h"
#include "kernels/cache/reference/dequantise.h"

namespace flash_mla::reference {
namespace {

/// Adds the tokens that one list of query token (req, i) selects.
void select(const SparseKeys& list, std::int64_t req, std::int64_t i, std::int64_t d_qk, Keys& keys) {
  if (!list.defined()) return;
  const kv::Pool pool = kv::make_pool(list.cache);
  const TensorView& t = list.indices;
  const std::int64_t length =
      list.topk_length.defined()
          ? list.topk_length.ptr<const std::int32_t>()[req * list.topk_length.stride(0)]
          : t.size(2);
  if (length == 0) return;
  const auto* entries = t.ptr<const std::int32_t>() + req * t.stride(0) + i * t.stride(1);
  for (std::int64_t j = 0; j < length; ++j) {
    if (entries[j] < 0) continue;
    keys.elements.resize(static_cast<std::size_t>((keys.count + 1) * d_qk));
    dequantise(pool, entries[j], keys.elements.data() + keys.count * d_qk);
    ++keys.count;
  }
}

}  // namespace

void sparse_decode_unchecked(const SparseDecodeArgs& a, double softmax_scale) {
  const std::int64_t b = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3);
  Keys keys;
  for (std::int64_t r = 0; r < b; ++r) {
    for (std::int64_t i = 0; i < s_q; ++i) {
      keys.count = 0;
      select(a.keys, r, i, d_qk, keys);
      select(a.extra, r, i, d_qk, keys);
      for (std::int64_t h = 0; h < h_q; ++h) {
        const double sink = a.attn_sink.defined() ? a.attn_sink.ptr<const float>()[h * a.attn_sink.stride(0)]
                                                  : -std::numeric_limits<double>::infinity();
        const Row row = visit_float_type(a.q.dtype, [&](auto element) {
          const auto* q =
              a.q.ptr<const decltype(element)>() + r * a.q.stride(0) + i * a.q.stride(1) + h * a.q.stride(2);
          return attend(q, d_qk, a.out.size(3), keys, softmax_scale, sink);
        });
        store_row(a.out, r * a.out.stride(0) + i * a.out.stride(1) + h * a.out.stride(2), row.out);
        if (a.lse.defined()) {
          store(a.lse, r * a.lse.stride(0) + h * a.lse.stride(1) + i * a.lse.stride(2), row.lse);
        }
      }
    }
  }
}

}  // namespace flash_mla::reference
