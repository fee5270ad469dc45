#include "block.h"

#include <algorithm>
#include <cstring>

#include "base/element.h"
#include "base/fp8.h"

namespace emulated {

void Block::enter() {
  Block& block = current();
  const std::size_t self = block.running_;
  try {
    (*block.body_)();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  block.fibers_[self].done = true;
  swapcontext(&block.fibers_[self].context, &block.scheduler_);
}

void Block::run(const std::function<void()>& body) {
  current_block() = this;
  body_ = &body;
  constexpr std::size_t kStack = 256 << 10;
  for (Fiber& f : fibers_) {
    f.stack.resize(kStack);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &scheduler_;
    makecontext(&f.context, &Block::enter, 0);
  }
  for (;;) {
    std::vector<std::size_t> ready, behind;
    bool all_done = true;
    // Now and then a warpgroup, or a warp, falls far behind.
    if (rng_() % 64 == 0)
      stalled_[rng_() % 4] = {rng_() % fibers_.size() / 32, std::size_t{rng_() % 2 == 0 ? 1U : 4U},
                              rng_() % 400};
    for (Stall& stall : stalled_) stall.passes -= stall.passes > 0 ? 1 : 0;
    const auto is_stalled = [&](std::size_t warp) {
      return std::any_of(stalled_.begin(), stalled_.end(),
                         [&](const Stall& s) { return s.passes > 0 && warp / s.width == s.first / s.width; });
    };
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& f = fibers_[i];
      all_done &= f.done;
      if (!f.done && (!f.ready || f.ready())) (is_stalled(i / 32) ? behind : ready).push_back(i);
    }
    if (all_done) return;
    if (ready.empty()) ready = std::move(behind);
    if (!events_.empty() && (ready.empty() || rng_() % 4 == 0)) {
      const std::size_t at = rng_() % events_.size();
      const auto event = std::move(events_[at]);
      events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(at));
      event();
      continue;
    }
    if (ready.empty()) {
      std::string who;
      for (std::size_t i = 0; i < fibers_.size(); ++i) {
        if (!fibers_[i].done && i % 32 == 0)
          who += " " + std::to_string(i / 32) + " (" + fibers_[i].waits_at + ")";
      }
      throw DeadlockError("all threads wait; of warps" + who);
    }
    // All that are ready go on, beginning anywhere, so that a pass of 384 costs one look at who is.
    const std::size_t first = rng_() % ready.size();
    for (std::size_t n = 0; n < ready.size(); ++n) {
      const std::size_t i = ready[(first + n) % ready.size()];
      Fiber& f = fibers_[i];
      if (f.done || (f.ready && !f.ready())) continue;
      f.ready = nullptr;
      running_ = i;
      swapcontext(&scheduler_, &f.context);
      if (error_) std::rethrow_exception(error_);
    }
  }
}

void Block::wait_until(std::function<bool()> ready, std::string at) {
  Fiber& f = fiber();
  f.waits_at = std::move(at);
  f.ready = std::move(ready);
  swapcontext(&f.context, &scheduler_);
}

void Block::settle(Barrier& b) {
  if (b.pending < 0) throw std::logic_error("more arrivals at an mbarrier than it expects");
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
  }
}

bool Block::meet(int key, int threads, bool stays, bool any) {
  Meeting& m = meetings_[key];
  m.any |= any;
  const std::uint64_t generation = m.generation;
  if (++m.arrived == threads) {
    m.arrived = 0;
    m.result = m.any;
    m.any = false;
    ++m.generation;
    return m.result;
  }
  if (!stays) return false;
  wait_until([&m, generation] { return m.generation != generation; }, "meeting " + std::to_string(key));
  return m.result;
}

const std::array<std::uint64_t, 32>& Block::exchange(std::uint64_t mine) {
  // Two tables by turns: nobody is two exchanges ahead.
  const unsigned warp = thread() / 32;
  Meeting& m = meetings_[1000 + static_cast<int>(warp)];
  auto& table = exchanged_[2 * warp + static_cast<unsigned>(m.generation % 2)];
  table[thread() % 32] = mine;
  meet_warp();
  return table;
}

float Block::half_to_float(std::uint16_t bits) { return flash_mla::to_float(flash_mla::Fp16{bits}); }
float Block::bf16_to_float(std::uint16_t bits) { return flash_mla::to_float(flash_mla::Bf16{bits}); }

namespace {

/// Where a K-major tile with 128-byte swizzle begins.
std::uint32_t start_of(std::uint64_t descriptor) {
  constexpr std::uint64_t kSwizzle128 = 1ull << 62, kFields = 0xC0003FFF00000000ull;
  if ((descriptor & kFields) != (kSwizzle128 | std::uint64_t{1024 >> 4} << 32)) {
    throw std::logic_error("a descriptor that is not of a K-major tile with 128-byte swizzle");
  }
  return static_cast<std::uint32_t>(descriptor & 0x3FFF) << 4;
}

/// Bytes from 64 columns of an MN-major tile to the next.
std::uint32_t leading_of(std::uint64_t descriptor) {
  return static_cast<std::uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
}

/// Where an MN-major one begins.
std::uint32_t start_of_mn_major(std::uint64_t descriptor) {
  constexpr std::uint64_t kLeading = std::uint64_t{0x3FFF} << 16;
  if (leading_of(descriptor) % 1024 != 0 || leading_of(descriptor) == 0)
    throw std::logic_error("a descriptor that is not of an MN-major tile");
  return start_of(descriptor & ~kLeading);
}

}  // namespace

