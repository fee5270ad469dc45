#include "server/generate.h"

#include <fmt/format.h>

#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "flash_mla/error.h"
#include "server/answer.h"
#include "server/call.h"
#include "server/call_format.h"
#include "server/chat_prompt.h"
#include "server/dialect.h"
#include "server/mailbox.h"
#include "server/watcher.h"

namespace flash_mla::server {
namespace {

/// The engine requests of one call; whatever has not ended when it goes is cancelled.
class Submitted {
 public:
  explicit Submitted(Engine& engine) : engine_(engine) {}
  ~Submitted() {
    for (const RequestId id : ids_) engine_.cancel(id);  // without effect on those that have ended
  }
  Submitted(const Submitted&) = delete;
  Submitted& operator=(const Submitted&) = delete;

  void submit(std::vector<Request> requests, const std::shared_ptr<Mailbox>& mailbox) {
    int first = 0;
    for (Request& request : requests) {
      const int n = request.sampling.n;
      ids_.push_back(engine_.submit(std::move(request), [mailbox, first](const GenerationEvent& e) {
        mailbox->put(first + e.index, e);
      }));
      for (int i = 0; i < n; ++i) choices_.emplace_back(ids_.back(), i);
      first += n;
    }
  }

  /// Ends a choice that has begun: its text goes on where nobody looks.
  void cancel(int choice) {
    const auto& [id, continuation] = choices_[static_cast<std::size_t>(choice)];
    engine_.cancel(id, continuation);
  }

 private:
  Engine& engine_;
  std::vector<RequestId> ids_;
  std::vector<std::pair<RequestId, int>> choices_;  // and which of the request's continuations each is
};

/// Sends what the socket takes at once, which is nearly always all, without the timer and the round through
/// the scheduler that waiting costs.
template <typename Buffers>
awaitable<void> send_event(beast::tcp_stream& stream, Buffers buffers, int timeout_seconds) {
  error_code error;
  const std::size_t sent = stream.socket().write_some(buffers, error);
  if (error && error != asio::error::would_block) throw boost::system::system_error(error);
  if (sent == asio::buffer_size(buffers)) co_return;
  beast::buffers_suffix<Buffers> rest(buffers);
  rest.consume(sent);
  stream.expires_after(seconds(timeout_seconds));
  co_await asio::async_write(stream, rest, use_awaitable);
  stream.expires_never();
}

std::unique_ptr<Dialect> dialect_of(const Exchange& x, Route::Generates api) {
  if (api == Route::Generates::kResponses) return responses_dialect(x.request.body(), x.shared.responses);
  if (api == Route::Generates::kMessages) return messages_dialect(x.request.body());
  return nullptr;
}

// A call, and the API it was made in, if that is not the chats' and completions' own.
struct Begun {
  Call call;
  std::unique_ptr<Dialect> dialect;
};

Begun parse(Exchange& x, Route::Generates api) {
  const bool chat = api != Route::Generates::kCompletion;
  std::unique_ptr<Dialect> dialect = dialect_of(x, api);
  if (dialect) x.request.body() = dialect->take_chat_body();
  Call call =
      parse_call(x.request.body(), chat, x.shared.options.model_names, x.shared.engine.default_sampling());
  x.request.body() = std::string();  // a stream may wait for long, with a long prompt
  warn_of_unknown_fields(call.unknown_fields);
  return {std::move(call), std::move(dialect)};
}

// Makes ready what a call's texts must be: takes up to a second.
void prepare_format(Exchange& x, const Call& call) {
  if (call.format_field.empty()) return;
  try {
    x.shared.engine.prepare(call.requests.front().sampling.format);
  } catch (const InvalidArgument& e) {
    throw bad_request(fmt::format("{}: {}", call.format_field, e.what()), call.format_field);
  } catch (const Unsupported& e) {
    throw bad_request(fmt::format("{}: {}", call.format_field, e.what()), call.format_field);
  }
}

// Which field an error of the engine is about: all else has been checked.
std::string field_of(std::string_view error, bool chat) {
  for (const char* name :
       {"chat_template_kwargs", "tools", "suffix", "bootstrap_room", "bootstrap_host", "bootstrap_port"}) {
    if (error.starts_with(name)) return name;
  }
  return chat ? "messages" : "prompt";
}

// Hands the prompts to the engine, which tokenizes them.
void submit(Exchange& x, Call& call, Submitted& submitted, const std::shared_ptr<Mailbox>& mailbox) {
  const bool chat = call.chat;
  if (!chat) prepare_format(x, call);
  try {
    for (std::size_t i = 0; i < call.echoed.size(); ++i) {
      const Request& r = call.requests[i];
      if (r.prompt.empty()) call.echoed[i] = x.shared.engine.detokenize(r.prompt_token_ids);
    }
    if (chat) {
      prepare_chat(x.shared.engine, x.shared.options, call);
      if (call.output.tools != nullptr) add_call_format(x.shared.engine, *call.output.tools, call);
      prepare_format(x, call);
    }
    submitted.submit(std::move(call.requests), mailbox);
  } catch (const InvalidArgument& e) {
    throw bad_request(e.what(), field_of(e.what(), chat));
  } catch (const Unsupported& e) {
    throw bad_request(e.what(), field_of(e.what(), chat));
  } catch (const Overloaded& e) {
    throw ApiError(429, "rate_limit_error", e.what(), "", "overloaded");
  }
}

/// Sends or collects the events of one call.
class Reply {
 public:
  Reply(Exchange& x, const Begun& begun, Submitted& submitted, std::shared_ptr<Mailbox> mailbox)
      : x_(x),
        submitted_(submitted),
        call_(begun.call),
        dialect_(begun.dialect.get()),
        mailbox_(std::move(mailbox)),
        answer_(begun.call, id(), x.shared.model_name(), now(), x.shared.engine),
        // Without chunks the end of a stream is the end of the connection.
        chunked_(x.request.version() >= 11),
        keep_alive_(x.request.keep_alive() && !x.shared.draining && (chunked_ || !begun.call.stream)) {}

