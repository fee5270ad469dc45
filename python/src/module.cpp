// The Python module: arguments in, one call of the C++ API, nothing computed here.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "arguments.h"
#include "engine_bindings.h"
#include "flash_mla/flash_mla.h"
#include "forward_bindings.h"
#include "gqa_bindings.h"
#include "indexer_bindings.h"
#include "mhc_bindings.h"
#include "mla_cascade_bindings.h"
#include "model_bindings.h"
#include "pages_bindings.h"
#include "planner_bindings.h"
#include "prefill_bindings.h"
#include "rows_bindings.h"
#include "sampling_bindings.h"
#include "sparse_bindings.h"
#include "tensor_argument.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

DenseDecodeArgs arguments(const TensorArgument& q, const TensorArgument& k_cache,
                          const TensorArgument& block_table, const TensorArgument& cache_seqlens,
                          const TensorArgument& out, const TensorArgument& lse) {
  DenseDecodeArgs args;
  args.q = q.view();
  args.k_cache = k_cache.view();
  args.block_table = block_table.view();
  args.cache_seqlens = cache_seqlens.view();
  args.out = out.view();
  args.lse = lse.view();
  return args;
}

void py_dense_decode(nb::handle q, nb::handle k_cache, nb::handle block_table, nb::handle cache_seqlens,
                     nb::handle out, nb::handle lse, nb::handle parts, nb::handle num_splits,
                     nb::handle softmax_scale, nb::handle causal, bool token_rows, nb::handle block_size,
                     nb::handle fixed_split_blocks, nb::handle num_threads, std::uintptr_t stream,
                     nb::handle allocate, nb::handle q_rope) {
  const TensorArgument t_q(q, "q"), t_k(k_cache, "k_cache"), t_table(block_table, "block_table"),
      t_lengths(cache_seqlens, "cache_seqlens"), t_out(out, "out"), t_lse(lse, "lse"),
      t_parts(parts, "tile_scheduler_metadata"), t_splits(num_splits, "num_splits");
  std::optional<TensorArgument> t_rope;
  if (!q_rope.is_none()) t_rope.emplace(q_rope, "q_rope");
  DenseDecodeArgs args = arguments(t_q, t_k, t_table, t_lengths, t_out, t_lse);
  if (t_rope) args.q_rope = t_rope->view();
  DecodeScheduleView schedule;
  schedule.parts = t_parts.view();
  schedule.num_splits = t_splits.view();
  schedule.block_size = int_argument(block_size, "block_size", 1);
  schedule.fixed_split_blocks = int_argument(fixed_split_blocks, "fixed_split_blocks", 0);
  schedule.unit = token_rows ? PartUnit::kTokens : PartUnit::kBlocks;
  DenseDecodeOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.causal = flag_argument(causal, "causal");
  options.num_threads = int_argument(num_threads, "num_threads", 0);
  options.stream = reinterpret_cast<void*>(stream);
  if (!allocate.is_none()) {
    // The caller's allocator knows when its memory may be used again; a call without it would have to wait.
    const std::size_t bytes = dense_decode_workspace_size(args, schedule, options);
    if (bytes == 0) {
      dense_decode(args, schedule, nullptr, 0, options);
    } else {
      const nb::object memory = allocate(bytes);
      const TensorArgument workspace(memory, "workspace");
      dense_decode(args, schedule, workspace.view().data, bytes, options);
    }
    return;
  }
  nb::gil_scoped_release release;
  const std::size_t bytes = dense_decode_workspace_size(args, schedule, options);
  dense_decode(args, schedule, thread_workspace().get(bytes), bytes, options);
}

/// The options that `given` names, the others as they are by default.
ScheduleOptions schedule_options_argument(const nb::kwargs& given, int num_parts) {
  ScheduleOptions options;
  const auto fields = schedule_option_fields();
  for (const auto& [key, value] : given) {
    const auto name = nb::cast<std::string>(key);
    const auto field = std::ranges::find(fields, name, &ScheduleOptionField::name);
    if (field == fields.end()) throw nb::type_error(("build_schedule() has no option " + name).c_str());
    options.*field->value = int_argument(value, field->name, field->least);
  }
  options.num_parts = num_parts;
  return options;
}

nb::dict to_dict(const ScheduleOptions& options) {
  nb::dict all;
  for (const ScheduleOptionField& field : schedule_option_fields()) {
    all[field.name] = options.*field.value;
  }
  return all;
}

/// Plans into `parts` (num_parts, 8) and `num_splits` (b + 1), which the caller has allocated.
void py_build_schedule(nb::handle cache_seqlens, nb::handle parts, nb::handle num_splits, bool token_rows,
                       std::uintptr_t stream, const nb::kwargs& given) {
  const TensorArgument t_lengths(cache_seqlens, "cache_seqlens"), t_parts(parts, "parts"),
      t_splits(num_splits, "num_splits");
  const TensorView& rows = t_parts.view();
  if (rows.rank != 2)
    throw InvalidArgument("parts is " + rows.describe() + ", expected int32 (num_parts, 8)");
  const ScheduleOptions options = schedule_options_argument(given, static_cast<int>(rows.size(0)));
  DecodeScheduleView schedule;
  schedule.parts = rows;
  schedule.num_splits = t_splits.view();
  schedule.block_size = options.block_size;
  schedule.fixed_split_blocks = options.fixed_split_blocks;
  schedule.unit = token_rows ? PartUnit::kTokens : PartUnit::kBlocks;
  build_decode_schedule(t_lengths.view(), options, schedule, reinterpret_cast<void*>(stream));
}

