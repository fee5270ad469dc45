#include "model/quantize/awq.h"

#include <algorithm>
#include <cmath>

#include "base/element.h"
#include "base/parallel.h"
#include "model/quantize/tensor_names.h"

namespace flash_mla::model {
namespace {

// Experts of a layer by which the scales of their common input are chosen.
constexpr std::size_t kExpertsLookedAt = 8;
constexpr float kAlphas[] = {0.0f, 0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f};

struct Matrix2 {
  std::vector<float> values;
  std::int64_t rows = 0, columns = 0;
};

/// Error of x·w in 4 bits when w's columns are multiplied by s first, of inputs with these mean squares.
double product_error(const Matrix2& w, std::int64_t group, const InputStatistics& x,
                     const std::vector<float>& s) {
  std::vector<double> errors(static_cast<std::size_t>(w.rows));
  parallel_for(w.rows, w.rows * w.columns >= (1 << 16) ? default_threads() : 1, [&](std::int64_t row) {
    const float* values = w.values.data() + row * w.columns;
    double error = 0;
    for (std::int64_t first = 0; first < w.columns; first += group) {
      const std::int64_t end = std::min(w.columns, first + group);
      float amax = 0;
      for (std::int64_t k = first; k < end; ++k) {
        amax = std::max(amax, std::abs(values[k] * s[static_cast<std::size_t>(k)]));
      }
      if (amax == 0) continue;
      const float scale = amax / 7.5f;
      for (std::int64_t k = first; k < end; ++k) {
        const auto column = static_cast<std::size_t>(k);
        const float wide = values[k] * s[column];
        const float narrow = std::clamp(std::nearbyint(wide / scale), -8.0f, 7.0f) * scale;
        const float off = (wide - narrow) / s[column];
        error += static_cast<double>(off * off * x.mean_square(column));
      }
    }
    errors[static_cast<std::size_t>(row)] = error;
  });
  double sum = 0;
  for (const double error : errors) sum += error;
  return sum * static_cast<double>(x.rows);
}

/// mean(|x|)^alpha, its largest and smallest as far from 1.
std::vector<float> scales(const InputStatistics& x, float alpha) {
  std::vector<float> out(x.sum_abs.size());
  float mean = 0;
  for (const float sum : x.sum_abs) mean += sum;
  mean /= static_cast<float>(out.size());
  float low = INFINITY, high = 0;
  for (std::size_t k = 0; k < out.size(); ++k) {
    // A feature that was hardly seen may matter in another text.
    out[k] = std::pow(std::max(x.sum_abs[k], 1e-2f * mean), alpha);
    low = std::min(low, out[k]);
    high = std::max(high, out[k]);
  }
  const float middle = std::sqrt(low * high);
  if (!(middle > 0 && middle < INFINITY)) return std::vector<float>(out.size(), 1.0f);
  for (float& s : out) s /= middle;
  return out;
}

struct Product {
  Matrix2 weight;
  const InputStatistics* input;
};

std::vector<float> best_scales(const std::vector<Product>& products, std::int64_t group,
                               const InputStatistics& input) {
  std::vector<float> best(input.sum_abs.size(), 1.0f);
  double best_error = INFINITY;
  for (const float alpha : kAlphas) {
    std::vector<float> s = scales(input, alpha);
    double error = 0;
    for (const Product& p : products) error += product_error(p.weight, group, *p.input, s);
    if (error < best_error) {
      best_error = error;
      best = std::move(s);
    }
  }
  return best;
}

/// "model.layers.3.mlp.experts.5" of its projections.
std::string network_of(std::string_view tensor) { return std::string(module_of(module_of(tensor))); }

constexpr std::string_view kNorm = ".post_attention_layernorm.weight";

}  // namespace

AwqScales AwqScales::search(const std::vector<std::string>& tensors, std::int64_t group,
                            const Calibration& calibration, const ReadTensor& read) {
  const auto product = [&](const std::string& name, const InputStatistics* input) {
    Product out{{}, input};
    out.weight.values = read(name, out.weight.rows, out.weight.columns);
    return out;
  };
  AwqScales out;
  std::map<std::string, std::vector<std::string>> networks;  // of every layer
  for (const std::string& tensor : tensors) {
    const auto kind = kind_of(tensor);
    const bool feed_forward =
        kind == LayerKind::kExperts || kind == LayerKind::kShared || kind == LayerKind::kDense;
    if (feed_forward && tensor.ends_with(".down_proj.weight")) {
      networks[std::string(layer_of(tensor))].push_back(network_of(tensor));
    }
  }
  for (const auto& [layer, all] : networks) {
    InputStatistics input;
    std::vector<Product> products;
    for (const std::string& network : all) {
      const InputStatistics* x = calibration.find(network + ".gate_proj.weight");
      if (x == nullptr) continue;
      input.add(*x);
      if (products.size() < 2 * kExpertsLookedAt) {
        products.push_back(product(network + ".gate_proj.weight", x));
        products.push_back(product(network + ".up_proj.weight", x));
      }
      const InputStatistics* inner = calibration.find(network + ".down_proj.weight");
      if (inner != nullptr) {
        out.inner_[network] = best_scales({product(network + ".down_proj.weight", inner)}, group, *inner);
      }
    }
    if (products.empty()) continue;
    std::vector<float> s = best_scales(products, group, input);
    // The norm is stored in bfloat16, in all published checkpoints: what it really divides by counts.
    std::int64_t rows = 0, columns = 0;
    const std::vector<float> norm = read(layer + std::string(kNorm), rows, columns);
    for (std::size_t k = 0; k < s.size(); ++k) {
      const float divided = to_float(to_bf16(norm[k] / s[k]));
      s[k] = divided != 0 ? norm[k] / divided : 1.0f;
    }
    out.inputs_[layer] = std::move(s);
  }
  return out;
}

const std::vector<float>* AwqScales::columns(std::string_view tensor) const {
  if (tensor.ends_with(".down_proj.weight")) {
    const auto found = inner_.find(network_of(tensor));
    return found == inner_.end() ? nullptr : &found->second;
  }
  const bool reads_norm = tensor.ends_with(".gate_proj.weight") || tensor.ends_with(".up_proj.weight") ||
                          tensor.ends_with(".mlp.gate.weight");
  if (!reads_norm) return nullptr;
  const auto found = inputs_.find(layer_of(tensor));
  return found == inputs_.end() ? nullptr : &found->second;
}

const std::vector<float>* AwqScales::rows(std::string_view tensor) const {
  if (!tensor.ends_with(".up_proj.weight")) return nullptr;
  const auto found = inner_.find(network_of(tensor));
  return found == inner_.end() ? nullptr : &found->second;
}

const std::vector<float>* AwqScales::norm(std::string_view tensor) const {
  if (!tensor.ends_with(kNorm)) return nullptr;
  const auto found = inputs_.find(layer_of(tensor));
  return found == inputs_.end() ? nullptr : &found->second;
}

}  // namespace flash_mla::model
