// The C ABI of selection and of the indexer.

#include "api/c_guard.h"
#include "flash_mla/top_k.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::required;
using api::view;

TopKOutput output_of(const flash_mla_top_k_output& o) {
  TopKOutput output;
  output.offsets = optional_view(o.offsets, "offsets");
  output.block_table = optional_view(o.block_table, "block_table");
  output.row_request = optional_view(o.row_request, "row_request");
  if (output.block_table.defined()) output.page_size = o.page_size;
  return output;
}

TopKArgs top_k_args(const flash_mla_top_k_args* args) {
  const flash_mla_top_k_args& a = required(args, "args");
  TopKArgs top;
  top.logits = view(a.logits, "logits");
  top.lengths = view(a.lengths, "lengths");
  top.row_starts = optional_view(a.row_starts, "row_starts");
  top.output = output_of(a.output);
  top.indices = view(a.indices, "indices");
  return top;
}

}  // namespace

flash_mla_status flash_mla_top_k_workspace_size(const flash_mla_top_k_args* args, int32_t num_threads,
                                                void* stream, size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    *bytes = top_k_workspace_size(top_k_args(args), {num_threads, stream, Backend::kAuto});
  });
}

flash_mla_status flash_mla_top_k(const flash_mla_top_k_args* args, int32_t num_threads, void* stream,
                                 void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    top_k(top_k_args(args), workspace, workspace_bytes, {num_threads, stream, Backend::kAuto});
  });
}
