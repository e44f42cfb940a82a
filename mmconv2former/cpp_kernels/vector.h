// Vectors of channels: loads and stores of fp32 and bf16, memory for them, and
// GELU.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#define INLINED __attribute__((always_inline))  // of lambdas
#define INLINE INLINED inline

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

using Vec = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));

struct bf16 {
  uint16_t bits;
};

INLINE Vec broadcast(float value) { return value - Vec{}; }

// Which lanes of a vector are channels: all, or at the end the first few.
#ifdef __AVX512F__

using Lanes = __mmask16;

INLINE Lanes first_lanes(int64_t count) {
  return count >= LANES ? 0xffff : (1u << count) - 1;
}

INLINE Vec only(Vec x, Lanes lanes) {
  return Vec(_mm512_maskz_mov_ps(lanes, __m512(x)));
}

INLINE Vec load(const float* from, Lanes lanes) {
  return Vec(_mm512_maskz_loadu_ps(lanes, from));
}

INLINE Vec load(const bf16* from, Lanes lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, from);
  return Vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE void store(float* to, Vec x, Lanes lanes) {
  _mm512_mask_storeu_ps(to, lanes, __m512(x));
}

INLINE float sum(Vec x) { return _mm512_reduce_add_ps(__m512(x)); }

#else

using Lanes = int;

INLINE Lanes first_lanes(int64_t count) {
  return count >= LANES ? LANES : int(count);
}

INLINE Vec only(Vec x, Lanes lanes) {
  for (int i = lanes; i < LANES; i++) x[i] = 0;
  return x;
}

INLINE Vec load(const float* from, Lanes lanes) {
  if (lanes == LANES) return Vec(_mm256_loadu_ps(from));
  Vec x{};
  for (int i = 0; i < lanes; i++) x[i] = from[i];
  return x;
}

INLINE Vec load(const bf16* from, Lanes lanes) {
  uint16_t bits[LANES] = {};
  if (lanes == LANES)
    std::memcpy(bits, from, sizeof(bits));
  else
    for (int i = 0; i < lanes; i++) bits[i] = from[i].bits;
  const __m128i all = _mm_loadu_si128(reinterpret_cast<__m128i*>(bits));
  return Vec(_mm256_slli_epi32(_mm256_cvtepu16_epi32(all), 16));
}

INLINE void store(float* to, Vec x, Lanes lanes) {
  if (lanes == LANES) return _mm256_storeu_ps(to, __m256(x));
  for (int i = 0; i < lanes; i++) to[i] = x[i];
}

INLINE float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

#endif

#ifdef __AVX512BF16__

INLINE __m256i bf16_bits(Vec x) {
  return __m256i(_mm512_cvtneps_pbh(__m512(x)));
}

INLINE void store(bf16* to, Vec x, Lanes lanes) {
  _mm256_mask_storeu_epi16(to, lanes, bf16_bits(x));
}

INLINE Vec rounded(Vec x, bf16) {
  return Vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_bits(x)), 16));
}

#else

// To the nearest, of two as near to the even one; NaN to a quiet one.
INLINE Ints bf16_bits(Vec x) {
  const Ints bits = Ints(x);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (x == x ? rounded : bits | 0x400000) >> 16;
}

INLINE void store(bf16* to, Vec x, Lanes lanes) {
  const Ints bits = bf16_bits(x);
#ifdef __AVX512F__
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(__m512i(bits)));
#else
  for (int i = 0; i < lanes; i++) to[i].bits = uint16_t(bits[i]);
#endif
}

INLINE Vec rounded(Vec x, bf16) { return Vec(bf16_bits(x) << 16); }

#endif

INLINE Vec rounded(Vec x, float) { return x; }

// All lanes, of memory that is aligned.
INLINE Vec load(const float* from) {
  return *reinterpret_cast<const Vec*>(from);
}

INLINE void store(float* to, Vec x) { *reinterpret_cast<Vec*>(to) = x; }

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

using Buffer = std::unique_ptr<float, Free>;

inline Buffer allocate(size_t floats) {
  const size_t bytes = (floats / 16 + 1) * 64;  // 0 bytes may give null
  Buffer buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!buffer) {
    std::fprintf(stderr, "mmconv2former: no memory for %zu bytes\n", bytes);
    std::abort();  // no exception may leave a thread of OpenMP
  }
  return buffer;
}

// (1 + erf(x / sqrt(2))) / 2, as 1/2 + x * P(x * x) / Q(x * x), a fit with an
// error of 2.3e-8; from the limit on the rest is below the rounding of fp32.
// Of the numbers near 5.5 it is the one at whose negative the fit, with a single
// rounding in each step, is next to 0: 3e-14, which GELU multiplies by what may
// be far below. Another comparison would cost GELU up to 8 %.
INLINE Vec normal_cdf(Vec x) {
  const Vec limit = broadcast(5.50529099f);
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  const Vec s = x * x;
  Vec p = s * 2.276833122e-8f + 6.346243481e-6f;
  p = p * s + 1.683504670e-4f;
  p = p * s + 4.674388561e-3f;
  p = p * s + 3.380882740e-2f;
  p = p * s + 3.989422321e-1f;
  Vec q = s * 1.197616825e-6f + 7.348064537e-5f;
  q = q * s + 1.881792909e-3f;
  q = q * s + 2.862028778e-2f;
  q = q * s + 2.514121532e-1f;
  q = q * s + 1.f;
  return x * (p / q) + 0.5f;
}

// exp(x), x <= 0. NaN gives a number.
INLINE Vec exp_negative(Vec x) {
  const Vec least = broadcast(-87.f);  // 1e-38; what is smaller becomes 0
  const Vec a = x > least ? x : least;
  // The sum's last bits are those of the nearest integer.
  const Vec shifted = a * 1.442695041f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  const Vec r = (a - n * 0.693359375f) + n * 2.121944401e-4f;
  Vec p = r * 1.989927696e-4f + 1.393364626e-3f;
  p = p * r + 8.333298378e-3f;
  p = p * r + 4.166646674e-2f;
  p = p * r + 1.666666716e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.f;
  const Vec power = Vec((Ints(shifted) - (0x4b400000 - 127)) << 23);
  return x < least ? Vec{} : p * power;
}

INLINE Vec gelu(Vec x) { return x * normal_cdf(x); }

// GELU with its derivative.
struct Gelu {
  Vec out, slope;

  INLINE explicit Gelu(Vec x) {
    const Vec cdf = normal_cdf(x);
    out = x * cdf;
    slope = cdf + x * exp_negative(x * x * -0.5f) * 0.3989422804f;
  }
};

// Calls f with an object of the type that a number from Python stands for.
template <class F>
void with_type(int is_bf16, F f) {
  if (is_bf16)
    f(bf16{});
  else
    f(float{});
}

// The same for two.
template <class F>
void with_types(int is_bf16, int other_is_bf16, F f) {
  with_type(is_bf16, [&](auto type) {
    with_type(other_is_bf16, [&](auto other_type) { f(type, other_type); });
  });
}
