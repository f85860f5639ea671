// What both CPU kernels are made of: bf16 as a type, and one register of the widest kind.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

#ifdef __AVX512F__
constexpr int64_t VECTOR_BYTES = 64;
#else
constexpr int64_t VECTOR_BYTES = 32;
#endif

template <class Acc>
struct Lanes {
  static constexpr int64_t COUNT = VECTOR_BYTES / sizeof(Acc);
  typedef Acc Vector __attribute__((vector_size(VECTOR_BYTES)));
  Vector value = {};

  void add_product(const Acc* a, const Acc* b) {
    Vector left, right;
    std::memcpy(&left, a, sizeof left);
    std::memcpy(&right, b, sizeof right);
    value += left * right;
  }
  void add_product(const bfloat16* a, const Acc* b) {  // Acc is float: a bf16 is its upper half
    typedef uint16_t Narrow __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Wide __attribute__((vector_size(VECTOR_BYTES)));
    Narrow narrow;
    std::memcpy(&narrow, a, sizeof narrow);
    const Wide wide = __builtin_convertvector(narrow, Wide) << 16;
    Vector left, right;
    std::memcpy(&left, &wide, sizeof left);
    std::memcpy(&right, b, sizeof right);
    value += left * right;
  }
  Acc sum() const {
    Acc part[COUNT];
    std::memcpy(part, &value, sizeof part);
    for (int64_t half = COUNT / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
  }
};

}  // namespace
