// The CUDA dialect's products of matrices by themselves: a line for each, with its name and the largest
// error, relative to the sum of the absolute products. header.h is what comes before every kernel.

#include <cstdio>
#include <random>

#include "cuda_on_cpu.h"
#include "header.h"

// ---- the products --------------------------------------------------------------------------------

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

// [16 TOKEN_TILES, 32 STEPS] of T by [32 STEPS, 8 COLUMN_TILES] of floats, which has a row for each column.
template <typename T, int COLUMN_TILES, int STEPS, int TOKEN_TILES>
static void long_product(const char* name) {
    enum { DEEP = 32 * STEPS };
    const auto rows = draw<T>(16 * TOKEN_TILES * DEEP), columns = draw<float>(8 * COLUMN_TILES * DEEP);
    Accumulators<COLUMN_TILES, TOKEN_TILES> made[32];
    run_block(32, [&] {
        const int lane = ::lane();
        AOperand<Raw<T, 8>, STEPS, TOKEN_TILES> own;
        BOperands<BOperand<T, COLUMN_TILES>, STEPS> operands;
        for (int b = 0; b < STEPS; b++) {
            for (int k = 0; k < 2 * TOKEN_TILES; k++) {
                const int row = 8 * k + tile_row(lane), at = 32 * b + 4 * tile_pair(lane);
                Floats<8> numbers;
                memcpy(numbers.at, &rows[row * DEEP + at], sizeof(numbers));
                own.at[b][k / 2].in_half[k % 2] = packed(static_cast<T*>(nullptr), numbers);
            }
            BTiles<COLUMN_TILES> tiles;
            for (int k = 0; k < 2 * COLUMN_TILES; k++) {
                const int column = k / 2 * 8 + b_column(lane, k % 2);
                const float* from = &columns[column * DEEP + 32 * b + 4 * b_row(lane, k % 2)];
                memcpy(tiles.at[k / 2].run[k % 2].at, from, 4 * sizeof(float));
            }
            operands.at[b] = b_operand(tiles, T(0.0f));
        }
        made[lane] = multiply<COLUMN_TILES>(own, operands);
    });
    Worst worst;
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < 4 * COLUMN_TILES * TOKEN_TILES; k++) {
            const int j = k % 2, half = k / 2 % (2 * TOKEN_TILES), tile = k / (4 * TOKEN_TILES);
            const int row = 8 * half + sum_row(lane, j), column = 8 * tile + sum_column(lane, j);
            worst.see(made[lane].at[half / 2].tile[tile].in_half[half % 2].at[j], &rows[row * DEEP],
                      &columns[column * DEEP], DEEP);
        }
    printf("%s tiles=%d blocks=%d height=%d %.3g\n", name, COLUMN_TILES, STEPS, TOKEN_TILES, worst.error);
}

// [16, 8] by [8, 8]
static void short_product() {
    const auto rows = draw<float>(16 * 8), columns = draw<float>(8 * 8);
    Floats<4> made[32];
    run_block(32, [&] {
        const int lane = ::lane();
        const auto at = [&](int half, int k) {
            return rows[(tile_row(lane) + 8 * half) * 8 + tile_pair(lane) + k];
        };
        const auto other = [&](int e) { return columns[b_column(lane, e) * 8 + b_row(lane, e)]; };
        made[lane] = multiply(Floats<4>(), a_fragment(at(0, 0), at(0, 1), at(1, 0), at(1, 1)),
                              b_fragment(other(0), other(1)));
    });
    Worst worst;
    for (int lane = 0; lane < 32; lane++)
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
    short_product();
    all_of<float>("float32"), all_of<__half>("float16"), all_of<__nv_bfloat16>("bfloat16");
}
