#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "model/quantize/calibration.h"

namespace flash_mla::model {

/// Gives a tensor's values (rows * columns).
using ReadTensor =
    std::function<std::vector<float>(const std::string& name, std::int64_t& rows, std::int64_t& columns)>;

/// Activation-aware scales (AWQ, arXiv 2306.00978): input feature k of a product is divided by s[k], and the weights
/// that meet it are multiplied by s[k] before they are rounded, so that features with large values are rounded more
/// finely. The division is folded into what makes the input: of gate and up projections, the norm before them (and so
/// the router's columns change, too); of a down projection, the rows of its up projection.
class AwqScales {
 public:
  /// Chooses s = mean(|x|)^alpha for the alpha with the least error of the products, features taken as independent, one
  /// for the inputs of a layer's experts and one for the down projection of each. `tensors`: those that are to be
  /// quantised, in groups of so many columns.
  static AwqScales search(const std::vector<std::string>& tensors, std::int64_t group,
                          const Calibration& calibration, const ReadTensor& read);

  /// What the columns of a tensor are multiplied by, or null; a vector is a row.
  const std::vector<float>* columns(std::string_view tensor) const;
  /// What its rows are divided by, or null.
  const std::vector<float>* rows(std::string_view tensor) const;
  /// What a norm's weights are divided by, or null.
  const std::vector<float>* norm(std::string_view tensor) const;

 private:
  std::map<std::string, std::vector<float>, std::less<>> inputs_;  // by layer
  std::map<std::string, std::vector<float>, std::less<>>
      inner_;  // by network, such as model.layers.3.mlp.experts.5
};

}  // namespace flash_mla::model
