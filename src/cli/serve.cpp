#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>

#include "cli/args.h"
#include "cli/commands.h"
#include "cli/config_file.h"
#include "cli/engine_flags.h"
#include "cli/load_progress.h"
#include "cli/planned_bytes.h"
#include "cli/transfer_flags.h"
#include "flash_mla/engine.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"
#include "server/server.h"

// `flash-mla serve`: an OpenAI-compatible server over one model.

namespace flash_mla::cli {
namespace {

constexpr const char* kKeyVariable = "FLASH_MLA_API_KEY";

struct ServeOptions {
  std::string model;
  Talk talk;
  EngineOptions engine;
  server::ServerOptions server;
};

// Every connection is a file. The soft limit is often 1024, for the sake of programs that use select().
void allow_files(int connections) {
  constexpr rlim_t kOwnFiles = 64;  // model, libraries, epoll
  const rlim_t wanted = static_cast<rlim_t>(connections) + kOwnFiles;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = std::min(wanted, limit.rlim_max);
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur < wanted) {
    fmt::print(stderr,
               "flash-mla serve: at most {} files may be open here, too few for --max-connections {}\n",
               limit.rlim_cur, connections);
  }
}

// By the names that vLLM's users know.
void add_tool_flag(CLI::App& app, EngineOptions& options) {
  std::map<std::string, std::optional<ToolFormat>> names = {{"auto", std::nullopt}};
  for (const ToolFormat format :
       {ToolFormat::kNone, ToolFormat::kDeepSeekV3, ToolFormat::kDeepSeekV31, ToolFormat::kDeepSeekV32,
        ToolFormat::kDeepSeekV4, ToolFormat::kGlm45, ToolFormat::kGlm47, ToolFormat::kKimiK2}) {
    names.emplace(tool_format_name(format), format);
  }
  app.add_option_function<std::string>(
         "--tool-call-parser",
         [&options, names](const std::string& name) { options.tool_format = names.at(name); },
         "How the model writes calls of tools; auto: as its chat template does")
      ->default_str("auto")
      ->check(CLI::IsMember(names));
}

int run_serve(ServeOptions o) {
  allow_files(o.server.max_connections);
  if (o.server.model_names.empty()) {
    // The directory's name, not its path: that is this machine's business.
    const std::filesystem::path path = std::filesystem::weakly_canonical(o.model);
    o.server.model_names = {path.filename().string()};
  }
  o.server.version = version();
  server::check_options(o.server);  // rather than when the model has been loaded
  check_kv_tiers(o.engine.kv_tiers, o.engine.kv_shared);
  check_transfer(o.engine.transfer);
  if (server::is_public(o.server) && o.server.api_keys.empty()) {
    fmt::print(stderr,
               "flash-mla serve: warning: everybody who reaches {}:{} may use it; {} sets a key "
               "(--api-key, or --host 127.0.0.1)\n",
               o.server.host, o.server.port, kKeyVariable);
  }
  show_loading(o.engine, o.talk, "flash-mla serve");
  // A model that cannot run is of no use to anybody who waits: whoever started this one starts another.
  std::atomic<bool> broken{false};
  o.engine.on_broken = [&broken](const std::string& why) {
    fmt::print(stderr, "flash-mla serve: error: {}\n", why);
    broken = true;
    std::raise(SIGTERM);
  };
  Engine engine(o.model, o.engine);
  server::Server server(engine, o.server);
  engine.start();
  fmt::print(stderr, "flash-mla serve: {} on http://{}:{}/v1, {} pages of 64 tokens{}\n",
             fmt::join(o.server.model_names, ", "), o.server.host, server.port(), engine.stats().pages_total,
             o.engine.load_format == EngineOptions::LoadFormat::kDummy ? ", random weights" : "");
  fmt::print(stderr, "flash-mla serve: {}\n", planned_bytes(o.model, o.engine, engine.stats()));
  if (const TransferStats transfer = engine.stats().transfer; transfer.role == TransferRole::kPrefill) {
    fmt::print(stderr, "flash-mla serve: prefill, decode servers meet it at {}:{} ({})\n",
               o.engine.transfer.host, transfer.port, o.engine.transfer.transport);
  } else if (transfer.role == TransferRole::kDecode) {
    fmt::print(stderr, "flash-mla serve: decode, pages from {} ({})\n",
               fmt::join(o.engine.transfer.peers, ", "), o.engine.transfer.transport);
  }
  if (const std::string why = engine.why_no_chat(); !why.empty()) {
    fmt::print(stderr, "flash-mla serve: no chat, only completions: {}\n", why);
  } else {
    fmt::print(stderr, "flash-mla serve: chat by the template of {}, calls of tools: {}\n",
               engine.chat_template_origin(), tool_format_name(engine.tool_format()));
  }
  server.run();
  engine.stop();
  return broken ? 1 : 0;
}

}  // namespace

