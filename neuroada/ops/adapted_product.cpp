// The adapted product of a few tokens on CPU: y[t, r] = sum over c of x[t, c] * W'[r, c] + bias[r], where W' is W with
// round(W + delta) at k chosen columns of each row.
//
// With few tokens a product costs what reading W costs. So a row of W is read once. One to three tokens are multiplied
// with it as it is, and what the k entries change is added, while the row is still in the L1 cache. For more tokens the
// row is copied into a buffer there, changed, and multiplied with each. W itself is never written.

#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

float rounded(float value, const float*) { return value; }
double rounded(double value, const double*) { return value; }
float rounded(float value, const bfloat16*) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return value;
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// y[n * y_stride] = dot(row, token n) + bias for N tokens at once.
template <int N, class In, class Acc>
void dots(const In* row, const Acc* x, int64_t in, Acc bias, Acc* y, int64_t y_stride) {
  using L = Lanes<Acc>;
  constexpr int CHAINS = N > 2 ? 2 : 4;  // independent sums hide the FMA's latency
  L acc[N][CHAINS];
  int64_t c = 0;
  for (; c + CHAINS * L::COUNT <= in; c += CHAINS * L::COUNT)
    for (int chain = 0; chain < CHAINS; chain++)
      for (int n = 0; n < N; n++)
        acc[n][chain].add_product(row + c + chain * L::COUNT, x + n * in + c + chain * L::COUNT);
  for (; c + L::COUNT <= in; c += L::COUNT)
    for (int n = 0; n < N; n++) acc[n][0].add_product(row + c, x + n * in + c);
  for (int n = 0; n < N; n++) {
    Acc sum = bias;
    for (int64_t rest = c; rest < in; rest++) sum += Acc(row[rest]) * x[n * in + rest];
    for (int chain = 0; chain < CHAINS; chain++) sum += acc[n][chain].sum();
    y[n * y_stride] = sum;
  }
}

template <class Acc>
struct Entries {
  const uint8_t* idx;
  const Acc* delta;
  int64_t k;
  int64_t column(int64_t j) const { return idx[2 * j] | idx[2 * j + 1] << 8; }
};

// A row for few tokens: y[t * y_stride]. False when a column lies outside of the row: nothing is read there.
template <class In, class Acc>
bool few(const In* row, const Entries<Acc>& entries, const Acc* x, int64_t tokens, int64_t in, Acc bias, Acc* y,
         int64_t y_stride) {
  bool inside = true;
  for (int64_t t = 0; t < tokens; t++) {
    dots<1>(row, x + t * in, in, bias, y + t * y_stride, y_stride);
    Acc change[4] = {};  // independent sums, as above
    for (int64_t j = 0; j < entries.k; j++) {
      const int64_t column = entries.column(j);
      if (column >= in) {
        inside = false;
        continue;
      }
      const Acc base = Acc(row[column]);
      change[j & 3] += (rounded(base + entries.delta[j], row) - base) * x[t * in + column];
    }
    y[t * y_stride] += (change[0] + change[1]) + (change[2] + change[3]);
  }
  return inside;
}

// The same for more tokens; buffer [in].
template <class In, class Acc>
bool many(const In* row, const Entries<Acc>& entries, const Acc* x, int64_t tokens, int64_t in, Acc bias, Acc* y,
          int64_t y_stride, Acc* buffer) {
  bool inside = true;
  for (int64_t c = 0; c < in; c++) buffer[c] = row[c];
  for (int64_t j = 0; j < entries.k; j++) {
    const int64_t column = entries.column(j);
    if (column < in)
      buffer[column] = rounded(Acc(row[column]) + entries.delta[j], row);
    else
      inside = false;
  }
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) dots<4>(buffer, x + t * in, in, bias, y + t * y_stride, y_stride);
  for (; t < tokens; t++) dots<1>(buffer, x + t * in, in, bias, y + t * y_stride, y_stride);
  return inside;
}

template <class In, class Acc>
int adapted_product(const Acc* x, const In* weight, int64_t weight_stride, const Acc* bias, const uint8_t* idx,
                    const Acc* delta, Acc* y, int64_t tokens, int64_t out, int64_t in, int64_t k, int parts) {
  int outside = 0;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(| : outside)
  for (int part = 0; part < parts; part++) {
    std::vector<Acc> buffer(in);
    for (int64_t r = out * part / parts; r < out * (part + 1) / parts; r++) {
      const In* row = weight + r * weight_stride;
      const Entries<Acc> entries = {idx + 2 * r * k, delta + r * k, k};
      const Acc start = bias ? bias[r] : Acc(0);
      const bool inside = tokens < 4 ? few(row, entries, x, tokens, in, start, y + r, out)
                                     : many(row, entries, x, tokens, in, start, y + r, out, buffer.data());
      outside |= !inside;
    }
  }
  return outside;
}

}  // namespace

// x [tokens, in]; weight [out, in] with the given row stride; bias [out] or null; idx [out, 2k] little-endian pairs;
// delta [out, k]; y [tokens, out]. All sizes positive. Returns 1 if a column lies outside of the weight, else 0.
#define EXPORT(NAME, IN, ACC)                                                                                     \
  extern "C" int NAME(const ACC* x, const IN* weight, int64_t weight_stride, const ACC* bias, const uint8_t* idx, \
                      const ACC* delta, ACC* y, int64_t tokens, int64_t out, int64_t in, int64_t k, int parts) {  \
    return adapted_product(x, weight, weight_stride, bias, idx, delta, y, tokens, out, in, k, parts);             \
  }
EXPORT(adapted_product_float32, float, float)
EXPORT(adapted_product_bfloat16, bfloat16, float)
EXPORT(adapted_product_float64, double, double)
