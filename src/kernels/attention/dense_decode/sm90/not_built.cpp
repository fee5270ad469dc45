// The Hopper backend of a build without CUDA: it has no devices and refuses every call.

#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_decode/sm90/kernel_facts.h"
#include "kernels/attention/dense_fp8_decode/sm90/dense_fp8_decode.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"
#include "kernels/attention/gqa/sm90/gqa.h"
#include "kernels/attention/indexer/sm90/indexer.h"
#include "kernels/attention/merge/sm90/merge.h"
#include "kernels/attention/sparse_decode/sm90/sparse_decode.h"
#include "kernels/attention/sparse_prefill/sm90/sparse_prefill.h"
#include "kernels/attention/top_k/sm90/top_k.h"
#include "kernels/cache/pages.h"
#include "kernels/cache/sm90/append.h"
#include "kernels/cache/sm90/gather.h"
#include "kernels/mhc/call.h"
#include "kernels/moe/choose_call.h"
#include "kernels/quant/sm90/quantise.h"
#include "kernels/rows/row_ops.h"
#include "kernels/sampling/call.h"

namespace flash_mla::sm90 {
namespace {

constexpr const char* kReason = "this build has no sm90 backend (FLASH_MLA_CUDA=OFF)";

[[noreturn]] void refuse() { throw Unsupported(std::string(kReason) + ": pass CPU tensors"); }

}  // namespace

std::vector<Gpu> gpus() { return {}; }
std::string why_no_gpus() { return kReason; }
std::string reject_reason(const Gpu&) { return kReason; }
void require_device(int) { refuse(); }
ScheduleOptions schedule_options(int, int, int, int, int) { refuse(); }
std::size_t dense_decode_workspace_size(const DenseDecodeArgs&, const DecodeScheduleView&) { refuse(); }
void dense_decode(const DenseDecodeArgs&, const DecodeScheduleView&, void*, float, bool, void*) { refuse(); }
void check_supported(const DenseDecodeArgs&, const DecodeScheduleView&) { refuse(); }
void build_schedule(const TensorView&, const ScheduleOptions&, const DecodeScheduleView&, void*) { refuse(); }
KernelFacts decode_kernel_facts(const DecodePlan&, bool) { return {}; }
KernelFacts combine_kernel_facts(const DecodePlan&, bool) { return {}; }

void check_supported(const DenseFp8DecodeArgs&, const DecodeScheduleView&) { refuse(); }
std::size_t dense_fp8_decode_workspace_size(const DenseFp8DecodeArgs&, const DecodeScheduleView&) {
  refuse();
}
void dense_fp8_decode(const DenseFp8DecodeArgs&, const DecodeScheduleView&, void*, float, bool, void*) {
  refuse();
}

void check_supported(const SparseDecodeArgs&, int) { refuse(); }
std::size_t sparse_decode_workspace_size(const SparseDecodeArgs&, int) { refuse(); }
void sparse_decode(const SparseDecodeArgs&, void*, float, int, void*) { refuse(); }

void top_k(const TopKArgs&, std::int64_t, std::int64_t, void*) { refuse(); }
void index_logits(const indexer::Rows&, std::int64_t, std::int64_t, const indexer::Logits&, void*) {
  refuse();
}
void append_index_keys(const IndexKeyAppendArgs&, void*) { refuse(); }
void quantise_index_queries(const IndexQueryArgs&, void*) { refuse(); }
void index_lengths(const indexer::Rows&, std::int64_t, std::int64_t, std::int32_t*, void*) { refuse(); }
void merge_states(const TensorView&, const TensorView&, const TensorView&, const TensorView&,
                  const TensorView&, const TensorView&, const TensorView&, LseBase, void*) {
  refuse();
}
void append_kv(const KvAppendArgs&, void*) { refuse(); }
void gather_kv(const KvGatherArgs&, void*) { refuse(); }
void quantise_fp8(const TensorView&, int, Fp8Recipe, const TensorView&, const TensorView&, void*) {
  refuse();
}
void check_supported(const SparsePrefillArgs&) { refuse(); }
void sparse_prefill(const SparsePrefillArgs&, float, void*) { refuse(); }

std::size_t dense_prefill_workspace_size() { refuse(); }
void check_supported(const DensePrefillArgs&) { refuse(); }
void dense_prefill(const DensePrefillArgs&, float, bool, void*, void*) { refuse(); }

void check_supported(const GqaArgs&, const DecodeScheduleView&) { refuse(); }
std::size_t gqa_workspace_size(const GqaArgs&, const DecodeScheduleView&, const GqaOptions&) { refuse(); }
void gqa_attention(const GqaArgs&, const DecodeScheduleView&, void*, const GqaOptions&, float) { refuse(); }
ScheduleOptions gqa_schedule_options(int, int, int, int, int) { refuse(); }

void rms_norm(const NormCall&, void*) { refuse(); }
void gated_activation(const GateCall&, void*) { refuse(); }
void apply_rope(const RopeCall&, void*) { refuse(); }
void choose_experts(const ChooseCall&, void*) { refuse(); }
void mhc_pre(const TensorView&, const MhcWeights&, const MhcMixes&, const MhcOptions&) { refuse(); }
void mhc_post(const MhcPostCall&, const MhcOptions&) { refuse(); }
void mhc_post_pre(const MhcPostCall&, const MhcWeights&, const MhcMixes&, const MhcOptions&) { refuse(); }
void sample_tokens(const SampleArgs&, const SamplingOptions&) { refuse(); }
void filter_tokens(const TensorView&, const SamplingRows&, const TensorView&, const SamplingOptions&) {
  refuse();
}
void token_probabilities(const TensorView&, const SamplingRows&, const TensorView&, const SamplingOptions&) {
  refuse();
}
void speculative_sampling(const SpeculativeArgs&, const SamplingOptions&) { refuse(); }
void append_pages(const PageAppendArgs&, void*) { refuse(); }
void batch_positions(const TensorView&, const TensorView&, const TensorView&, const TensorView&, void*) {
  refuse();
}
void paged_seqlens(const TensorView&, const TensorView&, std::int64_t, const TensorView&, void*) { refuse(); }

}  // namespace flash_mla::sm90
