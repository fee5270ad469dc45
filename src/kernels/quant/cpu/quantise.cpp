#include "kernels/quant/cpu/quantise.h"

#include <algorithm>
#include <cmath>

#include "base/element.h"

namespace flash_mla::cpu {

void quantise_fp8(const TensorView& x, int tile, Fp8Recipe recipe, const TensorView& values,
                  const TensorView& scales) {
  const std::int64_t d = x.size(1);
  if (d == 0) return;  // no address is made of a row that is empty
  visit_float_type(x.dtype, [&](auto element) {
    using T = decltype(element);
    for (std::int64_t row = 0; row < x.size(0); ++row) {
      const T* from = x.ptr<const T>() + row * x.stride(0);
      auto* to = values.ptr<E4m3>() + row * values.stride(0);
      for (std::int64_t begin = 0, t = 0; begin < d; begin += tile, ++t) {
        // In two passes over the row instead of a copy of the tile, which may be of any width.
        const std::int64_t end = std::min<std::int64_t>(begin + tile, d);
        float amax = 0;
        for (std::int64_t i = begin; i < end; ++i) {
          amax = std::max(amax, std::abs(static_cast<float>(to_float(from[i]))));
        }
        const float scale = quant::tile_scale(recipe, amax);
        for (std::int64_t i = begin; i < end; ++i) {
          to[i] = quant::quantise_value(recipe, static_cast<float>(to_float(from[i])), scale);
        }
        const std::int64_t at = row * scales.stride(0) + t * scales.stride(1);
        if (scales.dtype == DType::kUInt8) {
          scales.ptr<E8m0>()[at] = to_e8m0(scale);
        } else {
          scales.ptr<float>()[at] = scale;
        }
      }
    }
  });
}

}  // namespace flash_mla::cpu
