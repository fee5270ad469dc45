#include "cli/config_file.h"

#include <fmt/format.h>

#include <fstream>
#include <string>

#include "flash_mla/error.h"

namespace flash_mla::cli {
namespace {

void read_config(CLI::App& app, const std::string& path) {
  std::ifstream file(path);
  if (!file) throw InvalidArgument(fmt::format("--config {}: cannot be read", path));
  const CLI::ConfigBase toml;
  for (const CLI::ConfigItem& item : toml.from_config(file)) {
    if (item.name == "++" || item.name == "--") continue;  // a section begins or ends
    const std::string key = item.fullname();
    const bool own_section = item.parents.empty() || item.parents == std::vector{app.get_name()};
    CLI::Option* option = own_section ? app.get_option_no_throw("--" + item.name) : nullptr;
    if (option == nullptr || item.name == "config" || item.name == "help") {
      throw InvalidArgument(fmt::format("--config {}: \"{}\" is no flag of {}", path, key, app.get_name()));
    }
    if (option->count() > 0) continue;
    if (option->get_expected_min() == 0) {
      option->add_result(option->get_flag_value(item.name, toml.to_flag(item)));
    } else {
      option->add_result(item.inputs);
    }
  }
}

}  // namespace

void add_config_flag(CLI::App& app) {
  // The first option's callback is the first to run, so that those after it see the file's values.
  app.add_option_function<std::string>(
      "--config", [&app](const std::string& path) { read_config(app, path); }, "TOML file with these flags");
}

}  // namespace flash_mla::cli
