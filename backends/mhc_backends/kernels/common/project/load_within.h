// Loads at the end of a row.

#pragma once

#include "../access.h"
#include "../floats.h"
#include "../load.h"
#include "dialect/words.h"

// Loads the first `rest` of W numbers from p on, and zeros for the others. An address that is known
// to be aligned has whole K steps only, so rest is at least W or at most 0.
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
