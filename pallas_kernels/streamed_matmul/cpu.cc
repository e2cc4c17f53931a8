// y[m, n] = scales[n] * sum_k x[m, k] w[n, k], as fast as memory gives w.
#include "native.h"

namespace lm {
namespace {

constexpr int64_t kLeastWork = 1 << 16;  // multiplications that are worth a thread

ffi::Error StreamedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                          ffi::Buffer<ffi::F32> scales, ffi::ResultBuffer<ffi::F32> y) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = w.dimensions()[0];
  int64_t threads = M * K * N / kLeastWork, parts = threads > 1 ? 4 * pool.num_threads() : 1;
  int64_t size = (N + parts * 4 - 1) / (parts * 4) * 4;
  auto run = [&](auto of_x, auto of_w) {
    using X = decltype(of_x);
    using W = decltype(of_w);
    Product<X, W> product{
        static_cast<const X*>(x.untyped_data()), static_cast<const W*>(w.untyped_data()),
        scales.element_count() ? scales.typed_data() : nullptr, y->typed_data(), M, K, N};
    InParallel(pool, threads, parts, [=](int64_t part) {
      product.Range(part * size, std::min(N, (part + 1) * size));
    });
    return ffi::Error::Success();
  };
  bool is_narrow = x.element_type() == ffi::BF16;
  switch (w.element_type()) {
    case ffi::F32: return run(float(), float());
    case ffi::BF16: return is_narrow ? run(BFloat16(), BFloat16()) : run(float(), BFloat16());
    case ffi::S8: return run(float(), int8_t());
    default: return ffi::Error::InvalidArgument("w must be float32, bfloat16 or int8");
  }
}

// Rows of w as they lie; all bits of one that is not there are set, which is NaN of floats.
ffi::Error StreamedRows(ffi::AnyBuffer w, ffi::Buffer<ffi::S32> rows,
                        ffi::Result<ffi::AnyBuffer> out) {
  int64_t N = w.dimensions()[0], bytes = N ? w.size_bytes() / N : 0;
  const char* from = static_cast<const char*>(w.untyped_data());
  char* to = static_cast<char*>(out->untyped_data());
  for (int64_t i = 0; i < int64_t(rows.element_count()); i++) {
    int64_t row = rows.typed_data()[i];
    if (0 <= row && row < N) std::memcpy(to + i * bytes, from + row * bytes, bytes);
    else std::memset(to + i * bytes, 0xff, bytes);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lm

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lm_streamed_matmul, lm::StreamedMatmul,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>().Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lm_streamed_rows, lm::StreamedRows,
    xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Ret<xla::ffi::AnyBuffer>());
