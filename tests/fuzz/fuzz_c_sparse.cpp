// Arbitrary bytes as the arguments of the C ABI's sparse attention, decode over FP8 caches and cache operations. As in
// fuzz_c_api.cpp, phantoms go to the calls that look at shapes alone; an accepted call must stay inside its buffers, and a
// refused one must leave a message.

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "flash_mla/c_api.h"
#include "fuzzed_tensor.h"

using namespace flash_mla::fuzz;

namespace {

constexpr DLDataType kInt32{kDLInt, 32, 1}, kInt64{kDLInt, 64, 1}, kFloat{kDLFloat, 32, 1},
    kByte{kDLUInt, 8, 1}, kBf16{kDLBfloat, 16, 1}, kFp16{kDLFloat, 16, 1};

std::int64_t width_of(flash_mla_kv_format format, std::int64_t d_qk) {
  switch (format) {
    case FLASH_MLA_KV_FP8_V32:
      return 656;
    case FLASH_MLA_KV_FP8_V4:
      return 584;
    case FLASH_MLA_KV_FP8_TENSOR:
      return 576;
    default:
      return d_qk;
  }
}

/// A cache of few pages in any format of `d_qk`, or with a wrong format.
struct Cache {
  Tensor tensor;
  flash_mla_kv_cache view{};
  std::int64_t slots = 0;

  Cache(FuzzedDataProvider& in, std::int64_t d_qk, DLDataType real) {
    const flash_mla_kv_format fp8 = d_qk == 512        ? FLASH_MLA_KV_FP8_V4
                                    : in.ConsumeBool() ? FLASH_MLA_KV_FP8_V32
                                                       : FLASH_MLA_KV_FP8_TENSOR;
    const flash_mla_kv_format rows = real.code == kDLFloat ? FLASH_MLA_KV_FLOAT16 : FLASH_MLA_KV_BFLOAT16;
    view.format = in.ConsumeBool() ? fp8 : rows;
    const bool bytes = view.format == fp8;
    const std::int64_t pages = in.ConsumeIntegralInRange(0, 4), page = in.ConsumeIntegralInRange(1, 5);
    make(in, tensor, {pages, page, 1, width_of(view.format, d_qk)}, bytes ? kByte : real);
    slots = pages * page;
    if (in.ConsumeIntegralInRange(0, 15) == 0) view.format = in.ConsumeIntegral<std::int32_t>();
    view.data = &tensor.t;
    view.scale = in.ConsumeIntegralInRange(0, 7) == 0 ? in.ConsumeFloatingPoint<float>() : 0.5f;
  }
  bool real() const { return !tensor.phantom; }
};

struct Lists {
  Tensor indices, length;
  bool with_length;

  Lists(FuzzedDataProvider& in, std::int64_t b, std::int64_t s_q, std::int64_t slots) {
    const std::int64_t topk = in.ConsumeIntegralInRange(0, 8);
    make(in, indices, {b, s_q, topk}, kInt32);
    make(in, length, {b}, kInt32);
    put_ints(in, indices, -1, static_cast<std::int32_t>(slots) - 1);
    put_ints(in, length, 0, static_cast<std::int32_t>(topk));
    with_length = in.ConsumeBool();
  }
  bool real() const { return !indices.phantom && !length.phantom; }
};

/// run(workspace, bytes) if the size that was asked for is bearable, now and then with too little.
template <class Run>
void with_workspace(FuzzedDataProvider& in, std::size_t bytes, const Run& run) {
  if (bytes >= (std::size_t{1} << 26)) return;
  const std::size_t given = in.ConsumeIntegralInRange(0, 7) == 0 ? bytes / 2 : bytes;
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, (given + 64) / 64 * 64),
                                                              &std::free);
  require_message(run(workspace.get(), given));
}

flash_mla_sparse_options any_options(FuzzedDataProvider& in) {
  flash_mla_sparse_options o;
  flash_mla_sparse_options_init(&o);
  o.fixed_split_blocks =
      in.ConsumeBool() ? in.ConsumeIntegralInRange(-1, 3) : in.ConsumeIntegral<std::int32_t>();
  o.num_threads = in.ConsumeBool() ? in.ConsumeIntegralInRange(-1, 2) : in.ConsumeIntegral<std::int32_t>();
  if (in.ConsumeBool()) o.softmax_scale = in.ConsumeFloatingPoint<float>();
  o.causal = in.ConsumeBool();
  o.block_size = in.ConsumeIntegralInRange(-1, 5);
  return o;
}

