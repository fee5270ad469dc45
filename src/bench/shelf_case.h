#pragma once

// What to measure of attention and its neighbours as a library: calls, from a preset that has "calls".

#include <string>
#include <vector>

#include "bench/sparse_case.h"

namespace flash_mla::bench {

enum class ShelfOperation {
  kMlaPrefill,     ///< dense_prefill, 192 / 128
  kGqa,            ///< gqa_attention: prefill, and with s_q == 1 decode by a schedule
  kAppendPages,    ///< append_pages of keys and values
  kAppendLatents,  ///< append_kv of bfloat16 latents
  kRmsNorm,
  kAddRmsNorm,
  kRope,    ///< apply_rope, in place
  kRouting  ///< choose_experts, as DeepSeek-V3 does
};

/// "mla_prefill", "gqa_attention", "append_pages", "append_kv", "rms_norm", "add_rms_norm", "apply_rope", "choose_experts".
const char* shelf_operation_name(ShelfOperation operation);

/// A line of the benchmark, before any data exists. bfloat16.
struct ShelfCase {
  std::string name;
  ShelfOperation operation = ShelfOperation::kGqa;
  // Attention.
  int b = 1;
  int s_q = 1;
  int s_k = 1024;      ///< at least s_q where causal
  bool causal = true;  ///< bottom-right aligned
  int page_size = 0;   ///< kGqa: of keys in pages; 0: ragged
  // Attention, kAppendPages and kRope.
  int h_q = 32;
  int h_kv = 8;  ///< not of kMlaPrefill, which has h_q
  int d = 128;   ///< of a head; also the width of a norm's row and the experts of kRouting
  // Rows.
  int tokens = 4096;
  int topk = 8;  ///< kRouting

  bool attention() const {
    return operation == ShelfOperation::kMlaPrefill || operation == ShelfOperation::kGqa;
  }
  int d_qk() const { return operation == ShelfOperation::kMlaPrefill ? 192 : d; }
  int d_v() const { return operation == ShelfOperation::kMlaPrefill ? 128 : d; }
  /// 2 h_q (d_qk + d_v) for every key that a query sees; 0 of rows.
  double flop() const;
  /// Inputs read once, outputs written once.
  double bytes() const;
  /// The least time that the rates allow, without a launch's: of attention the longer of its FLOP and its bytes as a read
  /// stream, of rows their bytes as a copy. mma_tflops 0: not known, and then bytes count alone.
  double floor_us(const Rates& rates) const;
};

bool is_shelf_preset(const std::string& name_or_path);

/// Reads it. Throws InvalidArgument naming the file, the call and the key.
std::vector<ShelfCase> read_shelf_preset(const std::string& name_or_path);

/// "gqa_attention b128 q1 k8192 h32/8 d128 page64": what a call without a name is called.
std::string default_name(const ShelfCase& c);

}  // namespace flash_mla::bench
