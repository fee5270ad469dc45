#pragma once

#include <functional>
#include <memory>

#include "engine/peer_hub.h"
#include "engine/prefix_loader.h"
#include "flash_mla/engine.h"
#include "kv/page_pool.h"
#include "model/model.h"
#include "transfer/identity.h"

namespace flash_mla::engine {

/// The loader of an engine that is one side of prefill and decode.
class PeerLoader : public PrefixLoader {
 public:
  /// Throws InvalidArgument, naming the field, for a room that this side cannot have.
  virtual void check(const BootstrapRoom& room) const = 0;
};

/// What both sides are made with, of a rank.
struct PeerSetup {
  model::Model& model;
  kv::PagePool& pool;
  const TransferOptions& options;
  std::shared_ptr<PeerHub> hub;  ///< of all ranks
  /// Called from any thread when a call of the loader may say something else than before.
  std::function<void()> on_news;
};

/// Throws Unsupported for a model whose pages cannot be copied.
std::unique_ptr<PeerLoader> make_prefill_side(PeerSetup setup);
std::unique_ptr<PeerLoader> make_decode_side(PeerSetup setup);

}  // namespace flash_mla::engine
