// Arbitrary bytes as the arguments of the C ABI around attention: norms, gates, rotations, choices of tokens and experts, pages,
// hyper-connections. As in fuzz_c_api.cpp, an accepted call must stay inside its buffers and a refused one leave a message. No
// call here looks at shapes alone: phantoms go to none.

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>

#include "flash_mla/c_api.h"
#include "fuzzed_tensor.h"

using namespace flash_mla::fuzz;

namespace {

constexpr DLDataType kInt32{kDLInt, 32, 1}, kFloat{kDLFloat, 32, 1}, kByte{kDLUInt, 8, 1},
    kBf16{kDLBfloat, 16, 1};

bool real(std::initializer_list<const Tensor*> tensors) {
  return std::none_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return t->phantom; });
}

/// A float32 vector or matrix of numbers that sampling takes, and now and then of any.
void put_floats(FuzzedDataProvider& in, Tensor& x) {
  for (std::size_t i = 0; i + 4 <= x.memory.size(); i += 4) {
    const float v = in.ConsumeIntegralInRange(0, 31) == 0 ? in.ConsumeFloatingPoint<float>()
                                                          : in.ConsumeProbability<float>();
    std::memcpy(&x.memory[i], &v, 4);
  }
}

void rows(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 3), d = in.ConsumeIntegralInRange(1, 9);
  const DLDataType type = in.ConsumeBool() ? kFloat : kBf16;
  Tensor x, residual, weight, out, wide;
  make(in, x, {n, d}, type);
  make(in, residual, {n, d}, type);
  make(in, weight, {d}, in.ConsumeBool() ? kFloat : type);
  make(in, out, {n, d}, in.ConsumeBool() ? kByte : type);
  make(in, wide, {n, 2 * d}, type);
  if (real({&x, &residual, &weight, &out, &wide})) {
    flash_mla_rms_norm_options options;
    flash_mla_rms_norm_options_init(&options);
    if (in.ConsumeBool()) options.out_scale = in.ConsumeFloatingPoint<float>();
    require_message(flash_mla_rms_norm(&x.t, &weight.t, &out.t, &options));
    require_message(flash_mla_add_rms_norm(&x.t, &residual.t, &weight.t, &out.t, nullptr));
    require_message(flash_mla_gated_activation(&wide.t, &x.t, in.ConsumeIntegralInRange(-1, 3), 1, nullptr));
  }
}

void rotations(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 3), d = in.ConsumeIntegralInRange(1, 9),
                     heads = in.ConsumeIntegralInRange(1, 2);
  const DLDataType type = in.ConsumeBool() ? kFloat : kBf16;
  Tensor x, out, positions, table;
  flash_mla_rope_options rope;
  flash_mla_rope_options_init(&rope);
  rope.scaling = in.ConsumeIntegralInRange(-1, 4);
  rope.rotary_dim = in.ConsumeIntegralInRange(-2, 10);
  rope.interleaved = in.ConsumeBool();
  rope.original_max_position = in.ConsumeIntegral<std::int16_t>();
  if (in.ConsumeBool()) rope.factor = in.ConsumeFloatingPoint<double>();
  make(in, x, {n, heads, d}, type);
  make(in, out, {n, heads, d}, type);
  make(in, positions, {n}, kInt32);
  make(in, table, {4, rope.rotary_dim > 0 ? rope.rotary_dim : d}, kFloat);
  put_ints(in, positions, 0, 3);
  if (real({&x, &out, &positions, &table})) {
    require_message(
        flash_mla_apply_rope(&x.t, &positions.t, in.ConsumeBool() ? &table.t : nullptr, &out.t, &rope));
  }
}

void sampling(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 3), vocab = in.ConsumeIntegralInRange(1, 12),
                     m = in.ConsumeIntegralInRange(0, 3);
  Tensor scores, rows, top_k, top_p, seeds, tokens, valid, out;
  make(in, scores, {n, vocab}, kFloat);
  make(in, rows, {m}, kInt32);
  make(in, top_k, {n}, kInt32);
  make(in, top_p, {n}, kFloat);
  make(in, tokens, {in.ConsumeBool() ? n : m}, kInt32);
  make(in, valid, {m}, kByte);
  make(in, out, {n, vocab}, kFloat);
  put_floats(in, scores);
  put_floats(in, top_p);
  put_ints(in, rows, 0, static_cast<std::int32_t>(std::max<std::int64_t>(n - 1, 0)));
  put_ints(in, top_k, 0, 5);
  if (!real({&scores, &rows, &top_k, &top_p, &tokens, &valid, &out})) return;
  flash_mla_sampling_options options;
  flash_mla_sampling_options_init(&options);
  options.probabilities = in.ConsumeBool();
  options.joint = in.ConsumeBool();
  options.temperature = in.ConsumeBool() ? 1 : in.ConsumeFloatingPoint<double>();
  options.min_p = in.ConsumeProbability<double>();
  options.seed = in.ConsumeIntegral<std::uint64_t>();
  flash_mla_sample_args args{};
  args.scores = &scores.t;
  args.rows = in.ConsumeBool() ? &rows.t : nullptr;
  args.options.top_k = in.ConsumeBool() ? &top_k.t : nullptr;
  args.options.top_p = in.ConsumeBool() ? &top_p.t : nullptr;
  args.tokens = &tokens.t;
  args.valid = in.ConsumeBool() ? &valid.t : nullptr;
  require_message(flash_mla_sample_tokens(&args, &options));
  require_message(flash_mla_filter_tokens(&scores.t, &args.options, &out.t, &options));
  require_message(flash_mla_token_probabilities(&scores.t, nullptr, &out.t, &options));
}

