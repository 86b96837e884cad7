// Reads one lane of packed blocks on a CPU: scores of queries with keys, and weighted sums of values. `read_native.py`
// compiles this file and calls it. A block is unpacked to one byte a code, which stays in the first cache; scales are
// folded into the query (keys) or multiply the code in a register (values). No dense copy is made.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Blocks of `size` tokens and `width` channels, rows of the batch and heads one after the other in `heads`. `data`,
// `scale` and `zero` are laid out as `store.Lane` says; `zero` is null for symmetric codes, `ends` for scales in
// float16. `groups`: scales of a token of values, 0 for keys.
struct Lane {
    const std::uint8_t* data;
    const void* scale;
    const void* zero;
    const std::uint16_t* ends;
    std::int64_t heads, blocks, size, width, groups, bits;
};

namespace {

#if defined(__AVX512F__)
constexpr int WIDE = 16;
#elif defined(__AVX__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * WIDE), aligned(4)));
constexpr int ROWS = 4;  // rows of queries that share what is read

Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
Vec load(const std::uint8_t* from) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Vec wide;
    for (int i = 0; i < WIDE; i++) wide[i] = from[i];
    return wide;
#endif
}
float sum(const Vec& x) {
    float part[WIDE];
    std::memcpy(part, &x, sizeof part);
    for (int half = WIDE / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

// A finite half. The product puts the exponent where a float has it, of subnormal numbers too.
float half(std::uint16_t bits) {
    std::uint32_t wide = (bits & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    return (bits & 0x8000u ? -value : value) * 0x1p112f;
}

// Scales and zeros of one block; see `scales.widened`.
struct Grid {
    const Lane& lane;
    std::int64_t first;
    float step_unit = 1, start_unit = 1;

    Grid(const Lane& lane, std::int64_t block) : lane(lane) {
        first = block * (lane.groups ? lane.size * lane.groups : lane.width);
        if (lane.ends) {
            const std::uint16_t* mine = lane.ends + block * (lane.zero ? 2 : 1);
            step_unit = half(mine[0]) / 255;
            start_unit = lane.zero ? half(mine[1]) / 127 : 0;
        }
    }
    float step(std::int64_t i) const {
        return lane.ends ? static_cast<const std::uint8_t*>(lane.scale)[first + i] * step_unit
                         : half(static_cast<const std::uint16_t*>(lane.scale)[first + i]);
    }
    float start(std::int64_t i) const {
        if (!lane.zero) return -0.5f * ((1 << lane.bits) - 1) * step(i);
        return lane.ends ? static_cast<const std::int8_t*>(lane.zero)[first + i] * start_unit
                         : half(static_cast<const std::uint16_t*>(lane.zero)[first + i]);
    }
};

// Codes of one token from one plane: MORE adds the high bits to the low ones.
template <bool MORE>
void plane(const std::uint8_t* __restrict from, std::uint8_t* __restrict to, std::int64_t width, int right, int bits,
           int left) {
    const std::uint8_t mask = std::uint8_t((1 << bits) - 1);
    for (std::int64_t d = 0; d < width; d++) {
        const std::uint8_t code = std::uint8_t((from[d] >> right & mask) << left);
        to[d] = MORE ? to[d] | code : code;
    }
}

// Codes of a block, one byte each, rows of `stride`.
void unpack(const Lane& lane, std::int64_t block, std::uint8_t* codes, std::int64_t stride) {
    const std::int64_t size = lane.size, width = lane.width;
    const std::uint8_t* from = lane.data + block * (size * lane.bits / 8 * width);
    const int low = lane.bits == 3 ? 2 : int(lane.bits);
    for (std::int64_t t = 0, run = size * low / 8; t < size; t++)
        plane<false>(from + t % run * width, codes + t * stride, width, int(t / run) * low, low, 0);
    if (lane.bits == 3)
        for (std::int64_t t = 0, run = size / 8; t < size; t++)
            plane<true>(from + (size / 4 + t % run) * width, codes + t * stride, width, int(t / run), 1, 2);
}

// Scores of R rows with the tokens of a block; rows of scores stand `apart`.
template <int R>
void dot(const std::uint8_t* codes, const float* query, float* scores, const float* base, std::int64_t size,
         std::int64_t stride, std::int64_t apart) {
    for (std::int64_t t = 0; t < size; t++) {
        Vec found[R] = {};
        for (std::int64_t d = 0; d < stride; d += WIDE) {
            const Vec code = load(codes + t * stride + d);
            for (int r = 0; r < R; r++) found[r] += code * load(query + r * stride + d);
        }
        for (int r = 0; r < R; r++) scores[r * apart + t] = base[r] + sum(found[r]);
    }
}

// Adds the tokens of a block, weighted, to R rows of `out`. Groups are whole vectors, or one is the head.
template <int R>
void add(const std::uint8_t* codes, const float* steps, const float* starts, const float* weights, float* out,
         std::int64_t size, std::int64_t stride, std::int64_t group, std::int64_t groups, std::int64_t apart) {
    for (std::int64_t d = 0; d < stride; d += WIDE) {
        Vec found[R];
        for (int r = 0; r < R; r++) found[r] = load(out + r * stride + d);
        const std::int64_t g = d / group;
        for (std::int64_t t = 0; t < size; t++) {
            const Vec value = load(codes + t * stride + d) * steps[t * groups + g] + starts[t * groups + g];
            for (int r = 0; r < R; r++) found[r] += value * weights[r * apart + t];
        }
        for (int r = 0; r < R; r++) std::memcpy(out + r * stride + d, &found[r], sizeof(Vec));
    }
}

std::int64_t padded(std::int64_t width) { return (width + WIDE - 1) / WIDE * WIDE; }

}  // namespace

extern "C" {

// query [heads, rows, width] -> scores [heads, rows, blocks * size].
void packed_scores(const Lane* of, const float* query, float* scores, std::int64_t rows, int threads) {
    const Lane& lane = *of;
    const std::int64_t stride = padded(lane.width), apart = lane.blocks * lane.size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<std::uint8_t> codes(lane.size * stride);
        std::vector<float> mine(rows * stride), base(rows);
#pragma omp for schedule(static)
        for (std::int64_t index = 0; index < lane.heads * lane.blocks; index++) {
            const std::int64_t head = index / lane.blocks;
            unpack(lane, index, codes.data(), stride);
            const Grid grid(lane, index);
            std::fill(base.begin(), base.end(), 0.0f);
            for (std::int64_t d = 0; d < lane.width; d++) {
                const float step = grid.step(d), start = grid.start(d);
                for (std::int64_t r = 0; r < rows; r++) {
                    const float one = query[(head * rows + r) * lane.width + d];
                    mine[r * stride + d] = one * step;
                    base[r] += one * start;
                }
            }
            float* to = scores + head * rows * apart + index % lane.blocks * lane.size;
            for (std::int64_t r = 0; r < rows; r += ROWS) {
                auto* run = rows - r >= 4 ? dot<4> : rows - r == 3 ? dot<3> : rows - r == 2 ? dot<2> : dot<1>;
                run(codes.data(), mine.data() + r * stride, to + r * apart, base.data() + r, lane.size, stride, apart);
            }
        }
    }
}

// weights [heads, rows, blocks * size] -> sums [heads, splits, rows, width], one for every `split` blocks, so that what
// is added up in which order does not depend on the threads.
void packed_sums(const Lane* of, const float* weights, float* sums, std::int64_t rows, std::int64_t split,
                 int threads) {
    const Lane& lane = *of;
    const std::int64_t stride = padded(lane.width), apart = lane.blocks * lane.size;
    const std::int64_t splits = (lane.blocks + split - 1) / split;
#pragma omp parallel num_threads(threads)
    {
        std::vector<std::uint8_t> codes(lane.size * stride);
        std::vector<float> steps(lane.size * lane.groups), starts(lane.size * lane.groups), out(rows * stride);
#pragma omp for schedule(static)
        for (std::int64_t index = 0; index < lane.heads * splits; index++) {
            const std::int64_t head = index / splits, begin = index % splits * split;
            std::fill(out.begin(), out.end(), 0.0f);
            for (std::int64_t block = begin; block < std::min(begin + split, lane.blocks); block++) {
                unpack(lane, head * lane.blocks + block, codes.data(), stride);
                const Grid grid(lane, head * lane.blocks + block);
                for (std::int64_t i = 0; i < lane.size * lane.groups; i++) {
                    steps[i] = grid.step(i);
                    starts[i] = grid.start(i);
                }
                const float* from = weights + head * rows * apart + block * lane.size;
                for (std::int64_t r = 0; r < rows; r += ROWS) {
                    auto* run = rows - r >= 4 ? add<4> : rows - r == 3 ? add<3> : rows - r == 2 ? add<2> : add<1>;
                    run(codes.data(), steps.data(), starts.data(), from + r * apart, out.data() + r * stride,
                        lane.size, stride, lane.width / lane.groups, lane.groups, apart);
                }
            }
            for (std::int64_t r = 0; r < rows; r++)
                std::copy_n(out.data() + r * stride, lane.width, sums + (index * rows + r) * lane.width);
        }
    }
}

}
