// Operands of dx = du . phi.

#pragma once

#include "../floats.h"
#include "../fragments.h"
#include "load_within.h"
#include "dialect/lanes.h"
#include "dialect/mma.h"
#include "dialect/words.h"

// B operands of 8 columns of phi and 4 times 8 channels. Their products give a lane 8 adjacent
// channels, from 4 * tile_pair on: product t has channels t and 4 + t of these.
struct PhiFragments {
    BFragment at[4];
};

template <int COUNT>
struct KeptPhi {
    PhiFragments at[COUNT];
};

template <typename P>
FUNCTION PhiFragments load_phi_fragments(P phi, int64_t K, int M, int column, int64_t at, int rest,
                                         int lane) {
    Floats<4> b[2];
    UNROLL for (int e = 0; e < 2; e++) {
        const int row = column + b_row(lane, e), channel = 4 * b_column(lane, e);
        b[e] = load_within<4>(phi + row * K + at + channel, row < M ? rest - channel : 0);
    }
    PhiFragments out;
    UNROLL for (int t = 0; t < 4; t++)
        out.at[t] = b_fragment(b[0].at[t], b[1].at[t]);
    return out;
}

// The A operand of 16 tokens and 8 columns of du[T, M] from `column` on; `upper` is the token of
// this lane's upper row.
template <typename P>
FUNCTION AFragment load_a_fragment(P du, int M, int column, int64_t upper, int64_t T, int lane) {
    float given[4];
    UNROLL for (int k = 0; k < 4; k++) {
        const int64_t token = upper + k / 2 * 8;
        const int at = column + tile_pair(lane) + k % 2;
        given[k] = at < M && token < T ? float(du[token * M + at]) : 0.0f;
    }
    return a_fragment(given[0], given[1], given[2], given[3]);
}