  awaitable<bool> run() { return call_.stream ? stream() : whole(); }

 private:
  std::string id() const {
    return fmt::format("{}-{:x}-{}", call_.chat ? "chatcmpl" : "cmpl", x_.shared.created,
                       x_.shared.next_call++);
  }
  static std::int64_t now() {
    return std::chrono::duration_cast<seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  }

  // News for the client; empty once it has left or its time is over, or when there is none `until` then.
  awaitable<Mailbox::Events> next(TimePoint until = TimePoint::max()) {
    Mailbox::Events events;
    bool some = true;
    while (some && events.empty()) {
      events = co_await mailbox_->take(until);
      some = !events.empty();
      std::erase_if(events, [this](const auto& e) { return answer_.over(e.first); });
    }
    if (!events.empty() && x_.record.first_event_seconds < 0) {
      x_.record.first_event_seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - x_.record.begin).count();
    }
    for (const auto& [index, event] : events) {
      if (const std::string limit = limited_by(event); !limit.empty()) x_.record.limited_by = limit;
    }
    co_return events;
  }

  // Behind an event that the answer has taken, which may have ended a choice before its text does.
  void note_end(int index, FinishReason finish) {
    if (!answer_.over(index)) return;
    --open_;
    if (finish == FinishReason::kNone) submitted_.cancel(index);
  }

  awaitable<bool> whole() {
    while (open_ > 0) {
      const Mailbox::Events events = co_await next();
      if (mailbox_->gone()) co_return false;
      if (events.empty()) throw x_.too_late();
      for (const auto& [index, event] : events) {
        if (answer_.over(index)) continue;
        answer_.collect(index, event);
        note_end(index, event.finish);
      }
    }
    x_.record.usage = answer_.tokens();
    const Json answer = answer_.complete();
    HttpResponse response = json_response(x_.request, 200, dialect_ ? dialect_->whole(answer) : answer);
    co_await write(x_, response, keep_alive_);
    co_return keep_alive_;
  }

  awaitable<bool> stream() {
    co_await send_head();
    if (const std::string first = dialect_ ? dialect_->begin() : std::string(); !first.empty()) {
      co_await send(first);
    }
    while (open_ > 0) {
      const Mailbox::Events events = co_await next(next_comment());
      if (mailbox_->gone()) co_return false;
      const std::string out = !events.empty()    ? event_text(events)
                              : mailbox_->late() ? too_late()
                                                 : ": still waiting\n\n";
      if (!out.empty()) co_await send(out);
    }
    if (chunked_) {
      x_.stream.expires_after(seconds(x_.shared.options.write_timeout_seconds));
      co_await asio::async_write(x_.stream, http::make_chunk_last(), use_awaitable);
    }
    x_.record.status = 200;
    co_return keep_alive_;
  }

