#pragma once

// What to measure of sparse attention and FP8 caches: cases, from a preset that has "cases".

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "flash_mla/kv_cache.h"

namespace flash_mla::bench {

enum class SparseOperation { kSparseDecode, kSparsePrefill, kDenseFp8Decode, kAppend, kMerge };

/// "sparse_decode", "sparse_prefill", "dense_fp8_decode", "append_kv", "merge_states".
const char* sparse_operation_name(SparseOperation operation);

/// Rates of the machine that the preset was written for, from which floors follow.
struct Rates {
  double read_gbps = 0;   ///< a read stream
  double copy_gbps = 0;   ///< a copy, bytes read and bytes written
  double mma_tflops = 0;  ///< a bf16 matrix product
};

/// A line of the benchmark, before any data exists.
struct SparseCase {
  std::string name;
  SparseOperation operation = SparseOperation::kSparseDecode;
  KvFormat format = KvFormat::kFp8V32;  ///< of the cache; the second cache's too. Not of kMerge
  int b = 1;                            ///< requests
  int s_q = 1;                          ///< query tokens of each; kAppend: tokens that are written
  int h_q = 128;                        ///< not of kAppend
  int s_kv = 32768;                     ///< cached tokens of each request. Not of kMerge
  int topk = 2048;                      ///< kSparseDecode and kSparsePrefill: entries of a list
  int page_size = 64;
  int extra_topk = 0;  ///< kSparseDecode: entries of the list over a second cache of as many tokens; 0: none
  int extra_page_size = 64;
  // What the time is compared with, where the preset says it, in microseconds.
  std::map<std::string, double> peers_us{};
  std::optional<double> resolve_us{}, goal_us{};

  int d_qk() const { return format == KvFormat::kFp8V4 ? 512 : 576; }
  /// 2 h_q (d_qk + d_v) for every key that a query token attends to; 0 for kAppend and kMerge.
  double flop() const;
  /// What has to pass through memory: inputs read once, outputs written once. Of lists every entry's token,
  /// but of a prompt's queries, which share tokens, no more than there are tokens.
  double bytes() const;
  /// Whether the floor is a copy's.
  bool copies() const {
    return operation == SparseOperation::kAppend || operation == SparseOperation::kMerge;
  }
  /// The least time that the rates allow, without a launch's.
  double floor_us(const Rates& rates) const;
  /// The quickest of peers_us.
  std::optional<double> best_us() const;
};

struct SparsePreset {
  Rates rates;
  std::vector<SparseCase> cases;
};

/// Whether the preset, a file or a built-in one, has "cases" (this page's) rather than "shapes" (preset.h's).
/// Throws InvalidArgument where there is no such preset.
bool is_sparse_preset(const std::string& name_or_path);

/// Reads it. Throws InvalidArgument naming the file, the case and the key.
SparsePreset read_sparse_preset(const std::string& name_or_path);

/// "sparse_decode b128 s_q1 h64 topk2048 fp8_v32": what a case without a name is called.
std::string default_name(const SparseCase& c);

}  // namespace flash_mla::bench
