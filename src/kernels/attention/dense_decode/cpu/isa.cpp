#include "kernels/attention/dense_decode/cpu/isa.h"

#include <fmt/format.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "flash_mla/error.h"

namespace flash_mla::cpu {
namespace {

constexpr const char* kEnvironment = "FLASH_MLA_CPU_ISA";
constexpr const char* kAvx512Bf16 = "avx512_bf16";

struct Selection {
  std::int64_t target = HWY_STATIC_TARGET;
  bool bf16_dot = false;
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

Selection select() {
  Selection s;
  // Highway gives better targets lower bits.
  std::vector<std::int64_t> targets;
  for (std::int64_t rest = highway_targets(); rest != 0; rest &= rest - 1) targets.push_back(rest & -rest);
  if (targets.empty()) targets.push_back(HWY_STATIC_TARGET);
  s.bf16_dot = has_avx512_bf16();
  s.target = targets.front();
  if (s.bf16_dot) s.info.available.emplace_back(kAvx512Bf16);
  for (const std::int64_t t : targets) s.info.available.push_back(target_name(t));

  const char* forced = std::getenv(kEnvironment);
  if (forced == nullptr || *forced == '\0') {
    s.info.selected = s.info.available.front();
    s.info.reason = s.bf16_dot
                        ? "best on this machine; bf16 inputs use dot products of bf16 pairs, others fp32 "
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
  if (s.info.selected != kAvx512Bf16) {
    s.target = targets[static_cast<std::size_t>(found - s.info.available.begin()) - (s.bf16_dot ? 1u : 0u)];
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
  if (s.bf16_dot && dtype == DType::kBFloat16 && d_qk % 2 == 0) return avx512_bf16_tile_kernel();
  return highway_tile_kernel(s.target);
}

}  // namespace flash_mla::cpu
