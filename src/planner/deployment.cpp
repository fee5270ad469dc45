#include "planner/deployment.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "planner/evaluate.h"
#include "planner/number.h"
#include "planner/start_command.h"

namespace flash_mla::planner {
namespace {

// A queue in front of prefill that is busier than this makes users wait more for others than for themselves.
constexpr double kMostBusy = 0.9;
constexpr std::int64_t kMostUsers = 100'000'000;

struct Side {
  std::int64_t instances = 0;  ///< copies of the plan
  double cards = 0;            ///< of all of them
  Result result;
};

struct Deployment {
  Request request;  // with decode_plan, prefill_plan and batch as found
  Side decode, prefill;
  double ttft_s = 0;
  double cards() const { return decode.cards + prefill.cards; }
};

/// The degrees to try: what is given, or the powers of two that the model allows.
std::vector<std::int64_t> degrees(bool given, std::int64_t value, std::int64_t most, std::int64_t of) {
  if (given) return {value};
  std::vector<std::int64_t> out;
  for (std::int64_t d = 1; d <= most; d *= 2) {
    if (of % d == 0) out.push_back(d);
  }
  return out;
}

std::vector<Plan> plans(const Request& q, const Plan& base, bool tp_given, bool ep_given) {
  std::vector<Plan> out;
  const std::int64_t node = q.hardware.cards_per_node;
  for (const std::int64_t tp : degrees(tp_given, base.tp, node, q.model.num_heads)) {
    for (const std::int64_t ep :
         degrees(ep_given, base.ep, q.model.num_routed_experts, q.model.num_routed_experts)) {
      Plan p = base;
      p.tp = tp;
      p.ep = ep;
      out.push_back(p);
    }
  }
  return out;
}

class Search {
 public:
  Search(Request q, std::int64_t users, double tokens_per_s) : q_(std::move(q)), users_(users) {
    q_.workload.arrival_rate = 0;
    if (tokens_per_s > 0) {
      const double limit = 1 / tokens_per_s;
      q_.slo.tpot_s = q_.slo.tpot_s > 0 ? std::min(q_.slo.tpot_s, limit) : limit;
    }
  }

  /// Throws InvalidArgument if none of the plans can be evaluated.
  std::optional<Deployment> run(const std::vector<Plan>& decode, const std::vector<Plan>& prefill) {
    std::optional<Deployment> best;
    for (const Plan& plan : decode) {
      std::optional<Deployment> d = attempt([&] { return for_decode(plan); });
      if (!d || (best && d->decode.cards >= best->cards())) continue;
      for (const Plan& other : prefill) {
        const std::optional<Deployment> whole = attempt([&] { return with_prefill(*d, other); });
        if (whole && (!best || better(*whole, *best))) best = whole;
      }
    }
    if (!evaluated_) throw InvalidArgument(error_);
    return best;
  }

  /// Why there is none, after run().
  std::string problem() const {
    if (fastest_s_ == 0) {
      return fmt::format("no plan of {} fits on {}: the weights and one sequence need more memory",
                         q_.model.name, q_.hardware.name);
    }
    if (q_.slo.tpot_s > 0 && fastest_s_ > q_.slo.tpot_s) {
      return fmt::format("no plan of {} on {} gives a user {} tokens/s: the fastest gives {} (tp {} ep {})",
                         q_.model.name, q_.hardware.name, significant(1 / q_.slo.tpot_s, 4),
                         significant(1 / fastest_s_, 4), fastest_.tp, fastest_.ep);
    }
    return fmt::format("no plan of {} on {} begins to answer within {} ms", q_.model.name, q_.hardware.name,
                       significant(q_.slo.ttft_s * 1e3, 4));
  }

 private:
  template <typename Try>
  std::optional<Deployment> attempt(const Try& one) {
    try {
      std::optional<Deployment> out = one();
      evaluated_ = true;
      return out;
    } catch (const InvalidArgument& e) {
      error_ = e.what();  // a plan that this model or mode does not allow
      return {};
    }
  }

  static bool better(const Deployment& a, const Deployment& b) {
    if (a.cards() != b.cards()) return a.cards() < b.cards();
    if (a.decode.result.tpot_s != b.decode.result.tpot_s) {
      return a.decode.result.tpot_s < b.decode.result.tpot_s;
    }
    return a.ttft_s < b.ttft_s;
  }

  Result at(const Plan& plan, std::int64_t batch) const {
    Request q = q_;
    q.decode_plan = q.prefill_plan = plan;
    q.workload.batch = batch;
    return evaluate(q);
  }

  bool will_do(const Result& r) const {
    return r.decode.memory_share <= 1 && (q_.slo.tpot_s == 0 || r.tpot_s <= q_.slo.tpot_s);
  }

  /// The fewest copies of `plan` that hold all users: as many in each as memory and speed allow. A step takes
  /// longer the more there are.
  std::optional<Deployment> for_decode(const Plan& plan) {
    const Result one = at(plan, 1);
    if (one.decode.memory_share <= 1 && (fastest_s_ == 0 || one.tpot_s < fastest_s_)) {
      fastest_s_ = one.tpot_s;
      fastest_ = one.decode.plan;
    }
    if (!will_do(one)) return {};
    const std::int64_t ranks = one.decode.plan.dp;
    std::int64_t good = 1, bad = (users_ + ranks - 1) / ranks + 1;
    while (bad - good > 1) {
      const std::int64_t batch = good + (bad - good) / 2;
      (will_do(at(plan, batch)) ? good : bad) = batch;
    }
    Deployment d;
    d.decode.instances = (users_ + good * ranks - 1) / (good * ranks);
    d.request = q_;
    d.request.decode_plan = plan;
    // No more in each than there are.
    d.request.workload.batch = (users_ + d.decode.instances * ranks - 1) / (d.decode.instances * ranks);
    d.decode.result = at(plan, d.request.workload.batch);
    d.decode.cards = static_cast<double>(d.decode.instances) * d.decode.result.decode.cards;
    return d;
  }

