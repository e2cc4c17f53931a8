// What the native kernels share: vectors, products with rows as they lie, and threads.
#ifndef LM_NATIVE_H_
#define LM_NATIVE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace lm {

namespace ffi = xla::ffi;

constexpr int kLanes = 16;  // of a vector; narrower units take it in parts
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct BFloat16 { uint16_t bits; };

inline float ToFloat(float x) { return x; }
inline float ToFloat(int8_t x) { return x; }
inline float ToFloat(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Floats Load(const float* p) {
  Floats value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline Floats Load(const BFloat16* p) {
  Ints bits;
  for (int i = 0; i < kLanes; i++) bits[i] = p[i].bits;
  return (Floats)(bits << 16);
}
inline Floats Load(const int8_t* p) {
  Ints value;
  for (int i = 0; i < kLanes; i++) value[i] = p[i];
  return __builtin_convertvector(value, Floats);
}
inline void Store(Floats x, float* p) { std::memcpy(p, &x, sizeof x); }

inline float Sum(Floats x) {
  float parts[kLanes];
  std::memcpy(parts, &x, sizeof x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// How many numbers of a row of w and of x meet at once, and what they add to sums.
template <typename X, typename W>
struct Step {
  static constexpr int kSize = kLanes;
  typedef Floats Numbers;
  template <typename T>
  static Floats From(const T* p) { return Load(p); }
  static Floats Add(Floats sums, Floats w, Floats x) { return sums + w * x; }
};
#ifdef __AVX512BF16__
template <>
struct Step<BFloat16, BFloat16> {
  static constexpr int kSize = 2 * kLanes;
  typedef __m512bh Numbers;
  static __m512bh From(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Floats Add(Floats sums, __m512bh w, __m512bh x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sums, w, x);
  }
};
#endif

// y[m, n] = scales[n] * sum_k x[m, k] w[n, k]. Rows of w are read as they lie, four at a time, and
// meet all rows of x; meanwhile the next four come.
template <typename X, typename W>
struct Product {
  const X* x;           // [M, K]
  const W* w;           // [N, K]
  const float* scales;  // [N], or null
  float* y;             // [M, N], rows `stride` apart
  int64_t M, K, stride;

  void Range(int64_t n, int64_t end) const {
    for (; n + 4 <= end; n += 4) Columns<4>(n);
    for (; n < end; n++) Columns<1>(n);
  }

  template <int kColumns>
  void Columns(int64_t n) const {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) Tile<4, kColumns>(m, n);
    if (m + 2 <= M) Tile<2, kColumns>(m, n), m += 2;
    if (m < M) Tile<1, kColumns>(m, n);
  }

  template <int kRows, int kColumns>
  void Tile(int64_t m, int64_t n) const {
    using Step = lm::Step<X, W>;
    const X* rows = x + m * K;
    const W* columns = w + n * K;
    Floats sums[kColumns][kRows] = {};
    int64_t k = 0;
    for (; k + Step::kSize <= K; k += Step::kSize) {
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; j++) {
        __builtin_prefetch(columns + (kColumns + j) * K + k);
        typename Step::Numbers weights = Step::From(columns + j * K + k);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++)
          sums[j][i] = Step::Add(sums[j][i], weights, Step::From(rows + i * K + k));
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; j++) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; i++) {
        float sum = Sum(sums[j][i]);
        for (int64_t l = k; l < K; l++)
          sum += ToFloat(rows[i * K + l]) * ToFloat(columns[j * K + l]);
        y[(m + i) * stride + n + j] = scales ? scales[n + j] * sum : sum;
      }
    }
  }
};

// Calls work(part) for all parts; threads of the pool take one after the other until none is left,
// so that a late thread holds nothing up.
template <typename F>
void InParallel(ffi::ThreadPool& pool, int64_t threads, int64_t parts, const F& work) {
  struct State { std::atomic<int64_t> taken{0}, done{0}; };
  auto state = std::make_shared<State>();
  auto take = [state, parts, work] {
    for (int64_t part; (part = state->taken.fetch_add(1)) < parts;) {
      work(part);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  threads = std::min<int64_t>({threads, parts, pool.num_threads()});
  for (int64_t i = 1; i < threads; i++) pool.Schedule(std::function<void()>(take));
  take();
  for (int i = 0; state->done.load(std::memory_order_acquire) < parts; i++)
    if (i > 1000) std::this_thread::yield();
}

}  // namespace lm

#endif  // LM_NATIVE_H_