void decode(FuzzedDataProvider& in) {
  const std::int64_t b = in.ConsumeIntegralInRange(0, 3), s_q = in.ConsumeIntegralInRange(1, 2);
  const std::int64_t h_q =
      in.ConsumeIntegralInRange(0, 7) == 0 ? extreme(in) : in.ConsumeIntegralInRange(1, 3);
  const std::int64_t d_qk = in.ConsumeBool() ? 576 : 512;
  const DLDataType real = in.ConsumeBool() ? kBf16 : kFp16;
  Tensor q, sink, out, lse;
  make(in, q, {b, s_q, h_q, d_qk}, real);
  make(in, sink, {h_q}, kFloat);
  make(in, out, {b, s_q, h_q, 512}, real);
  make(in, lse, {b, h_q, s_q}, kFloat);
  Cache cache(in, d_qk, real), extra(in, d_qk, real);
  Lists lists(in, b, s_q, cache.slots), extra_lists(in, b, s_q, extra.slots);
  flash_mla_sparse_decode_args args{};
  args.q = &q.t;
  args.keys = {cache.view, &lists.indices.t, lists.with_length ? &lists.length.t : nullptr};
  if (in.ConsumeBool()) {
    args.extra = {extra.view, &extra_lists.indices.t,
                  extra_lists.with_length ? &extra_lists.length.t : nullptr};
  }
  args.attn_sink = in.ConsumeBool() ? &sink.t : nullptr;
  args.out = &out.t;
  args.lse = in.ConsumeBool() ? &lse.t : nullptr;
  const flash_mla_sparse_options options = any_options(in);
  std::size_t bytes = 0;
  const flash_mla_status status = flash_mla_sparse_decode_workspace_size(&args, &options, &bytes);
  require_message(status);
  const bool whole = !q.phantom && !sink.phantom && !out.phantom && !lse.phantom && cache.real() &&
                     extra.real() && lists.real() && extra_lists.real();
  if (status != FLASH_MLA_OK || !whole) return;
  with_workspace(in, bytes, [&](void* memory, std::size_t given) {
    return flash_mla_sparse_decode(&args, &options, memory, given);
  });
}

void prefill(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 4), h_q = in.ConsumeIntegralInRange(1, 3);
  const std::int64_t d_qk = in.ConsumeBool() ? 576 : 512, topk = in.ConsumeIntegralInRange(0, 6);
  const std::int64_t b = in.ConsumeIntegralInRange(1, 3), blocks = in.ConsumeIntegralInRange(0, 3);
  const DLDataType real = in.ConsumeBool() ? kBf16 : kFp16;
  Tensor q, indices, length, starts_q, starts_k, table, seqlens, out, max_logits, lse;
  Cache cache(in, d_qk, real);
  make(in, q, {n, h_q, d_qk}, real);
  make(in, indices, {n, topk}, kInt32);
  make(in, length, {n}, kInt32);
  make(in, starts_q, {b + 1}, kInt32);
  make(in, starts_k, {b + 1}, kInt32);
  make(in, table, {b, blocks}, kInt32);
  make(in, seqlens, {b}, kInt32);
  make(in, out, {n, h_q, 512}, real);
  make(in, max_logits, {n, h_q}, kFloat);
  make(in, lse, {n, h_q}, kFloat);
  put_ints(in, indices, -1, 20);
  put_ints(in, length, 0, static_cast<std::int32_t>(topk));
  put_ints(in, starts_q, 0, static_cast<std::int32_t>(n));
  put_ints(in, starts_k, 0, static_cast<std::int32_t>(cache.slots));
  put_ints(in, table, 0, static_cast<std::int32_t>(cache.slots));
  put_ints(in, seqlens, 0, static_cast<std::int32_t>(blocks * 2));
  flash_mla_sparse_prefill_args args{};
  args.q = &q.t;
  args.cache = cache.view;
  args.indices = &indices.t;
  args.topk_length = in.ConsumeBool() ? &length.t : nullptr;
  if (in.ConsumeBool()) {
    args.cu_seqlens_q = &starts_q.t;
    if (in.ConsumeBool()) {
      args.cu_seqlens_k = &starts_k.t;
    } else {
      args.block_table = &table.t;
      args.cache_seqlens = &seqlens.t;
    }
  }
  args.out = &out.t;
  args.max_logits = in.ConsumeBool() ? &max_logits.t : nullptr;
  args.lse = in.ConsumeBool() ? &lse.t : nullptr;
  const flash_mla_sparse_options options = any_options(in);
  std::size_t bytes = 0;
  const flash_mla_status status = flash_mla_sparse_prefill_workspace_size(&args, &options, &bytes);
  require_message(status);
  bool whole = cache.real();
  for (const Tensor* x :
       {&q, &indices, &length, &starts_q, &starts_k, &table, &seqlens, &out, &max_logits, &lse}) {
    whole = whole && !x->phantom;
  }
  if (status != FLASH_MLA_OK || !whole) return;
  with_workspace(in, bytes, [&](void* memory, std::size_t given) {
    return flash_mla_sparse_prefill(&args, &options, memory, given);
  });
}

