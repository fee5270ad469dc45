#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/config.h"

namespace flash_mla::model {

using checkpoint::ModelConfig;

/// Which ranks have which routed experts, layer by layer; an expert may lie on several (its replicas).
class ExpertPlacement {
 public:
  /// `how`: "linear" (experts in runs: of E experts on N places, expert e at e * N / E), "round-robin" (at e mod N), or
  /// the path of a file. The first two have `ep` places, of which each rank has the one of its number modulo `ep`: with
  /// ep 1 every rank has all experts. Layers are those of `config`, the module for multi-token prediction's included.
  /// Throws InvalidArgument, and what is wrong in a file with its path and key.
  ExpertPlacement(const ModelConfig& config, int ranks, int ep, const std::string& how);

  /// Ranks that have an expert of a mixture layer, ascending.
  std::span<const int> ranks_of(int layer, int expert) const {
    return layers_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(expert)];
  }
  /// Of all experts of a layer.
  const std::vector<std::vector<int>>& layer(int layer) const {
    return layers_[static_cast<std::size_t>(layer)];
  }

 private:
  void read(const ModelConfig& config, int ranks, const std::filesystem::path& file);

  std::vector<std::vector<std::vector<int>>> layers_;  ///< empty for dense layers
};

}  // namespace flash_mla::model
