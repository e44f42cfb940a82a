// Depthwise convolutions between what stands around them in a block.
//
// Tensors are (N, H, W, C). An image is processed in tiles of its area and
// LANES of its channels. What the convolution reads is written to a plane
// first, a small map in fp32 with zeros around the image, where a vector is a
// position. It stays in the cache of its core, and so nothing but the inputs
// and outputs of the operator passes through memory. The sums of a tile are
// kept apart and added up in a fixed order.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "vector.h"

namespace {

// Positions in a row that a convolution computes at once: with 11 taps, what
// fits into 32 registers.
constexpr int WIDE = 14, NARROW = 7;

template <class F, int... I>
INLINE void unroll(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0) .. f(N - 1), of constants, so that arrays become registers.
template <int N, class F>
INLINE void unroll(F f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}

// Products of all pairs of a position p and a tap k that meet in the output
// p - k: f(x[p], p - k, k).
template <int K, int B, class F>
INLINE void for_pairs(const float* x, F f) {
  unroll<B + K - 1>([&](auto p) INLINED {
    const Vec value = load(x + p * LANES);
    unroll<K>([&](auto k) INLINED {
      constexpr int j = decltype(p)::value - decltype(k)::value;
      if constexpr (j >= 0 && j < B) f(value, j, k);
    });
  });
}

// B positions of a row of the output. x: that row of the plane, of K.
template <int K, int B>
void convolve(const float* x, int64_t stride, const float* weight, Vec start,
              float* out) {
  unroll<B>([&](auto j) INLINED {
    store(out + j * LANES, start);
  });
  for (int row = 0; row < K; row++) {
    Vec sums[B] = {}, taps[K];
    unroll<K>([&](auto k) INLINED {
      taps[k] = load(weight + (row * K + k) * LANES);
    });
    for_pairs<K, B>(x + row * stride,
                    [&](Vec value, int j, int k) INLINED {
                      sums[j] += value * taps[k];
                    });
    // A sum of sums, which rounds off less than one of K * K numbers.
    unroll<B>([&](auto j) INLINED {
      store(out + j * LANES, load(out + j * LANES) + sums[j]);
    });
  }
}

// What B positions of a row of the gradient add to that of the weight.
template <int K, int B>
void correlate(const float* x, int64_t stride, const float* grad,
               float* weight) {
  for (int row = 0; row < K; row++) {
    Vec taps[K], grads[B];
    unroll<K>([&](auto k) INLINED {
      taps[k] = load(weight + (row * K + k) * LANES);
    });
    unroll<B>([&](auto j) INLINED {
      grads[j] = load(grad + j * LANES);
    });
    for_pairs<K, B>(x + row * stride,
                    [&](Vec value, int j, int k) INLINED {
                      taps[k] += value * grads[j];
                    });
    unroll<K>([&](auto k) INLINED {
      store(weight + (row * K + k) * LANES, taps[k]);
    });
  }
}

// The functions above for kernels of one size, [0] for NARROW and [1] for WIDE.
struct Kernel {
  int size;
  void (*convolve[2])(const float*, int64_t, const float*, Vec, float*);
  void (*correlate[2])(const float*, int64_t, const float*, float*);

  int padding() const { return size / 2; }
  int taps() const { return size * size; }
};

template <int K>
constexpr Kernel kernel_of{K,
                           {convolve<K, NARROW>, convolve<K, WIDE>},
                           {correlate<K, NARROW>, correlate<K, WIDE>}};

// By half of their size. Python knows the largest one.
constexpr Kernel KERNELS[] = {
    kernel_of<1>,  kernel_of<3>,  kernel_of<5>,  kernel_of<7>,
    kernel_of<9>,  kernel_of<11>, kernel_of<13>, kernel_of<15>,
    kernel_of<17>, kernel_of<19>, kernel_of<21>};

// f(first column, whether WIDE, how many of the columns count)
template <class F>
void for_blocks(int columns, F f) {
  for (int first = 0; first < columns;) {
    const bool is_wide = columns - first > NARROW;
    const int size = is_wide ? WIDE : NARROW;
    f(first, is_wide, std::min(size, columns - first));
    first += size;
  }
}

// As many columns as for_blocks writes.
int whole_blocks(int columns) {
  const int rest = columns % WIDE;
  return columns - rest + (rest > NARROW ? WIDE : rest ? NARROW : 0);
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(size_t floats) {
  const size_t bytes = (floats * 4 + 63) / 64 * 64;
  Buffer buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!buffer) std::abort();
  return buffer;
}

struct Shape {
  int64_t samples, height, width, channels;
};

struct Tile {
  int64_t sample, top, left, channel;
  int rows, columns;
  Lanes lanes;
};

struct Area {
  int64_t rows, columns;
};

// Of a tile. Planes should fit into 512 kB, those of small kernels, which cost
// less to compute at the borders twice, into a part of that. The columns are a
// multiple of WIDE, so that what a convolution computes besides its outputs is
// beyond the image.
constexpr Area GATE_AREA{28, 56}, POSITION_AREA{14, 28};

class Tiles {
 public:
  Tiles(const Shape& shape, const Area& area)
      : shape_(shape),
        area_(area),
        rows_(divide(shape.height, area.rows)),
        columns_(divide(shape.width, area.columns)) {}

