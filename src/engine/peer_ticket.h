#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "transfer/page_receiver.h"
#include "transfer/page_sender.h"

namespace flash_mla::engine {

/// A sequence's room, on either side.
struct PeerTicket {
  // Prefill.
  std::shared_ptr<transfer::OutgoingRoom> outgoing;
  std::int64_t prompt_tokens = 0;
  bool refused = false;                // has been told
  bool by_layer = false;               // goes while it is computed
  std::int64_t sent_pages = 0;         // in all layers
  std::int64_t step_pages = 0;         // up to here, exclusive, by the step that runs
  int told_layers = 0;                 // of them
  bool finished = false;               // nothing is left to send
  std::atomic<bool> computed = false;  // the whole prompt

  // Decode.
  std::shared_ptr<transfer::IncomingRoom> incoming;
  std::int64_t prefix_tokens = 0;   // that it would bring
  std::vector<std::int32_t> pages;  // of the sequence, while it is loaded
  std::int64_t begin = 0, end = 0;  // tokens
  std::int64_t loaded = 0;          // until `done` of the loader's thread
  bool loading = false;             // has begun
  std::atomic<bool> done = false;
};

}  // namespace flash_mla::engine
