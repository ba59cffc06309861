// Attention of one query token a request over pages of keys and values, read where they lie. Compiled for one head size and
// one number of query heads a K/V head: -DHEAD_DIM=64 -DGROUP=3. K and V are [num_pages, kv_heads, page_size, HEAD_DIM].
//
// Work is shared out by (request, K/V head, PART keys), so one long request keeps all threads busy; the parts are put
// together by their maxima and sums (flash decoding). Where the parts begin depends on the request alone: its result is the
// same in any batch.
#include "scalar.h"

#include <vector>

namespace {

constexpr int64_t PART = 512;
constexpr int64_t WORTH_SHARING = 256;  // keys of all requests and heads
constexpr int VECTORS = HEAD_DIM / LANES;
static_assert(HEAD_DIM % LANES == 0);

typedef int Index __attribute__((vector_size(4 * LANES)));

inline Vector add_neighbours(Vector a, Vector b) {
    const Index even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// the sums over the lanes of 16 vectors, as one vector
inline Vector sums(Vector (&x)[LANES]) {
    for (int count = LANES; count > 1; count /= 2)
        for (int i = 0; i < count / 2; ++i) x[i] = add_neighbours(x[2 * i], x[2 * i + 1]);
    return x[0];
}

struct Rows {  // of one request and K/V head: where token i of the request lies
    const Scalar* cache;
    const int32_t* pages;
    int64_t page_size, page_stride;
    const Scalar* operator[](int64_t i) const {
        return cache + pages[i / page_size] * page_stride + (i % page_size) * HEAD_DIM;
    }
};

struct Partial {
    Vector values[GROUP][VECTORS];
    float peak[GROUP], sum[GROUP];
};

void attend(const Scalar* (&queries)[GROUP], Rows keys, Rows values, int64_t begin, int64_t end, float scaling, float softcap,
            Partial& out) {
    alignas(64) float weights[GROUP][PART + LANES];
    const int64_t count = end - begin;
    Vector query[GROUP][VECTORS];
    for (int g = 0; g < GROUP; ++g)
        for (int d = 0; d < VECTORS; ++d) query[g][d] = load_vector(queries[g] + d * LANES);
    for (int64_t start = 0; start < count; start += LANES) {
        Vector dots[GROUP][LANES];
        for (int j = 0; j < LANES; ++j) {
            const Scalar* row = keys[std::min(begin + start + j, end - 1)];
            Vector key[VECTORS];
            for (int d = 0; d < VECTORS; ++d) key[d] = load_vector(row + d * LANES);
            for (int g = 0; g < GROUP; ++g) {
                dots[g][j] = query[g][0] * key[0];
                for (int d = 1; d < VECTORS; ++d) dots[g][j] += query[g][d] * key[d];
            }
        }
        for (int g = 0; g < GROUP; ++g) *(Vector*)&weights[g][start] = sums(dots[g]) * scaling;
    }
    for (int g = 0; g < GROUP; ++g) {
        float* w = weights[g];
        if (softcap > 0)
            for (int64_t j = 0; j < count; ++j) w[j] = softcap * std::tanh(w[j] / softcap);
        float peak = w[0], sum = 0;
#pragma omp simd reduction(max : peak)
        for (int64_t j = 0; j < count; ++j) peak = std::max(peak, w[j]);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; ++j) sum += w[j] = exp_(w[j] - peak);
        out.peak[g] = peak;
        out.sum[g] = sum;
    }
    Vector result[GROUP][VECTORS] = {};
    for (int64_t j = 0; j < count; ++j) {
        const Scalar* row = values[begin + j];
        for (int d = 0; d < VECTORS; ++d) {
            const Vector value = load_vector(row + d * LANES);
            for (int g = 0; g < GROUP; ++g) result[g][d] += weights[g][j] * value;
        }
    }
    std::memcpy(out.values, result, sizeof(result));
}

}  // namespace

