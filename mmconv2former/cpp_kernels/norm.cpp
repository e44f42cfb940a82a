// Layer norm and layer scale: passes over positions, (N * H * W, C).
#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

// Positions whose sums are kept apart, and then added up in a fixed order.
constexpr int64_t CHUNK = 16;

// f(first channel, which lanes)
template <class F>
INLINE void for_channels(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) f(c, first_lanes(LANES));
  if (c < channels) f(c, first_lanes(channels - c));
}

// Length of a row of whole vectors. What is written to a part of a vector is
// slow to be read again at once.
int64_t padded(int64_t channels) {
  return (channels + LANES - 1) / LANES * LANES;
}

// Calls f(row, buffer) for all rows, with a padded row of memory.
template <class F>
void for_rows(int64_t rows, int64_t channels, int threads, F f) {
#pragma omp parallel num_threads(threads)
  {
    const Buffer buffer = allocate(padded(channels));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) f(row, buffer.get());
  }
}

// Calls f(row, buffer, sums) for all rows, with two rows of memory and some
// rows of sums, all padded, and adds up the sums.
template <class F>
void sum_rows(int64_t rows, int64_t channels, int kinds, float* out,
              int threads, F f) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK, step = padded(channels);
  const int64_t size = kinds * step;
  const Buffer parts = allocate(chunks * size);
#pragma omp parallel num_threads(threads)
  {
    const Buffer buffer = allocate(2 * step);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      float* sums = parts.get() + chunk * size;
      std::fill_n(sums, size, 0.f);
      const int64_t end = std::min(rows, (chunk + 1) * CHUNK);
      for (int64_t row = chunk * CHUNK; row < end; row++)
        f(row, buffer.get(), sums);
    }
  }
  std::vector<double> totals(size);
  double* total = totals.data();
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const float* sums = parts.get() + chunk * size;
    for (int64_t i = 0; i < size; i++) total[i] += sums[i];
  }
  for (int kind = 0; kind < kinds; kind++)
    std::copy_n(total + kind * step, channels, out + kind * channels);
}

INLINE void add(float* sums, Vec x) { store(sums, load(sums) + x); }

// Where positions stand among patches, P x P positions that follow each other.
struct Patches {
  int64_t height, width, size;

  // -1 for what fills no patch.
  int64_t operator[](int64_t row) const {
    if (size == 1) return row;
    const int64_t x = row % width, y = row / width % height;
    const int64_t sample = row / width / height;
    const int64_t rows = height / size, columns = width / size;
    if (y / size >= rows || x / size >= columns) return -1;
    const int64_t patch = (sample * rows + y / size) * columns + x / size;
    return (patch * size + y % size) * size + x % size;
  }
};

struct Moments {
  float mean, rstd;
};

// Of read(first channel, which lanes), which is written to the buffer.
template <class Read>
INLINE Moments moments_of(int64_t channels, float eps, float* buffer,
                          Read read) {
  Vec total{};
  for_channels(channels, [&](int64_t c, Lanes lanes) INLINED {
    const Vec value = read(c, lanes);
    store(buffer + c, value);
    total += value;
  });
  const float mean = sum(total) / channels;
  Vec squares{};
  for_channels(channels, [&](int64_t c, Lanes lanes) INLINED {
    const Vec centred = only(load(buffer + c) - mean, lanes);
    squares += centred * centred;
  });
  return {mean, 1 / __builtin_sqrtf(sum(squares) / channels + eps)};
}

// What follows takes one position.

template <class O, class Read>
INLINE void norm_row(const float* weight, const float* bias, float eps, O* out,
                     int64_t channels, float* buffer, Read read) {
  const Moments m = moments_of(channels, eps, buffer, read);
  for_channels(channels, [&](int64_t c, Lanes lanes) INLINED {
    Vec value = (load(buffer + c) - m.mean) * m.rstd;
    if (weight)
      value = value * load(weight + c, lanes) + load(bias + c, lanes);
    store(out + c, value, lanes);
  });
}

// Gradients of the norm. T: type of the input and its gradient, G: of the
// output and its gradient.
template <class T, class G>
struct NormBackward {
  const G* grad;
  const T* x;
  const float *weight, *bias;
  float eps;
  const T* residual;  // or null
  T* grad_x;
  G* normed;
  int64_t channels;

