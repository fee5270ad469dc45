#pragma once

// Pieces of the evaluation that tests and the article's tables use on their own.

#include "flash_mla/planner.h"
#include "planner/equations.h"

namespace flash_mla::planner {

/// Values of one sheet, by name.
class Values {
 public:
  explicit Values(const Sheet& s) : sheet_(s), values_(s.num_slots(), 0.0) {}
  void set(std::string_view name, double value) { values_[sheet_.slot(name)] = value; }
  double operator[](std::string_view name) const { return values_[sheet_.slot(name)]; }
  void evaluate() { sheet_.evaluate(values_); }
  const std::vector<double>& all() const { return values_; }
  const Sheet& sheet() const { return sheet_; }

 private:
  const Sheet& sheet_;
  std::vector<double> values_;
};

/// One sheet's values for a request whose plans are complete (dp set); nothing is checked.
Values evaluate_sheet(const Request& request, PhaseKind kind);

struct Parameters {
  double dense, shared, routed, total, active_non_attention, mla;
};
/// Exact parameter counts: everything but experts, shared experts, routed experts, all, read per token
/// outside attention (output head included), MLA projections.
Parameters count_parameters(const Model& model);

double price_per_card_hour(const Prices& prices);

}  // namespace flash_mla::planner