extern "C" {

// q [requests, kv_heads * GROUP, HEAD_DIM], strides in elements; out the same without gaps. Request r sees its tokens
// max(0, kv_lens[r] - window) .. kv_lens[r] - 1, in the pages indices[indptr[r]] and following. softcap 0: none; sinks
// [heads] may be null.
void decode_attention(const Scalar* q, int64_t q_token_stride, int64_t q_head_stride, const Scalar* k_cache,
                      const Scalar* v_cache, const int32_t* indptr, const int32_t* indices, const int32_t* kv_lens,
                      int64_t requests, int64_t kv_heads, int64_t page_size, int64_t window, float scaling, float softcap,
                      const float* sinks, Scalar* out) {
    const int64_t page_stride = kv_heads * page_size * HEAD_DIM;
    std::vector<int64_t> first(requests + 1, 0);  // the first part of each request, for one head
    int64_t num_keys = 0;
    for (int64_t r = 0; r < requests; ++r) {
        const int64_t seen = std::min<int64_t>(kv_lens[r], window);
        first[r + 1] = first[r] + (seen + PART - 1) / PART;
        num_keys += seen * kv_heads;
    }
    const int64_t num_parts = first[requests];
    static thread_local std::vector<Partial> storage;
    storage.resize(num_parts * kv_heads);
    Partial* partials = storage.data();
#pragma omp parallel if (num_keys > WORTH_SHARING)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_parts * kv_heads; ++task) {
            const int64_t part = task / kv_heads, h = task % kv_heads;
            const int64_t r = std::upper_bound(first.begin(), first.end(), part) - first.begin() - 1;
            const int64_t begin = std::max<int64_t>(0, kv_lens[r] - window) + (part - first[r]) * PART;
            const int64_t end = std::min<int64_t>(begin + PART, kv_lens[r]);
            const Scalar* queries[GROUP];
            for (int g = 0; g < GROUP; ++g) queries[g] = q + r * q_token_stride + (h * GROUP + g) * q_head_stride;
            const Rows keys = {k_cache + h * page_size * HEAD_DIM, indices + indptr[r], page_size, page_stride};
            const Rows values = {v_cache + h * page_size * HEAD_DIM, indices + indptr[r], page_size, page_stride};
            attend(queries, keys, values, begin, end, scaling, softcap, partials[task]);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < requests * kv_heads; ++i) {
            const int64_t r = i / kv_heads, h = i % kv_heads;
            for (int g = 0; g < GROUP; ++g) {
                const int64_t head = h * GROUP + g;
                float peak = sinks ? sinks[head] : -INFINITY;
                for (int64_t p = first[r]; p < first[r + 1]; ++p) peak = std::max(peak, partials[p * kv_heads + h].peak[g]);
                float sum = sinks ? exp_(sinks[head] - peak) : 0;
                Vector total[VECTORS] = {};
                for (int64_t p = first[r]; p < first[r + 1]; ++p) {
                    const Partial& partial = partials[p * kv_heads + h];
                    const float share = exp_(partial.peak[g] - peak);
                    sum += share * partial.sum[g];
                    for (int d = 0; d < VECTORS; ++d) total[d] += share * partial.values[g][d];
                }
                for (int d = 0; d < HEAD_DIM; ++d)
                    out[(r * kv_heads * GROUP + head) * HEAD_DIM + d] = narrow(total[d / LANES][d % LANES] / sum);
            }
        }
    }
}

// k, v [tokens, kv_heads, HEAD_DIM], strides in elements: token t goes to row rows[t] of page pages[t]. What is not finite
// becomes 0, since a masked key has weight 0 but 0 * NaN is NaN: what one request computes wrongly must not stay for others.
void append(const Scalar* k, const Scalar* v, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
            int64_t v_head_stride, Scalar* k_cache, Scalar* v_cache, const int32_t* pages, const int32_t* rows,
            int64_t tokens, int64_t kv_heads, int64_t page_size) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t at = ((pages[t] * kv_heads + h) * page_size + rows[t]) * HEAD_DIM;
            const Scalar *key = k + t * k_token_stride + h * k_head_stride, *value = v + t * v_token_stride + h * v_head_stride;
            for (int d = 0; d < HEAD_DIM; ++d) {
                k_cache[at + d] = std::isfinite(load(key[d])) ? key[d] : narrow(0);
                v_cache[at + d] = std::isfinite(load(value[d])) ? value[d] : narrow(0);
            }
        }
}
}
