#include "indexer_bindings.h"

#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

TopKOutput output_of(Tensors& t, nb::handle page_size) {
  TopKOutput output;
  output.offsets = t("offsets");
  output.block_table = t("block_table");
  output.row_request = t("row_request");
  if (output.block_table.defined()) output.page_size = int_argument(page_size, "page_size", 1);
  return output;
}

void py_top_k(nb::dict tensors, nb::handle page_size, nb::handle num_threads, bool reference,
              std::uintptr_t stream, nb::handle allocate) {
  Tensors t(std::move(tensors));
  TopKArgs args;
  args.logits = t("logits");
  args.lengths = t("lengths");
  args.row_starts = t("row_starts");
  args.output = output_of(t, page_size);
  args.indices = t("indices");
  if (reference) return reference::top_k(args);
  TopKOptions options;
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  const std::size_t bytes = top_k_workspace_size(args, options);
  with_workspace(allocate, bytes, [&](void* workspace) { top_k(args, workspace, bytes, options); });
}

}  // namespace

void bind_indexer(nb::module_& m) {
  m.def("top_k", &py_top_k, "tensors"_a, "page_size"_a.none() = 64, "num_threads"_a.none() = 0,
        "reference"_a = false, "stream"_a = 0, "allocate"_a.none() = nb::none());
}

}  // namespace flash_mla::python
