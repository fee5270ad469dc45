#include "model/quantize/quantize_checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <utility>

#include "base/element.h"
#include "base/json.h"
#include "base/quantized.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/checkpoint_writer.h"
#include "checkpoint/config.h"
#include "checkpoint/safetensors.h"
#include "flash_mla/error.h"
#include "kernels/quant/cpu/weights.h"
#include "model/quantize/awq.h"
#include "model/quantize/config.h"
#include "model/quantize/tensor_names.h"

namespace flash_mla::model {
namespace {

namespace fs = std::filesystem;
using checkpoint::Checkpoint;
using checkpoint::CheckpointWriter;
using checkpoint::PlannedTensor;
using Format = QuantizeCheckpointOptions::Format;

/// A tensor as the model knows it, however it is stored.
struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::string dtype;  ///< that it is stored in; "" if it is quantised
  double bytes = 0;   ///< as stored
  bool quantise = false;

  std::int64_t rows() const { return shape.size() == 2 ? shape[0] : 1; }
  std::int64_t columns() const { return shape.empty() ? 1 : shape.back(); }
};

constexpr int kNoLayer = std::numeric_limits<int>::max();  // behind all layers

bool is_float(const std::string& dtype) { return dtype == "F32" || dtype == "F16" || dtype == "BF16"; }

std::span<const std::byte> bytes_of(const auto& values) { return std::as_bytes(std::span(values)); }

class Quantizer {
 public:
  Quantizer(const fs::path& model, const QuantizeCheckpointOptions& options, const Calibration& calibration)
      : options_(options),
        calibration_(calibration),
        config_(checkpoint::read_config(model)),
        checkpoint_(Checkpoint::open(model)) {
    read_tensors();
    choose_group();
    if (options.format == Format::kW4A8 && !calibration.empty()) {
      std::vector<std::string> names;
      for (const Tensor& t : tensors_) {
        if (t.quantise) names.push_back(t.name);
      }
      awq_ = AwqScales::search(names, group_, calibration,
                               [this](const std::string& name, std::int64_t& rows, std::int64_t& columns) {
                                 const Tensor& t = find(name);
                                 rows = t.rows();
                                 columns = t.columns();
                                 return values(t);
                               });
    }
  }

  QuantizeCheckpointReport write(const fs::path& directory) {
    std::vector<PlannedTensor> plan;
    double total = 0, done = 0;
    for (const Tensor& t : tensors_) {
      add_plan(t, plan);
      total += t.bytes;
    }
    CheckpointWriter writer(directory, plan, options_.shard_bytes);
    if (options_.on_progress) options_.on_progress(0, total);
    for (const Tensor& t : tensors_) {
      write(t, writer);
      done += t.bytes;
      if (options_.on_progress) options_.on_progress(done, total);
    }
    writer.finish();
    QuantizeCheckpointReport report{total, static_cast<double>(writer.bytes()), {}};
    for (const auto& [at, sums] : errors_) {
      const char* kind = name_of(at.second);
      report.errors.push_back(
          sums.named(at.first == kNoLayer ? kind : fmt::format("model.layers.{} {}", at.first, kind)));
    }
    return report;
  }

  std::int64_t group() const { return group_; }
  /// Modules with weights that stay as they are.
  std::vector<std::string> kept() const {
    std::vector<std::string> out;
    bool head = false;
    for (const Tensor& t : tensors_) {
      const bool router = t.name.ends_with(".mlp.gate.weight");
      if (t.quantise || (!kind_of(t.name) && !router)) continue;
      out.emplace_back(module_of(t.name));
      head |= out.back() == "lm_head";
    }
    // A head that shares the embedding's weights has no tensor, but is a module all the same.
    if (!head && config_.tie_word_embeddings) out.emplace_back("lm_head");
    return out;
  }

 private:
  struct Sums {
    std::int64_t weights = 0;
    double error = 0, size = 0, product_error = 0, product_size = 0;

