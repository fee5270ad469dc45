#include "engine/requests.h"

#include <algorithm>
#include <utility>

namespace flash_mla::engine {

Requests::Requests(Scheduler& scheduler, Inbox& inbox, Statistics& statistics,
                   TextDecoderFactory make_decoder, std::vector<std::int32_t> eos_token_ids,
                   std::int64_t max_length, LengthLimit limit)
    : scheduler_(scheduler),
      inbox_(inbox),
      statistics_(statistics),
      make_decoder_(std::move(make_decoder)),
      eos_token_ids_(std::move(eos_token_ids)),
      max_length_(max_length),
      limit_(limit) {
  std::random_device entropy;
  seeds_.seed((std::uint64_t{entropy()} << 32) | entropy());
}

void Requests::begin(std::unique_ptr<ActiveRequest> request) {
  ActiveRequest& r = *request;
  r.seed = r.sampling.seed ? *r.sampling.seed : seeds_();
  r.open = r.sampling.n;
  Continuation& first = *r.continuations.emplace_back(std::make_unique<Continuation>(r, 0, new_decoder()));
  first.tokens = r.prompt;
  first.room = r.room;
  first.format = new_matcher(r);
  std::vector<std::int32_t> ends = r.sampling.stop_token_ids;
  if (!r.sampling.ignore_eos) ends.insert(ends.end(), eos_token_ids_.begin(), eos_token_ids_.end());
  r.rules = LogitRules(r.sampling, std::move(ends));
  if (r.sampling.prompt_logprobs >= 0) {
    r.prompt_logprobs.emplace_back().chosen.token = r.prompt.front();
    if (r.prompt.size() > 1) first.score_from = 0;
  }
  scheduler_.add(first);
  requests_.emplace(r.id, std::move(request));
}

void Requests::cancel(RequestId id, int continuation) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;  // it has ended
  ActiveRequest& request = *it->second;
  if (continuation >= 0 && !request.forked && request.sampling.n > 1) return;  // it has not begun
  for (const auto& c : request.continuations) {
    if (!c->ended && (continuation < 0 || c->index == continuation)) end(*c, FinishReason::kCancelled, {});
  }
  if (request.open == 0) started(request);
}

void Requests::cancel_all() {
  std::vector<RequestId> ids;
  for (const auto& [id, request] : requests_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (const RequestId id : ids) cancel(id);
}

void Requests::started(ActiveRequest& request) {
  if (request.started) return;
  request.started = true;
  inbox_.started();
}

void Requests::fork(ActiveRequest& request) {
  request.forked = true;
  const Continuation& first = *request.continuations[0];
  for (int i = 1; i < request.sampling.n; ++i) {
    Continuation& c =
        *request.continuations.emplace_back(std::make_unique<Continuation>(request, i, new_decoder()));
    c.format = new_matcher(request);
    scheduler_.fork(first, c);
  }
}

void Requests::accept(Continuation& c, const Sampled& sampled) {
  const SamplingParams& sampling = c.request->sampling;
  c.tokens.push_back(sampled.token);
  c.history.add(sampled.token);
  ++c.num_generated;
  c.last_token = Clock::now();
  if (c.num_generated == 1) c.first_token = c.last_token;
  statistics_.generated(c);
  GenerationEvent event;
  event.token_ids = {sampled.token};
  if (sampling.logprobs >= 0) event.logprobs = {sampled.logprobs};
  if (c.num_generated == 1) event.prompt_logprobs = c.request->prompt_logprobs;

  c.allowed.clear();
  if (c.format && !c.format->accept(sampled.token)) {
    end(c, FinishReason::kError, "a token was chosen that the format of the text does not allow",
        /*keep_pages=*/true);
    return;
  }
  if (is_end(sampling, sampled.token)) {
    end(c, FinishReason::kStop, {}, std::move(event), /*keep_pages=*/true);
    return;
  }
  if (c.decoder) {
    std::string text = c.decoder->push(sampled.token);
    // A stop string before min_tokens is text like any other.
    event.text = c.num_generated < sampling.min_tokens ? std::move(text) : c.stop.push(text);
  }
  if (c.stop.stopped() || (c.format && c.format->ended())) {
    end(c, FinishReason::kStop, {}, std::move(event), /*keep_pages=*/true);
  } else if (c.num_generated == sampling.max_tokens ||
             static_cast<std::int64_t>(c.tokens.size()) >= max_length_) {
    event.limit = c.num_generated == sampling.max_tokens ? LengthLimit::kMaxTokens : limit_;
    end(c, FinishReason::kLength, {}, std::move(event), /*keep_pages=*/true);
  } else {
    event.index = c.index;
    event.usage = {static_cast<std::int64_t>(c.request->prompt.size()), c.cached_tokens, c.num_generated};
    send(*c.request, std::move(event));
  }
}

// Where the text may end it ends with what ends any other, even if the request would go on behind it.
std::unique_ptr<grammar::Matcher> Requests::new_matcher(const ActiveRequest& request) const {
  if (!request.grammar) return nullptr;
  std::vector<std::int32_t> ends = eos_token_ids_;
  ends.insert(ends.end(), request.sampling.stop_token_ids.begin(), request.sampling.stop_token_ids.end());
  return request.grammar->matcher(std::move(ends));
}

bool Requests::is_end(const SamplingParams& sampling, std::int32_t token) const {
  const auto is_in = [&](const std::vector<std::int32_t>& ids) {
    return std::ranges::find(ids, token) != ids.end();
  };
  return (!sampling.ignore_eos && is_in(eos_token_ids_)) || is_in(sampling.stop_token_ids);
}

void Requests::end_at_prompt(Continuation& c) {
  GenerationEvent event;
  event.prompt_logprobs = c.request->prompt_logprobs;
  event.limit = LengthLimit::kMaxTokens;
  end(c, FinishReason::kLength, {}, std::move(event), /*keep_pages=*/true);
}

void Requests::end(Continuation& c, FinishReason reason, const std::string& error, GenerationEvent event,
                   bool keep_pages) {
  ActiveRequest& request = *c.request;
  c.ended = true;
  scheduler_.finish(c, keep_pages);
  // A prompt that never came to fork ends for all its continuations.
  const bool ends_all = request.sampling.n > 1 && !request.forked;
  request.open = ends_all ? 0 : request.open - 1;
  if (request.open == 0) ended_.push_back(request.id);

  if (c.decoder && !c.stop.stopped()) {
    event.text += c.stop.push(c.decoder->flush());
    event.text += c.stop.flush();
  }
  event.finish = reason;
  event.error = error;
  event.usage = {static_cast<std::int64_t>(request.prompt.size()), c.cached_tokens, c.num_generated};
  statistics_.ended(c, reason, ends_all ? request.sampling.n : 1);
  if (!ends_all) {
    event.index = c.index;
    event.last = request.open == 0;
    send(request, std::move(event));
    return;
  }
  for (int i = 0; i < request.sampling.n; ++i) {
    event.index = i;
    event.last = i + 1 == request.sampling.n;
    send(request, event);
  }
}

void Requests::send(ActiveRequest& request, GenerationEvent event) {
  if (!request.on_event) return;
  event.request = request.id;
  try {
    request.on_event(event);
  } catch (...) {
    // A handler must not throw. Nobody listens any more: the request ends, its neighbours go on.
    request.on_event = nullptr;
    inbox_.cancel(request.id);
  }
}

void Requests::drop_ended() {
  std::erase_if(ended_, [this](RequestId id) {
    if (requests_.at(id)->num_in_flight > 0) return false;
    requests_.erase(id);
    return true;
  });
}

}  // namespace flash_mla::engine
