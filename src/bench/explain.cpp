#include "bench/explain.h"

#include <fmt/format.h>

#include "bench/gpu/bench.h"
#include "bench/table.h"
#include "kernels/attention/dense_decode/sm90/kernel_facts.h"

namespace flash_mla::bench {
namespace {

constexpr int kH200Sms = 132;

std::string grid_text(const sm90::Grid& g) { return fmt::format("{}x{}x{}", g.x, g.y, g.z); }

std::string known(std::size_t value) { return value > 0 ? fmt::format("{}", value) : "-"; }

std::vector<std::string> explain_row(const Shape& s, int sms) {
  const sm90::RowBlocks blocks = sm90::row_blocks(s.s_q, s.h_q / s.h_kv);
  const ScheduleOptions options = sm90::schedule_options(s.b, sms, blocks, s.h_kv);
  const sm90::DecodePlan plan = sm90::plan_decode(s.b, sms, blocks, s.h_kv, options.num_parts, false);
  const bool bf16 = s.dtype == DType::kBFloat16;
  const sm90::KernelFacts decode = sm90::decode_kernel_facts(plan, bf16);
  const sm90::KernelFacts combine = sm90::combine_kernel_facts(plan, bf16);
  return {s.name,
          fmt::format("{} of {}x{}", blocks.count(), blocks.tokens, blocks.heads),
          fmt::format("{}", plan.cluster),
          fmt::format("{}", options.num_parts),
          fmt::format("{}", options.fixed_overhead_blocks),
          fmt::format("{}", options.min_blocks_per_part),
          options.whole_requests_percent > 0 ? fmt::format("{}%", options.whole_requests_percent) : "-",
          sm90::compute_bound(blocks) ? "compute" : "memory",
          grid_text(plan.grid),
          plan.combines ? grid_text(plan.combine_grid) : "none",
          known(decode.threads),
          known(decode.smem_bytes),
          fmt::format("{}/{}", known(static_cast<std::size_t>(decode.registers)),
                      known(static_cast<std::size_t>(combine.registers))),
          decode.registers > 0 ? fmt::format("{}/{}", decode.spill_bytes, combine.spill_bytes) : "-"};
}

constexpr const char* kLegend =
    "row blocks  CTAs per latent head: how many, of so many query tokens x heads each (64 rows at most)\n"
    "cluster     CTAs that share every tile of keys\n"
    "parts       of the schedule; overhead: what it takes the start of a request for, in tiles of 64 keys\n"
    "least       fewest tiles of a part; whole: imbalance up to which requests are not cut\n"
    "bound       compute: the tensor unit needs longer for a tile than memory to bring it\n"
    "grids       row blocks x latent heads x parts; combine: chunks of columns x groups of rows x requests\n"
    "regs        of a thread at the start, decode/combine (setmaxnreg then moves them: consumers 232, "
    "producers "
    "40); spills in bytes\n";

}  // namespace

std::string why_not_sm90(const Shape& s) {
  if (s.dtype == DType::kFloat32) return "dtype is fp32, expected bf16 or fp16";
  if (s.page_size != 16 && s.page_size != 32 && s.page_size % sm90::kTileTokens != 0)
    return fmt::format("page_size is {}, expected 16, 32 or a multiple of 64", s.page_size);
  return "";
}

std::string explain(const std::vector<Shape>& shapes) {
  const bool here = gpu::why_unusable().empty();
  const int sms = here ? gpu::device().sms : kH200Sms;
  std::string text =
      here ? fmt::format("{}, {} multiprocessors\n\n", gpu::device().name, sms)
           : fmt::format("no GPU here ({}): assumes {} multiprocessors\n\n", gpu::why_unusable(), sms);
  Table table({"shape", "row blocks", "cluster", "parts", "overhead", "least", "whole", "bound",
               "decode grid", "combine", "threads", "smem", "regs", "spills"});
  std::string refused;
  for (const Shape& s : shapes) {
    const std::string reason = why_not_sm90(s);
    if (reason.empty()) {
      table.add(explain_row(s, sms));
    } else {
      refused += fmt::format("{}: not taken by the sm90 backend: {}\n", s.name, reason);
    }
  }
  return text + table.str() + "\n" + refused + kLegend;
}

}  // namespace flash_mla::bench
