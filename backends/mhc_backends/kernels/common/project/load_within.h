// Loads at the end of a row.

#pragma once

#include "../access.h"
#include "../floats.h"
#include "../load.h"
#include "dialect/words.h"

// The first `rest` numbers from p on, and zeros. Where that is known to be aligned, there are whole
// K steps alone.
template <int W, typename P>
FUNCTION Floats<W> load_within(P p, int rest) {
    Floats<W> out = zeros<W>();
    if (rest >= W || (Address<P>::ALIGNED && rest > 0)) {
        out = load<W>(p);
    } else if (!Address<P>::ALIGNED) {
        UNROLL for (int k = 0; k < W; k++)
            if (k < rest) out.at[k] = float(p[k]);
    }
    return out;
}
