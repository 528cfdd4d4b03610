// The CUDA dialect's products of matrices, run without a GPU: 32 threads are the lanes, and the tensor
// core's instructions are written out as the PTX ISA has them (9.7.14, "Matrix multiply-accumulate").
//
// dialect.h is dialect_cuda.h with these instructions as calls. Prints a line per product: its name and
// the largest error, relative to the sum of the absolute products.

#include <immintrin.h>
#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

// ---- what CUDA's headers have --------------------------------------------------------------------

#define __device__
#define __forceinline__ inline
struct uint1 {
    unsigned x;
};
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename To, typename From>
To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }
float __shfl_xor_sync(unsigned, float, int);
float __shfl_sync(unsigned, float, int);
bool __any_sync(unsigned, bool);

struct __half {
    unsigned short bits;
    __half(float v = 0.0f) : bits(_cvtss_sh(v, 0)) {}
    operator float() const { return _cvtsh_ss(bits); }
};
struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16(float v = 0.0f) {
        const unsigned all = same_bits<unsigned>(v);
        bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    }
    operator float() const { return same_bits<float>(unsigned(bits) << 16); }
};
struct __half2 {
    __half low, high;
};
struct __nv_bfloat162 {
    __nv_bfloat16 low, high;
};
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline float __half2float(__half v) { return v; }
inline __half __ushort_as_half(unsigned short v) { return same_bits<__half>(v); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

// ---- the tensor core -----------------------------------------------------------------------------

static thread_local int lane;
static pthread_barrier_t all_lanes;
static unsigned left_words[32][4], right_words[32][2];

// Number k of [16, K] by [K, 8], of a row of the left factor or a column of the right one, as floats.
static float tf32(unsigned v) { return same_bits<float>(v & 0xffffe000u); }
static float bf16(unsigned v, int k) {
    return same_bits<float>(k % 2 ? v & 0xffff0000u : v << 16);
}
template <int K>
static float left_number(int row, int k) {
    const unsigned* own = left_words[row % 8 * 4 + (K == 8 ? k % 4 : k % 8 / 2)];
    const unsigned v = own[row / 8 + (k >= K / 2 ? 2 : 0)];
    return K == 8 ? tf32(v) : bf16(v, k);
}
template <int K>
static float right_number(int k, int column) {
    const unsigned* own = right_words[column * 4 + (K == 8 ? k % 4 : k % 8 / 2)];
    return K == 8 ? tf32(own[k >= K / 2]) : bf16(own[k >= K / 2], k);
}
template <int K, typename Sum>
static void tensor_core(Sum& sum, uint4 a, unsigned b0, unsigned b1) {
    memcpy(left_words[lane], &a, sizeof(a));
    right_words[lane][0] = b0, right_words[lane][1] = b1;
    pthread_barrier_wait(&all_lanes);
    for (int e = 0; e < 4; e++) {
        double all = sum.at[e];
        for (int k = 0; k < K; k++)
            all += double(left_number<K>(lane / 4 + e / 2 * 8, k)) *
                   right_number<K>(k, lane % 4 * 2 + e % 2);
        sum.at[e] = float(all);
    }
    pthread_barrier_wait(&all_lanes);
}

#include "dialect.h"

// ---- the products --------------------------------------------------------------------------------

using namespace tested;

static void on_all_lanes(const std::function<void()>& work) {
    std::vector<std::thread> threads;
    for (int k = 0; k < 32; k++)
        threads.emplace_back([&work, k] {
            lane = k;
            work();
        });
    for (auto& thread : threads) thread.join();
}

static std::mt19937 random_bits(7);
template <typename T>
static std::vector<float> draw(int count) {
    std::normal_distribution<float> normal;
    std::vector<float> out(count);
    for (auto& v : out) v = float(T(normal(random_bits)));
    return out;
}

struct Worst {
    double error = 0;
    void see(double got, const float* a, const float* b, int count) {
        double want = 0, size = 0;
        for (int k = 0; k < count; k++) want += double(a[k]) * b[k], size += fabs(double(a[k]) * b[k]);
        const double off = fabs(got - want) / size;
        if (!(off <= error)) error = off;
    }
};

template <typename F, int BLOCKS>
struct Held {
    F at[BLOCKS];
};
template <typename F, int BLOCKS>
uint4 quad(Held<F, BLOCKS> factors, int block, int k) {
    return factors.at[block].quad[k];
}

// [16 HEIGHT, 32 BLOCKS] of T by [32 BLOCKS, 8 TILES] of floats, which has a row for each column.
template <typename T, int TILES, int BLOCKS, int HEIGHT>
static void long_product(const char* name) {
    enum { DEEP = 32 * BLOCKS };
    const auto rows = draw<T>(16 * HEIGHT * DEEP), columns = draw<float>(8 * TILES * DEEP);
    Products<TILES, HEIGHT> made[32];
    on_all_lanes([&] {
        Rows<Raw<T, 8>, BLOCKS, HEIGHT> own;
        Held<RightFactor<T, TILES>, BLOCKS> factors;
        for (int b = 0; b < BLOCKS; b++) {
            for (int k = 0; k < 2 * HEIGHT; k++) {
                const int row = 8 * k + tile_row(lane), at = 32 * b + 4 * tile_pair(lane);
                Floats<8> numbers;
                memcpy(numbers.at, &rows[row * DEEP + at], sizeof(numbers));
                own.at[b][k / 2].in_half[k % 2] = packed(static_cast<T*>(nullptr), numbers);
            }
            RightTiles<TILES> tiles;
            for (int k = 0; k < 2 * TILES; k++) {
                const int column = k / 2 * 8 + right_column(lane, k % 2);
                const float* from = &columns[column * DEEP + 32 * b + 4 * right_row(lane, k % 2)];
                memcpy(tiles.at[k / 2].run[k % 2].at, from, 4 * sizeof(float));
            }
            factors.at[b] = right_factor(tiles, T(0.0f));
        }
        made[lane] = multiply<TILES>(own, factors);
    });
    Worst worst;
    for (lane = 0; lane < 32; lane++)
        for (int k = 0; k < 4 * TILES * HEIGHT; k++) {
            const int j = k % 2, half = k / 2 % (2 * HEIGHT), tile = k / (4 * HEIGHT);
            const int row = 8 * half + sum_row(lane, j), column = 8 * tile + sum_column(lane, j);
            worst.see(made[lane].at[half / 2].tile[tile].in_half[half % 2].at[j], &rows[row * DEEP],
                      &columns[column * DEEP], DEEP);
        }
    printf("%s tiles=%d blocks=%d height=%d %.3g\n", name, TILES, BLOCKS, HEIGHT, worst.error);
}

// [16, 8] by [8, 8]
static void short_product() {
    const auto rows = draw<float>(16 * 8), columns = draw<float>(8 * 8);
    Floats<4> made[32];
    on_all_lanes([&] {
        const auto at = [&](int half, int k) {
            return rows[(tile_row(lane) + 8 * half) * 8 + tile_pair(lane) + k];
        };
        const auto other = [&](int e) { return columns[right_column(lane, e) * 8 + right_row(lane, e)]; };
        made[lane] = multiply(Floats<4>(), left(at(0, 0), at(0, 1), at(1, 0), at(1, 1)),
                              right(other(0), other(1)));
    });
    Worst worst;
    for (lane = 0; lane < 32; lane++)
        for (int e = 0; e < 4; e++)
            worst.see(made[lane].at[e], &rows[(tile_row(lane) + e / 2 * 8) * 8],
                      &columns[(tile_pair(lane) + e % 2) * 8], 8);
    printf("short %.3g\n", worst.error);
}

template <typename T>
static void all_of(const char* name) {
    long_product<T, 1, 1, 1>(name), long_product<T, 1, 2, 2>(name), long_product<T, 2, 1, 1>(name);
    long_product<T, 3, 2, 2>(name), long_product<T, 3, 4, 1>(name), long_product<T, 4, 1, 1>(name);
    long_product<T, 5, 1, 2>(name), long_product<T, 8, 1, 1>(name);
}

int main() {
    pthread_barrier_init(&all_lanes, nullptr, 32);
    short_product();
    all_of<float>("float32"), all_of<__half>("float16"), all_of<__nv_bfloat16>("bfloat16");
}
