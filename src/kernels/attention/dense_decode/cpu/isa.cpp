#include "kernels/attention/dense_decode/cpu/isa.h"

#include <cpuid.h>
#include <fmt/format.h>
#include <hwy/highway.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "flash_mla/error.h"

namespace flash_mla::cpu {
namespace {

constexpr const char* kEnvironment = "FLASH_MLA_CPU_ISA";
constexpr const char* kAvx512Bf16 = "avx512_bf16";
constexpr const char* kAvx512Amx = "avx512_amx";

struct Selection {
  std::int64_t target = HWY_STATIC_TARGET;
  bool bf16_dot = false;
  bool amx = false;
  CpuIsaInfo info;
  std::string error;
};

std::string target_name(std::int64_t target) {
  if (target == HWY_AVX3) return "avx512";
  std::string name = hwy::TargetName(target);
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return name;
}

bool has_avx512_bf16() {
  __builtin_cpu_init();
  return (highway_targets() & HWY_AVX3) != 0 && __builtin_cpu_supports("avx512bf16") != 0;
}

// The processor has it, and the kernel lets this process use it: tiles are registers that have to be asked for
// (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool has_avx512_amx() {
  constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  return (d & kAmxBf16) != 0 && (d & kAmxTile) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Selection select() {
  Selection s;
  // Highway gives better targets lower bits.
  std::vector<std::int64_t> targets;
  for (std::int64_t rest = highway_targets(); rest != 0; rest &= rest - 1) targets.push_back(rest & -rest);
  if (targets.empty()) targets.push_back(HWY_STATIC_TARGET);
  s.bf16_dot = has_avx512_bf16();
  s.amx = has_avx512_amx();
  s.target = targets.front();
  if (s.amx) s.info.available.emplace_back(kAvx512Amx);
  if (s.bf16_dot) s.info.available.emplace_back(kAvx512Bf16);
  const std::size_t num_bf16 = s.info.available.size();
  for (const std::int64_t t : targets) s.info.available.push_back(target_name(t));

  const char* forced = std::getenv(kEnvironment);
  if (forced == nullptr || *forced == '\0') {
    s.info.selected = s.info.available.front();
    s.info.reason =
        s.amx ? "best on this machine; bf16 inputs use the matrix unit, others fp32 arithmetic in avx512"
        : s.bf16_dot ? "best on this machine; bf16 inputs use dot products of bf16 pairs, others fp32 "
                       "arithmetic in avx512"
                     : "best on this machine, fp32 arithmetic";
    return s;
  }
  const auto found = std::find(s.info.available.begin(), s.info.available.end(), forced);
  if (found == s.info.available.end()) {
    std::string names;
    for (const std::string& name : s.info.available) names += (names.empty() ? "" : ", ") + name;
    s.error = fmt::format("{} is \"{}\", expected one of: {}", kEnvironment, forced, names);
    return s;
  }
  s.info.selected = forced;
  s.info.reason = fmt::format("forced by {}", kEnvironment);
  const auto place = static_cast<std::size_t>(found - s.info.available.begin());
  s.amx = s.info.selected == kAvx512Amx;
  if (place >= num_bf16) {
    s.target = targets[place - num_bf16];
    s.bf16_dot = false;
  }
  return s;
}

// Decided once; the environment is not read again.
const Selection& selection() {
  static const Selection kSelection = select();
  if (!kSelection.error.empty()) throw InvalidArgument(kSelection.error);
  return kSelection;
}

}  // namespace

CpuIsaInfo isa_info() { return selection().info; }

void check_isa() { selection(); }

const TileKernel& select_tile_kernel(DType dtype, int d_qk) {
  const Selection& s = selection();
  if (s.amx && dtype == DType::kBFloat16 && d_qk % 32 == 0) return avx512_amx_tile_kernel();
  if (s.bf16_dot && dtype == DType::kBFloat16 && d_qk % 2 == 0) return avx512_bf16_tile_kernel();
  return highway_tile_kernel(s.target);
}

}  // namespace flash_mla::cpu
