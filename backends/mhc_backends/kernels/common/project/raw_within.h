// load_within in the format of memory: the first `rest` of W numbers from p on, then zeros.

#pragma once

#include "../access.h"
#include "../load.h"
#include "dialect/fetch.h"
#include "dialect/numbers.h"
#include "dialect/words.h"

template <int W, typename P>
FUNCTION auto load_raw_within(P p, int rest) {
    decltype(load_raw<W>(p)) out = {};
    if (rest >= W || (Address<P>::ALIGNED && rest > 0)) {
        out = fetch_raw<W>(p);
    } else if (!Address<P>::ALIGNED) {
        UNROLL for (int k = 0; k < W; k++)
            if (k < rest) out.word[k / out.PER_WORD] |= bits(p[k]) << (k % out.PER_WORD * 16);
    }
    return out;
}