void py_reference(nb::handle q, nb::handle k_cache, nb::handle block_table, nb::handle cache_seqlens,
                  nb::handle out, nb::handle lse, nb::handle softmax_scale, nb::handle causal) {
  const TensorArgument t_q(q, "q"), t_k(k_cache, "k_cache"), t_table(block_table, "block_table"),
      t_lengths(cache_seqlens, "cache_seqlens"), t_out(out, "out"), t_lse(lse, "lse");
  DenseDecodeOptions options;
  options.softmax_scale = scale_argument(softmax_scale);
  options.causal = flag_argument(causal, "causal");
  nb::gil_scoped_release release;
  reference::dense_decode(arguments(t_q, t_k, t_table, t_lengths, t_out, t_lse), options);
}

void py_merge_states(nb::handle out_a, nb::handle lse_a, nb::handle out_b, nb::handle lse_b, nb::handle out,
                     nb::handle lse, bool base2, std::uintptr_t stream) {
  const TensorArgument a(out_a, "out_a"), la(lse_a, "lse_a"), b(out_b, "out_b"), lb(lse_b, "lse_b"),
      o(out, "out"), l(lse, "lse");
  nb::gil_scoped_release release;
  merge_states(a.view(), la.view(), b.view(), lb.view(), o.view(), l.view(),
               base2 ? LseBase::kTwo : LseBase::kE, reinterpret_cast<void*>(stream));
}

}  // namespace
}  // namespace flash_mla::python

NB_MODULE(_C, m) {
  using namespace flash_mla;
  m.doc() =
      "flash_mla's C++ API. The package flash_mla_kernels documents and wraps what is meant to be called.";
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const Unsupported& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });
  flash_mla::python::bind_engine(m);
  flash_mla::python::bind_forward(m);
  flash_mla::python::bind_gqa(m);
  flash_mla::python::bind_indexer(m);
  flash_mla::python::bind_mhc(m);
  flash_mla::python::bind_mla_cascade(m);
  flash_mla::python::bind_model(m);
  flash_mla::python::bind_pages(m);
  flash_mla::python::bind_planner(m);
  flash_mla::python::bind_prefill(m);
  flash_mla::python::bind_rows(m);
  flash_mla::python::bind_sampling(m);
  flash_mla::python::bind_sparse(m);
  m.def("version", &version);
  // nanobind refuses None before the argument has a name, so every argument takes it and refuses it by name.
  m.def("dense_decode", &python::py_dense_decode, "q"_a.none(), "k_cache"_a.none(), "block_table"_a.none(),
        "cache_seqlens"_a.none(), "out"_a.none(), "lse"_a.none(), "parts"_a.none(), "num_splits"_a.none(),
        "softmax_scale"_a.none() = nb::none(), "causal"_a.none() = false, "token_rows"_a = false,
        "block_size"_a.none() = 64, "fixed_split_blocks"_a.none() = 0, "num_threads"_a.none() = 0,
        "stream"_a = 0, "allocate"_a.none() = nb::none(), "q_rope"_a.none() = nb::none());
  m.def("build_schedule", &python::py_build_schedule, "cache_seqlens"_a.none(), "parts"_a.none(),
        "num_splits"_a.none(), "token_rows"_a = false, "stream"_a = 0, "options"_a);
  m.def("schedule_options", [] { return python::to_dict({}); });
  m.def(
      "cuda_schedule_options",
      [](int device_index, int s_q, int num_heads_q, int num_heads_k, int batch) {
        return python::to_dict(cuda_schedule_options(device_index, s_q, num_heads_q, num_heads_k, batch));
      },
      "device_index"_a, "s_q"_a, "num_heads_q"_a, "num_heads_k"_a, "batch"_a = 0);
  m.def(
      "cpu_schedule_options",
      [](int num_threads) { return python::to_dict(cpu_schedule_options(num_threads)); },
      "num_threads"_a = 0);
  m.def("reference_dense_decode", &python::py_reference, "q"_a.none(), "k_cache"_a.none(),
        "block_table"_a.none(), "cache_seqlens"_a.none(), "out"_a.none(), "lse"_a.none(),
        "softmax_scale"_a.none() = nb::none(), "causal"_a.none() = false);
  m.def("merge_states", &python::py_merge_states, "out_a"_a.none(), "lse_a"_a.none(), "out_b"_a.none(),
        "lse_b"_a.none(), "out"_a.none(), "lse"_a.none(), "base2"_a = false, "stream"_a = 0);
  m.def(
      "shape_and_dtype",
      [](nb::handle tensor, const char* name) {
        const python::TensorArgument t(tensor, name);
        nb::list extents;
        for (int i = 0; i < t.view().rank; ++i) extents.append(t.view().size(i));
        return nb::make_tuple(nb::tuple(extents), dtype_name(t.view().dtype));
      },
      "tensor"_a.none(), "name"_a);
  m.def("backends", [] {
    nb::list all;
    for (const BackendInfo& b : backends()) {
      nb::dict d;
      d["name"] = backend_name(b.backend);
      d["available"] = b.available;
      d["device"] = b.device;
      d["detail"] = b.detail;
      all.append(d);
    }
    return all;
  });
  m.def("cpu_isa", [] {
    const CpuIsaInfo isa = cpu_isa();
    nb::dict d;
    d["selected"] = isa.selected;
    d["reason"] = isa.reason;
    d["available"] = isa.available;
    return d;
  });
}
