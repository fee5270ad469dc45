// Pages of a model's cache to the host and back.

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/aligned.h"
#include "flash_mla/error.h"
#include "model/deepseek.h"

namespace flash_mla::model {

class DeepSeek::Copies : public PageCopies {
 public:
  explicit Copies(const DeepSeek& model) : model_(model), queue_(model.device_->make_copy_queue()) {}

  void follow_steps() override { queue_->wait_for_steps(); }
  void download(std::span<const std::int32_t> pages, std::byte* to) override {
    for_each(pages, [&](std::span<std::byte> part, std::size_t offset) {
      queue_->copy(to + offset, part.data(), part.size());
    });
  }
  void download(int layer, std::span<const std::int32_t> pages, std::byte* to) override {
    check(pages, 0);
    int number = 0;
    model_.for_each_cache([&](const Attention& attention) {
      if (number++ != layer) return;
      for (const std::int32_t page : pages) {
        for (const std::span<std::byte> part : attention.page(page)) {
          if (!part.empty()) queue_->copy(to, part.data(), part.size());
          to += part.size();
        }
      }
    });
    if (layer < 0 || layer >= number)
      throw InvalidArgument(fmt::format("layer is {}, expected 0 to {}", layer, number - 1));
  }
  void upload(std::span<const std::int32_t> pages, const std::byte* from) override {
    for_each(pages, [&](std::span<std::byte> part, std::size_t offset) {
      queue_->copy(part.data(), from + offset, part.size());
    });
  }
  std::unique_ptr<CopyMark> mark() override { return queue_->mark(); }

 private:
  void check(std::span<const std::int32_t> pages, int least) const {
    for (const std::int32_t page : pages) {
      if (page < least || page >= model_.num_pages_) {
        throw InvalidArgument(fmt::format("page is {}, expected {} to {}, the pages of the cache", page,
                                          least, model_.num_pages_ - 1));
      }
    }
  }
  /// f of every part of the pages that are not -1, and of where it lies on the host.
  template <class F>
  void for_each(std::span<const std::int32_t> pages, const F& f) const {
    check(pages, -1);
    std::size_t offset = 0;
    model_.for_each_cache([&](const Attention& attention) {
      for (const std::int32_t page : pages) {
        if (page < 0) {
          offset += attention.bytes_per_page();
          continue;
        }
        for (const std::span<std::byte> part : attention.page(page)) {
          if (!part.empty()) f(part, offset);
          offset += part.size();
        }
      }
    });
  }

  const DeepSeek& model_;
  std::unique_ptr<CopyQueue> queue_;
};

std::unique_ptr<PageCopies> DeepSeek::make_page_copies() { return std::make_unique<Copies>(*this); }

std::string DeepSeek::page_format() const {
  std::string out;
  for_each_cache([&](const Attention& attention) { out += attention.page_format() + "; "; });
  return out;
}

int DeepSeek::num_plain_layers() const {
  if (module_ || !config_.rope_interleave) return 0;
  for (const Layer& layer : layers_) {
    if (!layer.attention->has_plain_rows()) return 0;
  }
  return static_cast<int>(layers_.size());
}

std::vector<std::size_t> DeepSeek::layer_page_bytes() const {
  std::vector<std::size_t> out;
  for_each_cache([&](const Attention& attention) { out.push_back(attention.bytes_per_page()); });
  return out;
}

bool DeepSeek::set_on_layer(const std::function<void(int layer)>& on_layer) {
  if (device_->queues()) return false;
  on_layer_ = on_layer;
  return true;
}

std::unique_ptr<PageCopies> Model::make_page_copies() {
  throw Unsupported("kv_tiers: pages of this model cannot be copied");
}

Buffer Model::allocate_host(std::size_t bytes) const { return allocate_aligned(bytes); }

}  // namespace flash_mla::model
