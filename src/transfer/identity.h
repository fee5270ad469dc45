#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "transfer/connection.h"

namespace flash_mla::transfer {

/// What the pages of two sides must have in common before one takes the other's.
struct Identity {
  std::string weights;      ///< a digest
  std::string page_format;  ///< what a page's bytes mean, in words
  int page_tokens = 0;
  bool batch_invariant = false;
  std::vector<std::size_t> layer_bytes;  ///< of a page, in each layer

  std::size_t bytes_per_page() const;
  int num_layers() const { return static_cast<int>(layer_bytes.size()); }
  std::int64_t pages_for(std::int64_t tokens) const { return (tokens + page_tokens - 1) / page_tokens; }
};

Json to_json(const Identity& identity);
/// Throws TransferError, for the other side to read, that names the first thing in which `theirs` differs.
void check_same(const Identity& mine, const Json& theirs);

/// Of a prompt: who asks for its pages must know it.
std::string digest_of(std::span<const std::int32_t> tokens);

/// Where pages lie in a landing for `num_pages`: (layers, pages, bytes of a page in the layer).
class PageLayout {
 public:
  PageLayout() = default;
  PageLayout(const Identity& identity, std::int64_t num_pages);

  std::size_t bytes() const { return begins_.empty() ? 0 : begins_.back(); }
  std::int64_t num_pages() const { return num_pages_; }
  int num_layers() const { return static_cast<int>(layer_bytes_.size()); }
  /// Pages [page, page + count) of a layer, or of all (-1), without bytes yet: one piece for each layer.
  std::vector<Piece> pieces(int layer, std::int64_t page, std::int64_t count) const;

 private:
  std::int64_t num_pages_ = 0;
  std::vector<std::size_t> layer_bytes_, begins_;
};

/// Of bytes that lie in several places.
std::uint64_t checksum(std::span<const Piece> pieces);

}  // namespace flash_mla::transfer
