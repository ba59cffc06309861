// The small operations between matmuls, each in one pass over memory, with the same roundings as torch's chain of operators.
// Work that is too little to share stays in the calling thread: waking the others takes longer.
#include "scalar.h"

constexpr int64_t WORTH_SHARING = 1 << 15;  // elements

extern "C" {

// x [tokens, groups, dim], stride in elements, out the same without gaps; weight [dim]
void rms_norm(const Scalar* x, int64_t token_stride, const Scalar* weight, Scalar* out, int64_t tokens, int64_t groups,
              int64_t dim, float eps) {
#pragma omp parallel for if (tokens * groups * dim > WORTH_SHARING)
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t group = 0; group < groups; ++group) {
            const Scalar* from = x + token * token_stride + group * dim;
            Scalar* to = out + (token * groups + group) * dim;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < dim; ++i) sum += load(from[i]) * load(from[i]);
            const float scale = 1.0f / std::sqrt(sum / float(dim) + eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) to[i] = narrow(load(weight[i]) * rounded(load(from[i]) * scale));
        }
}

// x [rows, 2 * dim], gate before up; out [rows, dim]
void silu_and_mul(const Scalar* x, Scalar* out, int64_t rows, int64_t dim) {
#pragma omp parallel for if (rows * dim > WORTH_SHARING)
    for (int64_t row = 0; row < rows; ++row) {
        const Scalar *gate = x + row * 2 * dim, *up = gate + dim;
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) {
            const float g = load(gate[i]);
            out[row * dim + i] = narrow(rounded(g / (1.0f + exp_(-g))) * load(up[i]));
        }
    }
}

// x [tokens, heads, dim] with strides in elements, out the same without gaps, which may be x; cos, sin [tokens, dim]
void rope(const Scalar* x, int64_t token_stride, int64_t head_stride, const Scalar* cos, const Scalar* sin, Scalar* out,
          int64_t tokens, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
#pragma omp parallel for if (tokens * heads * dim > WORTH_SHARING)
    for (int64_t t = 0; t < tokens; ++t) {
        const Scalar *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < heads; ++h) {
            const Scalar* from = x + t * token_stride + h * head_stride;
            Scalar* to = out + (t * heads + h) * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float a = load(from[i]), b = load(from[i + half]);
                to[i] = narrow(rounded(a * load(c[i])) + rounded(-b * load(s[i])));
                to[i + half] = narrow(rounded(b * load(c[i + half])) + rounded(a * load(s[i + half])));
            }
        }
    }
}
}