  // Of the position that begins at ``at``, and among the patches at
  // ``source``. sums: of the gradients of weight and bias. The gradient of x
  // goes to write(first channel, which lanes, values), too.
  template <class Write>
  INLINE void row(int64_t at, int64_t source, float* buffer, float* sums,
                  Write write) const {
    float* grads = buffer + padded(channels);
    float* bias_sums = sums + padded(channels);
    const Moments m = moments_of(channels, eps, buffer,
                                 [&](int64_t c, Lanes lanes) INLINED {
      return load(x + at + c, lanes);
    });
    Vec total{}, product{};
    for_channels(channels, [&](int64_t c, Lanes lanes) INLINED {
      const Vec value = only((load(buffer + c) - m.mean) * m.rstd, lanes);
      const Vec w = load(weight + c, lanes);
      const Vec g = load(grad + source + c, lanes);
      store(normed + source + c, value * w + load(bias + c, lanes), lanes);
      add(sums + c, g * value);
      add(bias_sums + c, g);
      store(buffer + c, value);
      store(grads + c, g * w);
      total += g * w;
      product += g * w * value;
    });
    const float mean = sum(total) / channels;
    const float slope = sum(product) / channels;
    for_channels(channels, [&](int64_t c, Lanes lanes) INLINED {
      Vec out = (load(grads + c) - mean - load(buffer + c) * slope) * m.rstd;
      if (residual) out += load(residual + at + c, lanes);
      store(grad_x + at + c, out, lanes);
      write(c, lanes, rounded(out, T{}));
    });
  }
};

// From pointers of Python.
template <class T, class G>
NormBackward<T, G> norm_backward(T, G, const void* grad, const void* x,
                                 const float* weight, const float* bias,
                                 float eps, const void* residual,
                                 void* grad_x, void* normed,
                                 int64_t channels) {
  return {static_cast<const G*>(grad),
          static_cast<const T*>(x),
          weight,
          bias,
          eps,
          static_cast<const T*>(residual),
          static_cast<T*>(grad_x),
          static_cast<G*>(normed),
          channels};
}

// x + keep * scale * y
template <class T, class Y>
INLINE Vec scaled_sum(const T* x, const Y* y, const float* scale, float keep,
                      int64_t c, Lanes lanes) {
  Vec by = broadcast(keep);
  if (scale) by *= load(scale + c, lanes);
  return load(x + c, lanes) + load(y + c, lanes) * by;
}

// own: the gradient of y as if the scale were 1, whose sums these are; like
// scaled, only if wanted.
template <class G>
INLINE void scaled_sum_backward(Vec grad, const float* scale, float keep,
                                G* own, G* scaled, float* sums, int64_t c,
                                Lanes lanes) {
  grad = only(grad * keep, lanes);
  add(sums + c, grad);
  if (own) store(own + c, grad, lanes);
  if (scaled) store(scaled + c, grad * load(scale + c, lanes), lanes);
}

// Pointers that may be null stay so.
template <class T>
INLINE T* from(T* pointer, int64_t offset) {
  return pointer ? pointer + offset : pointer;
}

INLINE float keep_of(const float* keep, int64_t sample) {
  return keep ? keep[sample] : 1.f;
}

}  // namespace

