// Causal attention of a batch of requests over pages of keys and values, read where they lie. Compiled for one head size, one
// number of query heads a K/V head and one page size: -DHEAD_DIM=64 -DGROUP=3 -DPAGE_SIZE=16. K and V are
// [num_pages, kv_heads, PAGE_SIZE, HEAD_DIM].
//
// A task is a block of query tokens of one request, with all the query heads of one K/V head, over PART keys at a time: the
// parts are put together by their maxima and sums as they come (flash attention). A request with one query token, whose
// block is all there is to do for it, makes a task of each part instead, and they are put together at the end (flash
// decoding): one long request keeps all threads busy. Where parts begin depends on the request alone, so its result is the
// same in any batch.
#include "scalar.h"

#include <vector>

namespace {

constexpr int64_t PART = 512;
constexpr int64_t WORTH_SHARING = 256;  // keys of all tasks
constexpr int64_t AHEAD = 32;           // keys that are fetched ahead: the processor does not guess where the next page is
constexpr int VECTORS = HEAD_DIM / LANES;
constexpr int TOKENS = GROUP < 8 ? 8 / GROUP : 1;  // of a block
constexpr int QUERIES = TOKENS * GROUP;
static_assert(HEAD_DIM % LANES == 0);

#if defined(SCALAR_BF16) && defined(__AVX512BF16__) && HEAD_DIM % 32 == 0
constexpr int PIECE = 32;
using Piece = __m512bh;
inline Piece read(const Scalar* from) { return (__m512bh)_mm512_loadu_si512(from); }
inline Vector add_product(Vector sum, Piece a, Piece b) { return (Vector)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
constexpr int PIECE = LANES;
using Piece = Vector;
inline Piece read(const Scalar* from) { return load_vector(from); }
inline Vector add_product(Vector sum, Piece a, Piece b) { return sum + a * b; }
#endif
constexpr int PIECES = HEAD_DIM / PIECE;

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
    int64_t page_stride;
    const Scalar* operator[](uint32_t i) const {  // unsigned, and the size known: no division
        return cache + pages[i / PAGE_SIZE] * page_stride + i % PAGE_SIZE * HEAD_DIM;
    }
    void prefetch(uint32_t i) const {
        const char* row = (const char*)(*this)[i];
        for (size_t at = 0; at < HEAD_DIM * sizeof(Scalar); at += 64) __builtin_prefetch(row + at);
    }
};

struct Result {  // of the queries of a block, over the keys seen so far: weights are exp(score - peak)
    Vector values[QUERIES][VECTORS];
    float peak[QUERIES], sum[QUERIES];
};

struct Block {
    const Scalar* queries[QUERIES];  // token by token
    int64_t tokens, position;        // of the first token
    int64_t window;
    float scaling, softcap;
};

// adds keys begin .. end - 1, at most PART of them; num_queries is known when this is compiled, so all sums stay in registers
template <int num_queries>
void attend(const Block& block, Rows keys, Rows values, int64_t begin, int64_t end, Result& result) {
    alignas(64) static thread_local float weights[QUERIES][PART];
    const int64_t count = end - begin;
    for (int64_t start = 0; start < count; start += LANES) {
        Vector dots[QUERIES][LANES];
        for (int j = 0; j < LANES; ++j) {
            const Scalar* row = keys[std::min(begin + start + j, end - 1)];
            const int64_t ahead = begin + start + j + AHEAD;
            if (ahead < end)
                keys.prefetch(ahead);
            else if (begin + ahead - end < end)
                values.prefetch(begin + ahead - end);
            Piece key[PIECES];
            for (int d = 0; d < PIECES; ++d) key[d] = read(row + d * PIECE);
            for (int g = 0; g < num_queries; ++g) {
                Vector dot = {};
                for (int d = 0; d < PIECES; ++d) dot = add_product(dot, read(block.queries[g] + d * PIECE), key[d]);
                dots[g][j] = dot;
            }
        }
        for (int g = 0; g < num_queries; ++g) *(Vector*)&weights[g][start] = sums(dots[g]) * block.scaling;
    }
    for (int g = 0; g < num_queries; ++g) {
        float* w = weights[g];
        const int64_t position = block.position + g / GROUP;
        // of these keys the query sees those from first to last - 1
        const int64_t last = std::min(count, position + 1 - begin);
        const int64_t first = std::min(std::max<int64_t>(position + 1 - block.window - begin, 0), count);
        if (block.softcap > 0)
            for (int64_t j = first; j < last; ++j) w[j] = block.softcap * std::tanh(w[j] / block.softcap);
        float peak = result.peak[g], sum = 0;
#pragma omp simd reduction(max : peak)
        for (int64_t j = first; j < last; ++j) peak = std::max(peak, w[j]);
        for (int64_t j = 0; j < std::min(first, count); ++j) w[j] = 0;
        for (int64_t j = std::max<int64_t>(last, 0); j < count; ++j) w[j] = 0;
        if (peak == -INFINITY) continue;  // nothing seen yet
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < last; ++j) sum += w[j] = exp_(w[j] - peak);
        const float shrink = exp_(result.peak[g] - peak);
        result.sum[g] = result.sum[g] * shrink + sum;
        result.peak[g] = peak;
        for (int d = 0; d < VECTORS; ++d) result.values[g][d] *= shrink;
    }
    for (int first = 0; first < num_queries; first += GROUP) {
        Vector total[GROUP][VECTORS];
        std::memcpy(total, result.values[first], sizeof(total));
        for (int64_t j = 0; j < count; ++j) {
            const Scalar* row = values[begin + j];
            if (j + AHEAD < count) values.prefetch(begin + j + AHEAD);
            for (int d = 0; d < VECTORS; ++d) {
                const Vector value = load_vector(row + d * LANES);
                for (int g = 0; g < GROUP; ++g) total[g][d] += weights[first + g][j] * value;
            }
        }
        std::memcpy(result.values[first], total, sizeof(total));
    }
}

