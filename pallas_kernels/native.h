// What the native kernels share: vectors, products with rows as they lie, and threads.
#ifndef LM_NATIVE_H_
#define LM_NATIVE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
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

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that look out for the next product for a while before they sleep: to wake one takes as
// long as most products of a decode step.
class Team {
 public:
  static Team& Of(int64_t threads) {
    static Team* team = new Team(threads - 1);  // never destroyed: its threads may be at work
    return *team;
  }

  // Calls work(part) for all parts, each thread one after the other until none is left, so that a
  // late thread holds nothing up. Where the team is at work already the caller does all.
  void Run(int64_t threads, int64_t parts, const std::function<void(int64_t)>& work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || threads < 2 || parts < 2) {
      for (int64_t part = 0; part < parts; part++) work(part);
      return;
    }
    work_ = &work, wanted_ = threads - 1, done_ = 0;
    uint64_t ticket = ((ticket_ >> 32) + 1) << 32 | parts;
    ticket_ = ticket;
    ticket_.notify_all();
    Take(ticket);
    for (int i = 0; done_.load(std::memory_order_acquire) < parts; i++) {
      if (i < kLooks) Pause();
      else std::this_thread::yield();  // the other was put to sleep at its part
    }
  }

 private:
  static constexpr int kLooks = 1 << 14;  // some 0.2 ms

  explicit Team(int64_t threads) {
    for (int64_t i = 0; i < threads; i++) std::thread(&Team::Wait, this, i).detach();
  }

  void Wait(int64_t index) {
    for (uint64_t seen = 0;;) {
      uint64_t ticket = ticket_;
      for (int i = 0; ticket >> 32 == seen; ticket = ticket_) {
        if (++i < kLooks) Pause();
        else ticket_.wait(ticket);
      }
      seen = ticket >> 32;
      if (index < wanted_) Take(ticket);
    }
  }

  // Parts of this ticket's round. While one is left, or not done, the round stands, and `work_`.
  void Take(uint64_t ticket) {
    for (uint64_t round = ticket >> 32; ticket >> 32 == round && uint32_t(ticket);) {
      auto* work = work_.load();
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1)) continue;
      (*work)(uint32_t(ticket) - 1);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_;
    }
  }

  std::mutex turn_;
  std::atomic<uint64_t> ticket_{0};  // the round's number, and below it how many parts are left
  std::atomic<const std::function<void(int64_t)>*> work_{nullptr};
  std::atomic<int64_t> wanted_{0}, done_{0};
};

// Calls work(part) for all parts, with so many threads of those that XLA has.
inline void InParallel(ffi::ThreadPool& pool, int64_t threads, int64_t parts,
                       const std::function<void(int64_t)>& work) {
  threads = std::min<int64_t>({threads, parts, pool.num_threads()});
  Team::Of(pool.num_threads()).Run(threads, parts, work);
}

}  // namespace lm

#endif  // LM_NATIVE_H_
