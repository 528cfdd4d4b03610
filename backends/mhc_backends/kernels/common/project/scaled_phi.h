// Loads of phi, scaled by a norm's weight.

#pragma once

#include "../floats.h"
#include "../operands.h"
#include "load_within.h"
#include "phi.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// load_phi, with channel k of each row times 1 + norm[k]. By fma, so that no compiler rounds it in
// another way where something is subtracted from it.
template <int COLUMN_TILES, typename P, typename Q>
FUNCTION BTiles<COLUMN_TILES> load_scaled_phi(P phi, Q norm, int64_t K, int M, int column,
                                              int64_t at, int rest, int lane) {
    BTiles<COLUMN_TILES> out = load_phi<COLUMN_TILES>(phi, K, M, column, at, rest, lane);
    UNROLL for (int e = 0; e < 2; e++) {
        const int channel = 4 * b_row(lane, e);
        const Floats<4> factor = load_within<4>(norm + at + channel, rest - channel);
        UNROLL for (int k = 0; k < 4 * COLUMN_TILES; k++) {
            const float v = out.at[k / 4].run[e].at[k % 4];
            out.at[k / 4].run[e].at[k % 4] = fma(factor.at[k % 4], v, v);
        }
    }
    return out;
}