    static double ratio(double a, double b) { return b > 0 ? std::sqrt(a / b) : 0; }
    QuantizationError named(const std::string& name) const {
      return {name, weights, ratio(error, size), ratio(product_error, product_size)};
    }
  };

  void read_tensors();
  void choose_group();
  const Tensor& find(const std::string& name) const;
  std::vector<float> values(const Tensor& tensor) const;
  std::vector<float> scaled_values(const Tensor& tensor) const;
  bool is_scaled(const Tensor& t) const {
    return awq_.columns(t.name) != nullptr || awq_.rows(t.name) != nullptr || awq_.norm(t.name) != nullptr;
  }
  void add_plan(const Tensor& tensor, std::vector<PlannedTensor>& plan) const;
  void write(const Tensor& tensor, CheckpointWriter& writer);
  void write_fp8(const Tensor& tensor, CheckpointWriter& writer);
  void write_int4(const Tensor& tensor, CheckpointWriter& writer);
  static void write_plain(const Tensor& tensor, const std::vector<float>& values, CheckpointWriter& writer);
  float input_scale(const Tensor& tensor) const;
  void count_error(const Tensor& tensor, const std::vector<float>& values,
                   const std::vector<std::uint8_t>& codes, QuantizedType type, auto scale_of);

  const QuantizeCheckpointOptions& options_;
  const Calibration& calibration_;
  checkpoint::ModelConfig config_;
  Checkpoint checkpoint_;
  std::vector<Tensor> tensors_;  // by name
  std::int64_t group_ = kInt4Group;
  AwqScales awq_;
  std::map<std::pair<int, LayerKind>, Sums> errors_;  // by layer
};

/// Name of the tensor with the weights that `name` belongs to, "" for a tensor that stands for itself.
std::string owner_of(const Checkpoint& checkpoint, const std::string& name) {
  for (const std::string_view suffix : {"_scale_inv", "_packed", "_scale", "_shape"}) {
    if (!name.ends_with(suffix)) continue;
    std::string base = name.substr(0, name.size() - suffix.size());
    const bool packed = checkpoint.contains(base + "_packed");
    if (base.ends_with(".weight") && (packed || checkpoint.contains(base))) return base;
  }
  for (const std::string_view suffix : {".input_scale", ".activation_scale"}) {
    if (name.ends_with(suffix)) return name.substr(0, name.size() - suffix.size()) + ".weight";
  }
  return "";
}

void Quantizer::read_tensors() {
  const std::set<LayerKind> kinds = layers_of(options_);
  std::map<std::string, Tensor> all;
  for (const std::string& name : checkpoint_.names()) {
    const checkpoint::SafetensorsEntry& entry = checkpoint_.entry(name);
    const std::string owner = owner_of(checkpoint_, name);
    Tensor& t = all[owner.empty() ? name : owner];
    t.bytes += static_cast<double>(entry.data.size());
    if (owner.empty()) {
      t.name = name;
      t.shape = entry.shape;
      t.dtype = entry.dtype == "F8_E4M3" ? "" : entry.dtype;
    } else if (name.ends_with("_packed")) {
      t.name = owner;
      const checkpoint::SafetensorsEntry& shape = checkpoint_.entry(owner + "_shape");
      t.shape.resize(2);
      for (std::size_t i = 0; i < 2 && shape.data.size() >= 2; ++i) {
        const std::size_t width = shape.data.size() / 2;
        std::memcpy(&t.shape[i], shape.data.data() + i * width, std::min<std::size_t>(width, 8));
      }
    }
  }
  for (auto& [name, t] : all) {
    if (t.name.empty()) continue;  // scales of weights that are not there
    const auto kind = kind_of(name);
    // kv_b is taken apart and transposed by engines that absorb it: 4 bits of it have no kernel.
    const bool absorbed = options_.format == Format::kW4A8 && name.ends_with(".kv_b_proj.weight");
    // The calibration does not run the module for multi-token prediction, whose layer is behind the last.
    const std::string module_layer = fmt::format("model.layers.{}", config_.num_hidden_layers);
    const bool unseen = options_.static_activations && layer_of(name) == module_layer;
    t.quantise = kind && kinds.contains(*kind) && t.shape.size() == 2 && !absorbed && !unseen;
    tensors_.push_back(std::move(t));
  }
}

/// Other readers want whole groups: a model of which some product has no multiple of 128 columns gets smaller ones,
/// where that helps.
void Quantizer::choose_group() {
  for (const std::int64_t group : {kInt4Group, kInt4Group / 2, kInt4Group / 4}) {
    const bool whole = std::all_of(tensors_.begin(), tensors_.end(),
                                   [&](const Tensor& t) { return !t.quantise || t.columns() % group == 0; });
    if (!whole) continue;
    group_ = group;
    return;
  }
}

const Tensor& Quantizer::find(const std::string& name) const {
  const auto at =
      std::lower_bound(tensors_.begin(), tensors_.end(), name,
                       [](const Tensor& t, const std::string& wanted) { return t.name < wanted; });
  if (at == tensors_.end() || at->name != name)
    throw InvalidArgument(fmt::format("the checkpoint has no tensor \"{}\"", name));
  return *at;
}

std::vector<float> Quantizer::values(const Tensor& t) const {
  std::vector<float> out(static_cast<std::size_t>(t.rows() * t.columns()));
  checkpoint_.read_float32(t.name, t.rows(), t.columns(), config_.stored, out.data());
  const auto bad = std::find_if(out.begin(), out.end(), [](float x) { return !std::isfinite(x); });
  if (bad != out.end()) {
    const std::int64_t at = bad - out.begin();
    throw InvalidArgument(fmt::format("tensor {} holds {} at row {}, column {}, expected finite weights",
                                      t.name, *bad, at / t.columns(), at % t.columns()));
  }
  return out;
}

std::vector<float> Quantizer::scaled_values(const Tensor& t) const {
  std::vector<float> out = values(t);
  const auto columns = static_cast<std::size_t>(t.columns());
  if (const std::vector<float>* s = awq_.norm(t.name)) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] /= (*s)[i];
  }
  if (const std::vector<float>* s = awq_.columns(t.name)) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] *= (*s)[i % columns];
  }
  if (const std::vector<float>* s = awq_.rows(t.name)) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] /= (*s)[i / columns];
  }
  return out;
}

