// A token's h = sum_i w_i x_i between its squares and its norm.

#pragma once

#include "collapse.h"
#include "floats.h"
#include "load.h"
#include "norm.h"
#include "optional.h"
#include "raw.h"
#include "rounded.h"
#include "store.h"
#include "streams.h"
#include "dialect/words.h"

// A thread's first HELD accesses to h, rounded to the type of the streams, and the sum of the squares
// of all of them.
template <int W, int HELD>
struct KeptH {
    Floats<W> at[HELD];
    Floats<1> squares;
};

// Reads the streams `from` a token on: channels own, own + step, ... are a thread's; `coming` has the
// first of them. From `rest` on they are not kept.
template <int HELD, int N, int W, typename P, typename S, typename H>
FUNCTION KeptH<W, HELD> keep_h(P from, S coming, H weights, int C, int own, int step, int rest) {
    KeptH<W, HELD> kept;
    kept.squares = zeros<1>();
    UNROLL for (int j = 0; j < HELD; j++) {
        const auto streams = coming;
        if (j + 1 < HELD) coming = load_raw_streams<N, W>(from, C, own + (j + 1) * step);
        kept.at[j] = rounded(streams.at[0], collapse(weights, floats(streams)));
        kept.squares.at[0] = add_squares(kept.squares.at[0], kept.at[j]);
    }
    for (int c = rest; c < C; c += step) {
        const auto streams = load_raw_streams<N, W>(from, C, c);
        const Floats<W> again = rounded(streams.at[0], collapse(weights, floats(streams)));
        kept.squares.at[0] = add_squares(kept.squares.at[0], again);
    }
    return kept;
}

// Stores h inverse norm_weight to `to`, and h itself to `raw` if RAW. What was not kept is computed
// again.
template <bool RAW, int N, int W, int HELD, typename P, typename H, typename Weight, typename Y,
          typename Own>
FUNCTION void store_normed(KeptH<W, HELD> kept, float inverse, P from, H weights,
                           Weight norm_weight, Y to, Own raw, int C, int own, int step, int rest) {
    UNROLL for (int j = 0; j < HELD; j++) {
        const int c = own + j * step;
        if (c < C) {
            Optional<RAW, W>::put(raw + c, kept.at[j]);
            store(to + c, product(times(inverse, kept.at[j]), load<W>(norm_weight + c)));
        }
    }
    for (int c = rest; c < C; c += step) {
        const auto streams = load_raw_streams<N, W>(from, C, c);
        const Floats<W> again = rounded(streams.at[0], collapse(weights, floats(streams)));
        Optional<RAW, W>::put(raw + c, again);
        store(to + c, product(times(inverse, again), load<W>(norm_weight + c)));
    }
}
