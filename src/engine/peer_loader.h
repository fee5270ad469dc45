#pragma once

#include <functional>
#include <memory>

#include "engine/prefix_loader.h"
#include "flash_mla/engine.h"
#include "kv/page_pool.h"
#include "model/model.h"
#include "transfer/identity.h"
#include "transfer/page_transport.h"

namespace flash_mla::engine {

/// The loader of an engine that is one side of prefill and decode.
class PeerLoader : public PrefixLoader {
 public:
  /// Throws InvalidArgument, naming the field, for a room that this side cannot have.
  virtual void check(const BootstrapRoom& room) const = 0;
};

/// What both sides are made with.
struct PeerSetup {
  model::Model& model;
  kv::PagePool& pool;
  const TransferOptions& options;
  transfer::Identity identity;
  /// Called from any thread when a call of the loader may say something else than before.
  std::function<void()> on_news;
};

/// Throws InvalidArgument, Unsupported, or transfer::TransferError where the address cannot be bound.
std::unique_ptr<PeerLoader> make_prefill_side(PeerSetup setup);
std::unique_ptr<PeerLoader> make_decode_side(PeerSetup setup);

/// Of the options' name. Throws Unsupported where it is not there.
std::unique_ptr<transfer::PageTransport> make_transport(const TransferOptions& options);

}  // namespace flash_mla::engine
