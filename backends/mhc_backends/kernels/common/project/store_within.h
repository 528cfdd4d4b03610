// Stores at the end of a row.

#pragma once

#include "../access.h"
#include "../floats.h"
#include "../store.h"
#include "dialect/words.h"

template <int W, typename P>
FUNCTION void store_within(P p, Floats<W> v, int rest) {
    if (rest >= W || (Address<P>::ALIGNED && rest > 0)) {
        store(p, v);
    } else if (!Address<P>::ALIGNED) {
        UNROLL for (int k = 0; k < W; k++) {
            Floats<1> one;
            one.at[0] = v.at[k];
            if (k < rest) store(p + k, one);
        }
    }
}
