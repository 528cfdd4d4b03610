// order

#pragma once

#include "layout.h"
#include "dialect/words.h"

// Where block number `block` of a part is, and phi's numbers for it: of COLUMN_TILES tiles of columns from
// `column` on.
template <int N, int RUN>
FUNCTION int step_stream(int k_step) {
    return k_step / RUN % N;
}

template <int N, int RUN>
FUNCTION int step_channel(int k_step) {
    return (k_step / (N * RUN) * RUN + k_step % RUN) * STEP_CHANNELS;
}
