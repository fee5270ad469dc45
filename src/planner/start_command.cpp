#include "planner/start_command.h"

#include <fmt/format.h>

#include <algorithm>

namespace flash_mla::planner {
namespace {

constexpr std::int64_t kPageTokens = 64;

bool same(const Plan& a, const Plan& b) {
  return a.tp == b.tp && a.ep == b.ep && a.dp == b.dp && a.pp == b.pp && a.cp == b.cp;
}

const Plan& plan_of(const Request& q, ServerRole role) {
  return role == ServerRole::kPrefill ? q.prefill_plan : q.decode_plan;
}

// What no option of the program asks for.
std::vector<std::string> obstacles(const Request& q, ServerRole role) {
  std::vector<std::string> out;
  const Plan& plan = plan_of(q, role);
  const auto expect = [&](bool good, std::string text) {
    if (!good) out.push_back(std::move(text));
  };
  expect(plan.pp == 1, fmt::format("pp {}: expected 1", plan.pp));
  expect(plan.cp == 1, fmt::format("cp {}: expected 1", plan.cp));
  expect(plan.ep <= plan.tp * plan.dp && plan.tp * plan.dp % plan.ep == 0,
         fmt::format("ep {}: expected a divisor of the {} ranks", plan.ep, plan.tp * plan.dp));
  if (role == ServerRole::kBoth) {
    expect(same(plan, q.prefill_plan), "prefill under a plan of its own: a server has one");
  } else {
    expect(plan.dp == 1,
           fmt::format("dp {} and prefill apart from decode: expected one or the other", plan.dp));
  }
  expect(q.precision.kv == "bf16" || q.precision.kv == "fp8_656",
         fmt::format("kv {}: expected bf16 or fp8_656", q.precision.kv));
  expect(q.precision.moe == "w4a8" || q.precision.moe == q.precision.dense,
         fmt::format("dense {} with moe {}: --quantize takes both or, with w4a8, the experts",
                     q.precision.dense, q.precision.moe));
  return out;
}

}  // namespace

StartCommand start_command(const Request& q, ServerRole role) {
  StartCommand out;
  out.caveats = obstacles(q, role);
  if (!out.caveats.empty()) return out;
  const Plan& plan = plan_of(q, role);
  const Workload& w = q.workload;
  std::string& c = out.command;
  c = "flash-mla serve --model DIR";
  const std::int64_t ranks = plan.tp * plan.dp;
  if (plan.tp > 1) c += fmt::format(" --tp {}", plan.tp);
  if (plan.dp > 1) c += fmt::format(" --dp {}", plan.dp);
  if (ranks > 1) {
    c += fmt::format(" --ep {}", plan.ep);
    if (w.placement == "round_robin") c += " --expert-placement round-robin";
  }
  if (q.precision.moe == "w4a8") {
    c += " --quantize w4a8";
  } else if (q.precision.moe == "fp8") {
    c += " --quantize fp8";
  }
  if (q.precision.kv == "fp8_656") c += " --kv-cache fp8";
  if (w.mtp_draft > 0) c += fmt::format(" --speculative mtp --draft-tokens {}", w.mtp_draft);
  const bool prefill = role == ServerRole::kPrefill;
  const std::int64_t batch = prefill ? w.prefill_batch : w.batch, output = prefill ? 1 : w.output;
  const std::int64_t pages = (w.input + output + kPageTokens - 1) / kPageTokens;
  const std::int64_t prompt = w.chunk > 0 ? w.chunk : w.input * w.prefill_batch;
  c += fmt::format(" --max-batch-size {} --num-pages {} --max-tokens-per-step {}", batch, batch * pages,
                   prompt + (prefill ? 0 : batch * (1 + w.mtp_draft)));
  if (prefill) c += " --role prefill";
  if (role == ServerRole::kDecode) c += " --role decode --peer HOST:PORT";
  if (ranks > 1) {
    out.caveats.push_back(fmt::format(
        "{} ranks are threads of a CPU so far (--device cpu); for as many GPUs there are vLLM and SGLang",
        ranks));
  }
  if (q.precision.kv == "fp8_656" && q.model.index_topk == 0)
    out.caveats.emplace_back("a GPU keeps the cache of a model without an indexer in bfloat16 (--kv bf16)");
  return out;
}

}  // namespace flash_mla::planner
