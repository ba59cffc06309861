// Draws a token from each row of logits, as sampling/sampler.py says: greedy, or by a uniform number that inverts the cumulative
// distribution in the order of the vocabulary, over what top-k, then top-p of that, then min-p leave.
//
// The thresholds of top-k and top-p are looked for in a histogram of the logits: only the bucket that holds one is sorted.
#include "scalar.h"

#include <functional>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t WORTH_SHARING = 1 << 15;  // logits
constexpr int64_t PART = 256;               // summed up together
constexpr int BUCKETS = 1024;
constexpr float PER_UNIT = 32;  // buckets; what is smaller than the largest by BUCKETS / PER_UNIT or more is in the last one
constexpr float NOTHING = -87;  // e^-87 is as good as 0

template <typename T>
inline float as_float(T x) {
    if constexpr (std::is_same_v<T, float>)
        return x;
    else
        return load(x);
}

struct Largest {
    float value;
    int64_t at;  // the first of equals; -1 when it is not finite, or one is NaN
};

template <typename T>
Largest largest(const T* x, int64_t count) {
    Largest found = {-INFINITY, 0};
    bool any_nan = false;
    for (int64_t begin = 0; begin < count; begin += PART) {
        float highest = -INFINITY;
        int nans = 0;
#pragma omp simd reduction(max : highest) reduction(+ : nans)
        for (int64_t i = begin; i < std::min(begin + PART, count); ++i) {
            const float value = as_float(x[i]);
            highest = std::max(highest, value);
            nans += value != value;
        }
        any_nan |= nans > 0;
        if (highest > found.value) found = {highest, begin};
    }
    if (any_nan || std::fabs(found.value) > 3.4028235e38f)
        found.at = -1;
    else
        while (as_float(x[found.at]) != found.value) ++found.at;
    return found;
}

// Logits as differences to the largest, over the temperature, of one row.
class Row {
public:
    template <typename T>
    Row(const T* x, int64_t count, float peak, float temperature) : count(count) {
        static thread_local std::vector<float> floats;  // room that is kept from row to row
        static thread_local std::vector<int32_t> integers;
        floats.resize(std::max<size_t>(floats.size(), 2 * count));
        integers.resize(std::max<size_t>(integers.size(), count));
        shifted = floats.data(), weights = shifted + count, bucket_of = integers.data();
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) shifted[i] = (as_float(x[i]) - peak) / temperature;
    }

    // the smallest that top-k and top-p leave
    float threshold(int64_t top_k, double top_p) {
        int64_t numbers[BUCKETS] = {};
        double masses[BUCKETS] = {};
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            bucket_of[i] = int32_t(std::min(-shifted[i] * PER_UNIT, float(BUCKETS - 1)));
            weights[i] = weight(shifted[i], -INFINITY);
        }
        for (int64_t i = 0; i < count; ++i) ++numbers[bucket_of[i]], masses[bucket_of[i]] += weights[i];
        float limit = -INFINITY;
        double total = 0, before = 0;
        int64_t left = std::min(top_k, count);
        int last = 0;  // the bucket with the smallest that top-k leaves, `left` of it
        for (; left > numbers[last]; ++last) left -= numbers[last], total += masses[last];
        std::vector<float> inside;
        if (top_k < count) {
            inside = sorted(last);
            limit = inside[left - 1];
            for (int64_t i = 0; i < left; ++i) total += weight(inside[i], -INFINITY);
        } else {
            total += masses[last];
        }
        if (top_p >= 1) return limit;
        int bucket = 0;
        for (; bucket < last && before + masses[bucket] < top_p * total; ++bucket) before += masses[bucket];
        if (bucket < last || top_k >= count) inside = sorted(bucket), left = inside.size();
        for (int64_t i = 0; i < left && before < top_p * total; ++i) limit = inside[i], before += weight(limit, -INFINITY);
        return limit;
    }

    // uniform in [0, 1): of those that are not below the limit
    int64_t draw(float limit, double uniform) {
        double total = 0;
        std::vector<double> sums;
        for (int64_t begin = 0; begin < count; begin += PART) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < std::min(begin + PART, count); ++i) sum += weights[i] = weight(shifted[i], limit);
            sums.push_back(total += sum);
        }
        const double target = uniform * total;
        const int64_t part = std::upper_bound(sums.begin(), sums.end(), target) - sums.begin();
        double reached = part ? sums[part - 1] : 0.0;
        int64_t drawn = 0;  // sums of parts and of tokens are rounded apart: what passes the end of a part is its last token
        for (int64_t i = part * PART; i < std::min((part + 1) * PART, count); ++i) {
            if (weights[i] == 0) continue;
            drawn = i;
            if ((reached += weights[i]) > target) break;
        }
        return drawn;
    }

private:
    static float weight(float shifted, float limit) { return shifted >= std::max(limit, NOTHING) ? exp_(shifted) : 0.0f; }

    std::vector<float> sorted(int bucket) const {
        std::vector<float> inside;
        for (int64_t i = 0; i < count; ++i)
            if (bucket_of[i] == bucket) inside.push_back(shifted[i]);
        std::sort(inside.begin(), inside.end(), std::greater<float>());
        return inside;
    }

    int64_t count;
    float *shifted, *weights;
    int32_t* bucket_of;
};

template <typename T>
void draw_all(const T* x, const float* temperature, const int32_t* top_k, const double* top_p, const float* min_p,
              const double* uniform, int64_t* out, int64_t rows, int64_t count) {
#pragma omp parallel for schedule(dynamic) if (rows * count > WORTH_SHARING)
    for (int64_t r = 0; r < rows; ++r) {
        const Largest best = largest(x + r * count, count);
        out[r] = best.at;
        if (best.at < 0 || temperature[r] <= 0) continue;
        Row row(x + r * count, count, best.value, temperature[r]);
        const bool by_k = top_k[r] > 0 && top_k[r] < count, by_p = top_p[r] > 0 && top_p[r] < 1;
        float limit = min_p[r] > 0 ? std::log(min_p[r]) : -INFINITY;
        if (by_k || by_p) limit = std::max(limit, row.threshold(by_k ? top_k[r] : count, by_p ? top_p[r] : 1.0));
        out[r] = row.draw(limit, uniform[r]);
    }
}

}  // namespace

extern "C" {

// x [rows, count], of Scalars or of floats; parameters [rows], temperature 0: greedy, others 0: off; out [rows], -1 where the
// largest is not finite, or one is NaN
void draw_scalars(const Scalar* x, const float* temperature, const int32_t* top_k, const double* top_p, const float* min_p,
                  const double* uniform, int64_t* out, int64_t rows, int64_t count) {
    draw_all(x, temperature, top_k, top_p, min_p, uniform, out, rows, count);
}
void draw_floats(const float* x, const float* temperature, const int32_t* top_k, const double* top_p, const float* min_p,
                 const double* uniform, int64_t* out, int64_t rows, int64_t count) {
    draw_all(x, temperature, top_k, top_p, min_p, uniform, out, rows, count);
}
}
