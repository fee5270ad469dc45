#include "planner/check.h"

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"

namespace flash_mla::planner {
namespace {

[[noreturn]] void not_in_article(const std::string& key, const std::string& value) {
  bad(key, value, "nothing: the article has no formula for it; use mode exact");
}

}  // namespace

void bad(const std::string& key, const std::string& value, const std::string& expected) {
  throw InvalidArgument(fmt::format("{} = {}: expected {}", key, value, expected));
}

Plan check_plan(Plan p, const Model& m, const std::string& key) {
  if (p.tp > m.num_heads || m.num_heads % p.tp != 0) {
    bad(key + ".tp", fmt::format("{}", p.tp),
        fmt::format("a divisor of the {} attention heads", m.num_heads));
  }
  if (p.ep > m.num_routed_experts || m.num_routed_experts % p.ep != 0) {
    bad(key + ".ep", fmt::format("{}", p.ep),
        fmt::format("a divisor of the {} routed experts", m.num_routed_experts));
  }
  if (p.pp > m.num_layers) {
    bad(key + ".pp", fmt::format("{}", p.pp), fmt::format("at most the {} layers", m.num_layers));
  }
  if (p.dp == 0) p.dp = std::max<std::int64_t>(1, p.ep / (p.tp * p.cp));
  const std::int64_t cards = p.tp * p.cp * p.dp;
  if (cards % p.ep != 0) {
    bad(key + ".ep", fmt::format("{}", p.ep),
        fmt::format("a divisor of the stage's {} cards (tp {} x cp {} x dp {})", cards, p.tp, p.cp, p.dp));
  }
  return p;
}

void check_request(const Request& q) {
  const Workload& w = q.workload;
  const Model& m = q.model;
  if (w.batch < 1) bad("workload.batch", fmt::format("{}", w.batch), "1 or more");
  if (w.prefill_batch < 1) bad("workload.prefill_batch", fmt::format("{}", w.prefill_batch), "1 or more");
  if (w.input < 1) bad("workload.input", fmt::format("{}", w.input), "1 or more");
  if (w.output < 1) bad("workload.output", fmt::format("{}", w.output), "1 or more");
  if (!(w.prefix_hit >= 0 && w.prefix_hit < 1)) {
    bad("workload.prefix_hit", fmt::format("{}", w.prefix_hit), "a share from 0 up to, not including, 1");
  }
  if (!(w.mtp_acceptance >= 0 && w.mtp_acceptance <= 1)) {
    bad("workload.mtp_acceptance", fmt::format("{}", w.mtp_acceptance), "a chance from 0 to 1");
  }
  if (w.input + w.output > m.max_position_embeddings) {
    bad("workload.input + workload.output", fmt::format("{}", w.input + w.output),
        fmt::format("at most max_position_embeddings = {}", m.max_position_embeddings));
  }
  if (w.mtp_draft > 0 && m.num_mtp_layers == 0) {
    bad("workload.mtp_draft", fmt::format("{}", w.mtp_draft),
        fmt::format("0: {} has no MTP module (num_nextn_predict_layers)", m.name));
  }
  if (!w.expert_load.empty()) {
    if (static_cast<std::int64_t>(w.expert_load.size()) != m.num_routed_experts) {
      bad("workload.expert_load", fmt::format("{} entries", w.expert_load.size()),
          fmt::format("{}, one per routed expert", m.num_routed_experts));
    }
    double sum = 0;
    for (double count : w.expert_load) sum += count;
    if (!(sum > 0)) bad("workload.expert_load", "all zero", "a positive sum");
  }
  if (q.precision.attention == "fp8" && q.hardware.peak_fp8 == 0) {
    bad("precision.attention", "fp8", fmt::format("bf16: {} has no FP8 units", q.hardware.name));
  }
  if (q.mode != Mode::kArticle) return;
  for (const Plan& p : {q.prefill_plan, q.decode_plan}) {
    if (p.pp != 1) not_in_article("plan.pp", fmt::format("{}", p.pp));
    if (p.cp != 1) not_in_article("plan.cp", fmt::format("{}", p.cp));
  }
  if (w.chunk > 0) not_in_article("workload.chunk", fmt::format("{}", w.chunk));
  if (w.prefix_hit > 0) not_in_article("workload.prefix_hit", fmt::format("{}", w.prefix_hit));
  if (w.mtp_draft > 0) not_in_article("workload.mtp_draft", fmt::format("{}", w.mtp_draft));
  if (!w.expert_load.empty()) not_in_article("workload.expert_load", "a histogram");
  if (w.placement != "uniform") not_in_article("workload.placement", w.placement);
  if (m.index_num_heads > 0) not_in_article("model", m.name + " (sparse attention)");
  if (m.hc_mult > 0) not_in_article("model", m.name + " (mHC)");
  if (q.overlap == "operators") bad("overlap", "operators", "none, memory or full in mode article");
  if (q.hardware.peak_fp8 == 0)
    bad("hardware", q.hardware.name, "a card with FP8 units: the article computes in FP8");
}

}  // namespace flash_mla::planner
