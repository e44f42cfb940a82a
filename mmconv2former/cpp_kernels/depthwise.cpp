// The middles of both branches of a block: depthwise convolutions with all
// that stands around them, and their gradients.
//
// Only inputs and outputs of an operator pass through memory; what is between
// them stays in the planes of a tile.
#include "planes.h"

namespace {

// Of a tile. Planes should fit into 512 kB, those of small kernels, which cost
// less to compute at the borders twice, into a part of that. The columns are a
// multiple of WIDE, so that what a convolution computes besides its outputs is
// beyond the image.
constexpr Area GATE_AREA{28, 56}, POSITION_AREA{14, 28};

template <class T>
void gate(const T* zv, const float* weight, const float* bias, T* out, T* a,
          const Shape& shape, const Kernel& kernel, int threads) {
  const int64_t c = shape.channels, width = shape.width;
  const int k = kernel.size;
  const Tiles tiles(shape, GATE_AREA);
  const Filters filters(weight, c, kernel, false);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tiles.size(); i++) {
    const Tile t = tiles[i];
    const Window window = window_of(shape, t);
    const auto z = map_of(zv, 2 * c, t), v = map_of(zv + c, 2 * c, t);
    const auto out_map = map_of(out, c, t);
    const Plane h =
        workspace.plane(0, t.rows + k - 1, whole_blocks(t.columns) + k - 1);
    fill(h, window_of(shape, t, kernel.padding()),
         [&](int64_t p, int64_t, int64_t) {
           return gelu(z.load(p, p + width));
         });
    convolve_plane(kernel, h, filters.of(t), load(bias + t.channel, t.lanes),
                   t.rows, t.columns, [&](int row, int column, Vec sum) {
                     const int64_t p = window.position(row, column);
                     if (a) map_of(a, c, t).store(p, sum);
                     out_map.store(p, sum * v.load(p, p + width));
                   });
  }
}

// T: type of the gradients, S: of what is stored.
template <class T, class S>
void gate_backward(const T* grad, const S* zv, const S* a, const float* weight,
                   T* grad_zv, T* out, float* grad_weight, float* sums,
                   const Shape& shape, const Kernel& kernel, int threads) {
  const int64_t c = shape.channels, width = shape.width;
  const int k = kernel.size, padding = kernel.padding();
  const Tiles tiles(shape, GATE_AREA);
  const Filters filters(weight, c, kernel, true);
  Sums parts(tiles, kernel, 3);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tiles.size(); i++) {
    const Tile t = tiles[i];
    const Window window = window_of(shape, t);
    const Window around = window_of(shape, t, padding);
    const int64_t rows = t.rows + k - 1;
    const int64_t columns = whole_blocks(t.columns) + k - 1;
    const auto z = map_of(zv, 2 * c, t), v = map_of(zv + c, 2 * c, t);
    const auto grad_z = map_of(grad_zv, 2 * c, t);
    const auto grad_v = map_of(grad_zv + c, 2 * c, t);
    const auto grad_map = map_of(grad, c, t);
    const auto a_map = map_of(a, c, t);
    const auto out_map = map_of(out, c, t);

    const Plane h = workspace.plane(0, rows, columns);
    fill(h, around, [&](int64_t p, int64_t, int64_t) {
      return gelu(z.load(p, p + width));
    });
    const Plane grad_a = workspace.plane(1, rows, columns);
    fill(grad_a, around, [&](int64_t p, int64_t, int64_t) {
      return grad_map.load(p, p + width) * v.load(p, p + width);
    });
    Sum sum_a, sum_z, sum_v;
    for (int row = 0; row < t.rows; row++)
      for (int column = 0; column < t.columns; column++) {
        const int64_t p = window.position(row, column);
        const Vec factor = a_map.load(p, p + width);
        const Vec here = grad_map.load(p) * factor;
        grad_v.store(p, here);
        out_map.store(p, v.load(p) * factor);
        sum_v += here;
        sum_a += load(grad_a.at(row + padding, column + padding));
      }
    correlate_planes(kernel, h, grad_a, padding, t.rows, t.columns,
                     parts.weight(i));
    convolve_plane(kernel, grad_a, filters.of(t), Vec{}, t.rows, t.columns,
                   [&](int row, int column, Vec grad_h) {
                     const int64_t p = window.position(row, column);
                     const Gelu gelu(z.load(p, p + width));
                     grad_z.store(p, grad_h * gelu.slope);
                     sum_z += grad_h * gelu.slope;
                   });
    parts.set(i, 0, sum_a.get());
    parts.set(i, 1, sum_z.get());
    parts.set(i, 2, sum_v.get());
  }
  parts.add_up(c, grad_weight, sums, threads);
}

