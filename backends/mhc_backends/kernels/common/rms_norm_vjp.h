// The RMS norm's gradient.

#pragma once

#include "floats.h"
#include "dialect/words.h"

// dh = r (weight dy - h r pulled), with pulled = mean(h r weight dy).
template <int W>
FUNCTION Floats<W> rms_norm_pullback(Floats<W> h, Floats<W> weight, Floats<W> dy, float r,
                                     float pulled) {
    Floats<W> dh = product(weight, dy);
    UNROLL for (int k = 0; k < W; k++)
        dh.at[k] = r * (dh.at[k] - h.at[k] * r * pulled);
    return dh;
}
