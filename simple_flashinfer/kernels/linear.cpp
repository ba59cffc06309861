// y = x W^T + bias, for few rows of x at the speed at which W can be read, for many at that of the multipliers.
//
// W [out, in] is packed as [out / 16, in / PAIR, 16, PAIR] (out padded to 16): one vector holds the weights of 16 outputs for
// PAIR neighbouring inputs, to be multiplied with those inputs broadcast. It is read once, front to back, whatever the number
// of rows, and no sum has to be added up across lanes. A block of 64 outputs and up to 6 rows keeps 24 sums in registers. The
// first block of rows waits for its weights to come from memory; while the others multiply, the next weights are fetched.
//
// 8-bit weights are W / scale of each output, rounded to -127 .. 127. For few rows, where reading them is what takes time, x
// is rounded to 16 bits relative to the largest of CHUNK inputs of a row, finer than bfloat16, and integers are multiplied
// (VNNI). For many rows they become Scalars first, without a loss: 8 bits fit in bfloat16.
#include "scalar.h"

#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int TILES = 4, ROWS = 6;  // of a block: 24 of 32 vector registers are sums
#else
constexpr int TILES = 1, ROWS = 4;
#endif
constexpr int TILE = LANES;
constexpr int64_t CHUNK = 512;              // inputs: 512 * 127 * 32767 is the most that 32 bits can sum up
constexpr int64_t CACHED = 256 << 10;       // elements of x that stay in cache while W goes by
constexpr int64_t WORTH_SHARING = 1 << 21;  // multiplications, reading a weight counted as 8
constexpr int64_t MANY_ROWS = 20;

// A kind of arithmetic: PAIR, what is multiplied, and sum += weights * inputs.
struct Plain {
    using Weight = Scalar;
    using Input = Scalar;
    using Sum = Vector;
    using Weights = Pairs;
    static constexpr int64_t STEP = INT64_MAX;  // inputs until the sums must be put aside
    static constexpr int PAIR = ::PAIR;
    static Weights read(const Scalar* w) { return read_pairs(w); }
    static void add(Sum& sum, const Weights& w, const Scalar* x) { add_products(sum, w, x); }
    static Vector to_float(Sum sum) { return sum; }
};

#ifdef __AVX512VNNI__
struct Integers {
    using Weight = int8_t;
    using Input = int16_t;
    using Sum = __m512i;
    using Weights = __m512i;
    static constexpr int64_t STEP = CHUNK;
    static constexpr int PAIR = 2;
    static Weights read(const int8_t* w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)); }
    static void add(Sum& sum, Weights w, const int16_t* x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof(pair));
        sum = _mm512_dpwssd_epi32(sum, w, _mm512_set1_epi32(pair));
    }
    static Vector to_float(Sum sum) { return (Vector)_mm512_cvtepi32_ps(sum); }
};
#endif

template <typename Kind>
struct Task {
    const typename Kind::Input* x;  // [rows, in]
    const float* x_scales;          // [rows, in / STEP], or null
    const float* w_scales;          // [out], or null
    const Scalar* bias;             // [out], or null
    Scalar* y;                      // [rows, out]
    int64_t in, out;
};

// Memory to fetch while a block multiplies, two lines for each pair of inputs: all of the next weights, or half of them where only
// one block has the time; fetching all was no faster there.
struct Ahead {
    const char* at;
    int64_t step;
};

// M rows of the outputs of N tiles, whose weights begin at w
template <typename Kind, int N, int M>
void block(const Task<Kind>& task, const typename Kind::Weight* w, int64_t tile, int64_t row, Ahead ahead) {
    const int64_t in = task.in, chunks = (in - 1) / Kind::STEP + 1;
    const auto* x = task.x + row * in;
    Vector total[N][M] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        typename Kind::Sum sums[N][M] = {};
        const int64_t begin = chunk * Kind::STEP, end = in - begin > Kind::STEP ? begin + Kind::STEP : in;
        for (int64_t k = begin; k < end; k += Kind::PAIR) {
            typename Kind::Weights weights[N];
            for (int n = 0; n < N; ++n) weights[n] = Kind::read(w + n * TILE * in + k * TILE);
            if (N > 1) {
                for (int line = 0; line < 2; ++line) __builtin_prefetch(ahead.at + line * ahead.step, 0, 2);
                ahead.at += 2 * ahead.step;
            }
            for (int m = 0; m < M; ++m)
                for (int n = 0; n < N; ++n) Kind::add(sums[n][m], weights[n], x + m * in + k);
        }
        for (int n = 0; n < N; ++n)
            for (int m = 0; m < M; ++m)
                total[n][m] += Kind::to_float(sums[n][m]) * (task.x_scales ? task.x_scales[(row + m) * chunks + chunk] : 1.0f);
    }
    for (int n = 0; n < N; ++n) {
        const int64_t first = (tile + n) * TILE, count = std::min<int64_t>(TILE, task.out - first);
        for (int m = 0; m < M; ++m) {
            Scalar* to = task.y + (row + m) * task.out + first;
            if (count < TILE)
                for (int64_t i = 0; i < count; ++i) {
                    const float value = task.w_scales ? total[n][m][i] * task.w_scales[first + i] : total[n][m][i];
                    to[i] = narrow(task.bias ? value + load(task.bias[first + i]) : value);
                }
            else {
                Vector value = total[n][m];
                if (task.w_scales) value *= load_floats(task.w_scales + first);
                if (task.bias) value += load_vector(task.bias + first);
                store_vector(value, to);
            }
        }
    }
}

