#include "flash_mla/merge.h"

#include "api/call.h"
#include "kernels/attention/merge/cpu/merge.h"
#include "kernels/attention/merge/sm90/merge.h"

namespace flash_mla {
namespace {

/// What a caller calls the two states.
struct Names {
  const char *out_a, *lse_a, *out_b, *lse_b;
  const char* dims[4];
};
constexpr Names kTwoStates{
    "out_a",
    "lse_a",
    "out_b",
    "lse_b",
    {"out_a.shape[0] (b)", "out_a.shape[1] (s_q)", "out_a.shape[2] (h_q)", "out_a.shape[3] (d)"}};
constexpr Names kInPlace{
    "out",
    "lse",
    "other_out",
    "other_lse",
    {"out.shape[0] (b)", "out.shape[1] (s_q)", "out.shape[2] (h_q)", "out.shape[3] (d)"}};

void merge(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b, const TensorView& lse_b,
           const TensorView& out, const TensorView& lse, const TensorView& mask, LseBase base, void* stream,
           const Names& names) {
  using api::check_last_dim_contiguous;
  using api::check_no_overlap;
  using api::check_same_device;
  using api::check_size;
  using api::check_tensor;
  check_tensor(out_a, names.out_a, 4, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_tensor(out_b, names.out_b, 4, {out_a.dtype});
  check_tensor(out, "out", 4, {out_a.dtype});
  check_tensor(lse_a, names.lse_a, 3, {DType::kFloat32});
  check_tensor(lse_b, names.lse_b, 3, {DType::kFloat32});
  check_tensor(lse, "lse", 3, {DType::kFloat32});
  for (int d = 0; d < 4; ++d) {
    check_size(out_b, names.out_b, d, out_a.size(d), names.dims[d]);
    check_size(out, "out", d, out_a.size(d), names.dims[d]);
  }
  const auto check_lse = [&](const TensorView& t, const char* name) {
    check_size(t, name, 0, out_a.size(0), names.dims[0]);
    check_size(t, name, 1, out_a.size(2), names.dims[2]);
    check_size(t, name, 2, out_a.size(1), names.dims[1]);
  };
  check_lse(lse_a, names.lse_a);
  check_lse(lse_b, names.lse_b);
  check_lse(lse, "lse");
  check_last_dim_contiguous(out_a, names.out_a);
  check_last_dim_contiguous(out_b, names.out_b);
  check_last_dim_contiguous(out, "out");
  check_no_overlap(out, "out");
  check_no_overlap(lse, "lse");
  check_same_device(lse_a, names.lse_a, out_a, names.out_a);
  check_same_device(out_b, names.out_b, out_a, names.out_a);
  check_same_device(lse_b, names.lse_b, out_a, names.out_a);
  check_same_device(out, "out", out_a, names.out_a);
  check_same_device(lse, "lse", out_a, names.out_a);
  if (base != LseBase::kE && base != LseBase::kTwo) {
    api::invalid("base is {}, expected kE or kTwo", static_cast<int>(base));
  }
  if (mask.defined()) {
    check_tensor(mask, "mask", 2, {DType::kUInt8});
    check_size(mask, "mask", 0, out_a.size(0), names.dims[0]);
    check_size(mask, "mask", 1, out_a.size(1), names.dims[1]);
    check_same_device(mask, "mask", out_a, names.out_a);
  }
  const bool on_gpu = api::backend_of(Backend::kAuto, out_a, names.out_a) == Backend::kSm90;
  if (out.numel() == 0) return;
  if (on_gpu) return sm90::merge_states(out_a, lse_a, out_b, lse_b, out, lse, mask, base, stream);
  cpu::merge_states(out_a, lse_a, out_b, lse_b, out, lse, base, mask);
}

}  // namespace

void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                  const TensorView& lse_b, const TensorView& out, const TensorView& lse, LseBase base,
                  void* stream) {
  merge(out_a, lse_a, out_b, lse_b, out, lse, {}, base, stream, kTwoStates);
}

void merge_states_in_place(const TensorView& out, const TensorView& lse, const TensorView& other_out,
                           const TensorView& other_lse, const TensorView& mask, LseBase base, void* stream) {
  merge(out, lse, other_out, other_lse, out, lse, mask, base, stream, kInPlace);
}

}  // namespace flash_mla
