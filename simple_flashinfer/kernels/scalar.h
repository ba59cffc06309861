// What the CPU kernels share: the element type (-DSCALAR_BF16, _F16 or _F32), rounding as torch rounds, vectors, exp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

#ifdef SCALAR_BF16
struct Scalar {
    uint16_t bits;
};
inline float load(Scalar x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline Scalar narrow(float x) {  // to the nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(x);
    return {x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0)};
}
#else
#ifdef SCALAR_F16
using Scalar = _Float16;
#else
using Scalar = float;
#endif
inline float load(Scalar x) { return float(x); }
inline Scalar narrow(float x) { return Scalar(x); }
#endif

// the value as it is after a pass through memory: torch rounds between two operations, and so do the fused ones
inline float rounded(float x) { return load(narrow(x)); }

// What a step attends to: see AttentionMetadata in attention/base.py. Token t goes to row rows[t] of page pages[t].
struct Batch {
    int64_t tokens, requests;
    const int32_t *pages, *rows, *qo_indptr, *kv_indptr, *kv_indices, *kv_lens;
};

constexpr int LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));

inline Vector load_vector(const Scalar* from) {
#ifdef SCALAR_BF16
    typedef uint16_t Narrow __attribute__((vector_size(2 * LANES)));
    typedef uint32_t Wide __attribute__((vector_size(4 * LANES)));
    Narrow bits;
    std::memcpy(&bits, from, sizeof(bits));
    return bit_cast<Vector>(__builtin_convertvector(bits, Wide) << 16);
#else
    typedef Scalar Narrow __attribute__((vector_size(sizeof(Scalar) * LANES)));
    Narrow x;
    std::memcpy(&x, from, sizeof(x));
    return __builtin_convertvector(x, Vector);
#endif
}

// Numbers for 16 lanes, PAIR neighbouring ones each, which are multiplied with PAIR others and added up.
#if defined(SCALAR_BF16) && defined(__AVX512BF16__)
constexpr int PAIR = 2;
using Pairs = __m512bh;
inline Pairs read_pairs(const Scalar* from) { return (__m512bh)_mm512_loadu_si512(from); }
inline void add_products(Vector& sum, Pairs a, const Scalar* b) {
    int32_t pair;
    std::memcpy(&pair, b, sizeof(pair));
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, a, (__m512bh)_mm512_set1_epi32(pair));
}
#else
#ifdef SCALAR_BF16
constexpr int PAIR = 2;
#else
constexpr int PAIR = 1;
#endif
struct Pairs {
    Vector of[PAIR];
};
inline Pairs read_pairs(const Scalar* from) {
#ifdef SCALAR_BF16
    typedef uint32_t Both __attribute__((vector_size(4 * LANES)));
    Both both;
    std::memcpy(&both, from, sizeof(both));
    return {(Vector)(both << 16), (Vector)(both & 0xffff0000u)};
#else
    return {load_vector(from)};
#endif
}
inline void add_products(Vector& sum, const Pairs& a, const Scalar* b) {
    for (int i = 0; i < PAIR; ++i) sum += a.of[i] * load(b[i]);
}
#endif

inline Vector load_floats(const float* from) {
    Vector x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

inline void store_vector(Vector x, Scalar* to) {
#if defined(SCALAR_BF16) && defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &narrow, sizeof(narrow));
#else
    for (int i = 0; i < LANES; ++i) to[i] = narrow(x[i]);
#endif
}

// e^x for x <= 88, relative error about 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf). Written with
// plain arithmetic so that loops over it become vectors.
inline float exp_(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * bit_cast<float>(uint32_t(int32_t(n) + 127) << 23);
}
