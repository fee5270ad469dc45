#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <utility>

#include "transfer/page_receiver.h"

namespace flash_mla::transfer {

const char* trouble_name(Trouble trouble) {
  switch (trouble) {
    case Trouble::kRefused:
      return "refused";
    case Trouble::kLate:
      return "late";
    case Trouble::kGone:
      return "gone";
    case Trouble::kMemory:
      return "memory";
    case Trouble::kChanged:
      return "changed";
    case Trouble::kGivenUp:
      return "given_up";
    default:
      return "none";
  }
}

Trouble IncomingRoom::trouble() const {
  const std::lock_guard lock(mutex_);
  return trouble_;
}

std::string IncomingRoom::reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

void IncomingRoom::fail(Trouble trouble, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (state_ != State::kWaiting) return;
  trouble_ = trouble;
  reason_ = reason;
  state_ = State::kFailed;
}

// Every page of every layer comes once.
void IncomingRoom::note_written(const Json& message) {
  Written w;
  const std::int64_t layer = integer_of(message, "layer");
  w.page = integer_of(message, "page");
  w.count = integer_of(message, "count");
  const std::string sum = text_of(message, "checksum");
  const auto [end, error] = std::from_chars(sum.data(), sum.data() + sum.size(), w.checksum, 16);
  if (layer < -1 || layer >= layout_.num_layers() || w.page < 0 || w.count < 1 ||
      w.page > layout_.num_pages() - w.count || error != std::errc() || end != sum.data() + sum.size())
    throw TransferError("the prefill server says that it has written what was not asked for");
  w.layer = static_cast<int>(layer);
  const std::lock_guard lock(mutex_);
  const int first = w.layer < 0 ? 0 : w.layer, last = w.layer < 0 ? layout_.num_layers() : w.layer + 1;
  for (int l = first; l < last; ++l) {
    for (std::int64_t page = w.page; page < w.page + w.count; ++page) {
      auto place = covered_[static_cast<std::size_t>(l * layout_.num_pages() + page)];
      if (place) throw TransferError("the prefill server says that it has written a page twice");
      place = true;
    }
  }
  written_.push_back(w);
}

void IncomingRoom::note_done() {
  const std::lock_guard lock(mutex_);
  if (state_ != State::kWaiting) return;
  if (!std::ranges::all_of(covered_, std::identity()))
    throw TransferError("the prefill server says that all is written, but pages are missing");
  seconds_ = std::chrono::duration<double>(Clock::now() - begin_).count();
  state_ = State::kArrived;
}

// Sums are taken of the copy: what is written to the landing from now on changes nothing.
bool IncomingRoom::take(std::span<std::byte> to) {
  const std::lock_guard lock(mutex_);
  const auto give_up = [&](const std::string& why) {
    trouble_ = Trouble::kChanged;
    reason_ = why;
    landing_.reset();
    return false;
  };
  if (!landing_ || to.size() != layout_.bytes()) return give_up("the pages have been taken");
  try {
    landing_->read(0, to);
  } catch (const TransferError& e) {
    return give_up(e.what());
  }
  for (const Written& w : written_) {
    std::vector<Piece> pieces = layout_.pieces(w.layer, w.page, w.count);
    for (Piece& piece : pieces) piece.from = to.data() + piece.offset;
    if (checksum(pieces) != w.checksum)
      return give_up(fmt::format("pages {} to {} are not what was sent", w.page, w.page + w.count));
  }
  landing_.reset();
  return true;
}

}  // namespace flash_mla::transfer