  /// As many copies of `plan` for prompts as the users ask for who have their answer and come back.
  std::optional<Deployment> with_prefill(Deployment d, const Plan& plan) const {
    d.request.prefill_plan = plan;
    const Result r = evaluate(d.request);
    if (r.prefill.memory_share > 1) return {};
    const Workload& w = d.request.workload;
    const auto input = static_cast<double>(w.input), output = static_cast<double>(w.output);
    const double arrivals = static_cast<double>(users_) / (output * r.tpot_s);
    const double busy_cards = arrivals * input / r.prefill_tokens_per_s_card;
    d.prefill.result = r;
    d.prefill.instances = static_cast<std::int64_t>(std::ceil(busy_cards / kMostBusy / r.prefill.cards));
    d.prefill.instances = std::max<std::int64_t>(1, d.prefill.instances);
    const double step = r.prefill.step_s / static_cast<double>(r.prefill.plan.pp);
    const auto wait = [&] {  // M/D/1
      const double rho = busy_cards / (static_cast<double>(d.prefill.instances) * r.prefill.cards);
      return rho / (2 * (1 - rho)) * step;
    };
    if (q_.slo.ttft_s > 0) {
      if (r.ttft_s >= q_.slo.ttft_s) return {};
      // The wait is rho/(1 - rho) times half a step: it is within what is left of the time from this rho on.
      const double left = 2 * (q_.slo.ttft_s - r.ttft_s) / step;
      const double rho = left / (1 + left);
      d.prefill.instances = std::max(
          d.prefill.instances, static_cast<std::int64_t>(std::ceil(busy_cards / rho / r.prefill.cards)));
    }
    d.ttft_s = r.ttft_s + wait();
    d.prefill.cards = static_cast<double>(d.prefill.instances) * r.prefill.cards;
    return d;
  }

  Request q_;
  std::int64_t users_;
  bool evaluated_ = false;
  std::string error_;
  double fastest_s_ = 0;  // 0: none fits
  Plan fastest_;
};

/// `request` with both plans as they are found.
Json side_json(const Side& side, const Phase& phase, std::int64_t batch, const Request& request,
               ServerRole role) {
  const Plan& p = phase.plan;
  const StartCommand start = start_command(request, role);
  return {{"cards", side.cards},
          {"instances", side.instances},
          {"plan", {{"tp", p.tp}, {"ep", p.ep}, {"dp", p.dp}, {"pp", p.pp}, {"cp", p.cp}}},
          {"batch", batch},
          {"memory_share", phase.memory_share},
          {"bottleneck", phase.bottleneck},
          {"start", {{"command", start.command}, {"caveats", start.caveats}}}};
}

}  // namespace

Json run_deployment(const Json& request) {
  ObjectReader r(request, "request");
  r.text("command", "deployment");
  static const Json kEmpty = Json::object();
  const Json& base = r.has("base") ? *r.find("base") : kEmpty;
  if (!base.is_object()) r.fail("base", base.dump(), "an object: a plan request");
  const std::int64_t users = r.integer("users", 1, kMostUsers);
  const double tokens_per_s = r.number("tokens_per_s", 0, 0, 1e6);
  r.finish();
  const Request q = read_request(base, "request: base");
  if (!q.workload.mix.empty()) {
    throw InvalidArgument("request: base.workload.mix: expected input and output; a mix has no one answer");
  }
  const auto given = [&](const char* plan, const char* key) {
    return base.contains(plan) && base[plan].contains(key);
  };
  const std::vector<Plan> decode = plans(q, q.decode_plan, given("plan", "tp"), given("plan", "ep"));
  const std::vector<Plan> prefill =
      plans(q, q.prefill_plan, given("plan", "tp") || given("prefill_plan", "tp"),
            given("plan", "ep") || given("prefill_plan", "ep"));
  Search search(q, users, tokens_per_s);
  const std::optional<Deployment> best = search.run(decode, prefill);
  Json out = {{"command", "deployment"},      {"model", q.model.name},
              {"hardware", q.hardware.name},  {"users", users},
              {"tokens_per_s", tokens_per_s}, {"input", q.workload.input},
              {"output", q.workload.output}};
  if (!best) {
    out["best"] = nullptr;
    out["problem"] = search.problem();
    return out;
  }
  const double price = price_per_card_hour(q.prices);
  const Phase &decoding = best->decode.result.decode, &prefilling = best->prefill.result.prefill;
  Request found = best->request;
  found.decode_plan = decoding.plan;
  found.prefill_plan = prefilling.plan;
  out["best"] = {
      {"cards", best->cards()},
      {"tokens_per_s_user", 1 / best->decode.result.tpot_s},
      {"tpot_s", best->decode.result.tpot_s},
      {"ttft_s", best->ttft_s},
      {"decode", side_json(best->decode, decoding, found.workload.batch, found, ServerRole::kDecode)},
      {"prefill",
       side_json(best->prefill, prefilling, found.workload.prefill_batch, found, ServerRole::kPrefill)}};
  if (price > 0) out["best"]["per_hour"] = price * best->cards();
  return out;
}

}  // namespace flash_mla::planner
