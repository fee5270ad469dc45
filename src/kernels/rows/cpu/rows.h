#pragma once

#include <cstdint>

#include "flash_mla/tensor.h"

// Arithmetic on one row, vectorised for the machine it runs on. Rows are float32 or bfloat16 (`dtype`), sums
// are float32 and taken in an order that depends on the length alone.

namespace flash_mla::cpu::rows {

void widen(const void* x, DType dtype, float* out, std::int64_t n);
void narrow(const float* x, void* out, DType dtype, std::int64_t n);

/// out = x / sqrt(mean(x²) + eps) * weight
void rms_norm(const void* x, const float* weight, float eps, void* out, DType dtype, std::int64_t n);

/// out = gate * sigmoid(gate) * up
void silu_mul(const void* gate, const void* up, void* out, DType dtype, std::int64_t n);

/// Turns the pairs (2i, 2i + 1) of x by the angles whose cosines and sines are given, `pairs` of each.
void rotate(void* x, const float* cosines, const float* sines, DType dtype, std::int64_t pairs);

float max(const float* x, std::int64_t n);

/// p = exp(x * scale - shift), rounded to `dtype`; returns the sum of the unrounded values.
float exp_sum(const float* x, float scale, float shift, void* p, DType dtype, std::int64_t n);

/// x *= factor
void scale(float* x, float factor, std::int64_t n);

/// y += factor * x
void add_scaled(const float* x, float factor, float* y, std::int64_t n);

}  // namespace flash_mla::cpu::rows
