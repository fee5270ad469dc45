#include "cli/unknown_flags.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

namespace flash_mla::cli {
namespace {

/// Letters to change, insert, leave out, or swap with their neighbour.
int distance(const std::string& a, const std::string& b) {
  std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) d[i][0] = static_cast<int>(i);
  std::iota(d[0].begin(), d[0].end(), 0);
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t k = 1; k <= b.size(); ++k) {
      d[i][k] = std::min({d[i - 1][k] + 1, d[i][k - 1] + 1, d[i - 1][k - 1] + (a[i - 1] != b[k - 1])});
      if (i > 1 && k > 1 && a[i - 1] == b[k - 2] && a[i - 2] == b[k - 1]) {
        d[i][k] = std::min(d[i][k], d[i - 2][k - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

std::vector<std::string> flags_of(const CLI::App& command) {
  std::vector<std::string> out;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) out.push_back("--" + name);
    for (const std::string& name : option->get_snames()) out.push_back("-" + name);
  }
  return out;
}

}  // namespace

std::string nearest(const std::string& word, const std::vector<std::string>& names) {
  constexpr std::size_t kMaxBytes = 64;
  if (word.size() > kMaxBytes) return "";
  std::string out;
  int best = 1 + static_cast<int>(word.size()) / 3;
  for (const std::string& name : names) {
    // What was begun counts as near too: --temp for --temperature.
    const bool begun = word.size() >= 4 && name.starts_with(word);
    const int far = begun ? 1 : distance(word, name);
    if (far < best || (far == best && out.empty())) {
      best = far;
      out = name;
    }
  }
  return out;
}

std::string unknown_arguments(const CLI::App& app, int argc, const char* const* argv) {
  const CLI::App* command = &app;
  for (const CLI::App* sub : app.get_subcommands()) command = sub;
  std::vector<std::string> left = app.remaining(/*recurse=*/true);
  const std::vector<std::string> known = flags_of(*command);
  std::vector<std::string> flags, others;
  for (int i = 1; i < argc; ++i) {
    const auto found = std::ranges::find(left, argv[i]);
    if (found == left.end()) continue;
    left.erase(found);
    const std::string word = std::string(argv[i]).substr(0, std::string(argv[i]).find('='));
    if (!word.starts_with("-") || word == "-") {
      others.push_back(fmt::format("\"{}\"", word));
      continue;
    }
    // Any other letter would be near to one.
    const std::string near = word.size() > 2 ? nearest(word, known) : "";
    flags.push_back(near.empty() ? word : fmt::format("{} (did you mean {}?)", word, near));
  }
  const std::vector<std::string>& named = flags.empty() ? others : flags;  // values of unknown flags are none
  if (named.empty()) return "";
  const std::string name = command == &app ? app.get_name() : app.get_name() + " " + command->get_name();
  return fmt::format("{}: unknown {} {}; {} --help lists what there is", name,
                     fmt::format("{}{}", flags.empty() ? "argument" : "flag", named.size() == 1 ? "" : "s"),
                     fmt::join(named, ", "), name);
}

}  // namespace flash_mla::cli
