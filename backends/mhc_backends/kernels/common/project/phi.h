// Loads of phi.

#pragma once

#include "../operands.h"
#include "k_steps.h"
#include "load_within.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// Loads COLUMN_TILES tiles of phi[M, K]'s rows (the product's columns) from `column` on, 32
// channels from `at` on, of which the row has `rest`. Columns beyond M load row M - 1: their sums
// are not stored.
template <int COLUMN_TILES, typename P>
FUNCTION BTiles<COLUMN_TILES> load_phi(P phi, int64_t K, int M, int column, int64_t at, int rest,
                                       int lane) {
    BTiles<COLUMN_TILES> out;
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES; k++) {
        const int tile = k / 2, e = k % 2, channel = 4 * b_row(lane, e);
        const int row = column + tile * TILE_COLUMNS + b_column(lane, e);
        out.at[tile].run[e] =
            load_within<4>(phi + (row < M ? row : M - 1) * K + at + channel, rest - channel);
    }
    return out;
}

template <int N, int RUN, int COLUMN_TILES, typename P>
FUNCTION BTiles<COLUMN_TILES> load_step_phi(P phi, int64_t K, int M, int C, int column, int begin,
                                            int k_step, int lane) {
    const int c = begin + step_channel<N, RUN>(k_step);
    const int64_t at = step_stream<N, RUN>(k_step) * int64_t(C) + c;
    return load_phi<COLUMN_TILES>(phi, K, M, column, at, C - c, lane);
}
