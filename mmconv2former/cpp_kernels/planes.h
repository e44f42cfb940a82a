// Depthwise convolutions of tiles that stay in the cache of a core.
//
// Tensors are (N, H, W, C). An image is processed in tiles of its area and
// LANES of its channels. What the convolution reads is written to a plane
// first, a small map in fp32 with zeros around the image, where a vector is a
// position. The sums of a tile are kept apart and added up in a fixed order.
#pragma once

#include <algorithm>
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

}  // namespace
