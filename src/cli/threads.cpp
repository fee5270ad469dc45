#include "cli/threads.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

namespace flash_mla::cli {
namespace {

using Json = nlohmann::json;

/// From the first start to the second: what was chosen, and which variables were set for it.
constexpr const char* kChosen = "FLASH_MLA_CHOSEN_THREADS";

Threading& chosen() {
  static Threading threading = with_environment(choose_threading(read_processors()));
  return threading;
}

void take_over(const char* text) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  unsetenv(kChosen);
  try {
    for (const Json& name : json.at("set"))
      unsetenv(name.get<std::string>().c_str());  // not for our children
    chosen() = {json.at("threads"), static_cast<Waiting>(json.at("waiting").get<int>()),
                json.at("why_threads"), json.at("why_waiting")};
  } catch (const Json::exception&) {
    // Somebody else's variable of that name: what is chosen here stands.
  }
}

}  // namespace

void start_with_chosen_threads(char** argv) {
  if (const char* text = std::getenv(kChosen); text != nullptr) {
    take_over(std::string(text).c_str());
    return;
  }
  const Processors processors = read_processors();
  const Threading& threading = chosen();
  Json set = Json::array();
  const auto choose = [&](const char* name, int value) {
    setenv(name, std::to_string(value).c_str(), /*overwrite=*/1);
    set.push_back(name);
  };
  if (threading.waiting == Waiting::kSleep) choose(kSpinVariable, 0);
  if (std::getenv(kThreadsVariable) == nullptr && threading.threads < processors.usable) {
    choose(kThreadsVariable, threading.threads);
  }
  if (set.empty()) return;
  const Json json = {{"threads", threading.threads},
                     {"waiting", static_cast<int>(threading.waiting)},
                     {"why_threads", threading.why_threads},
                     {"why_waiting", threading.why_waiting},
                     {"set", set}};
  setenv(kChosen, json.dump(-1, ' ', false, Json::error_handler_t::replace).c_str(), /*overwrite=*/1);
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) execv(program.c_str(), argv);
  unsetenv(kChosen);
  chosen().why_waiting = "the program could not start itself again";
}

const Threading& chosen_threads() { return chosen(); }

}  // namespace flash_mla::cli
