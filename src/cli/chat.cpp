#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>

#include "base/json.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/load_progress.h"
#include "flash_mla/engine.h"
#include "flash_mla/error.h"

// `flash-mla chat`: a conversation in a terminal, answers as they come.

namespace flash_mla::cli {
namespace {

struct ChatOptions {
  std::string model, system, prompt, file, variables;
  Talk talk;
  EngineOptions engine;
  SamplingParams sampling;
};

/// Ctrl-C, while one of these lives: nothing ends, the next of those who ask is told. A pipe keeps the
/// signal for who is not yet waiting, so none is lost between a prompt and the read behind it.
class Interrupts {
 public:
  Interrupts() {
    if (pipe2(ends_, O_CLOEXEC | O_NONBLOCK) != 0) {
      throw std::system_error(errno, std::generic_category(), "pipe2");
    }
    struct sigaction action = {};
    action.sa_handler = [](int) {
      const int before = errno;
      [[maybe_unused]] const ssize_t n = ::write(ends_[1], "", 1);  // full: it is told already
      errno = before;
    };
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, &before_);
  }
  ~Interrupts() {
    sigaction(SIGINT, &before_, nullptr);
    for (int& end : ends_) close(std::exchange(end, -1));
  }
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;

  /// Whether there was one since the last call of it. Without an object: never.
  static bool take() {
    bool any = false;
    char bytes[64];
    while (ends_[0] >= 0 && ::read(ends_[0], bytes, sizeof bytes) > 0) any = true;
    return any;
  }

  /// Waits until standard input has something (or its end), or for Ctrl-C.
  static void wait() {
    pollfd of[2] = {{STDIN_FILENO, POLLIN, 0}, {ends_[0], POLLIN, 0}};
    poll(of, 2, -1);
  }

 private:
  static inline int ends_[2] = {-1, -1};
  struct sigaction before_ = {};
};

/// Lines of standard input. (std::getline does not come back for Ctrl-C.)
class Lines {
 public:
  enum class Kind { kLine, kInterrupted, kEnd };

  Kind next(std::string& line) {
    line.clear();
    while (true) {
      if (const std::size_t end = buffer_.find('\n'); end != buffer_.npos) {
        line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return Kind::kLine;
      }
      Interrupts::wait();
      if (Interrupts::take()) {
        buffer_.clear();
        return Kind::kInterrupted;
      }
      char piece[4096];
      const ssize_t got = ::read(STDIN_FILENO, piece, sizeof piece);
      if (got > 0) {
        buffer_.append(piece, static_cast<std::size_t>(got));
        continue;
      }
      if (got < 0 && errno == EINTR) continue;
      line = std::move(buffer_);
      buffer_.clear();
      return line.empty() ? Kind::kEnd : Kind::kLine;
    }
  }

 private:
  std::string buffer_;
};

constexpr const char* kHelp =
    "/reset    forget the conversation (not the system message)\n"
    "/history  print the conversation\n"
    "/help     this\n"
    "/exit     leave; so does Ctrl-D\n"
    "Ctrl-C    stop the answer; what has come of it stays in the conversation\n"
    "A line that ends with \\ goes on in the next one.\n";

class Chat {
 public:
  Chat(Engine& engine, const ChatOptions& options, bool terminal)
      : engine_(engine), options_(options), terminal_(terminal) {
    reset();
  }

  /// Asks, and prints the answer. False if there was none.
  bool ask(const std::string& text) {
    messages_.push_back({"user", text});
    Request request;
    request.messages = messages_;
    request.chat_variables = options_.variables;
    request.sampling = options_.sampling;
    bool stopped = false;
    try {
      const auto print = [](const GenerationEvent& event) {
        fmt::print("{}", event.text);
        std::fflush(stdout);
      };
      const Completion answer = engine_
                                    .generate(std::span(&request, 1), print,
                                              [&] { return !(stopped = stopped || Interrupts::take()); })
                                    .at(0);
      return take(answer.choices.at(0));
    } catch (const InvalidArgument& e) {
      messages_.pop_back();
      fmt::print(stderr, "flash-mla chat: {}{}\n", e.what(),
                 terminal_ ? " (/reset forgets the conversation)" : "");
      return false;
    }
  }

  /// Reads from the terminal until the end.
  void talk() {
    Lines lines;
    std::string line, text;
    while (true) {
      fmt::print("{}", text.empty() ? "> " : ". ");
      std::fflush(stdout);
      const Lines::Kind kind = lines.next(line);
      if (kind == Lines::Kind::kEnd) break;
      if (kind == Lines::Kind::kInterrupted) {
        text.clear();
        fmt::print("\n(/exit or Ctrl-D to leave)\n");
        continue;
      }
      text += line;
      if (text.ends_with('\\')) {
        text.back() = '\n';
        continue;
      }
      if (!text.empty() && !obey(text)) return;
      text.clear();
    }
    fmt::print("\n");
  }

