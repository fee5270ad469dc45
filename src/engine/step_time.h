#pragma once

namespace flash_mla::engine {

/// How long a step takes that has only sequences past their prompts: a + b * rows, fitted to the latest steps. It
/// is the planner's time of a decode step (docs/planner.md: what is read however many tokens there are, and what
/// each of them costs) with its two coefficients measured.
class StepTime {
 public:
  void add(int rows, double seconds);
  /// Seconds that one more row costs.
  double slope() const;
  /// Of a step; 0 before the first has been added.
  double at(double rows) const;

 private:
  double weight_ = 0, rows_ = 0, seconds_ = 0;  // means of the latest steps, the older the less
  double rows2_ = 0, rows_seconds_ = 0;         // of squares and products
};

}  // namespace flash_mla::engine
