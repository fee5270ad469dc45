#include <algorithm>
#include <type_traits>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/gqa/sm90/kernel.cuh"
#include "kernels/attention/gqa/sm90/launch.h"

namespace flash_mla::sm90::gqa {
namespace {

constexpr int kMaxCombineBlocks = 2048;  // along the rows of a sequence

template <class T, int kDqk, int kDv>
void launch_shape(const Params& p, cudaStream_t stream) {
  using S = Shape<kDqk, kDv>;
  constexpr auto kKernel = attention_kernel<T, kDqk, kDv>;
  check(allow_shared_memory<kKernel>(S::kSmem), "attention_kernel");
  const auto rows = static_cast<std::int64_t>(p.max_queries) * p.problem.group;
  const bool scheduled = p.parts != nullptr;
  const dim3 grid(static_cast<unsigned>((rows + kTileRows - 1) / kTileRows),
                  static_cast<unsigned>(p.problem.h_kv),
                  static_cast<unsigned>(scheduled ? p.num_parts : p.problem.batch));
  check(flash_mla::launch(LaunchConfig(grid, kThreads, S::kSmem, stream).programmatic(), kKernel, p),
        "attention_kernel");
  if (!scheduled || (p.num_parts == 1 && p.split_blocks == 0)) return;
  const auto of_sequence = static_cast<std::int64_t>(p.max_queries) * p.problem.h_q;
  const dim3 combine_grid(static_cast<unsigned>(std::min<std::int64_t>(of_sequence, kMaxCombineBlocks)),
                          static_cast<unsigned>(p.problem.batch));
  check(flash_mla::launch(
            LaunchConfig(combine_grid, kThreads, kWarps * (kDv + 2) * sizeof(float), stream).programmatic(),
            combine_kernel<T, kDqk, kDv>, p),
        "combine_kernel");
}

template <int kValue>
using Int = std::integral_constant<int, kValue>;

/// f(Int<d_qk>, Int<d_v>) of the kernel there is; false if there is none.
template <class F>
bool with_shape(int d_qk, int d_v, const F& f) {
  const auto is = [&](int a, int b) { return d_qk == a && d_v == b; };
  if (is(64, 64)) return f(Int<64>(), Int<64>()), true;
  if (is(96, 96)) return f(Int<96>(), Int<96>()), true;
  if (is(128, 128)) return f(Int<128>(), Int<128>()), true;
  if (is(192, 128)) return f(Int<192>(), Int<128>()), true;
  if (is(192, 192)) return f(Int<192>(), Int<192>()), true;
  if (is(256, 256)) return f(Int<256>(), Int<256>()), true;
  return false;
}

}  // namespace

bool has_kernel(int d_qk, int d_v) {
  return with_shape(d_qk, d_v, [](auto, auto) {});
}

int ctas_per_sm(int d_qk) { return d_qk <= 128 ? 2 : 1; }
static_assert(Shape<128, 128>::kCtas == 2 && Shape<64, 64>::kCtas == 2 && Shape<192, 128>::kCtas == 1 &&
              Shape<256, 256>::kCtas == 1);

void launch(const Params& params, DType dtype, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  with_shape(params.problem.d_qk, params.problem.d_v, [&](auto dims_qk, auto dims_v) {
    constexpr int kDqk = decltype(dims_qk)::value, kDv = decltype(dims_v)::value;
    if (dtype == DType::kBFloat16) {
      launch_shape<Bf16, kDqk, kDv>(params, queue);
    } else {
      launch_shape<Fp16, kDqk, kDv>(params, queue);
    }
  });
}

}  // namespace flash_mla::sm90::gqa