  // Proxies and clients give up connections on which nothing moves.
  TimePoint next_comment() const {
    const int silence = x_.shared.options.stream_keep_alive_seconds;
    return silence == 0 ? TimePoint::max() : std::chrono::steady_clock::now() + seconds(silence);
  }

  awaitable<void> send_head() {
    http::response<http::empty_body> head(http::status::ok, x_.request.version());
    head.set(http::field::content_type, "text/event-stream");
    head.set(http::field::cache_control, "no-cache");
    add_common_fields(x_, head);
    head.keep_alive(keep_alive_);
    head.chunked(chunked_);
    http::response_serializer<http::empty_body> serializer(head);
    co_await http::async_write_header(x_.stream, serializer, use_awaitable);
  }

  std::string too_late() {
    const ApiError late = x_.too_late();
    x_.record.error = late.what();
    open_ = 0;
    if (dialect_) return dialect_->failed(late);
    return "data: " + dump(late.body()) + "\n\ndata: [DONE]\n\n";
  }

  std::string event_text(const Mailbox::Events& events) {
    std::string out;
    for (const auto& [index, event] : events) {
      if (answer_.over(index)) continue;
      if (event.finish == FinishReason::kError) {
        --open_;
        x_.record.error = event.error;
        const ApiError error(500, "server_error", event.error);
        if (dialect_) return out + dialect_->failed(error);  // of one choice: it was all
        out += "data: " + dump(error.body()) + "\n\n";
      } else if (event.finish != FinishReason::kNone || !event.text.empty() || !event.logprobs.empty()) {
        const std::optional<Json> chunk = answer_.chunk(index, event);
        note_end(index, event.finish);
        if (!chunk) continue;
        out += dialect_ ? dialect_->chunk(*chunk, event.usage) : "data: " + dump(*chunk) + "\n\n";
      }
    }
    x_.record.usage = answer_.tokens();
    if (open_ == 0 && dialect_) return out + dialect_->end(answer_.usage_chunk());
    if (open_ == 0) {
      if (call_.include_usage) out += "data: " + dump(answer_.usage_chunk()) + "\n\n";
      out += "data: [DONE]\n\n";
    }
    return out;
  }

  awaitable<void> send(const std::string& out) {
    const int timeout = x_.shared.options.write_timeout_seconds;
    if (chunked_) {
      co_await send_event(x_.stream, http::make_chunk(asio::buffer(out)), timeout);
    } else {
      co_await send_event(x_.stream, asio::const_buffers_1(asio::buffer(out)), timeout);
    }
  }

  Exchange& x_;
  Submitted& submitted_;
  const Call& call_;
  Dialect* dialect_;  // null: chats and completions as they are
  std::shared_ptr<Mailbox> mailbox_;
  Answer answer_;
  const bool chunked_, keep_alive_;
  int open_ = call_.num_choices;  // choices that have not ended
};

}  // namespace

awaitable<bool> generate(Exchange& x, Route::Generates api) {
  if (x.shared.draining) throw ApiError(503, "server_error", "the server is shutting down");
  const auto mailbox = std::make_shared<Mailbox>(x.stream.get_executor());
  mailbox->set_deadline(x.deadline());
  Submitted submitted(x.shared.engine);
  Begun begun;
  if (x.has_large_body()) {
    begun = co_await on_body_thread(x, [&] {
      Begun parsed = parse(x, api);
      submit(x, parsed.call, submitted, mailbox);
      return parsed;
    });
  } else {
    begun = parse(x, api);
    if (!begun.call.needs_grammar()) {
      submit(x, begun.call, submitted, mailbox);
    } else {  // a grammar takes longer to make than a body to parse
      co_await on_body_thread(x, [&] {
        submit(x, begun.call, submitted, mailbox);
        return true;
      });
    }
  }
  const Call& call = begun.call;
  x.record.generates = true;
  x.record.stream = call.stream;
  x.record.num_choices = call.num_choices;
  x.stream.expires_never();
  const Watcher watcher(x.stream, mailbox);
  Reply reply(x, begun, submitted, mailbox);
  co_return co_await reply.run();
}

}  // namespace flash_mla::server