extern "C" {

void mmc_layer_norm(const void* x_, const float* weight, const float* bias,
                    float eps, void* out_, int64_t n, int64_t height,
                    int64_t width, int64_t c, int patch, int is_bf16,
                    int out_is_bf16, int threads) {
  const Patches patches{height, width, patch};
  with_types(is_bf16, out_is_bf16, [&](auto type, auto out_type) {
    const auto all = static_cast<const decltype(type)*>(x_);
    const auto out = static_cast<decltype(out_type)*>(out_);
    for_rows(n * height * width, c, threads,
             [=](int64_t row, float* buffer) INLINED {
      const int64_t target = patches[row];
      if (target < 0) return;
      const auto x = all + row * c;
      norm_row(
          weight, bias, eps, out + target * c, c, buffer,
          [=](int64_t i, Lanes lanes) INLINED { return load(x + i, lanes); });
    });
  });
}

void mmc_layer_norm_backward(const void* grad, const void* x,
                             const float* weight, const float* bias, float eps,
                             const void* residual, void* grad_x, void* normed,
                             float* sums, int64_t n, int64_t height,
                             int64_t width, int64_t c, int patch, int is_bf16,
                             int grad_is_bf16, int threads) {
  const Patches patches{height, width, patch};
  with_types(is_bf16, grad_is_bf16, [&](auto type, auto grad_type) {
    const auto norm = norm_backward(type, grad_type, grad, x, weight, bias,
                                    eps, residual, grad_x, normed, c);
    sum_rows(n * height * width, c, 2, sums, threads,
             [=](int64_t row, float* buffer, float* part) INLINED {
      const int64_t at = row * c, source = patches[row] * c;
      if (source >= 0)
        return norm.row(at, source, buffer, part,
                        [](int64_t, Lanes, Vec) INLINED {});
      for_channels(c, [&](int64_t i, Lanes lanes) INLINED {
        store(norm.grad_x + at + i,
              norm.residual ? load(norm.residual + at + i, lanes) : Vec{},
              lanes);
      });
    });
  });
}

// rows: of a sample, here and in what follows.
void mmc_scale_residual(const void* x_, const void* y_, const float* scale,
                        const float* keep, void* out_, int64_t n, int64_t rows,
                        int64_t c, int is_bf16, int y_is_bf16, int threads) {
  with_types(is_bf16, y_is_bf16, [&](auto type, auto y_type) {
    const auto x = static_cast<const decltype(type)*>(x_);
    const auto y = static_cast<const decltype(y_type)*>(y_);
    const auto out = static_cast<decltype(type)*>(out_);
    for_rows(n * rows, 0, threads, [=](int64_t row, float*) INLINED {
      const float factor = keep_of(keep, row / rows);
      const int64_t at = row * c;
      for_channels(c, [&](int64_t i, Lanes lanes) INLINED {
        store(out + at + i,
              scaled_sum(x + at, y + at, scale, factor, i, lanes), lanes);
      });
    });
  });
}

void mmc_scale_residual_norm(const void* x_, const void* y_,
                             const float* scale, const float* keep,
                             const float* weight, const float* bias, float eps,
                             void* out_, void* normed_, int64_t n,
                             int64_t rows, int64_t c, int is_bf16,
                             int y_is_bf16, int threads) {
  with_types(is_bf16, y_is_bf16, [&](auto type, auto y_type) {
    const auto x = static_cast<const decltype(type)*>(x_);
    const auto y = static_cast<const decltype(y_type)*>(y_);
    const auto out = static_cast<decltype(type)*>(out_);
    const auto normed = static_cast<decltype(y_type)*>(normed_);
    for_rows(n * rows, c, threads, [=](int64_t row, float* buffer) INLINED {
      const float factor = keep_of(keep, row / rows);
      const int64_t at = row * c;
      norm_row(weight, bias, eps, normed + at, c, buffer,
               [=](int64_t i, Lanes lanes) INLINED {
        const Vec value =
            scaled_sum(x + at, y + at, scale, factor, i, lanes);
        store(out + at + i, value, lanes);
        return rounded(value, decltype(type){});
      });
    });
  });
}

void mmc_scale_residual_backward(const void* grad_, const float* scale,
                                 const float* keep, void* own_, void* scaled_,
                                 float* sums, int64_t n, int64_t rows,
                                 int64_t c, int is_bf16, int out_is_bf16,
                                 int threads) {
  with_types(is_bf16, out_is_bf16, [&](auto type, auto out_type) {
    const auto grad = static_cast<const decltype(type)*>(grad_);
    const auto own = static_cast<decltype(out_type)*>(own_);
    const auto scaled = static_cast<decltype(out_type)*>(scaled_);
    sum_rows(n * rows, c, 1, sums, threads,
             [=](int64_t row, float*, float* part) INLINED {
      const float factor = keep_of(keep, row / rows);
      const int64_t at = row * c;
      for_channels(c, [&](int64_t i, Lanes lanes) INLINED {
        scaled_sum_backward(load(grad + at + i, lanes), scale, factor,
                            from(own, at), from(scaled, at), part, i, lanes);
      });
    });
  });
}

// sums: (3, C), two of the norm and one of the branch.
void mmc_scale_residual_norm_backward(
    const void* grad, const void* x, const float* weight, const float* bias,
    float eps, const void* residual, const float* scale, const float* keep,
    void* grad_x, void* normed, void* own_, void* scaled_, float* sums,
    int64_t n, int64_t rows, int64_t c, int is_bf16, int grad_is_bf16,
    int threads) {
  with_types(is_bf16, grad_is_bf16, [&](auto type, auto grad_type) {
    const auto norm = norm_backward(type, grad_type, grad, x, weight, bias,
                                    eps, residual, grad_x, normed, c);
    const auto own = static_cast<decltype(grad_type)*>(own_);
    const auto scaled = static_cast<decltype(grad_type)*>(scaled_);
    sum_rows(n * rows, c, 3, sums, threads,
             [=](int64_t row, float* buffer, float* part) INLINED {
      const float factor = keep_of(keep, row / rows);
      const int64_t at = row * c;
      norm.row(at, at, buffer, part,
               [=](int64_t i, Lanes lanes, Vec value) INLINED {
        scaled_sum_backward(value, scale, factor, from(own, at),
                            from(scaled, at), part + 2 * padded(c), i, lanes);
      });
    });
  });
}

}  // extern "C"
