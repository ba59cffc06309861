// Decoder layers of the common kind (Llama's) in one call: the other kernels, one after the other.
//
//   y = x + O attention(rope(Q n), rope(K n), V n)  where n = norm(x)
//   out = y + down(silu(gate m) * up m)             where m = norm(y)
//
// From Python the same is some thirty calls and views, and takes 130 us more than this for a layer.
#include "scalar.h"

#include <vector>

namespace {

struct Linear {  // see linear.cpp
    void (*multiply)(const Scalar* x, const void* w, const float* scales, const Scalar* bias, Scalar* y, int64_t rows, int64_t in,
                     int64_t out);
    const void* weight;
    const float* scales;
    const Scalar* bias;
    int64_t in, out;
    void operator()(const Scalar* x, Scalar* y, int64_t rows) const { multiply(x, weight, scales, bias, y, rows, in, out); }
};

struct Norm {
    const Scalar* weight;  // null where q or k has none
    int64_t dim;
    float eps;
};

struct Kernels {  // see elementwise.cpp and attention.cpp
    void (*rms_norm)(const Scalar* x, int64_t token_stride, const Scalar* weight, Scalar* out, int64_t tokens, int64_t groups,
                     int64_t dim, float eps);
    void (*silu_and_mul)(const Scalar* x, Scalar* out, int64_t rows, int64_t dim);
    void (*rope)(const Scalar* x, int64_t token_stride, int64_t head_stride, const Scalar* cos, const Scalar* sin, Scalar* out,
                 int64_t tokens, int64_t heads, int64_t dim);
    void (*append)(const Scalar* k, const Scalar* v, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
                   int64_t v_head_stride, Scalar* k_cache, Scalar* v_cache, const Batch* batch, int64_t kv_heads);
    void (*attention)(const Scalar* q, int64_t q_token_stride, int64_t q_head_stride, const Scalar* k_cache, const Scalar* v_cache,
                      const Batch* batch, int64_t kv_heads, int64_t window, float scaling, float softcap, const float* sinks,
                      Scalar* out);
};

struct Layer {
    Kernels kernels;
    Norm input_norm, q_norm, k_norm, post_norm;
    Linear qkv, o, gate_up, down;
    Scalar *k_cache, *v_cache;
    int64_t heads, kv_heads, head_dim, window;
    float scaling, softcap;
};

void add(const Scalar* a, const Scalar* b, Scalar* out, int64_t count) {
#pragma omp parallel for simd if (count > (1 << 17))
    for (int64_t i = 0; i < count; ++i) out[i] = narrow(load(a[i]) + load(b[i]));
}

// out may be x
void run(const Layer& l, const Batch* batch, const Scalar* cos, const Scalar* sin, const Scalar* x, Scalar* out) {
    const Kernels& kernels = l.kernels;
    const int64_t tokens = batch->tokens, hidden = l.qkv.in, dim = l.head_dim;
    const int64_t q_size = l.heads * dim, kv_size = l.kv_heads * dim;
    static thread_local std::vector<Scalar> memory;  // grows to the largest step
    const int64_t wide_size = std::max(l.qkv.out, l.gate_up.out), inner_size = std::max(q_size, l.down.in);
    const size_t needed = tokens * (hidden + wide_size + inner_size + q_size + kv_size);
    if (memory.size() < needed) memory.resize(needed);
    Scalar* same = memory.data();
    Scalar* wide = same + tokens * hidden;
    Scalar* inner = wide + tokens * wide_size;
    Scalar* q = inner + tokens * inner_size;
    Scalar* k = q + tokens * q_size;

    const auto norm_and_turn = [&](const Scalar* from, const Norm& norm, Scalar* to, int64_t size) {
        int64_t stride = l.qkv.out;
        if (norm.weight) {
            kernels.rms_norm(from, stride, norm.weight, to, tokens, size / norm.dim, norm.dim, norm.eps);
            from = to, stride = size;
        }
        kernels.rope(from, stride, dim, cos, sin, to, tokens, size / dim, dim);
    };
    kernels.rms_norm(x, hidden, l.input_norm.weight, same, tokens, 1, hidden, l.input_norm.eps);
    l.qkv(same, wide, tokens);
    norm_and_turn(wide, l.q_norm, q, q_size);
    norm_and_turn(wide + q_size, l.k_norm, k, kv_size);
    kernels.append(k, wide + q_size + kv_size, kv_size, dim, l.qkv.out, dim, l.k_cache, l.v_cache, batch, l.kv_heads);
    kernels.attention(q, q_size, dim, l.k_cache, l.v_cache, batch, l.kv_heads, l.window, l.scaling, l.softcap, nullptr, inner);
    l.o(inner, same, tokens);
    add(x, same, out, tokens * hidden);

    kernels.rms_norm(out, hidden, l.post_norm.weight, same, tokens, 1, hidden, l.post_norm.eps);
    l.gate_up(same, wide, tokens);
    kernels.silu_and_mul(wide, inner, tokens, l.down.in);
    l.down(inner, same, tokens);
    add(out, same, out, tokens * hidden);
}
}  // namespace

extern "C" {

// x, out [batch->tokens, hidden]; cos, sin [batch->tokens, head_dim]
void decoder_layers(const Layer* layers, int64_t count, const Batch* batch, const Scalar* cos, const Scalar* sin, const Scalar* x,
                    Scalar* out) {
    for (int64_t i = 0; i < count; ++i) run(layers[i], batch, cos, sin, i ? out : x, out);
}
}