void dense(FuzzedDataProvider& in) {
  const std::int64_t b = in.ConsumeIntegralInRange(0, 3), s_q = in.ConsumeIntegralInRange(1, 2);
  const std::int64_t h_q = in.ConsumeIntegralInRange(1, 3), width = in.ConsumeIntegralInRange(0, 3);
  const std::int64_t d_qk = in.ConsumeBool() ? 576 : 512, parts = in.ConsumeIntegralInRange(1, 3);
  const DLDataType real = in.ConsumeBool() ? kBf16 : kFp16;
  Tensor q, table, lengths, out, lse, rows, splits;
  Cache cache(in, d_qk, real);
  make(in, q, {b, s_q, h_q, d_qk}, real);
  make(in, table, {b, width}, kInt32);
  make(in, lengths, {b}, kInt32);
  make(in, out, {b, s_q, h_q, 512}, real);
  make(in, lse, {b, h_q, s_q}, kFloat);
  make(in, rows, {parts, 8}, kInt32);
  make(in, splits, {b + 1}, kInt32);
  put_ints(in, table, 0, 4);
  put_ints(in, lengths, 0, static_cast<std::int32_t>(width * 3));
  put_ints(in, rows, 0, 3);
  put_ints(in, splits, 0, 3);
  flash_mla_sparse_options options = any_options(in);
  if (splits.phantom) options.fixed_split_blocks = 0;  // the one mode in which num_splits is read for a size
  flash_mla_schedule_options plan;
  flash_mla_schedule_options_init(&plan);
  plan.block_size = options.block_size;
  plan.fixed_split_blocks = options.fixed_split_blocks;
  const bool real_plan = !lengths.phantom && !rows.phantom && !splits.phantom;
  if (real_plan) require_message(flash_mla_build_decode_schedule(&lengths.t, &plan, &rows.t, &splits.t));
  const flash_mla_dense_fp8_decode_args args{&q.t,   cache.view, &table.t, &lengths.t,
                                             &out.t, &lse.t,     &rows.t,  &splits.t};
  std::size_t bytes = 0;
  const flash_mla_status status = flash_mla_dense_fp8_decode_workspace_size(&args, &options, &bytes);
  require_message(status);
  if (status != FLASH_MLA_OK || !real_plan || q.phantom || table.phantom || out.phantom || lse.phantom ||
      !cache.real()) {
    return;
  }
  with_workspace(in, bytes, [&](void* memory, std::size_t given) {
    return flash_mla_dense_fp8_decode(&args, &options, memory, given);
  });
}

void append_and_gather(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 4), d_qk = in.ConsumeBool() ? 576 : 512;
  const DLDataType real = in.ConsumeBool() ? kBf16 : kFp16, given = in.ConsumeBool() ? real : kFloat;
  Cache cache(in, d_qk, real);
  Tensor latent, rope, slots, weight, positions, cos_sin, out;
  make(in, latent, {n, d_qk - 64}, given);
  make(in, rope, {n, 64}, given);
  make(in, slots, {n}, in.ConsumeBool() ? kInt32 : kInt64);
  make(in, weight, {in.ConsumeBool() ? d_qk : d_qk - 64}, kFloat);
  make(in, positions, {n}, kInt32);
  make(in, cos_sin, {3, 64}, kFloat);
  make(in, out, {n, d_qk}, given);
  put_ints(in, slots, -1, slots.t.dtype.bits == 32 ? static_cast<std::int32_t>(cache.slots) - 1 : 0);
  put_ints(in, positions, 0, 2);
  for (const Tensor* x : {&latent, &rope, &slots, &weight, &positions, &cos_sin, &out}) {
    if (x->phantom) return;
  }
  if (!cache.real()) return;
  flash_mla_append_kv_args args{};
  args.latent = &latent.t;
  args.rope = &rope.t;
  args.slot_mapping = &slots.t;
  args.cache = cache.view;
  args.recipe = in.ConsumeIntegralInRange(-1, 6);
  args.norm_eps = in.ConsumeBool() ? 1e-6f : in.ConsumeFloatingPoint<float>();
  args.norm_weight = in.ConsumeBool() ? &weight.t : nullptr;
  if (in.ConsumeBool()) {
    args.positions = &positions.t;
    args.cos_sin = &cos_sin.t;
  }
  require_message(flash_mla_append_kv(&args, in.ConsumeIntegralInRange(-1, 2), nullptr));
  require_message(flash_mla_gather_kv(&cache.view, &slots.t, &out.t, 1, nullptr));
}

void quantise(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 3), d = in.ConsumeIntegralInRange(0, 40);
  const std::int32_t tile =
      in.ConsumeBool() ? in.ConsumeIntegralInRange(0, 20) : in.ConsumeIntegral<std::int32_t>();
  Tensor x, values, scales;
  make(in, x, {n, d}, in.ConsumeBool() ? kFloat : kBf16);
  make(in, values, {n, d}, kByte);
  make(in, scales, {n, tile > 0 ? (d + tile - 1) / tile : 0}, in.ConsumeBool() ? kFloat : kByte);
  if (x.phantom || values.phantom || scales.phantom) return;
  require_message(
      flash_mla_quantise_fp8(&x.t, tile, in.ConsumeIntegralInRange(-1, 6), &values.t, &scales.t, nullptr));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange(0, 4)) {
    case 0:
      decode(in);
      break;
    case 1:
      prefill(in);
      break;
    case 2:
      dense(in);
      break;
    case 3:
      append_and_gather(in);
      break;
    default:
      quantise(in);
  }
  return 0;
}