struct Task {
    int64_t request, token, begin, end;  // first query token of the block, within the request; keys
    bool whole;                          // the only task of its block
};

void write(const Result& result, int query, Scalar* to) {
    for (int d = 0; d < HEAD_DIM; ++d) to[d] = narrow(result.values[query][d / LANES][d % LANES] / result.sum[query]);
}

}  // namespace

extern "C" {

// q [tokens, kv_heads * GROUP, HEAD_DIM], strides in elements; out the same without gaps. The tokens qo_indptr[r] and
// following are the last ones of request r, which has kv_lens[r] in the pages kv_indices[kv_indptr[r]] and following. Each
// sees itself and the window - 1 tokens before it. softcap 0: none; sinks [heads] may be null.
void attention(const Scalar* q, int64_t q_token_stride, int64_t q_head_stride, const Scalar* k_cache, const Scalar* v_cache,
               const int32_t* qo_indptr, const int32_t* kv_indptr, const int32_t* kv_indices, const int32_t* kv_lens,
               int64_t requests, int64_t kv_heads, int64_t window, float scaling, float softcap,
               const float* sinks, Scalar* out) {
    const int64_t page_stride = kv_heads * PAGE_SIZE * HEAD_DIM;
    std::vector<Task> tasks;
    int64_t num_keys = 0;
    for (int64_t r = 0; r < requests; ++r) {
        const int64_t tokens = qo_indptr[r + 1] - qo_indptr[r];
        for (int64_t token = 0; token < tokens; token += TOKENS) {
            const int64_t position = kv_lens[r] - tokens + token, last = std::min(position + TOKENS, int64_t(kv_lens[r]));
            const int64_t first = std::max<int64_t>(0, position + 1 - window), step = tokens == 1 ? PART : last;
            for (int64_t begin = first; begin < last; begin += step)
                tasks.push_back({r, token, begin, std::min(begin + step, last), last - first <= step});
            num_keys += last - first;
        }
    }
    const int64_t count = int64_t(tasks.size()) * kv_heads;
    static thread_local std::vector<Result> storage;  // of tasks that are parts
    if (std::any_of(tasks.begin(), tasks.end(), [](const Task& task) { return !task.whole; })) storage.resize(count);
    Result* results = storage.data();
    // a sink joins the sum, and has no value
    const auto finish = [=](Result& result, int64_t r, int64_t token, int64_t tokens, int64_t h) {
        for (int g = 0; g < tokens * GROUP; ++g) {
            const int64_t head = h * GROUP + g % GROUP;
            if (sinks) result.sum[g] += std::exp(sinks[head] - result.peak[g]);
            write(result, g, out + ((qo_indptr[r] + token + g / GROUP) * kv_heads * GROUP + head) * HEAD_DIM);
        }
    };
#pragma omp parallel if (num_keys * kv_heads > WORTH_SHARING)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            const Task& task = tasks[i / kv_heads];
            const int64_t r = task.request, h = i % kv_heads, tokens = qo_indptr[r + 1] - qo_indptr[r];
            Block block = {{}, std::min<int64_t>(TOKENS, tokens - task.token), kv_lens[r] - tokens + task.token, window, scaling, softcap};
            for (int g = 0; g < QUERIES; ++g) {
                const int64_t token = std::min(g / GROUP, int(block.tokens) - 1);  // a block that is not full repeats its last
                block.queries[g] = q + (qo_indptr[r] + task.token + token) * q_token_stride + (h * GROUP + g % GROUP) * q_head_stride;
            }
            const int32_t* pages = kv_indices + kv_indptr[r];
            const Rows keys = {k_cache + h * PAGE_SIZE * HEAD_DIM, pages, page_stride};
            const Rows values = {v_cache + h * PAGE_SIZE * HEAD_DIM, pages, page_stride};
            Result own;
            Result& result = task.whole ? own : results[i];
            result = {};
            std::fill(result.peak, result.peak + QUERIES, -INFINITY);
            for (int64_t begin = task.begin; begin < task.end; begin += PART)
                (block.tokens == 1 ? attend<GROUP> : attend<QUERIES>)(block, keys, values, begin, std::min(begin + PART, task.end), result);
            if (task.whole) finish(result, r, task.token, block.tokens, h);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {  // the first part of a block gathers the others
            const Task& task = tasks[i / kv_heads];
            if (task.whole || (i >= kv_heads && tasks[i / kv_heads - 1].request == task.request)) continue;
            Result& result = results[i];
            for (int64_t j = i + kv_heads; j < count && tasks[j / kv_heads].request == task.request; j += kv_heads)
                for (int g = 0; g < GROUP; ++g) {
                    const float peak = std::max(result.peak[g], results[j].peak[g]);
                    const float mine = exp_(result.peak[g] - peak), other = exp_(results[j].peak[g] - peak);
                    result.sum[g] = mine * result.sum[g] + other * results[j].sum[g];
                    result.peak[g] = peak;
                    for (int d = 0; d < VECTORS; ++d)
                        result.values[g][d] = mine * result.values[g][d] + other * results[j].values[g][d];
                }
            finish(result, task.request, 0, 1, i % kv_heads);
        }
    }
}

// k, v [tokens, kv_heads, HEAD_DIM], strides in elements: token t goes to row rows[t] of page pages[t]. What is not finite
// becomes 0, since a masked key has weight 0 but 0 * NaN is NaN: what one request computes wrongly must not stay for others.
void append(const Scalar* k, const Scalar* v, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
            int64_t v_head_stride, Scalar* k_cache, Scalar* v_cache, const int32_t* pages, const int32_t* rows,
            int64_t tokens, int64_t kv_heads) {
    const auto copy = [](const Scalar* from, Scalar* to) {
#pragma omp simd
        for (int d = 0; d < HEAD_DIM; ++d) {
            const float x = load(from[d]);
            to[d] = std::fabs(x) <= 3.4028235e38f ? from[d] : narrow(0);
        }
    };
#pragma omp parallel for if (tokens * kv_heads > 1024)
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t at = ((pages[t] * kv_heads + h) * PAGE_SIZE + rows[t]) * HEAD_DIM;
            copy(k + t * k_token_stride + h * k_head_stride, k_cache + at);
            copy(v + t * v_token_stride + h * v_head_stride, v_cache + at);
        }
}
}
