// The addresses of a lane's rows.

#pragma once

#include "dialect/lanes.h"
#include "dialect/words.h"

// The addresses of this lane's two tokens in each of TOKEN_TILES tiles from token `first` on. The
// last token replaces those beyond T.
template <int TOKEN_TILES, typename P>
struct Starts {
    P at[TOKEN_TILES][2];
};

template <int TOKEN_TILES, typename P>
FUNCTION Starts<TOKEN_TILES, P> starts_of(P x, int64_t first, int64_t T, int64_t K, int lane) {
    Starts<TOKEN_TILES, P> out;
    UNROLL for (int k = 0; k < 2 * TOKEN_TILES; k++) {
        const int64_t token = first + 8 * k + tile_row(lane);
        out.at[k / 2][k % 2] = x + (token < T ? token : T - 1) * K;
    }
    return out;
}
