#include "flash_mla/indexer.h"

#include <algorithm>

#include "api/call.h"
#include "api/indexer_checks.h"
#include "api/top_k_checks.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/indexer/cpu/indexer.h"
#include "kernels/attention/indexer/reference/indexer.h"
#include "kernels/attention/indexer/rows.h"
#include "kernels/attention/indexer/sm90/indexer.h"
#include "kernels/attention/top_k/cpu/top_k.h"
#include "kernels/attention/top_k/sm90/top_k.h"

namespace flash_mla {
namespace {

using cpu::IndexElement;

int threads(const IndexerOptions& options) {
  return options.num_threads > 0 ? options.num_threads : cpu::default_num_threads();
}

bool on_gpu(const IndexerOptions& options, const TensorView& q) {
  return api::backend_of(options.backend, q, "q") == Backend::kSm90;
}

void check_shapes(const MqaLogitsArgs& args, const IndexerOptions& options, bool with_logits,
                  bool allow_reference_types = false) {
  api::check_mqa_logits_shapes(args, options, with_logits, allow_reference_types);
}
void check_shapes(const PagedMqaLogitsArgs& args, const IndexerOptions& options, bool with_logits,
                  bool allow_reference_types = false) {
  api::check_paged_mqa_logits_shapes(args, options, with_logits, allow_reference_types);
}
void check_values(const MqaLogitsArgs& args) { api::check_mqa_logits_values(args); }
void check_values(const PagedMqaLogitsArgs& args) { api::check_paged_mqa_logits_values(args); }

bool compressed(const MqaLogitsArgs& args) { return args.compressed; }
bool compressed(const PagedMqaLogitsArgs&) { return false; }

template <class Args>
std::size_t logits_workspace_size(const Args& args, const IndexerOptions& options) {
  check_shapes(args, options, /*with_logits=*/true);
  if (on_gpu(options, args.q)) return 0;
  return cpu::index_logits_workspace_size(indexer::make_rows(args), IndexElement::kE4m3, threads(options));
}

template <class Args>
void logits(const Args& args, void* workspace, std::size_t workspace_bytes, const IndexerOptions& options,
            const char* size_function) {
  const std::size_t needed = logits_workspace_size(args, options);
  api::check_workspace_bytes(workspace, workspace_bytes, needed, size_function);
  const indexer::Rows rows = indexer::make_rows(args);
  const indexer::Logits out{args.logits.template ptr<float>(), args.logits.stride(0), args.logits.size(1),
                            compressed(args), args.clean};
  if (on_gpu(options, args.q)) {
    sm90::index_logits(rows, 0, rows.num_rows, out, options.stream);
    return;
  }
  check_values(args);
  cpu::index_logits(rows, IndexElement::kE4m3, 0, rows.num_rows, out, workspace, threads(options));
}

template <class Args>
void reference_logits(const Args& args) {
  check_shapes(args, {}, /*with_logits=*/true, /*allow_reference_types=*/true);
  if (args.q.device.type != DeviceType::kCpu) {
    api::invalid("q is {}, expected a CPU tensor", args.q.describe());
  }
  check_values(args);
  reference::index_logits(indexer::make_rows(args), args.logits, compressed(args), args.clean);
}

/// How the workspace of a selection is laid out: that of the logits kernel, then lengths, then logits.
struct Chunks {
  std::size_t kernel_bytes = 0, lengths_bytes = 0, row_floats = 0;
  std::int64_t rows = 0;  ///< of one chunk

