#include "flash_mla/merge.h"

#include "api/call.h"
#include "kernels/attention/merge/cpu/merge.h"
#include "kernels/attention/merge/sm90/merge.h"

namespace flash_mla {

void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                  const TensorView& lse_b, const TensorView& out, const TensorView& lse, LseBase base,
                  void* stream) {
  using api::check_last_dim_contiguous;
  using api::check_no_overlap;
  using api::check_same_device;
  using api::check_size;
  using api::check_tensor;
  check_tensor(out_a, "out_a", 4, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_tensor(out_b, "out_b", 4, {out_a.dtype});
  check_tensor(out, "out", 4, {out_a.dtype});
  check_tensor(lse_a, "lse_a", 3, {DType::kFloat32});
  check_tensor(lse_b, "lse_b", 3, {DType::kFloat32});
  check_tensor(lse, "lse", 3, {DType::kFloat32});
  constexpr const char* kOutDims[] = {"out_a.shape[0] (b)", "out_a.shape[1] (s_q)", "out_a.shape[2] (h_q)",
                                      "out_a.shape[3] (d)"};
  for (int d = 0; d < 4; ++d) {
    check_size(out_b, "out_b", d, out_a.size(d), kOutDims[d]);
    check_size(out, "out", d, out_a.size(d), kOutDims[d]);
  }
  const auto check_lse = [&](const TensorView& t, const char* name) {
    check_size(t, name, 0, out_a.size(0), kOutDims[0]);
    check_size(t, name, 1, out_a.size(2), kOutDims[2]);
    check_size(t, name, 2, out_a.size(1), kOutDims[1]);
  };
  check_lse(lse_a, "lse_a");
  check_lse(lse_b, "lse_b");
  check_lse(lse, "lse");
  check_last_dim_contiguous(out_a, "out_a");
  check_last_dim_contiguous(out_b, "out_b");
  check_last_dim_contiguous(out, "out");
  check_no_overlap(out, "out");
  check_no_overlap(lse, "lse");
  check_same_device(lse_a, "lse_a", out_a, "out_a");
  check_same_device(out_b, "out_b", out_a, "out_a");
  check_same_device(lse_b, "lse_b", out_a, "out_a");
  check_same_device(out, "out", out_a, "out_a");
  check_same_device(lse, "lse", out_a, "out_a");
  if (base != LseBase::kE && base != LseBase::kTwo) {
    api::invalid("base is {}, expected kE or kTwo", static_cast<int>(base));
  }
  const bool on_gpu = api::backend_of(Backend::kAuto, out_a, "out_a") == Backend::kSm90;
  if (out.numel() == 0) return;
  if (on_gpu) return sm90::merge_states(out_a, lse_a, out_b, lse_b, out, lse, base, stream);
  cpu::merge_states(out_a, lse_a, out_b, lse_b, out, lse, base);
}

}  // namespace flash_mla
