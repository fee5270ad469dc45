#include "model/deepseek.h"

#include <fmt/format.h>

#include <cstring>
#include <set>
#include <stdexcept>
#include <utility>

#include "flash_mla/error.h"
#include "model/step.h"

namespace flash_mla::model {

DeepSeek::DeepSeek(ModelConfig config, std::unique_ptr<Device> device, WeightSource& weights,
                   bool draft_module)
    : config_(std::move(config)), device_(std::move(device)) {
  embedding_ = device_->make_embedding(weights.embedding());
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    Layer layer = make_layer(weights, i);
    if (i > 0) layers_.back().feed_forward->set_next(*layer.attention);
    layers_.push_back(std::move(layer));
  }
  head_ = device_->make_head(weights.head());
  if (!draft_module || !weights.has_mtp()) return;
  const MtpWeights mtp = weights.mtp();
  module_ = std::make_unique<Module>();
  module_->input = device_->make_mtp_input(mtp);
  module_->layer = make_layer(weights, config_.num_hidden_layers);
  module_->head = device_->make_mtp_head(*head_, mtp);
}

DeepSeek::Layer DeepSeek::make_layer(WeightSource& weights, int i) {
  Layer layer;
  layer.attention = device_->make_attention(weights.attention(i));
  layer.feed_forward = config_.is_moe_layer(i) ? device_->make_mixture_of_experts(weights.mixture(i))
                                               : device_->make_feed_forward(weights.feed_forward(i));
  return layer;
}

// The model.
void DeepSeek::forward_pass() {
  Residual x = embedding_->forward();  // x = E[tokens]
  for (const Layer& layer : layers_) {
    // Nothing reads what the last layer makes of a prompt's tokens but the last, unless the module does.
    const bool last = &layer == &layers_.back() && !module_;
    layer.attention->forward(x, last ? Rows::kLogits : Rows::kAll);  // x += attention(norm(x))
    if (on_layer_) on_layer_(static_cast<int>(&layer - layers_.data()));
    layer.feed_forward->forward(x);  // x += ffn(norm(x)), or experts'
  }
  if (module_) module_->input->keep(x);
  const Matrix logits = head_->forward(x);  // logits = W · norm(x)
  // tokens: the likeliest, or drawn by softmax(logits / temperature)
  if (!step_.masked) device_->choose(logits);
}

void DeepSeek::launch(const ForwardBatch& batch) {
  if (!flights_.empty() && flights_.back().num_logit_rows > 0) {
    throw std::logic_error("launch: a step with logit_rows has not been collected");
  }
  if (batch.masked && !draws_take_masks()) throw Unsupported("masked steps on this device");
  step_ =
      plan_step(batch, {config_.vocab_size, config_.max_position_embeddings, num_pages_, num_tokens_chosen_});
  num_tokens_chosen_ = 0;
  Flight flight;
  flight.num_logit_rows = batch.logit_rows.size();
  flight.num_tokens = batch.drawn_rows.size() + batch.greedy_rows.size();
  if (step_.num_tokens() > 0 || device_->runs_empty_steps()) {
    device_->begin_step(step_);
    device_->run([&] { forward_pass(); });
  }
  if (flight.num_tokens > 0 && !batch.masked) start_download(flight);
  flights_.push_back(std::move(flight));
}

void DeepSeek::choose(std::span<const TokenRule> rules) {
  if (flights_.empty() || !step_.masked || flights_.back().tokens) {
    throw std::logic_error("choose: the last step is not masked, or its tokens are chosen");
  }
  Flight& flight = flights_.back();
  if (rules.size() != flight.num_tokens) {
    throw InvalidArgument(fmt::format("rules has {} rows, expected {}, those of drawn_rows and greedy_rows",
                                      rules.size(), flight.num_tokens));
  }
  if (flight.num_tokens == 0) return;
  device_->choose_among(static_cast<std::int64_t>(flight.num_logit_rows), rules);
  start_download(flight);
}

// Of the tokens that the last step has chosen.
void DeepSeek::start_download(Flight& flight) {
  const auto tokens = static_cast<std::int64_t>(flight.num_tokens);
  flight.tokens = device_->start_token_download(static_cast<std::int64_t>(flight.num_logit_rows), tokens);
  if (flight.num_logit_rows == 0) num_tokens_chosen_ = tokens;
}

void DeepSeek::collect(float* logits, std::int32_t* tokens) {
  if (flights_.empty()) throw std::logic_error("collect: no step has been launched");
  const Flight flight = std::move(flights_.front());
  flights_.pop_front();
  if (flight.num_logit_rows > 0) {
    device_->download_logits(static_cast<std::int64_t>(flight.num_logit_rows), logits);
  }
  if (flight.num_tokens > 0 && !flight.tokens)
    throw std::logic_error("collect: the step's tokens are not chosen");
  if (flight.tokens) std::memcpy(tokens, flight.tokens->wait(), flight.num_tokens * sizeof(std::int32_t));
}

std::int64_t DeepSeek::experts_hit(int num_tokens) {
  std::int64_t hit = 0;
  for (const Layer& layer : layers_) {
    std::set<std::int32_t> routed;
    for (const std::int32_t id : layer.feed_forward->experts_taken(num_tokens)) {
      if (id < config_.n_routed_experts) routed.insert(id);
    }
    hit += std::ssize(routed);
  }
  return hit;
}

std::vector<ExpertCounts> DeepSeek::expert_counts() const {
  std::vector<ExpertCounts> out;
  const auto add = [&](const FeedForward& feed_forward, int layer) {
    ExpertCounts counts = feed_forward.expert_counts();
    if (counts.counts.empty()) return;
    counts.layer = layer;
    out.push_back(std::move(counts));
  };
  for (std::size_t i = 0; i < layers_.size(); ++i) add(*layers_[i].feed_forward, static_cast<int>(i));
  if (module_) add(*module_->layer.feed_forward, config_.num_hidden_layers);
  return out;
}

std::string DeepSeek::why_no_expert_counts() const {
  if (!expert_counts().empty()) return {};
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    if (config_.is_moe_layer(i)) return "this device does not count how often experts are chosen";
  }
  return "the model has no mixture of experts";
}

std::size_t DeepSeek::bytes_per_page() const {
  std::size_t bytes = 0;
  for_each_cache([&](const Attention& attention) { bytes += attention.bytes_per_page(); });
  return bytes;
}

void DeepSeek::allocate_cache(int num_pages) {
  if (num_pages < 0) throw InvalidArgument(fmt::format("num_pages is {}, expected >= 0", num_pages));
  num_pages_ = 0;
  for_each_cache([](Attention& attention) { attention.free_cache(); });
  for_each_cache([&](Attention& attention) { attention.allocate_cache(num_pages); });
  // A sequence that ends, or is preempted, leaves pages to the prefix cache whose last tokens the module has not gone
  // over.
  if (module_) module_->layer.attention->clear_cache();
  num_pages_ = num_pages;
}

void DeepSeek::copy_page(int source, int target) {
  for (const auto& [name, page] : {std::pair("source", source), std::pair("target", target)}) {
    if (page < 0 || page >= num_pages_) {
      throw InvalidArgument(
          fmt::format("{} is {}, expected 0 to {}, the pages of the cache", name, page, num_pages_ - 1));
    }
  }
  for_each_cache([&](Attention& attention) { attention.copy_page(source, target); });
}

}  // namespace flash_mla::model
