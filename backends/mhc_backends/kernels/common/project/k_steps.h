// The order of the K steps in a split (layout.h).

#pragma once

#include "layout.h"
#include "dialect/words.h"

// The stream of K step number `k_step`, and its first channel in the split.
template <int N, int RUN>
FUNCTION int step_stream(int k_step) {
    return k_step / RUN % N;
}

template <int N, int RUN>
FUNCTION int step_channel(int k_step) {
    return (k_step / (N * RUN) * RUN + k_step % RUN) * STEP_CHANNELS;
}
