#pragma once

// The subcommands of the flash-mla program, one file each. A register_* function adds its subcommand to the
// app and sets a callback; the callback stores the process's exit code.

#include <CLI/CLI.hpp>

namespace flash_mla::cli {

void register_info(CLI::App& app, int& exit_code);
void register_demo(CLI::App& app, int& exit_code);
void register_verify(CLI::App& app, int& exit_code);
void register_bench(CLI::App& app, int& exit_code);
void register_bench_engine(CLI::App& app, int& exit_code);
void register_plan(CLI::App& app, int& exit_code);
void register_experts(CLI::App& app, int& exit_code);
void register_generate(CLI::App& app, int& exit_code);
void register_quantize(CLI::App& app, int& exit_code);
void register_chat(CLI::App& app, int& exit_code);
void register_serve(CLI::App& app, int& exit_code);
void register_loadtest(CLI::App& app, int& exit_code);

}  // namespace flash_mla::cli