void chains(FuzzedDataProvider& in) {
  const std::int64_t b = in.ConsumeIntegralInRange(0, 2), n = in.ConsumeIntegralInRange(0, 3),
                     vocab = in.ConsumeIntegralInRange(1, 6);
  Tensor draft, target, drafts, tokens, counts;
  make(in, draft, {b, n, vocab}, kFloat);
  make(in, target, {b, n + 1, vocab}, kFloat);
  make(in, drafts, {b, n}, kInt32);
  make(in, tokens, {b, n + 1}, kInt32);
  make(in, counts, {b}, kInt32);
  put_floats(in, draft);
  put_floats(in, target);
  put_ints(in, drafts, 0, static_cast<std::int32_t>(vocab) - 1);
  if (!real({&draft, &target, &drafts, &tokens, &counts})) return;
  flash_mla_speculative_args args{};
  args.draft_probs = &draft.t;
  args.draft_tokens = &drafts.t;
  args.target_probs = &target.t;
  args.tokens = &tokens.t;
  args.emitted = in.ConsumeBool() ? &counts.t : nullptr;
  require_message(flash_mla_speculative_sampling(&args, nullptr));
}

void routing(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 3), experts = in.ConsumeIntegralInRange(1, 12),
                     k = in.ConsumeIntegralInRange(0, 5);
  Tensor logits, bias, ids, weights;
  make(in, logits, {n, experts}, kFloat);
  make(in, bias, {experts}, kFloat);
  make(in, ids, {n, k}, kInt32);
  make(in, weights, {n, k}, kFloat);
  put_floats(in, logits);
  put_floats(in, bias);
  if (!real({&logits, &bias, &ids, &weights})) return;
  flash_mla_routing_options options;
  flash_mla_routing_options_init(&options);
  options.sigmoid = in.ConsumeBool();
  options.num_groups = in.ConsumeIntegralInRange(-1, 6);
  options.groups_kept = in.ConsumeIntegralInRange(-1, 6);
  options.groups_by_best_two = in.ConsumeBool();
  options.normalise = in.ConsumeBool();
  require_message(flash_mla_choose_experts(&logits.t, in.ConsumeBool() ? &bias.t : nullptr, &ids.t,
                                           &weights.t, &options));
}

void pages(FuzzedDataProvider& in) {
  const std::int64_t n = in.ConsumeIntegralInRange(0, 4), h = in.ConsumeIntegralInRange(1, 2),
                     d = in.ConsumeIntegralInRange(1, 4);
  const std::int64_t b = in.ConsumeIntegralInRange(0, 3), used = in.ConsumeIntegralInRange(0, 4),
                     size = in.ConsumeIntegralInRange(1, 3);
  Tensor key, pool, sequences, positions, indptr, indices, last, lengths;
  make(in, key, {n, h, d}, kBf16);
  make(in, pool, {3, size, h, d}, kBf16);
  make(in, sequences, {n}, kInt32);
  make(in, positions, {n}, kInt32);
  make(in, indptr, {b + 1}, kInt32);
  make(in, indices, {used}, kInt32);
  make(in, last, {b}, kInt32);
  make(in, lengths, {b}, kInt32);
  put_ints(in, sequences, 0, static_cast<std::int32_t>(std::max<std::int64_t>(b - 1, 0)));
  put_ints(in, positions, 0, 3);
  put_ints(in, indptr, 0, static_cast<std::int32_t>(used));
  put_ints(in, indices, 0, 2);
  put_ints(in, last, 1, static_cast<std::int32_t>(size));
  if (!real({&key, &pool, &sequences, &positions, &indptr, &indices, &last, &lengths})) return;
  flash_mla_page_append_args args{&key.t,    nullptr,    &sequences.t, &positions.t,
                                  &indptr.t, &indices.t, &pool.t,      nullptr};
  require_message(flash_mla_append_pages(&args, 1));
  require_message(flash_mla_paged_seqlens(&indptr.t, &last.t, in.ConsumeIntegralInRange<std::int64_t>(-1, 4),
                                          &lengths.t));
  require_message(flash_mla_batch_positions(&indptr.t, &lengths.t, &sequences.t, &positions.t));
}

void hyper_connections(FuzzedDataProvider& in) {
  const std::int64_t tokens = in.ConsumeIntegralInRange(0, 2), n = in.ConsumeIntegralInRange(1, 9),
                     d = in.ConsumeIntegralInRange(1, 5);
  const DLDataType type = in.ConsumeBool() ? kFloat : kBf16;
  Tensor x, residual, fn, scale, base, post, comb, input;
  make(in, x, {tokens, d}, type);
  make(in, residual, {tokens, n, d}, type);
  make(in, fn, {n * (n + 2), n * d}, kFloat);
  make(in, scale, {3}, kFloat);
  make(in, base, {n * (n + 2)}, kFloat);
  make(in, post, {tokens, n}, kFloat);
  make(in, comb, {tokens, n, n}, kFloat);
  make(in, input, {tokens, d}, type);
  if (!real({&x, &residual, &fn, &scale, &base, &post, &comb, &input})) return;
  const flash_mla_mhc_weights weights{&fn.t, &scale.t, &base.t, nullptr};
  const flash_mla_mhc_mixes mixes{&post.t, &comb.t, &input.t};
  flash_mla_mhc_options options;
  flash_mla_mhc_options_init(&options);
  options.sinkhorn_repeat = in.ConsumeIntegralInRange(-1, 5);
  require_message(flash_mla_mhc_pre(&residual.t, &weights, &mixes, &options));
  require_message(
      flash_mla_mhc_post_pre(&x.t, &residual.t, &post.t, &comb.t, &residual.t, &weights, &mixes, &options));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  constexpr std::array kCalls = {rows, rotations, sampling, chains, routing, pages, hyper_connections};
  in.PickValueInArray(kCalls)(in);
  return 0;
}
