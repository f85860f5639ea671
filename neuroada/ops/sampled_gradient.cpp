// The sampled gradient on CPU: grad[r, j] = sum over t of dy[t, r] * x[t, idx[r, j]].
//
// x and dy arrive token-major, where one column is a cache line per token. They are therefore transposed, a block of
// TOKENS tokens at a time, so that a column of a block is contiguous and every entry of grad is a plain dot product:
// k of them for each row, with that row's piece of dy in the L1 cache and the block of x in L2. bf16 becomes fp32 on
// the way, so all arithmetic is in the type of grad.
//
// Threads take ranges of tokens, each with its own block of x and its own partial sums: they meet once, at the end, so a
// busy machine costs little, and the bits depend on the number of parts alone. Built by cpu_kernel.py with nothing but
// a C++17 compiler (vector extensions of gcc and clang).

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int64_t TOKENS = 128;  // tokens of a block, zero-padded: 512 bytes a column in fp32
constexpr int64_t TILE = 16;     // a transpose goes by tiles of 16 x 16
constexpr int64_t ROWS = 128;    // rows of dy transposed at once: 64 KiB in fp32, long reads per token

// One tile: from[t * stride + c], height x width -> to[c * TOKENS + t]; absent tokens become zeros.
template <class In, class Acc>
void transpose_tile(const In* from, int64_t stride, int64_t height, int64_t width, Acc* to) {
  // The tile below is a page or more away, where the hardware does not look ahead.
  for (int t = 0; t < TILE; t++) __builtin_prefetch(from + (t + TILE) * stride);
  Acc tile[TILE][TILE];
  if (height == TILE && width == TILE) {  // constant bounds: the compiler keeps the tile in registers
    for (int t = 0; t < TILE; t++)
      for (int c = 0; c < TILE; c++) tile[t][c] = from[t * stride + c];
  } else {
    std::fill_n(&tile[0][0], TILE * TILE, Acc(0));
    for (int t = 0; t < height; t++)
      for (int c = 0; c < width; c++) tile[t][c] = from[t * stride + c];
  }
  for (int c = 0; c < width; c++) {
    Acc column[TILE];
    for (int t = 0; t < TILE; t++) column[t] = tile[t][c];
    std::memcpy(to + c * TOKENS, column, sizeof column);
  }
}

// A block: from[t * stride + c], tokens x columns -> to[c * TOKENS + t].
template <class In, class Acc>
void transpose(const In* from, int64_t stride, int64_t tokens, int64_t columns, Acc* to) {
  for (int64_t t = 0; t < TOKENS; t += TILE)
    for (int64_t c = 0; c < columns; c += TILE)
      transpose_tile(from + t * stride + c, stride, std::clamp<int64_t>(tokens - t, 0, TILE),
                     std::min(TILE, columns - c), to + c * TOKENS + t);
}

// grad[j] += dot(dy, x column idx[j]) for N values of j at once: N independent accumulators hide the FMA's latency.
template <int N, class Acc>
void dots(const Acc* dy, const Acc* x, const int64_t* idx, Acc* grad) {
  using L = Lanes<Acc>;
  L acc[N];
  const Acc* column[N];
  for (int n = 0; n < N; n++) column[n] = x + idx[n] * TOKENS;
  for (int64_t t = 0; t < TOKENS; t += L::COUNT)
    for (int n = 0; n < N; n++) acc[n].add_product(dy + t, column[n] + t);
  for (int n = 0; n < N; n++) grad[n] += acc[n].sum();
}

// The tokens of one part: grad[r, j] += their share. xt: a block of transposed x, [in][TOKENS].
template <class In, class Acc>
void add_part(const In* dy, int64_t dy_stride, const In* x, int64_t x_stride, const int64_t* idx, Acc* grad, Acc* xt,
              int64_t tokens, int64_t out, int64_t in, int64_t k) {
  alignas(64) Acc dyt[ROWS * TOKENS];
  for (int64_t t0 = 0; t0 < tokens; t0 += TOKENS) {
    const int64_t count = std::min(TOKENS, tokens - t0);
    transpose(x + t0 * x_stride, x_stride, count, in, xt);
    for (int64_t r0 = 0; r0 < out; r0 += ROWS) {
      const int64_t height = std::min(ROWS, out - r0);
      transpose(dy + t0 * dy_stride + r0, dy_stride, count, height, dyt);
      for (int64_t r = 0; r < height; r++) {
        const int64_t* columns = idx + (r0 + r) * k;
        Acc* entries = grad + (r0 + r) * k;
        int64_t j = 0;
        for (; j + 4 <= k; j += 4) dots<4>(dyt + r * TOKENS, xt, columns + j, entries + j);
        for (; j < k; j++) dots<1>(dyt + r * TOKENS, xt, columns + j, entries + j);
      }
    }
  }
}

template <class In, class Acc>
void sampled_gradient(const In* dy, int64_t dy_stride, const In* x, int64_t x_stride, const int64_t* idx, Acc* grad,
                      Acc* scratch, int64_t tokens, int64_t out, int64_t in, int64_t k, int parts) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; part++) {
    const int64_t first = tokens * part / parts, last = tokens * (part + 1) / parts;
    add_part(dy + first * dy_stride, dy_stride, x + first * x_stride, x_stride, idx, grad + part * out * k,
             scratch + part * in * TOKENS, last - first, out, in, k);
  }
}

}  // namespace

// dy [tokens, out] and x [tokens, in] with unit column strides and the given row strides; idx [out, k] in [0, in);
// grad [parts, out, k] zeroed by the caller, who adds the parts up; scratch [parts, in, 128]. All sizes positive.
#define EXPORT(NAME, IN, ACC)                                                                                         \
  extern "C" void NAME(const IN* dy, int64_t dy_stride, const IN* x, int64_t x_stride, const int64_t* idx, ACC* grad, \
                       ACC* scratch, int64_t tokens, int64_t out, int64_t in, int64_t k, int parts) {                 \
    sampled_gradient(dy, dy_stride, x, x_stride, idx, grad, scratch, tokens, out, in, k, parts);                      \
  }
EXPORT(sampled_gradient_float32, float, float)
EXPORT(sampled_gradient_bfloat16, bfloat16, float)
EXPORT(sampled_gradient_float64, double, double)
