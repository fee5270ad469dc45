#pragma once

#include <exception>
#include <functional>
#include <utility>
#include <vector>

#include "kv/page_pool.h"
#include "model/page_copies.h"

namespace flash_mla::engine {

/// Whether a copy reads or writes no more: a device that has failed copies nothing.
inline bool is_over(model::CopyMark& mark) {
  try {
    return mark.done();
  } catch (const std::exception&) {
    return true;
  }
}

/// Pages that are no sequence's and that a copy still reads or writes.
class HeldPages {
 public:
  explicit HeldPages(kv::PagePool& pool) : pool_(pool) {}

  void hold(kv::SequencePages pages, std::function<bool()> is_done) {
    held_.push_back({std::move(pages), std::move(is_done)});
  }
  bool empty() const { return held_.empty(); }
  /// Gives back those whose copies have been made.
  void poll() {
    std::erase_if(held_, [this](Held& held) {
      if (!held.is_done()) return false;
      pool_.release(held.pages);
      return true;
    });
  }

 private:
  struct Held {
    kv::SequencePages pages;
    std::function<bool()> is_done;
  };
  kv::PagePool& pool_;
  std::vector<Held> held_;
};

}  // namespace flash_mla::engine