void Quantizer::add_plan(const Tensor& t, std::vector<PlannedTensor>& plan) const {
  if (!t.quantise) {
    plan.push_back({t.name, t.dtype.empty() ? "BF16" : t.dtype, t.shape});
    return;
  }
  const std::int64_t rows = t.rows(), columns = t.columns();
  if (options_.format == Format::kFp8) {
    plan.push_back({t.name, "F8_E4M3", t.shape});
    plan.push_back({t.name + "_scale_inv",
                    "F32",
                    {(rows + kFp8Block - 1) / kFp8Block, (columns + kFp8Block - 1) / kFp8Block}});
    return;
  }
  plan.push_back({t.name + "_packed", "I32", {rows, (columns + 7) / 8}});
  plan.push_back({t.name + "_scale", "BF16", {rows, (columns + group_ - 1) / group_}});
  plan.push_back({t.name + "_shape", "I64", {2}});
  if (options_.static_activations)
    plan.push_back({std::string(module_of(t.name)) + ".input_scale", "F32", {1}});
}

void Quantizer::write(const Tensor& t, CheckpointWriter& writer) {
  if (t.quantise) return options_.format == Format::kFp8 ? write_fp8(t, writer) : write_int4(t, writer);
  if (t.dtype.empty() || (is_scaled(t) && is_float(t.dtype))) return write_plain(t, scaled_values(t), writer);
  writer.write(t.name, checkpoint_.entry(t.name).data);
}

