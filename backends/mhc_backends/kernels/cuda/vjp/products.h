// The products of a tile: dx = phi^T du^T and dphi^T = x^T du, 16 channels of a stream by 8 tokens or
// columns at a time. docs/images/fragments.svg draws the operands.

#pragma once

#include "../../common/floats.h"
#include "../../common/load.h"
#include "../../common/position.h"
#include "../../common/raw.h"
#include "dialect/numbers.h"
#include "dialect/operands.h"
#include "dialect/words.h"
#include "layout.h"

// Two floats as the sum of PIECES words of two bfloat16 numbers.
template <int PIECES>
struct Split {
    uint word[PIECES];
};
template <int PIECES>
FUNCTION Split<PIECES> split(float first, float second) {
    Split<PIECES> out;
    float v[2] = {first, second};
    const __nv_bfloat16 like = 0.0f;
    UNROLL for (int k = 0; k < PIECES; k++) {
        out.word[k] = pack(v, like);
        v[0] -= number(out.word[k], 0, like), v[1] -= number(out.word[k], 1, like);
    }
    return out;
}

// A lane's share of phi, in the order of dx_word: channels 2 j and 2 j + 1 are the rows of product j.
// `at[j][k]` has two factors of 8 columns, each with a word for either channel: for two tiles of
// columns the rests, then the nearest; for a last tile, its rest and its nearest.
template <int COLUMN_TILES>
struct LanePhi {
    uint4 at[2][COLUMN_TILES];
};

// phi points to the lane's first channel in column 0.
template <int COLUMNS, typename P>
FUNCTION auto load_lane_phi(P phi, int64_t K, int lane) {
    enum { COLUMN_TILES = (COLUMNS + 7) / 8 };
    LanePhi<COLUMN_TILES> out;
    Split<2> all[COLUMN_TILES][4];
    UNROLL for (int q = 0; q < COLUMN_TILES; q++) {
        Floats<4> both[2];
        UNROLL for (int e = 0; e < 2; e++) {
            const int column = 8 * q + 2 * (lane % 4) + e;
            both[e] = zeros<4>();
            if (column < COLUMNS) both[e] = load<4>(phi + column * K);
        }
        UNROLL for (int k = 0; k < 4; k++)
            all[q][k] = split<2>(both[0].at[k], both[1].at[k]);
    }
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES; k++) {
        const int j = k % 2, own = k / 2, q = own / 2 * 2;
        const bool last = q + 1 == COLUMN_TILES;
        const auto a = all[q] + 2 * j, b = all[last ? q : q + 1] + 2 * j;
        const int piece = 1 - own % 2, piece1 = last ? 0 : piece;
        out.at[j][own] =
            make_uint4(a[0].word[piece], a[1].word[piece], b[0].word[piece1], b[1].word[piece1]);
    }
    return out;
}

// A lane's sums for COUNT halves of a tile's tokens, or tiles of columns: number 2 k + e of at[j][q]
// is channel 2 j + k of token or column 8 q + 2 (lane % 4) + e.
template <int COUNT>
struct LaneSums {
    Floats<4> at[2][COUNT];
};

// The four channels of token or column 8 q + 2 (lane % 4) + e.
template <int COUNT>
FUNCTION Floats<4> four_channels(LaneSums<COUNT> sums, int q, int e) {
    Floats<4> out;
    UNROLL for (int k = 0; k < 4; k++)
        out.at[k] = sums.at[k / 2][q].at[2 * (k % 2) + e];
    return out;
}

// A lane's numbers of the streams, as in memory: four channels of each of its four tokens.
struct LaneRows {
    Raw<__nv_bfloat16, 4> at[2][2];
};

// Fragments `first` to `first + COUNT - 1` of a lane in a record.
template <int COUNT>
struct LaneWords {
    uint at[4 * COUNT];
};
template <int COUNT>
FUNCTION LaneWords<COUNT> lane_words(const uint4* record, int first, int lane) {
    LaneWords<COUNT> out;
    UNROLL for (int k = 0; k < COUNT; k++) {
        const uint4 v = record[(first + k) * SIMD + lane];
        out.at[4 * k] = v.x, out.at[4 * k + 1] = v.y;
        out.at[4 * k + 2] = v.z, out.at[4 * k + 3] = v.w;
    }
    return out;
}

// sum + phi^T du^T, without the products of two rests, the smallest products first. The tensor cores
// take two tiles of columns together, or the rest and the nearest of a last one.
template <int COLUMN_TILES>
FUNCTION LaneSums<2> add_dx(LaneSums<2> sum, LanePhi<COLUMN_TILES> phi,
                            LaneWords<COLUMN_TILES> du) {
    const __nv_bfloat16 like = 0.0f;
    enum { PAIRS = COLUMN_TILES / 2, LAST = COLUMN_TILES % 2, ORDERS = 3 };
    UNROLL for (int order = 0; order < ORDERS; order++) {
        // the rest of phi by du, phi by the rest of du, phi by du
        UNROLL for (int k = 0; k < 4 * PAIRS; k++) {
            const int pair = k / 4, h = k / 2 % 2, j = k % 2;
            const uint* factors = du.at + 2 * COLUMN_TILES * h + 4 * pair + 2 * (order == 1);
            sum.at[j][h] =
                step_multiply(sum.at[j][h], phi.at[j][2 * pair + (order > 0)], factors, like);
        }
        UNROLL for (int k = 0; k < 4 * LAST; k++) {
            if (order == 1) continue;  // is with order 0
            const int h = k / 2, j = k % 2;
            const uint* own = du.at + 2 * COLUMN_TILES * h + 4 * PAIRS;
            const uint factors[2] = {order ? 0u : own[0], order ? own[0] : own[1]};
            sum.at[j][h] = step_multiply(sum.at[j][h], phi.at[j][2 * PAIRS], factors, like);
        }
    }
    return sum;
}

// sum + x^T du. A tile is multiplied on its own, because tensor cores truncate their sums.
template <int COLUMN_TILES, int COUNT>
FUNCTION LaneSums<COLUMN_TILES> add_dphi(LaneSums<COLUMN_TILES> sum, LaneRows x,
                                         LaneWords<COUNT> du) {
    const __nv_bfloat16 like = 0.0f;
    UNROLL for (int j = 0; j < 2; j++) {
        uint pairs[2][2];  // of two tokens: half of the tokens, channel
        UNROLL for (int h = 0; h < 2; h++) {
            const uint u = x.at[h][0].word[j], v = x.at[h][1].word[j];
            pairs[h][0] = __byte_perm(u, v, 0x5410), pairs[h][1] = __byte_perm(u, v, 0x7632);
        }
        const uint4 operand = make_uint4(pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]);
        UNROLL for (int q = 0; q < COLUMN_TILES; q++) {
            Floats<4> own = zeros<4>();
            UNROLL for (int piece = 2; piece >= 0; piece--)
                own = step_multiply(own, operand, du.at + 2 * (piece * COLUMN_TILES + q), like);
            sum.at[j][q] = plus(sum.at[j][q], own);
        }
    }
    return sum;
}
