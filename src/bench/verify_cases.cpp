#include "bench/verify_cases.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <exception>

#include "bench/dtype.h"
#include "flash_mla/reference.h"

namespace flash_mla::bench {
namespace {

// Multiply-adds of a case at most: the scalar reference takes about 50 ms for it.
constexpr double kBudget = 3e7;

std::int32_t draw_length(Random& random, std::int64_t longest, int page_size, int s_q) {
  const auto bounded = [&](std::int64_t x) {
    return static_cast<std::int32_t>(std::clamp<std::int64_t>(x, 0, longest));
  };
  switch (random.integer(0, 9)) {
    case 0:
      return 0;
    case 1:
      return bounded(1);
    case 2:  // fewer keys than queries
      return bounded(random.integer(0, s_q));
    case 3:  // the edges of a page
      return bounded(page_size * random.integer(1, 4) + random.integer(-1, 1));
    case 4:  // the edges of a schedule block
      return bounded(64 * random.integer(1, 4) + random.integer(-1, 1));
    default:
      return bounded(random.integer(1, std::max<std::int64_t>(longest, 1)));
  }
}

void draw_head_dims(Random& random, ProblemSpec& p) {
  if (random.chance(0.6)) return;  // DeepSeek's 512 + 64
  p.d_v = random.chance(0.5) ? static_cast<int>(random.integer(1, 64) * 16)
                             : static_cast<int>(random.integer(1, 1024));
  p.d_rope = random.chance(0.2) ? 0 : static_cast<int>(random.integer(1, 128));
}

void draw_heads(Random& random, ProblemSpec& p) {
  p.h_kv = random.chance(0.8) ? 1 : static_cast<int>(random.integer(2, 4));
  const std::vector<int> groups = {1, 2, 4, 8, 16, 16, 32, 64, 128, 128};
  const int group = random.chance(0.8) ? random.pick(groups) : static_cast<int>(random.integer(1, 130));
  p.h_q = p.h_kv * group;
}

}  // namespace

VerifyCase make_verify_case(std::uint64_t seed, std::int64_t index) {
  // Distinct (seed, index) start distinct streams; the odd factor is a bijection on 64 bits.
  Random random(Random(seed).bits() ^ (static_cast<std::uint64_t>(index) * 0xD1342543DE82EF95u));
  VerifyCase c;
  ProblemSpec& p = c.problem;
  p.dtype =
      random.pick(std::vector<DType>{DType::kBFloat16, DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  draw_head_dims(random, p);
  draw_heads(random, p);
  p.s_q = random.chance(0.6)
              ? 1
              : static_cast<int>(random.chance(0.7) ? random.integer(2, 4) : random.integer(5, 64));
  p.causal = random.chance(0.5);
  p.page_size = random.pick(std::vector<int>{1, 16, 32, 64, 64, 64, 128, 256});
  if (random.chance(0.2)) p.page_size = static_cast<int>(random.integer(1, 256));
  if (random.chance(0.5))
    p.softmax_scale = random.chance(0.5) ? 0.1352338f : static_cast<float>(random.uniform());
  p.spare_pages = static_cast<int>(random.integer(0, 3));
  if (random.chance(0.3)) p.page_gap = static_cast<int>(random.integer(1, 2000));
  if (random.chance(0.3)) p.head_gap = static_cast<int>(random.integer(1, 70));

  const auto b = random.chance(0.05) ? 0 : random.integer(1, random.chance(0.2) ? 16 : 5);
  const double per_token = double{1} * p.h_q * p.s_q * (p.d_qk() + p.d_v);
  const auto longest = static_cast<std::int64_t>(
      std::clamp(kBudget / per_token / static_cast<double>(std::max<std::int64_t>(b, 1)), 4.0, 3000.0));
  for (std::int64_t r = 0; r < b; ++r) {
    p.cache_seqlens.push_back(draw_length(random, longest, p.page_size, p.s_q));
  }
  c.threads = random.pick(std::vector<int>{1, 2, 2, 3, 8});
  if (random.chance(0.3)) c.num_parts = static_cast<int>(random.integer(1, 40));
  if (random.chance(0.2)) c.fixed_split_blocks = static_cast<int>(random.integer(1, 8));
  p.seed = random.bits();
  return c;
}

std::string describe(const VerifyCase& c) {
  const ProblemSpec& p = c.problem;
  return fmt::format(
      "b={} s_q={} h_q={} h_kv={} d_qk={} d_v={} page_size={} {}{} softmax_scale={} threads={} parts={} "
      "fixed_split_blocks={} page_gap={} head_gap={} cache_seqlens=[{}]",
      p.batch(), p.s_q, p.h_q, p.h_kv, p.d_qk(), p.d_v, p.page_size, short_dtype(p.dtype),
      p.causal ? " causal" : "", p.softmax_scale ? fmt::format("{}", *p.softmax_scale) : "default", c.threads,
      c.num_parts > 0 ? c.num_parts : c.threads, c.fixed_split_blocks, p.page_gap, p.head_gap,
      fmt::join(p.cache_seqlens, " "));
}

void library_decode(const VerifyCase& c, const Problem& problem) {
  DecodeRun(problem, c.threads, c.fixed_split_blocks, c.num_parts).run();
}

Comparison run_verify_case(const VerifyCase& c, const DecodeFunction& decode) {
  const Problem problem(c.problem);
  decode(c, problem);
  const DenseDecodeArgs& args = problem.args();
  const Buffer out(static_cast<std::size_t>(args.out.numel()) * 8);
  const Buffer lse(static_cast<std::size_t>(args.lse.numel()) * 8);
  DenseDecodeArgs ref = args;
  ref.out = TensorView::contiguous(out.data(), DType::kFloat64,
                                   {args.out.size(0), args.out.size(1), args.out.size(2), args.out.size(3)});
  ref.lse = TensorView::contiguous(lse.data(), DType::kFloat64,
                                   {args.lse.size(0), args.lse.size(1), args.lse.size(2)});
  reference::dense_decode(ref, problem.options());
  return compare_outputs(args.out, args.lse, ref.out, ref.lse, tolerance_for(c.problem.dtype));
}

std::int64_t run_verify(const VerifyOptions& options, const DecodeFunction& decode) {
  using Clock = std::chrono::steady_clock;
  const bool single = options.only_case >= 0;
  const std::int64_t first = single ? options.only_case : 0;
  const std::int64_t end = single ? first + 1 : options.cases;
  std::int64_t failures = 0;
  double worst_out = 0, worst_lse = 0;
  auto last_progress = Clock::now();
  for (std::int64_t k = first; k < end; ++k) {
    const VerifyCase c = make_verify_case(options.seed, k);
    Comparison result;
    try {
      result = run_verify_case(c, decode);
    } catch (const std::exception& e) {
      result.ok = false;
      result.failure = e.what();
    }
    worst_out = std::max(worst_out, result.out_max_abs);
    worst_lse = std::max(worst_lse, result.lse_max_abs);
    if (!result.ok) {
      ++failures;
      fmt::print("FAILED: flash-mla verify --seed {} --case {}\n  {}\n  {}\n", options.seed, k, describe(c),
                 result.failure);
    } else if (options.verbose || single) {
      fmt::print("ok {}: {}; max |out error| {:.2e}, max |lse error| {:.2e}\n", k, describe(c),
                 result.out_max_abs, result.lse_max_abs);
    }
    if (!options.quiet && Clock::now() - last_progress > std::chrono::seconds(2)) {
      last_progress = Clock::now();
      fmt::print(stderr, "verify: {} of {} cases, {} failed\n", k + 1 - first, end - first, failures);
    }
  }
  fmt::print(
      "{} of {} cases agree with the fp64 reference (seed {}); largest error: out {:.2e}, lse {:.2e}\n",
      end - first - failures, end - first, options.seed, worst_out, worst_lse);
  return failures;
}

}  // namespace flash_mla::bench
