// Attention of the newest tokens over a cache, as `api.py` says it: each key and value that a query
// sees is read once for all queries of its head, where it lies.
#include <cmath>
#include <vector>

#include "native.h"

namespace lm {
namespace {

// e^x for x <= 0, off by 2e-7 of itself: 2^n e^f, |f| <= log(2) / 2, the latter by its series.
inline Floats Exp(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  Floats scaled = x * 1.44269504f;
  Ints n = __builtin_convertvector(scaled - 0.5f, Ints);  // rounds towards 0, and scaled <= 0
  Floats f = x - __builtin_convertvector(n, Floats) * 0.693359375f +
             __builtin_convertvector(n, Floats) * 2.12194440e-4f;
  Floats y = Floats{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * f + c;
  return y * (Floats)((n + 127) << 23);
}

template <typename W>
struct Attention {
  const float* query;                // [B, T, N, H]
  const W *key, *value;              // [pages, K, page, H]
  const float *key_scale, *value_scale;  // [pages, K, page], or null
  const int32_t *lengths, *table;    // [B], [B, pages of a row]
  const float *bias, *sinks;         // [1 or B, N, T, S], [N]; or null
  float* out;                        // [B, T, N, H]
  int64_t B, T, N, H, K, page, pages, bias_stride;
  int64_t window;                    // 0: all
  float scale, softcap;              // softcap 0: none

  // All queries of a key-value head of a row.
  void Head(int64_t b, int64_t k) const {
    int64_t group = N / K, M = T * group, S = pages * page;
    int64_t end = std::clamp<int64_t>(lengths[b], 0, S);
    int64_t start = window ? std::max<int64_t>(0, end - T + 1 - window) : 0;
    int64_t stride = (end - start + kLanes) / kLanes * kLanes;
    std::vector<float> x(M * H), probs(M * stride), sums(M * H);
    for (int64_t m = 0; m < M; m++)  // queries of one head of all t, then of the next
      std::memcpy(&x[m * H], Query(b, m % T, k * group + m / T), H * sizeof(float));
    for (int64_t s = start; s < end;) {
      int64_t at = Place(b, k, s), size = std::min(page - s % page, end - s);
      Product<float, W>{x.data(), key + at * H, key_scale ? key_scale + at : nullptr,
                 &probs[s - start], M, H, stride}.Range(0, size);
      s += size;
    }
    for (int64_t m = 0; m < M; m++)
      Softmax(&probs[m * stride], b, m % T, k * group + m / T, start, end, stride);
    for (int64_t s = start; s < end;) {
      int64_t at = Place(b, k, s), size = std::min(page - s % page, end - s);
      if (value_scale)
        for (int64_t m = 0; m < M; m++)
          for (int64_t i = 0; i < size; i++)
            probs[m * stride + s - start + i] *= value_scale[at + i];
      const float* p = &probs[s - start];
      int64_t m = 0;
      for (; m + 4 <= M; m += 4) Mix<4>(p + m * stride, value + at * H, &sums[m * H], size, stride);
      for (; m < M; m++) Mix<1>(p + m * stride, value + at * H, &sums[m * H], size, stride);
      s += size;
    }
    for (int64_t m = 0; m < M; m++)
      std::memcpy(out + (Query(b, m % T, k * group + m / T) - query), &sums[m * H],
                  H * sizeof(float));
  }

  const float* Query(int64_t b, int64_t t, int64_t n) const {
    return query + ((b * T + t) * N + n) * H;
  }

  // Of token s of row b in the cache, in vectors of H.
  int64_t Place(int64_t b, int64_t k, int64_t s) const {
    return (table[b * pages + s / page] * K + k) * page + s % page;
  }

  // Products of a query with keys [start, end) to probabilities.
  void Softmax(float* p, int64_t b, int64_t t, int64_t n, int64_t start, int64_t end,
               int64_t stride) const {
    int64_t stop = std::max(start, end - T + t + 1);
    int64_t first = window ? std::max(start, stop - window) : start;
    float largest = sinks ? sinks[n] : -INFINITY;
    const float* added = bias ? bias + b * bias_stride + (n * T + t) * pages * page : nullptr;
    for (int64_t s = first; s < stop; s++) {
      float score = p[s - start] * scale;
      if (softcap) score = softcap * std::tanh(score / softcap);
      if (added) score += added[s];
      p[s - start] = score;
      largest = std::max(largest, score);
    }
    std::fill(p, p + (first - start), -INFINITY);
    std::fill(p + (stop - start), p + stride, -INFINITY);
    if (largest == -INFINITY) largest = 0;  // sees no key, and gives zeros
    Floats sums{};
    for (int64_t i = 0; i < stride; i += kLanes) {
      Floats score = Load(p + i), y = Exp(score - largest);
      y = score == -INFINITY ? Floats{} : y;
      sums += y;
      Store(y, p + i);
    }
    float sum = Sum(sums) + (sinks ? std::exp(sinks[n] - largest) : 0.0f);
    float weight = 1 / std::max(sum, 1e-30f);
    for (int64_t i = 0; i < stride; i += kLanes) Store(Load(p + i) * weight, p + i);
  }

  // sums[m] += sum_s p[m, s] values[s] of kRows queries.
  template <int kRows>
  void Mix(const float* p, const W* values, float* sums, int64_t size, int64_t stride) const {
    int64_t h = 0;
    for (; h + 4 * kLanes <= H; h += 4 * kLanes) Block<kRows, 4>(p, values, sums, h, size, stride);
    for (; h + kLanes <= H; h += kLanes) Block<kRows, 1>(p, values, sums, h, size, stride);
    for (; h < H; h++)
      for (int i = 0; i < kRows; i++)
        for (int64_t s = 0; s < size; s++)
          sums[i * H + h] += p[i * stride + s] * ToFloat(values[s * H + h]);
  }

  template <int kRows, int kVectors>
  void Block(const float* p, const W* values, float* sums, int64_t h, int64_t size,
             int64_t stride) const {
    Floats y[kRows][kVectors];
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < kVectors; j++) y[i][j] = Load(sums + i * H + h + j * kLanes);
    for (int64_t s = 0; s < size; s++) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) {
        Floats v = Load(values + s * H + h + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) y[i][j] += v * p[i * stride + s];
      }
    }
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < kVectors; j++) Store(y[i][j], sums + i * H + h + j * kLanes);
  }
};

