#pragma once

#include <string>

namespace flash_mla::bench {

/// Decodes one step of DeepSeek-V3's attention on the CPU (`quick`: a small one), checks it against the fp64
/// reference, prints how close to the machine's limit it ran and writes the figures to the file `json`, as a
/// benchmark's. Returns whether the result was right.
bool run_demo(bool quick, const std::string& json);

}  // namespace flash_mla::bench