template <class T>
void position(const T* z, const float* weight, const float* bias, T* out,
              const Shape& shape, const Kernel& kernel, int threads) {
  const int64_t c = shape.channels, width = shape.width;
  const int k = kernel.size, padding = kernel.padding();
  const Tiles tiles(shape, POSITION_AREA);
  const Filters filters(weight, c, kernel, false);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tiles.size(); i++) {
    const Tile t = tiles[i];
    const Window window = window_of(shape, t);
    const auto z_map = map_of(z, c, t);
    const auto out_map = map_of(out, c, t);
    const Plane h =
        workspace.plane(0, t.rows + k - 1, whole_blocks(t.columns) + k - 1);
    fill(h, window_of(shape, t, padding), [&](int64_t p, int64_t, int64_t) {
      return gelu(z_map.load(p, p + width));
    });
    convolve_plane(kernel, h, filters.of(t), load(bias + t.channel, t.lanes),
                   t.rows, t.columns, [&](int row, int column, Vec sum) {
                     const Vec here =
                         load(h.at(row + padding, column + padding));
                     out_map.store(window.position(row, column),
                                   here + gelu(sum));
                   });
  }
}

template <class T, class S>
void position_backward(const T* grad, const S* z, const float* weight,
                       const float* bias, T* grad_z, T* out,
                       float* grad_weight, float* sums, const Shape& shape,
                       const Kernel& kernel, int threads) {
  const int64_t c = shape.channels, width = shape.width;
  const int k = kernel.size, padding = kernel.padding();
  const Tiles tiles(shape, POSITION_AREA);
  const Filters filters(weight, c, kernel, false);
  const Filters flipped(weight, c, kernel, true);
  Sums parts(tiles, kernel, 2);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tiles.size(); i++) {
    const Tile t = tiles[i];
    const Window window = window_of(shape, t);
    const Window around = window_of(shape, t, padding);
    const auto z_map = map_of(z, c, t);
    const auto grad_map = map_of(grad, c, t);
    const auto grad_z_map = map_of(grad_z, c, t);
    const auto out_map = map_of(out, c, t);

    // The gradient of the convolution's output is wanted around the tile, too,
    // and so is this output, and its input around that.
    const int rows = t.rows + k - 1, columns = t.columns + k - 1;
    const Plane h =
        workspace.plane(0, rows + k - 1, whole_blocks(columns) + k - 1);
    const Plane slopes = workspace.plane(2, h.rows, h.columns);
    fill(h, window_of(shape, t, 2 * padding),
         [&](int64_t p, int64_t row, int64_t column) {
           const Gelu gelu(z_map.load(p, p + width));
           store(slopes.at(row, column), gelu.slope);
           return gelu.out;
         });
    const Plane grad_d =
        workspace.plane(1, rows, whole_blocks(t.columns) + k - 1);
    for (int row = 0; row < rows; row++)
      for (int64_t column = columns; column < grad_d.columns; column++)
        store(grad_d.at(row, column), Vec{});
    Sum sum_d, sum_z;
    convolve_plane(
        kernel, h, filters.of(t), load(bias + t.channel, t.lanes), rows,
        columns, [&](int row, int column, Vec d) {
          if (!around.has(row, column))
            return store(grad_d.at(row, column), Vec{});
          const int64_t p = around.position(row, column);
          const Gelu gelu(d);
          const Vec here = grad_map.load(p, p + width) * gelu.slope;
          store(grad_d.at(row, column), here);
          const int from_top = row - padding, from_left = column - padding;
          if (from_top < 0 || from_top >= t.rows || from_left < 0 ||
              from_left >= t.columns)
            return;
          sum_d += here;
          out_map.store(
              p, load(h.at(row + padding, column + padding)) + gelu.out);
        });
    // Without the border that only the convolution above has read.
    const Plane inner{h.at(padding, padding), h.rows, h.columns};
    correlate_planes(kernel, inner, grad_d, padding, t.rows, t.columns,
                     parts.weight(i));
    convolve_plane(
        kernel, grad_d, flipped.of(t), Vec{}, t.rows, t.columns,
        [&](int row, int column, Vec sum) {
          const int64_t p = window.position(row, column);
          const Vec here =
              (sum + grad_map.load(p)) *
              load(slopes.at(row + 2 * padding, column + 2 * padding));
          grad_z_map.store(p, here);
          sum_z += here;
        });
    parts.set(i, 0, sum_d.get());
    parts.set(i, 1, sum_z.get());
  }
  parts.add_up(c, grad_weight, sums, threads);
}

}  // namespace