using FloatArray = ffi::Buffer<ffi::F32>;
using IntArray = ffi::Buffer<ffi::S32>;

inline const float* Given(const FloatArray& x) {
  return x.element_count() ? x.typed_data() : nullptr;
}

ffi::Error DecodeAttention(ffi::ThreadPool pool, FloatArray query, ffi::AnyBuffer key,
                           ffi::AnyBuffer value, IntArray lengths, IntArray table,
                           FloatArray key_scale, FloatArray value_scale, FloatArray bias,
                           FloatArray sinks, ffi::Result<FloatArray> out, int64_t window,
                           double scale, double softcap) {
  auto q = query.dimensions(), c = key.dimensions();
  int64_t B = q[0], T = q[1], N = q[2], H = q[3], K = c[1], page = c[2];
  int64_t pages = table.dimensions()[1];
  int64_t of_row = N * T * pages * page;  // elements of the bias
  int64_t bias_stride = int64_t(bias.element_count()) > of_row ? of_row : 0;
  auto run = [&](auto* keys) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(keys)>>;
    Attention<W> attention{
        query.typed_data(), keys, static_cast<const W*>(value.untyped_data()), Given(key_scale),
        Given(value_scale), lengths.typed_data(), table.typed_data(), Given(bias), Given(sinks),
        out->typed_data(), B, T, N, H, K, page, pages, bias_stride, window, float(scale),
        float(softcap)};
    InParallel(pool, B * K, B * K, [=](int64_t part) { attention.Head(part / K, part % K); });
    return ffi::Error::Success();
  };
  switch (key.element_type()) {
    case ffi::F32: return run(static_cast<const float*>(key.untyped_data()));
    case ffi::BF16: return run(static_cast<const BFloat16*>(key.untyped_data()));
    case ffi::S8: return run(static_cast<const int8_t*>(key.untyped_data()));
    default: return ffi::Error::InvalidArgument("keys must be float32, bfloat16 or int8");
  }
}

// Writes vectors of new tokens to their places in the cache, which is `out`'s memory already.
ffi::Error PutTokens(ffi::AnyBuffer cache, ffi::AnyBuffer tokens, IntArray rows, IntArray places,
                     ffi::Result<ffi::AnyBuffer> out) {
  auto shape = cache.dimensions();
  int64_t pages = shape[0], K = shape[1], page = shape[2];
  int64_t bytes = pages * K * page ? cache.size_bytes() / (pages * K * page) : 0;
  const char* from = static_cast<const char*>(tokens.untyped_data());
  char* to = static_cast<char*>(out->untyped_data());
  if (to != cache.untyped_data()) std::memcpy(to, cache.untyped_data(), cache.size_bytes());
  for (int64_t i = 0; i < int64_t(rows.element_count()); i++) {
    int64_t row = rows.typed_data()[i], place = places.typed_data()[i];
    if (row < 0 || row >= pages || place < 0 || place >= page) continue;
    for (int64_t k = 0; k < K; k++)
      std::memcpy(to + ((row * K + k) * page + place) * bytes, from + (i * K + k) * bytes, bytes);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lm

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lm_decode_attention, lm::DecodeAttention,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<lm::FloatArray>()
        .Arg<xla::ffi::AnyBuffer>().Arg<xla::ffi::AnyBuffer>().Arg<lm::IntArray>()
        .Arg<lm::IntArray>().Arg<lm::FloatArray>().Arg<lm::FloatArray>().Arg<lm::FloatArray>()
        .Arg<lm::FloatArray>().Ret<lm::FloatArray>().Attr<int64_t>("window").Attr<double>("scale")
        .Attr<double>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lm_put_tokens, lm::PutTokens,
    xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Arg<xla::ffi::AnyBuffer>().Arg<lm::IntArray>()
        .Arg<lm::IntArray>().Ret<xla::ffi::AnyBuffer>());
