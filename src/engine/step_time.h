#pragma once

namespace flash_mla::engine {

/// How long a step takes that has only sequences past their prompts: a + b * rows, fitted to the latest steps. It
/// is the planner's time of a decode step (docs/planner.md: what is read however many tokens there are, and what
/// each of them costs) with its two coefficients measured.
class StepTime {
 public:
  StepTime();
  void add(int rows, double seconds);
  /// Seconds that one more row costs.
  double slope() const;
  /// Of a step; 0 before the first has been added.
  double at(double rows) const;

 private:
  double weight_ = 0, rows_ = 0, seconds_ = 0;  // means of the latest steps, the older the less
  double rows2_ = 0, rows_seconds_ = 0;         // of squares and products
  double
      share_;  // of a step's time that goes with its rows, as it was when steps of different sizes were last seen
};

}  // namespace flash_mla::engine