  int64_t blocks() const { return divide(shape_.channels, LANES); }
  // Tiles with the same channels.
  int64_t areas() const { return shape_.samples * rows_ * columns_; }
  int64_t size() const { return areas() * blocks(); }

  Tile operator[](int64_t index) const {
    Tile tile;
    tile.channel = index % blocks() * LANES;
    index /= blocks();
    tile.left = index % columns_ * area_.columns;
    index /= columns_;
    tile.top = index % rows_ * area_.rows;
    tile.sample = index / rows_;
    tile.rows = int(std::min(area_.rows, shape_.height - tile.top));
    tile.columns = int(std::min(area_.columns, shape_.width - tile.left));
    tile.lanes = first_lanes(shape_.channels - tile.channel);
    return tile;
  }

 private:
  static int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

  Shape shape_;
  Area area_;
  int64_t rows_, columns_;
};

// A part of an image, which may exceed it.
struct Window {
  const Shape& shape;
  int64_t sample, top, left;

  // Index among the positions of all images.
  int64_t position(int64_t row, int64_t column) const {
    return (sample * shape.height + top + row) * shape.width + left + column;
  }
  bool has_row(int64_t row) const {
    return top + row >= 0 && top + row < shape.height;
  }
  bool has(int64_t row, int64_t column) const {
    return has_row(row) && left + column >= 0 && left + column < shape.width;
  }
};

Window window_of(const Shape& shape, const Tile& tile, int border = 0) {
  return {shape, tile.sample, tile.top - border, tile.left - border};
}

// The channels of a tile at all positions of a tensor.
template <class T>
struct Map {
  T* data;         // of the first position and channel
  int64_t stride;  // from position to position
  Lanes lanes;

  INLINE Vec load(int64_t position) const {
    return ::load(data + position * stride, lanes);
  }
  // The same, and ask for what will be read next: positions are far apart in
  // memory, and so no processor foresees that.
  INLINE Vec load(int64_t position, int64_t next) const {
    __builtin_prefetch(data + next * stride);
    return load(position);
  }
  INLINE void store(int64_t position, Vec x) const {
    ::store(data + position * stride, x, lanes);
  }
};

template <class T>
Map<T> map_of(T* data, int64_t stride, const Tile& tile) {
  return {data + tile.channel, stride, tile.lanes};
}

struct Plane {
  float* data;
  int64_t rows, columns;

  int64_t stride() const { return columns * LANES; }
  float* at(int64_t row, int64_t column) const {
    return data + row * stride() + column * LANES;
  }
};

// The planes of a thread, which keeps their memory.
class Workspace {
 public:
  Plane plane(int index, int64_t rows, int64_t columns) {
    const size_t size = size_t(rows * columns * LANES);
    if (size > sizes_[index]) {
      buffers_[index] = allocate(size);
      sizes_[index] = size;
    }
    return {buffers_[index].get(), rows, columns};
  }

 private:
  Buffer buffers_[3];
  size_t sizes_[3] = {};
};

thread_local Workspace workspace;

// A sum of many vectors that carries along what it rounds off (Kahan).
class Sum {
 public:
  INLINE void operator+=(Vec x) {
    const Vec addend = x - excess_;
    const Vec next = total_ + addend;
    excess_ = (next - total_) - addend;
    total_ = next;
  }
  Vec get() const { return total_; }

