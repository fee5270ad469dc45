#include "pages_bindings.h"

#include <cstdint>
#include <utility>

#include "arguments.h"
#include "flash_mla/merge.h"
#include "flash_mla/pages.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

void py_append_pages(nb::dict tensors, nb::handle num_threads, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  PageAppendArgs args;
  args.key = t("key");
  args.value = t("value");
  args.batch_indices = t("batch_indices");
  args.positions = t("positions");
  args.page_indptr = t("page_indptr");
  args.page_indices = t("page_indices");
  args.k_cache = t("k_cache");
  args.v_cache = t("v_cache");
  RowOptions options;
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  nb::gil_scoped_release release;
  append_pages(args, options);
}

void py_batch_positions(nb::dict tensors, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  RowOptions options;
  options.stream = reinterpret_cast<void*>(stream);
  batch_positions(t("indptr"), t("seqlens"), t("batch_indices"), t("positions"), options);
}

void py_paged_seqlens(nb::dict tensors, nb::handle page_size, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  RowOptions options;
  options.stream = reinterpret_cast<void*>(stream);
  paged_seqlens(t("page_indptr"), t("last_page_len"), int_argument(page_size, "page_size", 1), t("seqlens"),
                options);
}

void py_merge_states_in_place(nb::dict tensors, bool base2, std::uintptr_t stream) {
  Tensors t(std::move(tensors));
  const TensorView out = t("out"), lse = t("lse"), other_out = t("other_out"), other_lse = t("other_lse"),
                   mask = t("mask");
  nb::gil_scoped_release release;
  merge_states_in_place(out, lse, other_out, other_lse, mask, base2 ? LseBase::kTwo : LseBase::kE,
                        reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_pages(nb::module_& m) {
  m.def("append_pages", &py_append_pages, "tensors"_a, "num_threads"_a.none() = 0, "stream"_a = 0);
  m.def("batch_positions", &py_batch_positions, "tensors"_a, "stream"_a = 0);
  m.def("paged_seqlens", &py_paged_seqlens, "tensors"_a, "page_size"_a.none(), "stream"_a = 0);
  m.def("merge_states_in_place", &py_merge_states_in_place, "tensors"_a, "base2"_a, "stream"_a = 0);
}

}  // namespace flash_mla::python
