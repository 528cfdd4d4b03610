// The product of operands of common/operands.h.
//
// The tensor cores get the B operand as their A operand, transposed: so a row's numbers stay in the
// registers that they were loaded to. A float is the sum of PIECES numbers that tensor cores can
// multiply. The rows of their A operand are the columns of the first piece of all tiles, then those
// of the next piece; 16 rows make a pair.

#pragma once

#include "../../common/floats.h"
#include "../../common/operands.h"
#include "../../common/raw.h"
#include "mma.h"
#include "numbers.h"
#include "words.h"

// The most 16-byte fragments of a lane's share of COLUMN_TILES tiles of a B operand.
#define B_FRAGMENTS(COLUMN_TILES) (4 * (COLUMN_TILES))

// One instruction's share of a row: its numbers and, for floats, their rests.
struct Piece {
    unsigned whole[2], rest[2];
};

// An instruction takes numbers t and 4 + t of every run of 8; the order does not matter.
template <typename T>
struct Pieces {
    enum { PIECES = 2, MMAS = 4 };
};

// Numbers of 8 significant bits are multiplied twice as fast, 16 at a time.
template <>
struct Pieces<__nv_bfloat16> {
    enum { PIECES = 3, MMAS = 2 };
};

template <typename T>
FUNCTION Piece piece_of(Raw<T, 8> row, int t) {
    const Floats<8> v = floats(row);
    if (sizeof(T) < 4) return {{bits(v.at[t]), bits(v.at[4 + t])}, {}};  // they are whole
    const BFragment both = b_fragment(v.at[t], v.at[4 + t]);
    return {{both.frag.x, both.frag.y}, {both.frag.z, both.frag.w}};
}

FUNCTION Piece piece_of(Raw<__nv_bfloat16, 8> row, int t) {
    return {{row.word[2 * t], row.word[2 * t + 1]}, {}};
}

// Splits the first piece off the numbers, which keep the rest.
template <typename T>
FUNCTION void split_off(unsigned words[][2], BNumbers& numbers, T) {
    UNROLL for (int k = 0; k < 8; k++) {
        float& v = numbers.run[k / 4].at[k % 4];
        // a NaN may have no rest that stays a NaN, so it must be one here (tensor_float of
        // 0x7fffffff, the NaN that GPUs make, is not)
        words[k % 4][k / 4] = v != v ? 0x7fffffffu : tensor_float(v);
        v -= __uint_as_float(words[k % 4][k / 4]);
    }
}

FUNCTION void split_off(unsigned words[][2], BNumbers& numbers, __nv_bfloat16 t) {
    UNROLL for (int k = 0; k < 4; k++) {
        float* v = numbers.run[k / 2].at + k % 2 * 2;
        const uint both = pack(v, t);
        v[0] -= number(both, 0, t), v[1] -= number(both, 1, t);
        words[k / 2][k % 2] = both;
    }
}

template <typename T>
FUNCTION Floats<4> step_multiply(Floats<4> sum, uint4 a, const unsigned* b, T) {
    return tensor_multiply(sum, a, b[0], b[1]);
}

FUNCTION Floats<4> step_multiply(Floats<4> sum, uint4 a, const unsigned* b, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]));
    return sum;
}

template <typename T, int COLUMN_TILES>
struct BOperand {
    enum {
        PIECES = Pieces<T>::PIECES,
        MMAS = Pieces<T>::MMAS,
        PAIRS = (PIECES * COLUMN_TILES + 1) / 2,
        FRAGMENTS = PAIRS * MMAS
    };
    uint4 frag[FRAGMENTS];
};

template <int COLUMN_TILES, typename T>
FUNCTION BOperand<T, COLUMN_TILES> b_operand(BTiles<COLUMN_TILES> tiles, T t) {
    typedef BOperand<T, COLUMN_TILES> Operand;
    Operand out = {};
    UNROLL for (int eight = 0; eight < Operand::PIECES * COLUMN_TILES; eight++) {
        unsigned words[Operand::MMAS][2];
        split_off(words, tiles.at[eight % COLUMN_TILES], t);
        UNROLL for (int k = 0; k < Operand::MMAS; k++) {
            uint4& frag = out.frag[eight / 2 * Operand::MMAS + k];
            if (eight % 2 == 0)
                frag.x = words[k][0], frag.z = words[k][1];
            else
                frag.y = words[k][0], frag.w = words[k][1];
        }
    }
    return out;
}

// Multiplies STEPS K steps of each row by as many B operands, and adds the products up in full
// float32, the smallest first.
template <int COLUMN_TILES, int STEPS, int TOKEN_TILES, typename T, typename F>
FUNCTION Accumulators<COLUMN_TILES, TOKEN_TILES> multiply(
    AOperand<Raw<T, 8>, STEPS, TOKEN_TILES> rows, F operands) {
    typedef BOperand<T, COLUMN_TILES> Operand;
    Accumulators<COLUMN_TILES, TOKEN_TILES> out;
    UNROLL for (int pair = Operand::PAIRS - 1; pair >= 0; pair--) {
        Floats<4> sums[2 * TOKEN_TILES] = {};
        // for floats, first the products of their rests with the first pieces of phi
        UNROLL for (int whole = sizeof(T) == 4 && 2 * pair < COLUMN_TILES ? 0 : 1; whole < 2;
                    whole++) {
            UNROLL for (int k = 0; k < STEPS * Operand::MMAS; k++) {
                const int k_step = k / Operand::MMAS, step = k % Operand::MMAS;
                const uint4 a = frag(operands, k_step, pair * Operand::MMAS + step);
                UNROLL for (int h = 0; h < 2 * TOKEN_TILES; h++) {
                    const Piece b = piece_of(rows.at[k_step][h / 2].in_half[h % 2], step);
                    sums[h] = step_multiply(sums[h], a, whole ? b.whole : b.rest, T(0.0f));
                }
            }
        }
        // with a single tile, both pieces are in one pair; the second piece is the smaller one
        UNROLL for (int k = 0; k < 8 * TOKEN_TILES; k++) {
            const int h = k / 4, j = (k + 2) % 4, eight = 2 * pair + j / 2;
            const float sum = sums[h].at[j];
            if (eight < Operand::PIECES * COLUMN_TILES) {
                float& own = out.at[h / 2].tile[eight % COLUMN_TILES].in_half[h % 2].at[j % 2];
                own = eight / COLUMN_TILES == Operand::PIECES - 1 ? sum : own + sum;
            }
        }
    }
    return out;
}
