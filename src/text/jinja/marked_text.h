#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::text::jinja {

/// A string whose bytes know where they come from: control (the template's own text, in which special tokens
/// are recognised) or not (a client's, in which none is). Copies share their bytes. Appending to the copy
/// that was made last is done in place, so that building a text piece by piece takes time in proportion to
/// it.
class MarkedText {
 public:
  MarkedText() = default;
  MarkedText(std::string_view text, bool control);
  /// One that threads may share: appending to it copies.
  static MarkedText constant(std::string_view text, bool control);

  bool empty() const { return size_ == 0; }
  std::size_t size() const { return size_; }  ///< bytes
  std::string_view view() const { return bytes_ ? std::string_view(bytes_->text).substr(0, size_) : ""; }

  /// Bytes [begin, end), marked as they are.
  MarkedText slice(std::size_t begin, std::size_t end) const;
  /// Returns how many bytes were copied.
  std::size_t append(const MarkedText& other);
  /// f(text, control) for the runs of bytes that are marked alike.
  template <class F>
  void for_each_run(const F& f) const {
    for_each_run(0, size_, f);
  }

 private:
  struct Run {
    std::size_t end;
    bool control;
  };
  struct Bytes {
    std::string text;
    std::vector<Run> runs;
    bool shared_by_threads = false;
  };

  static void append_run(Bytes& bytes, std::string_view text, bool control);
  std::size_t run_at(std::size_t place) const;
  template <class F>
  void for_each_run(std::size_t begin, std::size_t end, const F& f) const {
    for (std::size_t run = run_at(begin); begin < end; ++run) {
      const std::size_t run_end = bytes_->runs[run].end < end ? bytes_->runs[run].end : end;
      f(std::string_view(bytes_->text).substr(begin, run_end - begin), bytes_->runs[run].control);
      begin = run_end;
    }
  }

  std::shared_ptr<Bytes> bytes_;
  std::size_t size_ = 0;
};

}  // namespace flash_mla::text::jinja
