#include "kernels/attention/dense_fp8_decode/reference/dense_fp8_decode.h"

#include "kernels/attention/sparse_decode/reference/attend.h"
#include "kernels/cache/reference/dequantise.h"

namespace flash_mla::reference {

void dense_fp8_decode_unchecked(const DenseFp8DecodeArgs& a, double softmax_scale, bool causal) {
  const std::int64_t b = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3);
  const kv::Pool pool = kv::make_pool(a.cache);
  Keys keys;
  for (std::int64_t r = 0; r < b; ++r) {
    const std::int64_t length = a.cache_seqlens.ptr<const std::int32_t>()[r];
    const auto* pages = a.block_table.ptr<const std::int32_t>() + r * a.block_table.stride(0);
    keys.elements.resize(static_cast<std::size_t>(length * d_qk));
    for (std::int64_t j = 0; j < length; ++j) {
      dequantise(pool, pages[j / pool.page_size] * pool.page_size + j % pool.page_size,
                 keys.elements.data() + j * d_qk);
    }
    for (std::int64_t i = 0; i < s_q; ++i) {
      keys.count = causal ? std::max<std::int64_t>(length - s_q + i + 1, 0) : length;
      for (std::int64_t h = 0; h < h_q; ++h) {
        const Row row = visit_float_type(a.q.dtype, [&](auto element) {
          const auto* q =
              a.q.ptr<const decltype(element)>() + r * a.q.stride(0) + i * a.q.stride(1) + h * a.q.stride(2);
          return attend(q, d_qk, a.out.size(3), keys, softmax_scale,
                        -std::numeric_limits<double>::infinity());
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
