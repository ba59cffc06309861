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
