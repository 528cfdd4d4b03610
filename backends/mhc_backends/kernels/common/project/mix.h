// The streams that combine makes, x'_i = sum_j H_res[i, j] x_j + h_post_i y.

#pragma once

#include "../access.h"
#include "../floats.h"
#include "../held.h"
#include "../raw.h"
#include "../store_raw.h"
#include "../streams.h"
#include "raw_within.h"
#include "store_within.h"
#include "dialect/unroll.h"
#include "dialect/words.h"

// Returns sum + sum_j res_{first + j} x_j; the streams x are in registers if KEPT, else they are
// loaded from `token` on.
template <int N, bool KEPT, int COUNT, typename R, typename H, typename P>
FUNCTION Floats<8> mix_streams(Floats<8> sum, H res, int first, RawStreams<COUNT, R> streams,
                               P token, int C, int rest) {
    UNROLL_SMALL for (int j = 0; j < N; j++) {
        R stream;
        if (KEPT)
            stream = streams.at[KEPT ? j : 0];
        else
            stream = load_raw_within<8>(token + int64_t(j) * C, rest);
        sum = add(sum, value(res, first + j), floats(stream));
    }
    return sum;
}

template <typename P, typename T>
FUNCTION void store_raw_within(P p, Raw<T, 8> v, int rest) {
    if (rest >= 8 || (Address<P>::ALIGNED && rest > 0))
        store_raw(p, v);
    else if (!Address<P>::ALIGNED)
        store_within(p, floats(v), rest);
}
