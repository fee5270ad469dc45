#include "kernels/attention/sparse_prefill/reference/sparse_prefill.h"

#include "kernels/attention/sparse_decode/reference/attend.h"
#include "kernels/attention/sparse_prefill/selection.h"
#include "kernels/cache/reference/dequantise.h"

namespace flash_mla::reference {

void sparse_prefill_unchecked(const SparsePrefillArgs& a, double softmax_scale) {
  const std::int64_t n = a.q.size(0), h_q = a.q.size(1), d_qk = a.q.size(2);
  const kv::Pool pool = kv::make_pool(a.cache);
  const PrefillSelection selection(a);
  Keys keys;
  for (std::int64_t i = 0; i < n; ++i) {
    keys.count = 0;
    const std::int64_t request = selection.request(i);
    for (std::int64_t j = 0; j < selection.length(i); ++j) {
      const std::int64_t slot = selection.slot(request, selection.entries(i)[j]);
      if (slot < 0) continue;
      keys.elements.resize(static_cast<std::size_t>((keys.count + 1) * d_qk));
      dequantise(pool, slot, keys.elements.data() + keys.count * d_qk);
      ++keys.count;
    }
    for (std::int64_t h = 0; h < h_q; ++h) {
      const double sink = a.attn_sink.defined() ? a.attn_sink.ptr<const float>()[h * a.attn_sink.stride(0)]
                                                : -std::numeric_limits<double>::infinity();
      const Row row = visit_float_type(a.q.dtype, [&](auto element) {
        const auto* q = a.q.ptr<const decltype(element)>() + i * a.q.stride(0) + h * a.q.stride(1);
        return attend(q, d_qk, a.out.size(2), keys, softmax_scale, sink);
      });
      store_row(a.out, i * a.out.stride(0) + h * a.out.stride(1), row.out);
      if (a.max_logits.defined()) {
        store(a.max_logits, i * a.max_logits.stride(0) + h * a.max_logits.stride(1), row.max_logit);
      }
      if (a.lse.defined()) store(a.lse, i * a.lse.stride(0) + h * a.lse.stride(1), row.lse);
    }
  }
}

}  // namespace flash_mla::reference
