#include "flash_mla/quantize_checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>

#include "flash_mla/error.h"
#include "model/model.h"
#include "model/quantize/calibration.h"
#include "model/quantize/quantize_checkpoint.h"
#include "text/tokenizer.h"

namespace flash_mla {
namespace {

// Tokens of a piece of the calibration text that the model sees at once.
constexpr std::int64_t kPiece = 512;

std::string read_text(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string out{std::istreambuf_iterator<char>(in), {}};
  if (in.fail()) throw InvalidArgument(fmt::format("calibration: {}: cannot be read", path.string()));
  return out;
}

/// Runs the model over pieces of the text, spread over all of it.
void run(model::Model& model, const std::vector<std::int32_t>& tokens, std::int64_t wanted) {
  const std::int64_t piece = std::min(kPiece, static_cast<std::int64_t>(model.max_position()));
  const auto count = static_cast<std::int64_t>(tokens.size());
  const std::int64_t pieces = std::max<std::int64_t>(1, std::min(wanted, count) / piece);
  const int pages = static_cast<int>((piece + kPageSize - 1) / kPageSize);
  model.allocate_cache(pages);
  std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
  std::iota(table.begin(), table.end(), 0);
  for (std::int64_t i = 0; i < pieces; ++i) {
    const std::int64_t first = pieces > 1 ? i * (count - piece) / (pieces - 1) : 0;
    const auto length = static_cast<std::int32_t>(std::min(piece, count - first));
    const std::int32_t starts[] = {0, length}, lengths[] = {length};
    // The last layer goes on with the rows alone whose logits are wanted.
    std::vector<std::int32_t> rows(static_cast<std::size_t>(length));
    std::iota(rows.begin(), rows.end(), 0);
    std::vector<float> logits(rows.size() * static_cast<std::size_t>(model.vocab_size()));
    model::ForwardBatch batch;
    batch.token_ids = std::span(tokens).subspan(static_cast<std::size_t>(first), rows.size());
    batch.query_starts = starts;
    batch.seq_lens = lengths;
    batch.block_table = table;
    batch.max_blocks = pages;
    batch.logit_rows = rows;
    model.forward(batch, logits.data(), nullptr);
  }
}

void calibrate(const std::filesystem::path& directory, const QuantizeCheckpointOptions& options,
               model::Calibration& calibration) {
  const std::string text = read_text(options.calibration);
  const std::vector<std::int32_t> tokens = text::Tokenizer::open(directory).encode(text, true, false);
  if (tokens.empty()) {
    throw InvalidArgument(fmt::format("calibration: {}: expected some text", options.calibration.string()));
  }
  model::ModelOptions model_options;
  model_options.device = ModelDevice::kCpu;
  model_options.num_threads = options.num_threads;
  model_options.on_product = [&](std::span<const std::string> tensors, const Matrix& rows) {
    calibration.observe(tensors, rows);
  };
  const std::unique_ptr<model::Model> model = model::load_model(directory, model_options);
  run(*model, tokens, options.calibration_tokens);
}

}  // namespace

QuantizeCheckpointReport quantize_checkpoint(const std::filesystem::path& model,
                                             const std::filesystem::path& out,
                                             const QuantizeCheckpointOptions& options) {
  if (options.calibration_tokens < 1) {
    throw InvalidArgument(
        fmt::format("calibration_tokens is {}, expected at least 1", options.calibration_tokens));
  }
  model::layers_of(options);
  model::Calibration calibration;
  if (!options.calibration.empty()) calibrate(model, options, calibration);
  return model::write_quantized(model, out, options, calibration);
}

}  // namespace flash_mla
