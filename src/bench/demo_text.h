#pragma once

#include <filesystem>

namespace flash_mla::bench {

/// Lets a model write on this machine's CPU: streams a fixed prompt's continuation to stdout with the time to
/// the first token, the time per token and tokens/s, and leaves the text, prompt included, in `file`. The
/// seed is fixed: the same machine writes the same text. Returns whether the model wrote all that was asked
/// for.
bool demo_text(const std::filesystem::path& model_directory, const std::filesystem::path& file);

}  // namespace flash_mla::bench
