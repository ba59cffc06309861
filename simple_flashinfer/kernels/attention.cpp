// Causal attention of a batch of requests over pages of keys and values, read where they lie. Compiled for one head size, one
// number of query heads a K/V head and one page size, a multiple of 16: -DHEAD_DIM=64 -DGROUP=3 -DPAGE_SIZE=16.
//
// Keys and values lie as matmuls want them, so that a vector of either is multiplied with broadcast numbers and no sum has to
// be added up across lanes: K is [num_pages, kv_heads, PAGE_SIZE / 16, HEAD_DIM / PAIR, 16, PAIR], PAIR dimensions of 16 tokens
// a vector, V is [num_pages, kv_heads, PAGE_SIZE / PAIR, HEAD_DIM, PAIR], 16 dimensions of PAIR tokens. Softmax's weights are
// rounded to Scalars, as on a GPU's tensor cores; their sum is of the exact ones.
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
constexpr int64_t AHEAD = 64;           // keys that are fetched ahead: the processor does not guess where the next page is
constexpr int VECTORS = HEAD_DIM / LANES;
constexpr int TOKENS = GROUP < 12 ? 12 / GROUP : 1;  // of a block
constexpr int QUERIES = TOKENS * GROUP;
static_assert(HEAD_DIM % LANES == 0 && PAGE_SIZE % LANES == 0);