template <typename Kind, int M = ROWS>
void block_of(int rows, const Task<Kind>& task, const typename Kind::Weight* w, int64_t tile, int64_t row, Ahead ahead) {
    if constexpr (M == 1)
        block<Kind, TILES, 1>(task, w, tile, row, ahead);
    else if (rows == M)
        block<Kind, TILES, M>(task, w, tile, row, ahead);
    else
        block_of<Kind, M - 1>(rows, task, w, tile, row, ahead);
}

// weights(tile, count): those of some neighbouring tiles; in_place: the next ones lie behind them
template <typename Kind, typename Source>
void linear(const Task<Kind>& task, int64_t rows, bool in_place, Source weights) {
    const int64_t tiles = (task.out + TILE - 1) / TILE, groups = (tiles + TILES - 1) / TILES;
    const int64_t panel = std::max<int64_t>(CACHED / task.in / ROWS, 1) * ROWS;  // rows that stay in cache
    const int64_t panels = (rows + panel - 1) / panel;
#pragma omp parallel for collapse(2) schedule(dynamic, 4) if (task.in * task.out * (rows + 8) > WORTH_SHARING)
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t tile = group * TILES, count = std::min<int64_t>(TILES, tiles - tile);
            const auto* w = weights(tile, count);
            const int64_t first = p * panel, end = std::min(rows, first + panel), bytes = TILES * TILE * task.in * sizeof(*w);
            const int64_t others = (end - first - 1) / ROWS;  // blocks of rows after the first
            for (int64_t row = first; row < end;) {
                const int64_t left = end - row, blocks = (left + ROWS - 1) / ROWS;
                Ahead ahead = {(const char*)w, 0};
                if (in_place && row > first && group + 1 < groups)
                    ahead = {(const char*)w + bytes + (others - blocks) * (bytes / others), bytes / others / (task.in / Kind::PAIR) / 2};
                const int now = int((left + blocks - 1) / blocks);  // 8 rows as 4 and 4, not as 6 and 2
                if (count == TILES)
                    block_of<Kind>(now, task, w, tile, row, ahead);
                else
                    for (int64_t t = 0; t < count; ++t)  // what is left over, one by one: code for all cases takes long to compile
                        for (int64_t m = 0; m < now; ++m) block<Kind, 1, 1>(task, w + t * TILE * task.in, tile + t, row + m, ahead);
                row += now;
            }
        }
}

}  // namespace

extern "C" {

int linear_pair() { return Plain::PAIR; }

// x [rows, in]; w packed in pairs of linear_pair(); scales null; bias [out] or null; y [rows, out]
void linear_plain(const Scalar* x, const Scalar* w, const float* scales, const Scalar* bias, Scalar* y, int64_t rows, int64_t in,
                  int64_t out) {
    const Task<Plain> task = {x, nullptr, scales, bias, y, in, out};
    linear(task, rows, true, [=](int64_t tile, int64_t) { return w + tile * TILE * in; });
}

// the same with w int8, packed in pairs of 2; scales [out]
void linear_int8(const Scalar* x, const int8_t* w, const float* scales, const Scalar* bias, Scalar* y, int64_t rows, int64_t in,
                 int64_t out) {
#ifdef __AVX512VNNI__
    if (rows < MANY_ROWS) {
        static thread_local std::vector<int16_t> integers;
        static thread_local std::vector<float> x_scales;
        const int64_t chunks = (in - 1) / CHUNK + 1;
        integers.resize(rows * in);
        x_scales.resize(rows * chunks);
        for (int64_t i = 0; i < rows * chunks; ++i) {
            const int64_t row = i / chunks, begin = row * in + i % chunks * CHUNK, end = std::min(begin + CHUNK, (row + 1) * in);
            float peak = 1e-30f, nothing = 0;
#pragma omp simd reduction(max : peak) reduction(+ : nothing)
            for (int64_t k = begin; k < end; ++k) {
                const float value = load(x[k]);
                peak = std::max(peak, std::fabs(value));
                nothing += value - value;
            }
            x_scales[i] = peak / 32767.0f + nothing;  // NaN where an input is not finite, and so are the sums
            const float scale = nothing == 0 ? 32767.0f / peak : 0;
#pragma omp simd
            for (int64_t k = begin; k < end; ++k) integers[k] = int16_t(nothing == 0 ? std::nearbyint(load(x[k]) * scale) : 0);
        }
        const Task<Integers> task = {integers.data(), x_scales.data(), scales, bias, y, in, out};
        return linear(task, rows, true, [=](int64_t tile, int64_t) { return w + tile * TILE * in; });
    }
#endif
    const Task<Plain> task = {x, nullptr, scales, bias, y, in, out};
    linear(task, rows, false, [=](int64_t tile, int64_t count) -> const Scalar* {
        static thread_local std::vector<Scalar> wide;
        wide.resize(TILES * TILE * in);
        const int8_t* from = w + tile * TILE * in;
        Scalar* to = wide.data();
        if constexpr (Plain::PAIR == 2) {
#pragma omp simd
            for (int64_t i = 0; i < count * TILE * in; ++i) to[i] = narrow(from[i]);
        } else {
            for (int64_t i = 0; i < count * TILE * in; i += 2 * TILE)  // a vector of pairs
                for (int j = 0; j < 2; ++j)
                    for (int lane = 0; lane < TILE; ++lane) to[i + j * TILE + lane] = narrow(from[i + 2 * lane + j]);
        }
        return wide.data();
    });
}
}
