// The adapted product of a few tokens on CPU: y[t, r] = sum over c of x[t, c] * W'[r, c] + bias[r], where W' is W with
// round(W + delta) at k chosen columns of each row.
//
// With few tokens a product costs what reading W costs. So a row of W is read once, into a buffer in the L1 cache; its k
// entries are changed there, and every token is multiplied with the buffer. W itself is never written.

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
template <int N, class Acc>
void dots(const Acc* row, const Acc* x, int64_t in, Acc bias, Acc* y, int64_t y_stride) {
  using L = Lanes<Acc>;
  constexpr int CHAINS = N > 2 ? 1 : 4;  // independent sums hide the FMA's latency
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
    for (int64_t rest = c; rest < in; rest++) sum += row[rest] * x[n * in + rest];
    for (int chain = 0; chain < CHAINS; chain++) sum += acc[n][chain].sum();
    y[n * y_stride] = sum;
  }
}

// 0, or 1 when a column lies outside of the row: nothing is read there.
template <class In, class Acc>
int adapted_product(const Acc* x, const In* weight, int64_t weight_stride, const Acc* bias, const uint8_t* idx,
                    const Acc* delta, Acc* y, int64_t tokens, int64_t out, int64_t in, int64_t k, int parts) {
  int outside = 0;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(| : outside)
  for (int part = 0; part < parts; part++) {
    std::vector<Acc> row(in);
    for (int64_t r = out * part / parts; r < out * (part + 1) / parts; r++) {
      const In* from = weight + r * weight_stride;
      for (int64_t c = 0; c < in; c++) row[c] = from[c];
      for (int64_t j = r * k; j < (r + 1) * k; j++) {
        const int64_t column = idx[2 * j] | idx[2 * j + 1] << 8;
        if (column < in)
          row[column] = rounded(Acc(from[column]) + delta[j], from);
        else
          outside = 1;
      }
      const Acc start = bias ? bias[r] : Acc(0);
      int64_t t = 0;
      for (; t + 4 <= tokens; t += 4) dots<4>(row.data(), x + t * in, in, start, y + t * out + r, out);
      for (; t < tokens; t++) dots<1>(row.data(), x + t * in, in, start, y + t * out + r, out);
    }
  }
  return outside;
}

}  // namespace

// x [tokens, in]; weight [out, in] with the given row stride; bias [out] or null; idx [out, 2k] little-endian pairs;
// delta [out, k]; y [tokens, out]. All sizes positive.
#define EXPORT(NAME, IN, ACC)                                                                                     \
  extern "C" int NAME(const ACC* x, const IN* weight, int64_t weight_stride, const ACC* bias, const uint8_t* idx, \
                      const ACC* delta, ACC* y, int64_t tokens, int64_t out, int64_t in, int64_t k, int parts) {  \
    return adapted_product(x, weight, weight_stride, bias, idx, delta, y, tokens, out, in, k, parts);             \
  }
EXPORT(adapted_product_float32, float, float)
EXPORT(adapted_product_bfloat16, bfloat16, float)
EXPORT(adapted_product_float64, double, double)
