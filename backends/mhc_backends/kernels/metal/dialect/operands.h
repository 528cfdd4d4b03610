// The product of operands of common/operands.h, by the matrices of mma.h.

#pragma once

#include "../../common/floats.h"
#include "../../common/operands.h"
#include "../../common/raw.h"
#include "mma.h"
#include "words.h"

// The most 16-byte fragments of a lane's share of COLUMN_TILES tiles of a B operand.
#define B_FRAGMENTS(COLUMN_TILES) (2 * (COLUMN_TILES))

// Product t of four takes numbers t and 4 + t of every run of 8; the order does not matter.
template <typename T, int COLUMN_TILES>
struct BOperand {
    enum { FRAGMENTS = 2 * COLUMN_TILES };
    uint4 frag[FRAGMENTS];
};

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

// Multiplies STEPS K steps of each row by as many B operands, and adds the products up.
template <int COLUMN_TILES, int STEPS, int TOKEN_TILES, typename T, typename F>
FUNCTION Accumulators<COLUMN_TILES, TOKEN_TILES> multiply(
    AOperand<Raw<T, 8>, STEPS, TOKEN_TILES> rows, F operands) {
    Accumulators<COLUMN_TILES, TOKEN_TILES> out;
    UNROLL for (int k = 0; k < COLUMN_TILES * TOKEN_TILES; k++) {
        const int tile = k % COLUMN_TILES;
        Floats<4> sum = {};
        UNROLL for (int k_step = 0; k_step < STEPS; k_step++) {
            const Halves<Raw<T, 8>> row = rows.at[k_step][k / COLUMN_TILES];
            const Floats<8> u = floats(row.in_half[0]), l = floats(row.in_half[1]);
            UNROLL for (int t = 0; t < 4; t++) {
                const float4 two = as_type<float4>(frag(operands, k_step, 2 * tile + t / 2));
                const BFragment factor =
                    t % 2 ? b_fragment(two.z, two.w) : b_fragment(two.x, two.y);
                sum = multiply(sum, a_fragment(u.at[t], u.at[4 + t], l.at[t], l.at[4 + t]), factor);
            }
        }
        UNROLL for (int j = 0; j < 4; j++)
            out.at[k / COLUMN_TILES].tile[tile].in_half[j / 2].at[j % 2] = sum.at[j];
    }
    return out;
}