 private:
  void reset() {
    messages_.clear();
    if (!options_.system.empty()) messages_.push_back({"system", options_.system});
  }

  /// A command, or else a message. False: to leave.
  bool obey(const std::string& text) {
    if (text == "/exit" || text == "/quit") return false;
    if (text == "/reset") {
      reset();
      fmt::print("(the conversation is forgotten)\n");
    } else if (text == "/help") {
      fmt::print("{}", kHelp);
    } else if (text == "/history") {
      for (const ChatMessage& message : messages_) fmt::print("{}: {}\n", message.role, message.content);
    } else if (text.starts_with('/') && text.find(' ') == text.npos && text.find('/', 1) == text.npos) {
      fmt::print("(there is no {}; /help lists what there is)\n", text);
    } else {
      ask(text);
    }
    return true;
  }

  bool take(const Completion::Choice& choice) {
    fmt::print("\n");
    if (choice.finish == FinishReason::kError) {
      messages_.pop_back();
      fmt::print(stderr, "flash-mla chat: {}\n", choice.error);
      return false;
    }
    messages_.push_back({"assistant", choice.text});
    if (choice.finish == FinishReason::kCancelled) {
      fmt::print("(stopped)\n");
    } else if (choice.limit == LengthLimit::kModel || choice.limit == LengthLimit::kCache) {
      fmt::print(stderr, "flash-mla chat: the answer ended early: {}\n",
                 choice.limit == LengthLimit::kModel ? "the model has no more positions"
                                                     : "the cache has no more pages (--num-pages, --memory)");
    }
    std::fflush(stdout);
    return true;
  }

  Engine& engine_;
  const ChatOptions& options_;
  bool terminal_;
  std::vector<ChatMessage> messages_;
};

/// What is asked before, or instead of, a talk: --prompt, then the file, then what is piped in.
std::string first_message(const ChatOptions& o, bool terminal) {
  std::string out;
  const auto add = [&](const std::string& text) {
    if (!out.empty() && !text.empty()) out += "\n\n";
    out += text;
  };
  if (o.prompt != "-") add(o.prompt);
  if (!o.file.empty()) add(read_file(o.file));
  if (!terminal || o.prompt == "-") add(std::string(std::istreambuf_iterator<char>(std::cin), {}));
  while (out.ends_with('\n')) out.pop_back();
  return out;
}

int run_chat(const CLI::App& app, ChatOptions o) {
  const bool terminal = isatty(STDIN_FILENO) == 1;
  const std::string first = first_message(o, terminal);
  if (first.empty() && (!terminal || o.prompt == "-")) {
    throw InvalidArgument("standard input is empty, expected a message (or a terminal, or --prompt)");
  }
  show_loading(o.engine, o.talk, "flash-mla chat");
  Engine engine(o.model, o.engine);
  if (const std::string why = engine.why_no_chat(); !why.empty()) {
    throw InvalidArgument(fmt::format("{} (generate continues texts; --chat-template)", why));
  }
  use_model_defaults(app, engine.default_sampling(), o.sampling);
  if (app.count("--max-tokens") == 0) o.sampling.max_tokens = std::numeric_limits<int>::max();
  Chat chat(engine, o, terminal);
  std::optional<Interrupts> guard;
  if (terminal) guard.emplace();
  bool answered = true;
  if (!first.empty()) answered = chat.ask(first);
  if (!terminal || o.prompt == "-") return answered ? 0 : 1;
  if (!o.talk.quiet) fmt::print("({}; /help, /exit)\n", engine.chat_template_origin());
  chat.talk();
  return 0;
}

}  // namespace

void register_chat(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<ChatOptions>();
  CLI::App* sub = app.add_subcommand("chat", "Talk with a DeepSeek-V2 or V3 checkpoint in a terminal");
  sub->add_option("-m,--model", o->model, "Hugging Face model directory")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->envname("MODEL_PATH");
  sub->add_option(
      "-p,--prompt", o->prompt,
      "The first message; \"-\": standard input. What is piped in follows it, and there is one answer then");
  sub->add_option("-f,--file", o->file, "A file with the first message, behind --prompt if there is one")
      ->check(CLI::ExistingFile);
  sub->add_option("--system", o->system, "The system message");
  sub->add_option("--chat-template-kwargs", o->variables,
                  "What the chat template is to see besides, as JSON: '{\"thinking\": true}'");
  add_sampling_flags(*sub, o->sampling);
  add_engine_flags(*sub, o->engine);
  add_talk_flags(*sub, o->talk);
  sub->callback([o, sub, &exit_code] { exit_code = run_chat(*sub, *o); });
}

}  // namespace flash_mla::cli