 private:
  Vec total_{}, excess_{};
};

// value(position, row, column) where the window is within the image, and 0
// elsewhere.
template <class F>
INLINE void fill(const Plane& plane, const Window& window, F value) {
  for (int64_t row = 0; row < plane.rows; row++) {
    int64_t column = 0;
    if (window.has_row(row)) {
      for (; column < -window.left; column++)
        store(plane.at(row, column), Vec{});
      const int64_t end =
          std::min(plane.columns, window.shape.width - window.left);
      for (; column < end; column++)
        store(plane.at(row, column),
              value(window.position(row, column), row, column));
    }
    for (; column < plane.columns; column++)
      store(plane.at(row, column), Vec{});
  }
}

// each(row, column, sum) for the outputs of a convolution of a plane.
template <class F>
INLINE void convolve_plane(const Kernel& kernel, const Plane& x,
                           const float* weight, Vec start, int rows,
                           int columns, F each) {
  alignas(64) float out[WIDE * LANES];
  // Down the rows, whose K - 1 last ones are at hand.
  for_blocks(columns, [&](int first, bool is_wide, int count) {
    for (int row = 0; row < rows; row++) {
      kernel.convolve[is_wide](x.at(row, first), x.stride(), weight, start,
                               out);
      for (int j = 0; j < count; j++)
        each(row, first + j, load(out + j * LANES));
    }
  });
}

// The gradient of the weight, from a plane and the gradient of the output,
// which begins at the given row and column of its plane.
void correlate_planes(const Kernel& kernel, const Plane& x, const Plane& grad,
                      int border, int rows, int columns, float* weight) {
  std::fill_n(weight, kernel.taps() * LANES, 0.f);
  for_blocks(columns, [&](int first, bool is_wide, int) {
    for (int row = 0; row < rows; row++)
      kernel.correlate[is_wide](x.at(row, first), x.stride(),
                                grad.at(row + border, first + border), weight);
  });
}

// Filters by blocks of LANES channels, (C / LANES, K * K, LANES).
class Filters {
 public:
  Filters(const float* weight, int64_t channels, const Kernel& kernel,
          bool is_flipped)
      : size_(kernel.taps() * LANES),
        blocks_((channels + LANES - 1) / LANES),
        data_(allocate(blocks_ * size_)) {
    const int taps = kernel.taps();
    std::fill_n(data_.get(), blocks_ * size_, 0.f);
    for (int64_t c = 0; c < channels; c++)
      for (int tap = 0; tap < taps; tap++)
        data_.get()[c / LANES * size_ + tap * LANES + c % LANES] =
            weight[c * taps + (is_flipped ? taps - 1 - tap : tap)];
  }

  const float* of(const Tile& tile) const {
    return data_.get() + tile.channel / LANES * size_;
  }

 private:
  int64_t size_, blocks_;
  Buffer data_;
};

// What the tiles sum up: the gradient of the weight, and further vectors.
class Sums {
 public:
  Sums(const Tiles& tiles, const Kernel& kernel, int others)
      : tiles_(tiles),
        taps_(kernel.taps()),
        others_(others),
        data_(allocate(tiles.size() * size())) {}

  float* weight(int64_t tile) { return data_.get() + tile * size(); }

  void set(int64_t tile, int index, Vec x) {
    store(weight(tile) + (taps_ + index) * LANES, x);
  }

  // grad_weight: (C, K, K); others: (number of these, C)
  void add_up(int64_t channels, float* grad_weight, float* others,
              int threads) {
    const int64_t blocks = tiles_.blocks(), areas = tiles_.areas();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * LANES;
      const int count = int(std::min<int64_t>(LANES, channels - first));
      for (int i = 0; i < taps_ + others_; i++) {
        double total[LANES] = {};
        for (int64_t area = 0; area < areas; area++) {
          const float* part = weight(area * blocks + block) + i * LANES;
          for (int lane = 0; lane < LANES; lane++) total[lane] += part[lane];
        }
        for (int lane = 0; lane < count; lane++) {
          if (i < taps_)
            grad_weight[(first + lane) * taps_ + i] = float(total[lane]);
          else
            others[(i - taps_) * channels + first + lane] = float(total[lane]);
        }
      }
    }
  }

 private:
  int64_t size() const { return int64_t(taps_ + others_) * LANES; }

  const Tiles& tiles_;
  int taps_, others_;
  Buffer data_;
};

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
  with_type(is_bf16, [&](auto type) {
    with_type(stored_is_bf16, [&](auto stored) {
      using T = decltype(type);
      using S = decltype(stored);
      gate_backward(static_cast<const T*>(grad), static_cast<const S*>(zv),
                    static_cast<const S*>(a), weight, static_cast<T*>(grad_zv),
                    static_cast<T*>(out), grad_weight, sums,
                    {n, height, width, c}, KERNELS[size / 2], threads);
    });
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
  with_type(is_bf16, [&](auto type) {
    with_type(stored_is_bf16, [&](auto stored) {
      using T = decltype(type);
      using S = decltype(stored);
      position_backward(static_cast<const T*>(grad), static_cast<const S*>(z),
                        weight, bias, static_cast<T*>(grad_z),
                        static_cast<T*>(out), grad_weight, sums,
                        {n, height, width, c}, KERNELS[size / 2], threads);
    });
  });
}

}  // extern "C"