extern "C" {

void mmc_gate(const void* zv, const float* weight, const float* bias, void* out,
              void* a, int64_t n, int64_t height, int64_t width, int64_t c,
              int size, int is_bf16, int threads) {
  with_type(is_bf16, [&](auto type) {
    using T = decltype(type);
    gate(static_cast<const T*>(zv), weight, bias, static_cast<T*>(out),
         static_cast<T*>(a), {n, height, width, c}, KERNELS[size / 2],
         threads);
  });
}

void mmc_gate_backward(const void* grad, const void* zv, const void* a,
                       const float* weight, void* grad_zv, void* out,
                       float* grad_weight, float* sums, int64_t n,
                       int64_t height, int64_t width, int64_t c, int size,
                       int is_bf16, int stored_is_bf16, int threads) {
  with_types(is_bf16, stored_is_bf16, [&](auto type, auto stored) {
    using T = decltype(type);
    using S = decltype(stored);
    gate_backward(static_cast<const T*>(grad), static_cast<const S*>(zv),
                  static_cast<const S*>(a), weight, static_cast<T*>(grad_zv),
                  static_cast<T*>(out), grad_weight, sums,
                  {n, height, width, c}, KERNELS[size / 2], threads);
  });
}

void mmc_position(const void* z, const float* weight, const float* bias,
                  void* out, int64_t n, int64_t height, int64_t width,
                  int64_t c, int size, int is_bf16, int threads) {
  with_type(is_bf16, [&](auto type) {
    using T = decltype(type);
    position(static_cast<const T*>(z), weight, bias, static_cast<T*>(out),
             {n, height, width, c}, KERNELS[size / 2], threads);
  });
}

void mmc_position_backward(const void* grad, const void* z,
                           const float* weight, const float* bias,
                           void* grad_z, void* out, float* grad_weight,
                           float* sums, int64_t n, int64_t height,
                           int64_t width, int64_t c, int size, int is_bf16,
                           int stored_is_bf16, int threads) {
  with_types(is_bf16, stored_is_bf16, [&](auto type, auto stored) {
    using T = decltype(type);
    using S = decltype(stored);
    position_backward(static_cast<const T*>(grad), static_cast<const S*>(z),
                      weight, bias, static_cast<T*>(grad_z),
                      static_cast<T*>(out), grad_weight, sums,
                      {n, height, width, c}, KERNELS[size / 2], threads);
  });
}

}  // extern "C"
