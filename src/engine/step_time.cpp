#include "engine/step_time.h"

#include <algorithm>

namespace flash_mla::engine {
namespace {

constexpr double kForget = 0.98;  // per step
// Until steps of different sizes have been seen: the share of a step's time that goes with its rows. What has been seen
// loses its weight against it while none are seen.
constexpr double kAssumedShare = 0.3, kForgetShare = 0.998;

}  // namespace

StepTime::StepTime() : share_(kAssumedShare) {}

void StepTime::add(int rows, double seconds) {
  weight_ = kForget * weight_ + 1;
  const double share = 1 / weight_;
  rows_ += share * (rows - rows_);
  seconds_ += share * (seconds - seconds_);
  rows2_ += share * (double{1} * rows * rows - rows2_);
  rows_seconds_ += share * (rows * seconds - rows_seconds_);
  const double variance = rows2_ - rows_ * rows_;
  if (variance < 0.01 * rows_) {
    share_ = kAssumedShare + kForgetShare * (share_ - kAssumedShare);
    return;
  }
  // Time is noisy where others use the machine: a row costs something, and no more than its share of all.
  const double slope = (rows_seconds_ - rows_ * seconds_) / variance;
  share_ = std::clamp(slope * rows_ / seconds_, 0.5 * kAssumedShare, 1.0);
}

double StepTime::slope() const { return weight_ == 0 ? 0 : share_ * seconds_ / rows_; }

double StepTime::at(double rows) const { return seconds_ + slope() * (rows - rows_); }

}  // namespace flash_mla::engine