struct Tiles {  // of one request and K/V head: where its tokens i, i + 1, .. i + LANES - 1 lie
    const Scalar* cache;
    const int32_t* pages;
    int64_t page_stride;
    const Scalar* operator[](uint32_t i) const {  // unsigned, and the size known: no division
        return cache + pages[i / PAGE_SIZE] * page_stride + i % PAGE_SIZE * HEAD_DIM;
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
void attend(const Block& block, Tiles keys, Tiles values, int64_t begin, int64_t end, Result& result) {
    alignas(64) static thread_local float scores[num_queries][PART];
    alignas(64) static thread_local Scalar weights[num_queries][PART];
    constexpr int TILES = num_queries < 6 ? 6 / num_queries : 1;  // side by side, so that no product waits for the one before
    const int64_t count = end - begin, padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t start = 0; start < padded; start += TILES * LANES) {
        const Scalar *tile[TILES], *next[TILES];
        for (int t = 0; t < TILES; ++t) {
            tile[t] = keys[begin + std::min(start + t * LANES, padded - LANES)];
            const int64_t ahead = start + t * LANES + AHEAD;
            next[t] = ahead < padded ? keys[begin + ahead] : values[begin + std::min(ahead - padded, padded - LANES)];
        }
        Vector sums[num_queries][TILES] = {};
        for (int d = 0; d < HEAD_DIM; d += PAIR)
            for (int t = 0; t < TILES; ++t) {
                __builtin_prefetch(next[t] + d * LANES, 0, 2);
                const Pairs key = read_pairs(tile[t] + d * LANES);
                for (int g = 0; g < num_queries; ++g) add_products(sums[g][t], key, block.queries[g] + d);
            }
        for (int g = 0; g < num_queries; ++g)
            for (int t = 0; t < TILES && start + t * LANES < padded; ++t)
                *(Vector*)&scores[g][start + t * LANES] = sums[g][t] * block.scaling;
    }
    for (int g = 0; g < num_queries; ++g) {
        float* s = scores[g];
        Scalar* w = weights[g];
        const int64_t position = block.position + g / GROUP;
        // of these keys the query sees those from first to last - 1
        const int64_t last = std::max<int64_t>(std::min(count, position + 1 - begin), 0);
        const int64_t first = std::min(std::max<int64_t>(position + 1 - block.window - begin, 0), last);
        if (block.softcap > 0)
            for (int64_t j = first; j < last; ++j) s[j] = block.softcap * std::tanh(s[j] / block.softcap);
        float peak = result.peak[g], sum = 0;
#pragma omp simd reduction(max : peak)
        for (int64_t j = first; j < last; ++j) peak = std::max(peak, s[j]);
        std::fill(s, s + first, 0.0f);
        std::fill(s + last, s + padded, 0.0f);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < last; ++j) sum += s[j] = exp_(s[j] - peak);
        for (int64_t j = 0; j < padded; j += LANES) store_vector(load_floats(s + j), w + j);
        if (peak == -INFINITY) continue;  // nothing seen yet
        const float shrink = exp_(result.peak[g] - peak);
        result.sum[g] = result.sum[g] * shrink + sum;
        result.peak[g] = peak;
        for (int d = 0; d < VECTORS; ++d) result.values[g][d] *= shrink;
    }
    constexpr int WIDTH = num_queries * VECTORS <= 24 ? VECTORS : num_queries <= 12 && VECTORS % 2 == 0 ? 2 : 1;  // fits into registers
    for (int first = 0; first < VECTORS; first += WIDTH) {
        Vector total[num_queries][WIDTH];
        for (int g = 0; g < num_queries; ++g) std::memcpy(total[g], result.values[g] + first, sizeof(total[g]));
        for (int64_t start = 0; start < padded; start += LANES) {
            const Scalar* tile = values[begin + start] + first * LANES * PAIR;
            const Scalar* next = values[begin + std::min(start + AHEAD, padded - LANES)] + first * LANES * PAIR;
            for (int j = 0; j < LANES; j += PAIR)
                for (int d = 0; d < WIDTH; ++d) {
                    __builtin_prefetch(next + j * HEAD_DIM + d * LANES * PAIR, 0, 2);
                    const Pairs value = read_pairs(tile + j * HEAD_DIM + d * LANES * PAIR);
                    for (int g = 0; g < num_queries; ++g) add_products(total[g][d], value, &weights[g][start + j]);
                }
        }
        for (int g = 0; g < num_queries; ++g) std::memcpy(result.values[g] + first, total[g], sizeof(total[g]));
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

int pair() { return PAIR; }

// q [tokens, kv_heads * GROUP, HEAD_DIM], strides in elements; out the same without gaps. The tokens qo_indptr[r] and
// following are the last ones of request r, which has kv_lens[r] in the pages kv_indices[kv_indptr[r]] and following. Each
// sees itself and the window - 1 tokens before it. softcap 0: none; sinks [heads] may be null.
void attention(const Scalar* q, int64_t q_token_stride, int64_t q_head_stride, const Scalar* k_cache, const Scalar* v_cache,
               const Batch* batch, int64_t kv_heads, int64_t window, float scaling, float softcap, const float* sinks,
               Scalar* out) {
    const int32_t *qo_indptr = batch->qo_indptr, *kv_lens = batch->kv_lens;
    const int64_t page_stride = kv_heads * PAGE_SIZE * HEAD_DIM;
    std::vector<Task> tasks;
    size_t num_keys = 0, num_results = 0;  // kept until the end, for tasks that are parts: decodes, which come first
    for (int64_t r = 0; r < batch->requests; ++r) {
        const int64_t tokens = qo_indptr[r + 1] - qo_indptr[r];
        for (int64_t token = 0; token < tokens; token += TOKENS) {
            const int64_t position = kv_lens[r] - tokens + token, last = std::min(position + TOKENS, int64_t(kv_lens[r]));
            const int64_t first = std::max<int64_t>(0, position + 1 - window) / LANES * LANES, step = tokens == 1 ? PART : last;
            for (int64_t begin = first; begin < last; begin += step)
                tasks.push_back({r, token, begin, std::min(begin + step, last), last - first <= step});
            num_keys += last - first;
            if (last - first > step) num_results = tasks.size() * kv_heads;
        }
    }
    const int64_t count = int64_t(tasks.size()) * kv_heads;
    static thread_local std::vector<Result> storage;
    if (storage.size() < num_results) storage.resize(num_results);
    Result* results = storage.data();
    // a sink joins the sum, and has no value
    const auto finish = [=](Result& result, int64_t r, int64_t token, int64_t tokens, int64_t h) {
        for (int g = 0; g < tokens * GROUP; ++g) {
            const int64_t head = h * GROUP + g % GROUP;
            if (sinks) result.sum[g] += std::exp(sinks[head] - result.peak[g]);
            write(result, g, out + ((qo_indptr[r] + token + g / GROUP) * kv_heads * GROUP + head) * HEAD_DIM);
        }
    };
#pragma omp parallel if (int64_t(num_keys) * kv_heads > WORTH_SHARING)
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
            const int32_t* pages = batch->kv_indices + batch->kv_indptr[r];
            const Tiles keys = {k_cache + h * PAGE_SIZE * HEAD_DIM, pages, page_stride};
            const Tiles values = {v_cache + h * PAGE_SIZE * HEAD_DIM, pages, page_stride};
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

// k, v [tokens, kv_heads, HEAD_DIM], strides in elements. What is not finite becomes 0, since a masked key has weight 0 but
// 0 * NaN is NaN: what one request computes wrongly must not stay for others.
void append(const Scalar* k, const Scalar* v, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
            int64_t v_head_stride, Scalar* k_cache, Scalar* v_cache, const Batch* batch, int64_t kv_heads) {
    const auto finite = [](Scalar x) { return std::fabs(load(x)) <= 3.4028235e38f ? x : narrow(0); };
#pragma omp parallel for if (batch->tokens * kv_heads > 1024)
    for (int64_t t = 0; t < batch->tokens; ++t)
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t row = batch->rows[t], lane = row % LANES;
            const int64_t tile = ((batch->pages[t] * kv_heads + h) * PAGE_SIZE + row - lane) * HEAD_DIM;
            const Scalar *key = k + t * k_token_stride + h * k_head_stride, *value = v + t * v_token_stride + h * v_head_stride;
            Scalar *to_key = k_cache + tile + lane * PAIR, *to_value = v_cache + tile + lane / PAIR * PAIR * HEAD_DIM + lane % PAIR;
            for (int d = 0; d < HEAD_DIM; ++d) {
                to_key[d / PAIR * PAIR * LANES + d % PAIR] = finite(key[d]);
                to_value[d * PAIR] = finite(value[d]);
            }
        }
}
}
