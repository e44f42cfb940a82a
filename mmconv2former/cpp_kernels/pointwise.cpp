// Layer norm and layer scale: passes over positions, (N * H * W, C).
#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

// Positions whose sums are kept apart, and then added up in a fixed order.
constexpr int64_t CHUNK = 16;

int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }

// f(first channel, which lanes)
template <class F>
INLINE void for_channels(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) f(c, first_lanes(LANES));
  if (c < channels) f(c, first_lanes(channels - c));
}

// Adds up (chunks, width) over the chunks.
void add_up(const std::vector<float>& parts, int64_t width, float* out) {
  std::vector<double> total(width);
  for (size_t at = 0; at < parts.size(); at += width)
    for (int64_t i = 0; i < width; i++) total[i] += parts[at + i];
  for (int64_t i = 0; i < width; i++) out[i] = float(total[i]);
}

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

// Reads a position into a buffer as well.
template <class T>
INLINE Moments moments_of(const T* x, int64_t channels, float eps,
                          float* buffer) {
  Vec total{};
  for_channels(channels, [&](int64_t c, Lanes lanes) {
    const Vec value = load(x + c, lanes);
    store(buffer + c, value, lanes);
    total += value;
  });
  const float mean = sum(total) / channels;
  Vec squares{};
  for_channels(channels, [&](int64_t c, Lanes lanes) {
    const Vec centred = only(load(buffer + c, lanes) - mean, lanes);
    squares += centred * centred;
  });
  return {mean, 1 / __builtin_sqrtf(sum(squares) / channels + eps)};
}

template <class T, class O>
void layer_norm(const T* x, const float* weight, const float* bias, float eps,
                O* out, int64_t rows, int64_t channels, const Patches& patches,
                int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(channels);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const int64_t target = patches[row];
      if (target < 0) continue;
      const Moments m =
          moments_of(x + row * channels, channels, eps, buffer.data());
      for_channels(channels, [&](int64_t c, Lanes lanes) {
        Vec value = (load(buffer.data() + c, lanes) - m.mean) * m.rstd;
        if (weight)
          value = value * load(weight + c, lanes) + load(bias + c, lanes);
        store(out + target * channels + c, value, lanes);
      });
    }
  }
}

// T: type of the input and its gradient, G: of the output and its gradient.
// sums: (2, C), gradients of weight and bias.
template <class T, class G>
void layer_norm_backward(const G* grad, const T* x, const float* weight,
                         const float* bias, float eps, const T* residual,
                         T* grad_x, G* normed, float* sums, int64_t rows,
                         int64_t channels, const Patches& patches,
                         int threads) {
  const int64_t chunks = chunks_of(rows);
  std::vector<float> parts(chunks * 2 * channels);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> values(channels), grads(channels);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      float* weight_sums = parts.data() + chunk * 2 * channels;
      float* bias_sums = weight_sums + channels;
      const int64_t end = std::min(rows, (chunk + 1) * CHUNK);
      for (int64_t row = chunk * CHUNK; row < end; row++) {
        const int64_t at = row * channels;
        const int64_t source = patches[row] * channels;
        if (source < 0) {
          for_channels(channels, [&](int64_t c, Lanes lanes) {
            store(grad_x + at + c,
                  residual ? load(residual + at + c, lanes) : Vec{}, lanes);
          });
          continue;
        }
        const Moments m = moments_of(x + at, channels, eps, values.data());
        Vec total{}, product{};
        for_channels(channels, [&](int64_t c, Lanes lanes) {
          const Vec value =
              only((load(values.data() + c, lanes) - m.mean) * m.rstd, lanes);
          const Vec w = load(weight + c, lanes);
          const Vec g = load(grad + source + c, lanes);
          store(normed + source + c, value * w + load(bias + c, lanes), lanes);
          store(weight_sums + c, load(weight_sums + c, lanes) + g * value,
                lanes);
          store(bias_sums + c, load(bias_sums + c, lanes) + g, lanes);
          store(values.data() + c, value, lanes);
          store(grads.data() + c, g * w, lanes);
          total += g * w;
          product += g * w * value;
        });
        const float mean = sum(total) / channels;
        const float slope = sum(product) / channels;
        for_channels(channels, [&](int64_t c, Lanes lanes) {
          const Vec value = load(values.data() + c, lanes);
          Vec out =
              (load(grads.data() + c, lanes) - mean - value * slope) * m.rstd;
          if (residual) out += load(residual + at + c, lanes);
          store(grad_x + at + c, out, lanes);
        });
      }
    }
  }
  add_up(parts, 2 * channels, sums);
}