void Block::execute_e4m3(const Product& p, std::size_t index) {
  static const std::array<float, 256> kValues = [] {
    std::array<float, 256> values{};
    for (std::size_t i = 0; i < 256; ++i)
      values[i] = flash_mla::to_float(flash_mla::E4m3{static_cast<std::uint8_t>(i)});
    return values;
  }();
  const auto row_of = [&](std::uint32_t start, std::size_t row) {
    std::array<float, 32> out{};
    for (std::uint32_t k = 0; k < 32; ++k) {
      const std::uint32_t linear = start + static_cast<std::uint32_t>(row) * 128 + k;
      out[k] = kValues[std::to_integer<std::size_t>(*shared_at(linear ^ ((linear >> 7 & 7) << 4), 1))];
    }
    return out;
  };
  const std::size_t warp = running_ % 128 / 32, lane = running_ % 32;
  const std::uint32_t of_b = start_of(p.b);
  std::array<std::array<float, 32>, 2> a{};
  if (p.a_shared != 0) {
    const std::uint32_t of_a = start_of(p.a_shared);
    a = {row_of(of_a, 16 * warp + lane / 4), row_of(of_a, 16 * warp + lane / 4 + 8)};
  } else {
    for (std::size_t h = 0; h < 2; ++h) {
      for (std::size_t k = 0; k < 32; ++k) {
        const Product& of = fibers_[running_ / 4 * 4 + k % 16 / 4].products[index];
        a[h][k] = kValues[of.a[h + 2 * (k / 16)] >> (8 * (k % 4)) & 0xFF];
      }
    }
  }
  for (std::size_t i = 0; i < static_cast<std::size_t>(p.count); i += 4) {
    for (std::size_t e = 0; e < 2; ++e) {
      const std::array<float, 32> b = row_of(of_b, 2 * i + lane % 4 * 2 + e);
      for (std::size_t h = 0; h < 2; ++h) {
        float& d = p.sums[i + 2 * h + e];
        float sum = p.accumulate ? d : 0.0f;
        for (std::size_t k = 0; k < 32; ++k) sum += a[h][k] * b[k];
        d = sum;
      }
    }
  }
}

void Block::execute(const Product& p, std::size_t index) {
  if (p.e4m3) return execute_e4m3(p, index);
  const auto widen = p.bf16 ? &bf16_to_float : &half_to_float;
  const std::size_t lane = running_ % 32, warp_first = running_ - lane;
  const std::size_t g = lane / 4, t = lane % 4;
  const std::uint32_t start = p.mn_major ? start_of_mn_major(p.b) : start_of(p.b);
  const int n = 2 * p.count;
  const auto shared_value = [&](std::uint32_t first, std::size_t row, std::uint32_t k) {
    const std::uint32_t linear = first + static_cast<std::uint32_t>(row) * 128 + k * 2;
    std::uint16_t bits;
    std::memcpy(&bits, shared_at(linear ^ ((linear >> 7 & 7) << 4), 2), 2);
    return widen(bits);
  };
  float a[2][16];
  for (std::size_t h = 0; h < 2; ++h) {
    for (std::size_t k = 0; k < 16; ++k) {
      if (p.shared) {
        const std::size_t row = 16 * (running_ % 128 / 32) + g + 8 * h;
        a[h][k] = shared_value(start_of(p.a_shared), row, static_cast<std::uint32_t>(k));
        continue;
      }
      const Product& of = fibers_[warp_first + 4 * g + k % 8 / 2].products[index];
      a[h][k] = widen(static_cast<std::uint16_t>(of.a[h + 2 * (k / 8)] >> (16 * (k % 2))));
    }
  }
  for (int group = 0; group < n / 8; ++group) {
    for (std::size_t e = 0; e < 2; ++e) {
      const auto column = static_cast<std::uint32_t>(8 * group) + static_cast<std::uint32_t>(2 * t + e);
      float b[16];
      for (std::uint32_t k = 0; k < 16; ++k) {
        b[k] = p.mn_major ? shared_value(start + column / 64 * leading_of(p.b), k, column % 64)
                          : shared_value(start, column, k);
      }
      for (std::size_t h = 0; h < 2; ++h) {
        float& d = p.sums[static_cast<std::size_t>(4 * group) + 2 * h + e];
        float sum = p.accumulate ? d : 0.0f;
        for (std::size_t k = 0; k < 16; ++k) sum += a[h][k] * b[k];
        d = sum;
      }
    }
  }
}

void Block::wait_for_products(int pending) {
  const std::size_t groups = fiber().groups.size();
  const std::size_t until =
      groups > static_cast<std::size_t>(pending) ? groups - static_cast<std::size_t>(pending) : 0;
  // A product is the whole warpgroup's: it is done when all have issued it, and then for all of them, whose warps may have
  // gone different ways since.
  const std::size_t own = running_, first = own / 128 * 128;
  const auto issued = [this, first, until] {
    return std::all_of(fibers_.begin() + static_cast<std::ptrdiff_t>(first),
                       fibers_.begin() + static_cast<std::ptrdiff_t>(first + 128),
                       [until](const Fiber& f) { return f.groups.size() >= until; });
  };
  if (!issued()) wait_until(issued, "products " + std::to_string(until));
  for (running_ = first; running_ < first + 128; ++running_) {
    Fiber& f = fiber();
    if (f.groups_done >= until) continue;
    for (; f.executed < f.groups[until - 1]; ++f.executed) execute(f.products[f.executed], f.executed);
    f.groups_done = until;
  }
  running_ = own;
}

}  // namespace emulated