  Chunks(const indexer::Rows& r, const MqaTopKOptions& options, bool gpu) {
    const auto round = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
    if (!gpu)
      kernel_bytes = cpu::index_logits_workspace_size(r, IndexElement::kE4m3, threads(options.indexer));
    row_floats = round(static_cast<std::size_t>(std::max<std::int64_t>(r.max_keys, 1)) * sizeof(float)) /
                 sizeof(float);
    const std::size_t fit = options.logits_bytes / (row_floats * sizeof(float));
    rows = std::clamp<std::int64_t>(static_cast<std::int64_t>(std::min<std::size_t>(fit, 1 << 30)), 1,
                                    std::max<std::int64_t>(r.num_rows, 1));
    lengths_bytes = round(static_cast<std::size_t>(rows) * sizeof(std::int32_t));
  }
  std::size_t bytes() const {
    return kernel_bytes + lengths_bytes + static_cast<std::size_t>(rows) * row_floats * sizeof(float);
  }
};

template <class Args>
Chunks check_top_k(const Args& args, const TopKOutput& output, const TensorView& indices,
                   const MqaTopKOptions& options, const char* function) {
  if (args.logits.defined()) {
    api::invalid("logits is {}, expected none: {} keeps its own", args.logits.describe(), function);
  }
  check_shapes(args, options.indexer, /*with_logits=*/false);
  const indexer::Rows rows = indexer::make_rows(args);
  api::check_top_k_output_shapes(output, indices, rows.num_rows);
  api::check_same_device(indices, "indices", args.q, "q");
  return Chunks(rows, options, on_gpu(options.indexer, args.q));
}

/// The rows first to first + count - 1 of an output.
TopKOutput rows_of(const TopKOutput& output, std::int64_t first, std::int64_t count) {
  TopKOutput part = output;
  for (TensorView* v : {&part.offsets, &part.row_request}) {
    if (!v->defined()) continue;
    v->data = v->ptr<std::int32_t>() + first;
    v->shape[0] = count;
  }
  return part;
}

/// Kernels queued chunk by chunk, over one piece of workspace.
template <class Args>
void select_on_gpu(const Args& args, const TopKOutput& output, const TensorView& indices, void* workspace,
                   const Chunks& chunks, void* stream) {
  const indexer::Rows rows = indexer::make_rows(args);
  auto* bytes = static_cast<std::byte*>(workspace);
  auto* lengths = reinterpret_cast<std::int32_t*>(bytes);
  auto* scores = reinterpret_cast<float*>(bytes + chunks.lengths_bytes);
  const auto stride = static_cast<std::int64_t>(chunks.row_floats);
  const std::int64_t per_request =
      output.block_table.defined() && !output.row_request.defined() && rows.num_rows > 0
          ? rows.num_rows / output.block_table.size(0)
          : 1;
  for (std::int64_t first = 0; first < rows.num_rows; first += chunks.rows) {
    const std::int64_t count = std::min(chunks.rows, rows.num_rows - first);
    sm90::index_logits(rows, first, first + count, {scores, stride, stride, true, false}, stream);
    sm90::index_lengths(rows, first, first + count, lengths, stream);
    TopKArgs top;
    top.logits = TensorView::contiguous(scores, DType::kFloat32, {count, stride}, indices.device);
    top.lengths = TensorView::contiguous(lengths, DType::kInt32, {count}, indices.device);
    top.output = rows_of(output, first, count);
    top.indices = indices;
    top.indices.data = indices.ptr<std::int32_t>() + first * indices.stride(0);
    top.indices.shape[0] = count;
    sm90::top_k(top, first, per_request, stream);
  }
}

template <class Args>
void select(const Args& args, const TopKOutput& output, const TensorView& indices, void* workspace,
            std::size_t workspace_bytes, const MqaTopKOptions& options, const char* function,
            const char* size_function) {
  const Chunks chunks = check_top_k(args, output, indices, options, function);
  api::check_workspace_bytes(workspace, workspace_bytes, chunks.bytes(), size_function);
  if (on_gpu(options.indexer, args.q)) {
    select_on_gpu(args, output, indices, workspace, chunks, options.indexer.stream);
    return;
  }
  check_values(args);
  const indexer::Rows rows = indexer::make_rows(args);
  const auto length = [&](std::int64_t row) {
    return std::max<std::int64_t>(rows.end(row) - rows.begin(row), 0);
  };
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    api::check_top_k_output_values(output, row, length(row), rows.num_rows);
  }
  auto* bytes = static_cast<std::byte*>(workspace);
  auto* lengths = reinterpret_cast<std::int32_t*>(bytes + chunks.kernel_bytes);
  auto* scores = reinterpret_cast<float*>(bytes + chunks.kernel_bytes + chunks.lengths_bytes);
  const auto stride = static_cast<std::int64_t>(chunks.row_floats);
  const int num_threads = threads(options.indexer);
  for (std::int64_t first = 0; first < rows.num_rows; first += chunks.rows) {
    const std::int64_t last = std::min(first + chunks.rows, rows.num_rows);
    cpu::index_logits(rows, IndexElement::kE4m3, first, last, {scores, stride, stride, true, false},
                      workspace, num_threads);
    for (std::int64_t row = first; row < last; ++row) {
      lengths[row - first] = static_cast<std::int32_t>(length(row));
    }
    cpu::top_k_rows({scores, stride, lengths, first, rows.num_rows}, last - first, output, indices,
                    num_threads);
  }
}

}  // namespace

