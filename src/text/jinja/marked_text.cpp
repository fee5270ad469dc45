#include "text/jinja/marked_text.h"

#include <algorithm>

namespace flash_mla::text::jinja {

MarkedText::MarkedText(std::string_view text, bool control) : size_(text.size()) {
  if (text.empty()) return;
  bytes_ = std::make_shared<Bytes>();
  append_run(*bytes_, text, control);
}

MarkedText MarkedText::constant(std::string_view text, bool control) {
  MarkedText out(text, control);
  if (out.bytes_) out.bytes_->shared_by_threads = true;
  return out;
}

void MarkedText::append_run(Bytes& bytes, std::string_view text, bool control) {
  bytes.text += text;
  if (!bytes.runs.empty() && bytes.runs.back().control == control) {
    bytes.runs.back().end = bytes.text.size();
  } else {
    bytes.runs.push_back({bytes.text.size(), control});
  }
}

std::size_t MarkedText::run_at(std::size_t place) const {
  if (!bytes_) return 0;
  const auto found = std::upper_bound(bytes_->runs.begin(), bytes_->runs.end(), place,
                                      [](std::size_t at, const Run& run) { return at < run.end; });
  return static_cast<std::size_t>(found - bytes_->runs.begin());
}

MarkedText MarkedText::slice(std::size_t begin, std::size_t end) const {
  if (begin == 0 && end == size_) return *this;
  MarkedText out;
  if (begin >= end) return out;
  out.bytes_ = std::make_shared<Bytes>();
  out.size_ = end - begin;
  for_each_run(begin, end,
               [&](std::string_view text, bool control) { append_run(*out.bytes_, text, control); });
  return out;
}

std::size_t MarkedText::append(const MarkedText& other) {
  if (other.empty()) return 0;
  if (empty()) {
    *this = other;
    return 0;
  }
  std::size_t copied = other.size_;
  // Others may see the first size_ bytes; what stands behind them is nobody's only at the very end.
  if (bytes_->shared_by_threads || bytes_->text.size() != size_ || bytes_ == other.bytes_) {
    auto own = std::make_shared<Bytes>();
    for_each_run([&](std::string_view text, bool control) { append_run(*own, text, control); });
    bytes_ = std::move(own);
    copied += size_;
  }
  other.for_each_run([&](std::string_view text, bool control) { append_run(*bytes_, text, control); });
  size_ += other.size_;
  return copied;
}

}  // namespace flash_mla::text::jinja
