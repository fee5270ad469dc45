#pragma once

#include <CLI/CLI.hpp>

#include "flash_mla/transfer_options.h"

namespace flash_mla::cli {

/// Of a server that is one side of prefill and decode.
void add_transfer_flags(CLI::App& app, TransferOptions& options);

}  // namespace flash_mla::cli