void register_serve(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<ServeOptions>();
  o->engine.max_waiting = 1024;
  CLI::App* sub = app.add_subcommand("serve", "Serve a checkpoint over an OpenAI-compatible HTTP API");
  add_config_flag(*sub);
  sub->add_option("-m,--model", o->model, "Hugging Face model directory")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->envname("MODEL_PATH");
  sub->add_option(
         "--served-model-name,--model-name", o->server.model_names,
         "Name in the API (default: the directory's); may be given several times: answers say the first")
      ->allow_extra_args(false);
  sub->add_option("--host", o->server.host, "Address to listen on")->capture_default_str();
  sub->add_option("--port", o->server.port, "Port; 0 takes any free one")
      ->check(integer_between(0, 65535))
      ->capture_default_str();
  sub->add_option("--api-key", o->server.api_keys, "Key that clients must send; may be given several times")
      ->allow_extra_args(false)
      ->envname(kKeyVariable);
  sub->add_option(
         "--allowed-host", o->server.allowed_hosts,
         "Name in a request's Host that is this server's, or *.example.com, or *; may be given several "
         "times (default: any at a public address; at a loopback one those without a dot)")
      ->allow_extra_args(false);
  sub->add_option(
         "--cors-origin", o->server.cors_origins,
         "Origin such as https://app.example.com whose pages may call, or *; may be given several times")
      ->allow_extra_args(false);
  sub->add_option("--max-waiting", o->engine.max_waiting,
                  "Requests that wait at most; more get 429 (0: no bound)")
      ->capture_default_str();
  sub->add_option("--max-connections", o->server.max_connections, "Open connections at most; more get 503")
      ->check(integer_between(1, 1'000'000))
      ->capture_default_str();
  sub->add_option("--max-body-bytes", o->server.max_body_bytes, "Size of a request's body at most")
      ->capture_default_str();
  sub->add_option("--read-timeout", o->server.read_timeout_seconds, "Seconds for a whole request to arrive")
      ->check(integer_between(1, 86400))
      ->capture_default_str();
  sub->add_option("--write-timeout", o->server.write_timeout_seconds,
                  "Seconds for a client to take what is sent to it")
      ->check(integer_between(1, 86400))
      ->capture_default_str();
  sub->add_option("--idle-timeout", o->server.idle_timeout_seconds,
                  "Seconds between requests of a connection")
      ->check(integer_between(1, 86400))
      ->capture_default_str();
  sub->add_option("--stream-keep-alive", o->server.stream_keep_alive_seconds,
                  "Seconds without news after which a stream gets a comment (0: never)")
      ->check(integer_between(0, 86400))
      ->capture_default_str();
  sub->add_option("--request-timeout", o->server.request_timeout_seconds,
                  "Seconds for a request and its whole answer (0: no limit)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option(
         "--reasoning-parser", o->server.reasoning_parser,
         "How the reasoning of answers is found: auto, none, deepseek_r1, deepseek_v3, glm45, kimi_k2, ...")
      ->capture_default_str();
  add_tool_flag(*sub, o->engine);
  sub->add_flag("!--no-request-log", o->server.log_requests, "Do not write a line of JSON for every request");
  sub->add_option("--http-threads", o->server.num_threads, "Threads for connections")
      ->check(integer_between(1, 64))
      ->capture_default_str();
  add_engine_flags(*sub, o->engine);
  add_transfer_flags(*sub, o->engine.transfer);
  add_talk_flags(*sub, o->talk);
  sub->callback([o, &exit_code] { exit_code = run_serve(*o); });
}

}  // namespace flash_mla::cli
