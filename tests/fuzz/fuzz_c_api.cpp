// Arbitrary bytes as the arguments of the C ABI. Every tensor's data is a real allocation of as many bytes as
// its shape and strides reach. Where that is too much the tensor is a phantom: extents near 2^63 over a small
// allocation, for the arithmetic of checks and sizes. Phantoms go to the calls that look at shapes alone,
// and, where no call may follow them beyond the allocation, to the others too. An accepted call must stay
// inside its buffers, which AddressSanitizer watches; a refused one must leave a message.

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "flash_mla/c_api.h"
#include "fuzzed_tensor.h"

using namespace flash_mla::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  const auto small = [&](int low, int high) { return in.ConsumeIntegralInRange<std::int64_t>(low, high); };
  std::int64_t b = small(0, 3), h_kv = small(1, 2), h_q = h_kv * small(1, 2), pages = small(1, 3);
  std::int64_t width = small(0, 3), parts = small(1, 3);
  const std::int64_t s_q = small(1, 3), d_v = small(1, 5), d_qk = d_v + small(0, 3), page = small(1, 4);
  const std::int64_t real_pages = pages, real_width = width;
  // One dimension huge in every tensor that has it, so that no check of one shape against another gets in the
  // way.
  switch (in.ConsumeIntegralInRange(0, 15)) {
    case 0:
      b = extreme(in);
      break;
    case 1:
      h_q = extreme(in);
      h_kv = 1;
      break;
    case 2:
      h_q = h_kv = extreme(in);
      break;
    case 3:
      pages = extreme(in);
      break;
    case 4:
      width = extreme(in);
      break;
    case 5:
      parts = extreme(in);
      break;
    default:
      break;
  }
  const DLDataType real = in.ConsumeBool() ? DLDataType{kDLFloat, 32, 1} : DLDataType{kDLBfloat, 16, 1};
  const DLDataType i32{kDLInt, 32, 1};
  Tensor q, cache, table, lengths, out, lse, rows, splits;
  make(in, q, {b, s_q, h_q, d_qk}, real);
  make(in, cache, {pages, page, h_kv, d_qk}, real);
  make(in, table, {b, width}, i32);
  make(in, lengths, {b}, i32);
  make(in, out, {b, s_q, h_q, d_v}, real);
  make(in, lse, {b, h_q, s_q}, {kDLFloat, 32, 1});
  make(in, rows, {parts, 8}, i32);
  make(in, splits, {b + 1}, i32);
  put_ints(in, table, 0, static_cast<std::int32_t>(real_pages) - 1, !cache.phantom);
  put_ints(in, lengths, 0, static_cast<std::int32_t>(real_width * page), !table.phantom);
  put_ints(in, rows, 0, 3);
  put_ints(in, splits, 0, 3);

  const bool real_plan = !lengths.phantom && !rows.phantom && !splits.phantom;
  const bool real_results = !out.phantom && !lse.phantom;
  // A pool of any number of pages is real as far as the table leads into it, and one row of a table as far as
  // the lengths do.
  const bool real_inputs = !q.phantom && (!cache.phantom || !cache.bent) &&
                           (!table.phantom || (!table.bent && b == 1)) && real_plan;

  flash_mla_schedule_options plan;
  flash_mla_schedule_options_init(&plan);
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 0:
      break;
    case 1:
      plan.block_size = in.ConsumeIntegral<std::int32_t>();
      plan.fixed_overhead_blocks = in.ConsumeIntegral<std::int32_t>();
      plan.min_blocks_per_request = in.ConsumeIntegralInRange(0, 1);
      plan.fixed_split_blocks = in.ConsumeIntegral<std::int32_t>();
      plan.min_blocks_per_part = plan.block_size ^ 1;  // not drawn: the corpus is older
      plan.whole_requests_percent = plan.block_size ^ 2;
      break;
    default:
      plan.block_size = in.ConsumeIntegralInRange(-1, 5);
      plan.fixed_overhead_blocks = in.ConsumeIntegralInRange(-1, 3);
      plan.min_blocks_per_request = in.ConsumeIntegralInRange(-1, 2);
      plan.fixed_split_blocks = in.ConsumeIntegralInRange(-1, 2);
      plan.min_blocks_per_part = plan.fixed_overhead_blocks + 1;
      plan.whole_requests_percent = 50 * plan.fixed_overhead_blocks;
  }
  if (splits.phantom) plan.fixed_split_blocks = 0;  // the one mode in which num_splits is read for a size
  if (real_plan && in.ConsumeIntegralInRange(0, 3) != 0) {
    require_message(flash_mla_build_decode_schedule(&lengths.t, &plan, &rows.t, &splits.t));
  }
  flash_mla_dense_decode_options options;
  flash_mla_dense_decode_options_init(&options);
  options.causal = in.ConsumeBool();
  options.num_threads =
      in.ConsumeBool() ? in.ConsumeIntegral<std::int32_t>() : in.ConsumeIntegralInRange(-1, 2);
  options.block_size = plan.block_size;
  options.fixed_split_blocks = plan.fixed_split_blocks;
  if (in.ConsumeBool()) options.softmax_scale = in.ConsumeFloatingPoint<float>();
  const flash_mla_dense_decode_args args{
      &q.t, &cache.t, &table.t, &lengths.t, &out.t, in.ConsumeBool() ? &lse.t : nullptr, &rows.t, &splits.t};
  std::size_t bytes = 0;
  const flash_mla_status status = flash_mla_dense_decode_workspace_size(&args, &options, &bytes);
  require_message(status);
  if (status == FLASH_MLA_OK && bytes < (std::size_t{1} << 26) && real_inputs && real_results) {
    const std::size_t given = in.ConsumeIntegralInRange(0, 7) == 0 ? bytes / 2 : bytes;
    const std::unique_ptr<void, decltype(&std::free)> workspace(
        std::aligned_alloc(64, (given + 63) / 64 * 64), &std::free);
    require_message(flash_mla_dense_decode(&args, &options, workspace.get(), given));
  }
  if (real_results) {
    require_message(flash_mla_merge_states(&out.t, &lse.t, &out.t, &lse.t, &out.t, &lse.t,
                                           in.ConsumeBool() ? FLASH_MLA_LSE_BASE_E : FLASH_MLA_LSE_BASE_2,
                                           nullptr));
  }
  return 0;
}
