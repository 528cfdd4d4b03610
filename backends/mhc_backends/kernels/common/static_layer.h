// The last stage of static_layer, for all streams at W channels. The mappings are arrays of floats:
// pre[n], post[n], res[n, n].

#pragma once

#include "collapse.h"
#include "floats.h"
#include "store.h"
#include "streams.h"
#include "dialect/unroll.h"
#include "dialect/words.h"

// out_i = sum_j H_res[i, j] x_j + h_post_i y, with y = h r weight; stream i is C after stream i - 1
template <int N, int W, typename P, typename H>
FUNCTION void mix_static(P out, int C, Streams<N, W> x, float r, Floats<W> weight, H pre, H post,
                         H res) {
    const Floats<W> y = product(times(r, collapse(pre, x)), weight);
    UNROLL_SMALL for (int i = 0; i < N; i++) {
        Floats<W> sum = times(post[i], y);
        UNROLL for (int j = 0; j < N; j++)
            sum = add(sum, res[i * N + j], x.at[j]);
        store(out + int64_t(i) * C, sum);
    }
}