void Quantizer::write_plain(const Tensor& t, const std::vector<float>& values, CheckpointWriter& writer) {
  if (t.dtype == "F32") return writer.write(t.name, bytes_of(values));
  std::vector<std::uint16_t> narrow(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    narrow[i] = t.dtype == "F16" ? to_fp16(values[i]).bits : to_bf16(values[i]).bits;
  }
  writer.write(t.name, bytes_of(narrow));
}

void Quantizer::write_fp8(const Tensor& t, CheckpointWriter& writer) {
  const std::vector<float> w = scaled_values(t);
  const std::int64_t groups = (t.columns() + kFp8Block - 1) / kFp8Block;
  std::vector<std::uint8_t> codes(w.size());
  std::vector<float> scales(static_cast<std::size_t>((t.rows() + kFp8Block - 1) / kFp8Block * groups));
  cpu::quantise_fp8_blocks(w.data(), t.rows(), t.columns(), options_.power_of_two_scales, codes.data(),
                           scales.data());
  count_error(t, w, codes, QuantizedType::kE4m3, [&](std::int64_t row, std::int64_t column) {
    return scales[static_cast<std::size_t>(row / kFp8Block * groups + column / kFp8Block)];
  });
  writer.write(t.name, bytes_of(codes));
  writer.write(t.name + "_scale_inv", bytes_of(scales));
}

void Quantizer::write_int4(const Tensor& t, CheckpointWriter& writer) {
  const std::vector<float> w = scaled_values(t);
  const std::int64_t rows = t.rows(), columns = t.columns(), words = (columns + 7) / 8;
  const std::int64_t groups = (columns + group_ - 1) / group_;
  std::vector<std::uint8_t> codes(w.size());
  std::vector<float> scales(static_cast<std::size_t>(rows * groups));
  cpu::quantise_int4(w.data(), rows, columns, group_, codes.data(), scales.data());
  count_error(t, w, codes, QuantizedType::kInt4, [&](std::int64_t row, std::int64_t column) {
    return scales[static_cast<std::size_t>(row * groups + column / group_)];
  });
  std::vector<std::uint32_t> packed(static_cast<std::size_t>(rows * words));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t k = 0; k < columns; ++k) {
      packed[static_cast<std::size_t>(row * words + k / 8)] |=
          std::uint32_t{codes[static_cast<std::size_t>(row * columns + k)]} << (k % 8 * 4);
    }
  }
  std::vector<std::uint16_t> narrow(scales.size());
  for (std::size_t i = 0; i < scales.size(); ++i) narrow[i] = to_bf16(scales[i]).bits;
  writer.write(t.name + "_packed", bytes_of(packed));
  writer.write(t.name + "_scale", bytes_of(narrow));
  writer.write(t.name + "_shape", bytes_of(t.shape));
  if (options_.static_activations) {
    const std::vector<float> scale = {input_scale(t)};
    writer.write(std::string(module_of(t.name)) + ".input_scale", bytes_of(scale));
  }
}

/// Largest activation of the calibration over the largest e4m3.
float Quantizer::input_scale(const Tensor& t) const {
  const InputStatistics* x = calibration_.find(t.name);
  const std::vector<float>* s = awq_.columns(t.name);
  InputStatistics of_others;
  if (x == nullptr) {
    // An expert that no token of the calibration took: as the others of its layer and kind.
    const std::string end = t.name.substr(module_of(module_of(t.name)).size());
    for (const Tensor& other : tensors_) {
      if (layer_of(other.name) != layer_of(t.name) || !other.name.ends_with(end)) continue;
      const InputStatistics* theirs = calibration_.find(other.name);
      if (theirs != nullptr && theirs->max_abs.size() == static_cast<std::size_t>(t.columns())) {
        of_others.add(*theirs);
      }
    }
    if (of_others.rows == 0) {
      throw InvalidArgument(fmt::format(
          "calibration: no token reaches {}: static activation scales need a longer text", t.name));
    }
    x = &of_others;
  }
  float largest = 0;
  for (std::size_t k = 0; k < x->max_abs.size(); ++k) {
    largest = std::max(largest, x->max_abs[k] / (s != nullptr ? (*s)[k] : 1.0f));
  }
  return largest > 0 ? largest / kE4m3Max : 1.0f;
}

