#include "forward_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include "model/model.h"

namespace nb = nanobind;

namespace flash_mla::python {
namespace {

using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::span<const std::int32_t> span(const Ints& x) { return {x.data(), x.size()}; }

void forward(model::Model& self, const Ints& token_ids, const Ints& query_starts, const Ints& seq_lens,
             const Table& block_table, const Ints& logit_rows, bool batch_invariant, const Logits& logits) {
  if (logits.shape(0) != logit_rows.size() ||
      logits.shape(1) != static_cast<std::size_t>(self.vocab_size())) {
    throw nb::value_error("logits must have shape (len(logit_rows), vocab_size)");
  }
  model::ForwardBatch batch;
  batch.token_ids = span(token_ids);
  batch.query_starts = span(query_starts);
  batch.seq_lens = span(seq_lens);
  batch.block_table = {block_table.data(), block_table.size()};
  batch.max_blocks = static_cast<int>(block_table.shape(1));
  batch.logit_rows = span(logit_rows);
  batch.batch_invariant = batch_invariant;
  nb::gil_scoped_release release;
  self.forward(batch, logits.data(), nullptr);
}

std::unique_ptr<model::Model> load(const std::string& directory, const std::string& precision,
                                   const std::string& quantize, const std::string& kv_cache,
                                   int num_threads) {
  model::ModelOptions options;
  options.device = ModelDevice::kCpu;
  options.num_threads = num_threads;
  if (precision == "float32") {
    options.precision = ModelPrecision::kFloat32;
  } else if (precision == "bfloat16") {
    options.precision = ModelPrecision::kBFloat16;
  } else if (precision != "auto") {
    throw nb::value_error(
        ("precision is '" + precision + "', expected 'auto', 'float32' or 'bfloat16'").c_str());
  }
  if (quantize == "int8") {
    options.quantize = ModelQuantize::kInt8;
  } else if (quantize == "fp8") {
    options.quantize = ModelQuantize::kFp8;
  } else if (quantize == "w4a8") {
    options.quantize = ModelQuantize::kW4A8;
  } else if (quantize != "none") {
    throw nb::value_error(
        ("quantize is '" + quantize + "', expected 'none', 'int8', 'fp8' or 'w4a8'").c_str());
  }
  if (kv_cache == "bfloat16") {
    options.kv_cache = ModelKvCache::kBFloat16;
  } else if (kv_cache == "float16") {
    options.kv_cache = ModelKvCache::kFloat16;
  } else if (kv_cache == "fp8") {
    options.kv_cache = ModelKvCache::kFp8;
  } else if (kv_cache != "auto") {
    throw nb::value_error(
        ("kv_cache is '" + kv_cache + "', expected 'auto', 'bfloat16', 'float16' or 'fp8'").c_str());
  }
  nb::gil_scoped_release release;
  return model::load_model(directory, options);
}

}  // namespace

void bind_forward(nb::module_& m) {
  nb::class_<model::Model>(m, "Model")
      .def_prop_ro("vocab_size", &model::Model::vocab_size)
      .def_prop_ro("max_position", &model::Model::max_position)
      .def_prop_ro("bytes_per_page", &model::Model::bytes_per_page)
      .def("allocate_cache", &model::Model::allocate_cache, nb::arg("num_pages"))
      .def("copy_page", &model::Model::copy_page, nb::arg("source"), nb::arg("target"))
      .def("forward", &forward, nb::arg("token_ids"), nb::arg("query_starts"), nb::arg("seq_lens"),
           nb::arg("block_table"), nb::arg("logit_rows"), nb::arg("batch_invariant"), nb::arg("logits"));
  m.def("load_model", &load, nb::arg("directory"), nb::arg("precision"), nb::arg("quantize"),
        nb::arg("kv_cache"), nb::arg("num_threads"));
}

}  // namespace flash_mla::python
