#include "flash_mla/c_api.h"

#include <cmath>

#include "api/c_guard.h"
#include "api/checks.h"
#include "flash_mla/decode.h"
#include "flash_mla/dlpack.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"
#include "flash_mla/merge.h"
#include "flash_mla/schedule.h"
#include "schedule/options.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::last_error;
using api::required;
using api::view;

struct DecodeCall {
  DenseDecodeArgs args;
  DecodeScheduleView schedule;
  DenseDecodeOptions options;
};

DecodeCall decode_call(const flash_mla_dense_decode_args* args,
                       const flash_mla_dense_decode_options* options) {
  required(args, "args");
  DecodeCall call;
  call.args.q = view(args->q, "q");
  call.args.k_cache = view(args->k_cache, "k_cache");
  call.args.block_table = view(args->block_table, "block_table");
  call.args.cache_seqlens = view(args->cache_seqlens, "cache_seqlens");
  call.args.out = view(args->out, "out");
  if (args->lse != nullptr) {
    call.args.lse = view(args->lse, "lse");
    // Rank 0 would read as "not given".
    if (call.args.lse.rank == 0) api::invalid("lse has rank 0, expected a tensor of rank 3 or NULL");
  }
  call.schedule.parts = view(args->parts, "parts");
  call.schedule.num_splits = view(args->num_splits, "num_splits");
  flash_mla_dense_decode_options defaults;
  flash_mla_dense_decode_options_init(&defaults);
  const flash_mla_dense_decode_options& o = options != nullptr ? *options : defaults;
  call.schedule.block_size = o.block_size;
  call.schedule.fixed_split_blocks = o.fixed_split_blocks;
  if (!std::isnan(o.softmax_scale)) call.options.softmax_scale = o.softmax_scale;
  call.options.causal = o.causal != 0;
  call.options.num_threads = o.num_threads;
  call.options.stream = o.stream;
  return call;
}

LseBase lse_base(flash_mla_lse_base base) {
  if (base != FLASH_MLA_LSE_BASE_E && base != FLASH_MLA_LSE_BASE_2) {
    api::invalid("base is {}, expected FLASH_MLA_LSE_BASE_E or FLASH_MLA_LSE_BASE_2", static_cast<int>(base));
  }
  return base == FLASH_MLA_LSE_BASE_E ? LseBase::kE : LseBase::kTwo;
}

}  // namespace

const char* flash_mla_last_error(void) { return last_error().c_str(); }

const char* flash_mla_version(void) { return version(); }

void flash_mla_schedule_options_init(flash_mla_schedule_options* options) {
  if (options == nullptr) return;
  const ScheduleOptions defaults;
#define FLASH_MLA_COPY(name, ...) options->name = defaults.name;
  FLASH_MLA_SCHEDULE_OPTIONS(FLASH_MLA_COPY)
#undef FLASH_MLA_COPY
  options->stream = nullptr;
}

flash_mla_status flash_mla_num_parts(DLDevice device, int32_t s_q, int32_t num_heads_q, int32_t num_heads_k,
                                     int32_t* num_parts) {
  return guarded([&] {
    required(num_parts, "num_parts");
    switch (static_cast<int>(device.device_type)) {
      case 1:  // kDLCPU
        *num_parts = cpu_schedule_options().num_parts;
        return;
      case 2:  // kDLCUDA
        *num_parts = cuda_schedule_options(device.device_id, s_q, num_heads_q, num_heads_k).num_parts;
        return;
      default:
        api::invalid("device.device_type is {}, expected CPU (1) or CUDA (2)",
                     static_cast<int>(device.device_type));
    }
  });
}

flash_mla_status flash_mla_build_decode_schedule(const DLTensor* cache_seqlens,
                                                 const flash_mla_schedule_options* options, DLTensor* parts,
                                                 DLTensor* num_splits) {
  return guarded([&] {
    const TensorView lengths = view(cache_seqlens, "cache_seqlens");
    const TensorView rows = view(parts, "parts");
    const TensorView splits = view(num_splits, "num_splits");
    api::check_tensor(rows, "parts", 2, {DType::kInt32});
    if (rows.size(0) < 1 || rows.size(0) > api::kMaxParts) {
      api::invalid("parts.shape[0] is {}, expected 1 to {}", rows.size(0), api::kMaxParts);
    }
    ScheduleOptions o;
    o.num_parts = static_cast<int>(rows.size(0));
    if (options != nullptr) {
#define FLASH_MLA_COPY(name, ...) o.name = options->name;
      FLASH_MLA_SCHEDULE_OPTIONS(FLASH_MLA_COPY)
#undef FLASH_MLA_COPY
    }
    DecodeScheduleView schedule;
    schedule.parts = rows;
    schedule.num_splits = splits;
    schedule.block_size = o.block_size;
    schedule.fixed_split_blocks = o.fixed_split_blocks;
    build_decode_schedule(lengths, o, schedule, options != nullptr ? options->stream : nullptr);
  });
}

void flash_mla_dense_decode_options_init(flash_mla_dense_decode_options* options) {
  if (options == nullptr) return;
  const DecodeScheduleView schedule;
  options->softmax_scale = std::nanf("");
  options->causal = 0;
  options->num_threads = 0;
  options->block_size = schedule.block_size;
  options->fixed_split_blocks = schedule.fixed_split_blocks;
  options->stream = nullptr;
}

flash_mla_status flash_mla_dense_decode_workspace_size(const flash_mla_dense_decode_args* args,
                                                       const flash_mla_dense_decode_options* options,
                                                       size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    const DecodeCall call = decode_call(args, options);
    *bytes = dense_decode_workspace_size(call.args, call.schedule, call.options);
  });
}

flash_mla_status flash_mla_dense_decode(const flash_mla_dense_decode_args* args,
                                        const flash_mla_dense_decode_options* options, void* workspace,
                                        size_t workspace_bytes) {
  return guarded([&] {
    const DecodeCall call = decode_call(args, options);
    dense_decode(call.args, call.schedule, workspace, workspace_bytes, call.options);
  });
}

flash_mla_status flash_mla_merge_states_in_place(DLTensor* out, DLTensor* lse, const DLTensor* other_out,
                                                 const DLTensor* other_lse, const DLTensor* mask,
                                                 flash_mla_lse_base base, void* stream) {
  return guarded([&] {
    merge_states_in_place(view(out, "out"), view(lse, "lse"), view(other_out, "other_out"),
                          view(other_lse, "other_lse"), api::optional_view(mask, "mask"), lse_base(base),
                          stream);
  });
}

flash_mla_status flash_mla_merge_states(const DLTensor* out_a, const DLTensor* lse_a, const DLTensor* out_b,
                                        const DLTensor* lse_b, DLTensor* out, DLTensor* lse,
                                        flash_mla_lse_base base, void* stream) {
  return guarded([&] {
    merge_states(view(out_a, "out_a"), view(lse_a, "lse_a"), view(out_b, "out_b"), view(lse_b, "lse_b"),
                 view(out, "out"), view(lse, "lse"), lse_base(base), stream);
  });
}