void Quantizer::count_error(const Tensor& t, const std::vector<float>& values,
                            const std::vector<std::uint8_t>& codes, QuantizedType type, auto scale_of) {
  const InputStatistics* x = calibration_.find(t.name);
  const std::vector<float>* s = awq_.columns(t.name);
  const std::string_view layer = layer_of(t.name);
  int number = kNoLayer;
  if (!layer.empty())
    std::from_chars(layer.data() + layer.rfind('.') + 1, layer.data() + layer.size(), number);
  Sums& sums = errors_[{number, *kind_of(t.name)}];
  sums.weights += t.rows() * t.columns();
  for (std::int64_t row = 0; row < t.rows(); ++row) {
    for (std::int64_t k = 0; k < t.columns(); ++k) {
      const auto at = static_cast<std::size_t>(row * t.columns() + k);
      const auto column = static_cast<std::size_t>(k);
      const float by = s != nullptr ? (*s)[column] : 1.0f;
      const float value = values[at] / by;
      const float off = value - quantized_value(type, codes[at]) * scale_of(row, k) / by;
      const double error = static_cast<double>(off) * static_cast<double>(off);
      const double size = static_cast<double>(value) * static_cast<double>(value);
      sums.error += error;
      sums.size += size;
      if (x == nullptr) continue;
      sums.product_error += error * static_cast<double>(x->mean_square(column));
      sums.product_size += size * static_cast<double>(x->mean_square(column));
    }
  }
}

/// Everything but weights and configuration.
void copy_other_files(const fs::path& from, const fs::path& to) {
  for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file() || name == "config.json" || name.ends_with(".safetensors") ||
        name.ends_with(".safetensors.index.json")) {
      continue;
    }
    fs::copy_file(entry.path(), to / name);
  }
}

void check(const fs::path& out, const QuantizeCheckpointOptions& options) {
  if (fs::exists(out)) {
    throw InvalidArgument(fmt::format("out: {} exists: expected the name of a new directory", out.string()));
  }
  if (options.shard_bytes == 0) throw InvalidArgument("shard_bytes is 0, expected at least 1");
  if (options.static_activations && (options.calibration.empty() || options.format != Format::kW4A8)) {
    throw InvalidArgument("static_activations: expected format w4a8 and a calibration text");
  }
}

}  // namespace

std::set<LayerKind> layers_of(const QuantizeCheckpointOptions& options) {
  std::set<LayerKind> out;
  for (const std::string& name : options.layers) out.insert(kind_named(name));
  if (!out.empty()) return out;
  out = {LayerKind::kShared, LayerKind::kExperts};
  if (options.format == Format::kFp8) out.insert(LayerKind::kAttention);
  return out;
}

QuantizeCheckpointReport write_quantized(const fs::path& model, const fs::path& out,
                                         const QuantizeCheckpointOptions& options,
                                         const Calibration& calibration) {
  check(out, options);
  Quantizer quantizer(model, options, calibration);
  Json config = parse_json(read_file(model / "config.json"), (model / "config.json").string());
  config["quantization_config"] = quantization_config(options, quantizer.group(), quantizer.kept());
  fs::path partial = out;
  partial += ".partial";
  if (!fs::create_directory(partial)) {
    throw InvalidArgument(
        fmt::format("{} exists, of an earlier run that did not end: remove it", partial.string()));
  }
  try {
    QuantizeCheckpointReport report = quantizer.write(partial);
    std::ofstream file(partial / "config.json");
    file << config.dump(2) << '\n';
    if (!file.flush())
      throw std::runtime_error(fmt::format("{}: cannot be written", (partial / "config.json").string()));
    copy_other_files(model, partial);
    fs::rename(partial, out);
    return report;
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw;
  }
}

}  // namespace flash_mla::model