template <class T, class Y>
void scale_residual(const T* x, const Y* y, const float* scale,
                    const float* keep, T* out, int64_t samples, int64_t rows,
                    int64_t channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < samples * rows; row++) {
    const float factor = keep ? keep[row / rows] : 1.f;
    const int64_t at = row * channels;
    for_channels(channels, [&](int64_t c, Lanes lanes) {
      const Vec by = load(scale + c, lanes) * factor;
      store(out + at + c,
            load(x + at + c, lanes) + load(y + at + c, lanes) * by, lanes);
    });
  }
}

// sums: (C, ), of the gradient
template <class T>
void scale_backward(const T* grad, const float* scale, T* out, float* sums,
                    int64_t rows, int64_t channels, int threads) {
  const int64_t chunks = chunks_of(rows);
  std::vector<float> parts(chunks * channels);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    float* part = parts.data() + chunk * channels;
    const int64_t end = std::min(rows, (chunk + 1) * CHUNK);
    for (int64_t row = chunk * CHUNK; row < end; row++) {
      const int64_t at = row * channels;
      for_channels(channels, [&](int64_t c, Lanes lanes) {
        const Vec g = load(grad + at + c, lanes);
        store(part + c, load(part + c, lanes) + g, lanes);
        store(out + at + c, g * load(scale + c, lanes), lanes);
      });
    }
  }
  add_up(parts, channels, sums);
}

}  // namespace

extern "C" {

void mmc_layer_norm(const void* x, const float* weight, const float* bias,
                    float eps, void* out, int64_t n, int64_t height,
                    int64_t width, int64_t c, int patch, int is_bf16,
                    int out_is_bf16, int threads) {
  with_type(is_bf16, [&](auto type) {
    with_type(out_is_bf16, [&](auto out_type) {
      layer_norm(static_cast<const decltype(type)*>(x), weight, bias, eps,
                 static_cast<decltype(out_type)*>(out), n * height * width, c,
                 {height, width, patch}, threads);
    });
  });
}

void mmc_layer_norm_backward(const void* grad, const void* x,
                             const float* weight, const float* bias, float eps,
                             const void* residual, void* grad_x, void* normed,
                             float* sums, int64_t n, int64_t height,
                             int64_t width, int64_t c, int patch, int is_bf16,
                             int grad_is_bf16, int threads) {
  with_type(is_bf16, [&](auto type) {
    with_type(grad_is_bf16, [&](auto grad_type) {
      using T = decltype(type);
      using G = decltype(grad_type);
      layer_norm_backward(static_cast<const G*>(grad),
                          static_cast<const T*>(x), weight, bias, eps,
                          static_cast<const T*>(residual),
                          static_cast<T*>(grad_x), static_cast<G*>(normed),
                          sums, n * height * width, c, {height, width, patch},
                          threads);
    });
  });
}

void mmc_scale_residual(const void* x, const void* y, const float* scale,
                        const float* keep, void* out, int64_t n, int64_t rows,
                        int64_t c, int is_bf16, int y_is_bf16, int threads) {
  with_type(is_bf16, [&](auto type) {
    with_type(y_is_bf16, [&](auto y_type) {
      using T = decltype(type);
      scale_residual(static_cast<const T*>(x),
                     static_cast<const decltype(y_type)*>(y), scale, keep,
                     static_cast<T*>(out), n, rows, c, threads);
    });
  });
}

void mmc_scale_backward(const void* grad, const float* scale, void* out,
                        float* sums, int64_t rows, int64_t c, int is_bf16,
                        int threads) {
  with_type(is_bf16, [&](auto type) {
    using T = decltype(type);
    scale_backward(static_cast<const T*>(grad), scale, static_cast<T*>(out),
                   sums, rows, c, threads);
  });
}

}  // extern "C"
