#include "serving_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "engine_bindings.h"
#include "flash_mla/error.h"
#include "flash_mla/event_queue.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flash_mla::python {
namespace {

TransferRole role_named(const std::string& name) {
  if (name == "none") return TransferRole::kNone;
  if (name == "prefill") return TransferRole::kPrefill;
  if (name == "decode") return TransferRole::kDecode;
  throw InvalidArgument("role is \"" + name + "\", expected none, prefill or decode");
}

nb::dict to_python(const GenerationEvent& event) {
  nb::dict d;
  d["request"] = event.request;
  d["index"] = event.index;
  d["text"] = event.text;
  d["token_ids"] = event.token_ids;
  d["logprobs"] = logprobs_of(event.logprobs);
  d["prompt_logprobs"] = logprobs_of(event.prompt_logprobs);
  d["finish_reason"] = finish_reason_name(event.finish);
  d["error"] = event.error;
  d["prompt_tokens"] = event.usage.prompt_tokens;
  d["cached_tokens"] = event.usage.cached_tokens;
  d["completion_tokens"] = event.usage.completion_tokens;
  d["last"] = event.last;
  return d;
}

nb::dict to_python(const CacheEvent& event) {
  nb::dict d;
  d["rank"] = event.rank;
  d["block"] = event.block;
  const bool stored = event.kind == CacheEvent::Kind::kStored;
  d["type"] = stored ? "stored" : "removed";
  if (stored) {
    d["parent"] = event.parent ? nb::object(nb::int_(*event.parent)) : nb::object(nb::none());
    d["token_ids"] = event.tokens;
  }
  return d;
}

nb::dict to_python(const EngineLoad& load) {
  nb::dict d;
  d["running"] = load.running;
  d["waiting"] = load.waiting;
  d["pages_used"] = load.pages_used;
  d["pages_cached"] = load.pages_cached;
  d["pages_total"] = load.pages_total;
  d["prefix_tokens_looked_up"] = load.prefix_tokens_looked_up;
  d["prefix_tokens_hit"] = load.prefix_tokens_hit;
  return d;
}

template <class T>
nb::list list_of(const std::vector<T>& values) {
  nb::list out;
  for (const T& value : values) out.append(to_python(value));
  return out;
}

void bind_transfer_options(nb::module_& m) {
  const TransferOptions d;
  nb::class_<TransferOptions>(m, "TransferOptions")
      .def(
          "__init__",
          [](TransferOptions* self, const std::string& role, std::string transport, std::string host,
             int port, std::vector<std::string> peers, std::string key, double lease_seconds,
             std::size_t memory_bytes, std::int64_t layerwise_tokens) {
            TransferOptions o;
            o.role = role_named(role);
            o.transport = std::move(transport);
            o.host = std::move(host);
            o.port = port;
            o.peers = std::move(peers);
            o.key = std::move(key);
            o.lease_seconds = lease_seconds;
            o.memory_bytes = memory_bytes;
            o.layerwise_tokens = layerwise_tokens;
            check_transfer(o);
            new (self) TransferOptions(std::move(o));
          },
          nb::kw_only(), "role"_a = "none", "transport"_a = d.transport, "host"_a = d.host, "port"_a = d.port,
          "peers"_a = d.peers, "key"_a = d.key, "lease_seconds"_a = d.lease_seconds,
          "memory_bytes"_a = d.memory_bytes, "layerwise_tokens"_a = d.layerwise_tokens,
          "Prefill and decode as two engines (docs/serving.md). role: \"none\", \"prefill\" or \"decode\".\n"
          "transport: \"shm\" or \"nixl\". host, port: of a prefill engine, what decode engines connect to;\n"
          "port 0 takes any. peers: of a decode engine, the \"HOST:PORT\" it may ask, \"*\" for any. Raises\n"
          "ValueError naming the option for a value out of range.");
}

}  // namespace

nb::dict transfer_of(const TransferStats& s) {
  nb::dict d;
  d["role"] = transfer_role_name(s.role);
  d["port"] = s.port;
  d["rooms"] = s.rooms;
  d["handed_over"] = s.handed_over;
  d["bytes"] = s.bytes;
  d["seconds"] = s.seconds;
  d["overlapped_seconds"] = s.overlapped_seconds;
  d["open"] = s.open;
  nb::dict fallbacks;
  for (const auto& [why, count] : s.fallbacks) fallbacks[nb::str(why.c_str())] = count;
  d["fallbacks"] = fallbacks;
  d["last_trouble"] = s.last_trouble;
  return d;
}

void bind_serving(nb::module_& m) {
  bind_transfer_options(m);
  nb::class_<EventQueue>(m, "EventQueue")
      .def(nb::init<>(), "Events of requests that Engine.submit was given it with.")
      .def("fileno", &EventQueue::file_descriptor, "Readable while there are events.")
      .def(
          "take", [](EventQueue& q) { return list_of(q.take()); },
          "The events since the last call, as dicts; does not wait.");
}

void bind_serving(nb::class_<Engine>& engine) {
  engine.def("start", &Engine::start)
      .def("stop", &Engine::stop, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "submit",
          [](Engine& e, Request request, const EventQueue& queue) {
            const nb::gil_scoped_release release;
            return e.submit(std::move(request), queue.handler());
          },
          "request"_a, "queue"_a)
      .def(
          "cancel", [](Engine& e, RequestId id) { e.cancel(id); }, "request"_a)
      .def(
          "prepare",
          [](const Engine& e, const SamplingParams& sampling) {
            const nb::gil_scoped_release release;
            e.prepare(sampling.format);
          },
          "sampling"_a)
      .def("load", [](const Engine& e) { return to_python(e.load()); })
      .def("rank_loads", [](const Engine& e) { return list_of(e.rank_loads()); })
      .def("take_cache_events", [](Engine& e) { return list_of(e.take_cache_events()); });
}

}  // namespace flash_mla::python
