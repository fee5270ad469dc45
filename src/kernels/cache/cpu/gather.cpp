#include "kernels/cache/cpu/gather.h"

#include <array>

#include "base/element.h"
#include "kernels/cache/cpu/dequantise.h"
#include "kernels/cache/cpu/tokens.h"

namespace flash_mla::cpu {

void gather_kv(const KvGatherArgs& args, int num_threads) {
  const kv::Pool pool = kv::make_pool(args.cache);
  for_each_token(args.out.size(0), num_threads, [&](std::int64_t i) {
    const std::int64_t slot = integer(args.slots, i);
    std::array<float, 576> row{};
    if (slot >= 0) dequantise(pool, kv::locate(pool, slot), row.data());
    visit_float_type(args.out.dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (!std::is_same_v<T, double>) {
        T* to = args.out.ptr<T>() + i * args.out.stride(0);
        for (int d = 0; d < pool.d_qk; ++d) to[d] = from_double<T>(row[static_cast<std::size_t>(d)]);
      }
    });
  });
}

}  // namespace flash_mla::cpu