std::size_t mqa_logits_workspace_size(const MqaLogitsArgs& args, const IndexerOptions& options) {
  return logits_workspace_size(args, options);
}

std::size_t paged_mqa_logits_workspace_size(const PagedMqaLogitsArgs& args, const IndexerOptions& options) {
  return logits_workspace_size(args, options);
}

void mqa_logits(const MqaLogitsArgs& args, void* workspace, std::size_t workspace_bytes,
                const IndexerOptions& options) {
  logits(args, workspace, workspace_bytes, options, "mqa_logits_workspace_size");
}

void paged_mqa_logits(const PagedMqaLogitsArgs& args, void* workspace, std::size_t workspace_bytes,
                      const IndexerOptions& options) {
  logits(args, workspace, workspace_bytes, options, "paged_mqa_logits_workspace_size");
}

std::size_t mqa_top_k_workspace_size(const MqaLogitsArgs& args, const TopKOutput& output,
                                     const TensorView& indices, const MqaTopKOptions& options) {
  return check_top_k(args, output, indices, options, "mqa_top_k").bytes();
}

std::size_t paged_mqa_top_k_workspace_size(const PagedMqaLogitsArgs& args, const TopKOutput& output,
                                           const TensorView& indices, const MqaTopKOptions& options) {
  return check_top_k(args, output, indices, options, "paged_mqa_top_k").bytes();
}

void mqa_top_k(const MqaLogitsArgs& args, const TopKOutput& output, const TensorView& indices,
               void* workspace, std::size_t workspace_bytes, const MqaTopKOptions& options) {
  select(args, output, indices, workspace, workspace_bytes, options, "mqa_top_k", "mqa_top_k_workspace_size");
}

void paged_mqa_top_k(const PagedMqaLogitsArgs& args, const TopKOutput& output, const TensorView& indices,
                     void* workspace, std::size_t workspace_bytes, const MqaTopKOptions& options) {
  select(args, output, indices, workspace, workspace_bytes, options, "paged_mqa_top_k",
         "paged_mqa_top_k_workspace_size");
}

void append_index_keys(const IndexKeyAppendArgs& args, const IndexerOptions& options) {
  api::check_index_append_shapes(args, options);
  if (api::backend_of(options.backend, args.k, "k") == Backend::kSm90) {
    return sm90::append_index_keys(args, options.stream);
  }
  api::check_index_append_values(args);
  cpu::append_index_keys(args, options.num_threads);
}

void quantise_index_queries(const IndexQueryArgs& args, const IndexerOptions& options) {
  api::check_index_query_shapes(args, options);
  if (on_gpu(options, args.q)) return sm90::quantise_index_queries(args, options.stream);
  cpu::quantise_index_queries(args, options.num_threads);
}

namespace reference {

void mqa_logits(const MqaLogitsArgs& args) { reference_logits(args); }
void paged_mqa_logits(const PagedMqaLogitsArgs& args) { reference_logits(args); }

}  // namespace reference
}  // namespace flash_mla
