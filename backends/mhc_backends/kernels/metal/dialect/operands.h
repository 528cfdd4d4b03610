// The long product.

#pragma once

#include "../../common/floats.h"
#include "../../common/operands.h"
#include "../../common/raw.h"
#include "lanes.h"
#include "mma.h"
#include "simd.h"
#include "words.h"

#define B_FRAGMENTS(COLUMN_TILES) (2 * (COLUMN_TILES))

// The lane of the same row whose tile_pair is 2 k.
FUNCTION int row_lane(int lane, int k) { return (lane & 22) + (k & 2) * 4 + k % 2; }

// The sum over the four lanes that hold a row.
FUNCTION float row_sum(float v) {
    v += simd_partner(v, 1);
    return v + simd_partner(v, 8);
}

// The longer product, of 16 rows of 32 numbers of T, is [16, 32] by [32, 8 COLUMN_TILES]. A lane holds 8
// numbers of each of its two rows, those from 4 tile_pair on, as they are in memory; and of each tile
// of the right factor two runs of 4 numbers, run e in rows 4 b_row(lane, e) to 4 b_row(lane, e)
// + 3 and column b_column(lane, e). Of the sum it gets two numbers of each tile in each half of the
// rows: number j of half h is in row 8 h + sum_row(lane, j) and column sum_column(lane, j).
FUNCTION int sum_row(int lane, int) { return tile_row(lane); }

FUNCTION int sum_column(int lane, int j) { return tile_pair(lane) + j; }

// Accumulator t of four takes the numbers t and 4 + t of every run of 8: any order will do.
template <typename T, int COLUMN_TILES>
struct BOperand {
    enum { FRAGMENTS = 2 * COLUMN_TILES };
    uint4 frag[FRAGMENTS];
};

// The last argument only names the type.
template <int COLUMN_TILES, typename T>
FUNCTION BOperand<T, COLUMN_TILES> b_operand(BTiles<COLUMN_TILES> tiles, T) {
    BOperand<T, COLUMN_TILES> out;
    UNROLL for (int tile = 0; tile < COLUMN_TILES; tile++) {
        const Floats<4> f = tiles.at[tile].run[0], s = tiles.at[tile].run[1];
        out.frag[2 * tile] = as_type<uint4>(float4(f.at[0], s.at[0], f.at[1], s.at[1]));
        out.frag[2 * tile + 1] = as_type<uint4>(float4(f.at[2], s.at[2], f.at[3], s.at[3]));
    }
    return out;
}

// The products of STEPS times 32 numbers of each row with as many factors, added up.
template <int COLUMN_TILES, int STEPS, int TOKEN_TILES, typename T, typename F>
FUNCTION Accumulators<COLUMN_TILES, TOKEN_TILES> multiply(AOperand<Raw<T, 8>, STEPS, TOKEN_TILES> rows, F operands) {
    Accumulators<COLUMN_TILES, TOKEN_TILES> out;
    UNROLL for (int k = 0; k < COLUMN_TILES * TOKEN_TILES; k++) {
        const int tile = k % COLUMN_TILES;
        Floats<4> sum = {};
        UNROLL for (int k_step = 0; k_step < STEPS; k_step++) {
            const Halves<Raw<T, 8>> row = rows.at[k_step][k / COLUMN_TILES];
            const Floats<8> u = floats(row.in_half[0]), l = floats(row.in_half[1]);
            UNROLL for (int t = 0; t < 4; t++) {
                const float4 two = as_type<float4>(frag(operands, k_step, 2 * tile + t / 2));
                const BFragment factor = t % 2 ? b_fragment(two.z, two.w) : b_fragment(two.x, two.y);
                sum = multiply(sum, a_fragment(u.at[t], u.at[4 + t], l.at[t], l.at[4 + t]), factor);
            }
        }
        UNROLL for (int j = 0; j < 4; j++)
            out.at[k / COLUMN_TILES].tile[tile].in_half[j / 2].at[j % 2] = sum.at[j];
    }
    return out;
}
