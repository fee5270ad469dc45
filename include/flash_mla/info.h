#pragma once

#include <string>
#include <vector>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"

namespace flash_mla {

/// What one backend is on this machine.
struct BackendInfo {
  Backend backend = Backend::kCpu;
  bool available = false;
  std::string device;  ///< processor or GPU name
  std::string detail;  ///< what it will use and why, or why it was rejected
};

/// Instruction sets of the CPU backend.
struct CpuIsaInfo {
  std::string selected;                ///< e.g. "avx512_bf16"
  std::string reason;                  ///< why that one
  std::vector<std::string> available;  ///< names that FLASH_MLA_CPU_ISA accepts here, best first
};

/// All backends this library knows, available or not. The sm90 backend has one entry for each GPU, or one
/// that says why there is none.
FLASH_MLA_API std::vector<BackendInfo> backends();

/// The instruction set in use. The environment variable FLASH_MLA_CPU_ISA forces one; a name the machine
/// does not have throws InvalidArgument from the first call that needs it.
FLASH_MLA_API CpuIsaInfo cpu_isa();

/// "0.1.0"
FLASH_MLA_API const char* version();

}  // namespace flash_mla
