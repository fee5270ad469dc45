#include <flash_mla/flash_mla.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

// One request of three tokens whose keys are all equal: the output is the key's latent part, whatever the
// query.
int main() {
  using namespace flash_mla;
  std::vector<float> q(2 * 576, 0.5f), cache(4 * 16 * 576, 0.25f), out(2 * 512), lse(2);
  std::vector<std::int32_t> table{2}, lengths{3};
  DenseDecodeArgs args;
  args.q = TensorView::contiguous(q.data(), DType::kFloat32, {1, 1, 2, 576});
  args.k_cache = TensorView::contiguous(cache.data(), DType::kFloat32, {4, 16, 1, 576});
  args.block_table = TensorView::contiguous(table.data(), DType::kInt32, {1, 1});
  args.cache_seqlens = TensorView::contiguous(lengths.data(), DType::kInt32, {1});
  args.out = TensorView::contiguous(out.data(), DType::kFloat32, {1, 1, 2, 512});
  args.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {1, 2, 1});
  const DecodeSchedule schedule = DecodeSchedule::build(lengths, cpu_schedule_options(2));
  const std::size_t bytes = dense_decode_workspace_size(args, schedule.view());
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  dense_decode(args, schedule.view(), workspace, bytes);
  std::free(workspace);
  const double expected = 576 * 0.125 / 24 + std::log(3.0);
  if (std::abs(out[511] - 0.25f) > 1e-6f || std::abs(lse[1] - expected) > 1e-4) {
    std::printf("out %g lse %g, expected 0.25 and %g\n", out[511], lse[1], expected);
    return 1;
  }
  return 0;
}
