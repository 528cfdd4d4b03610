// Loads and stores of a lane's line.

#pragma once

#include "../floats.h"
#include "../load.h"
#include "../position.h"
#include "../store.h"
#include "../store_one.h"
#include "lanes.h"
#include "dialect/words.h"

// The index of entry (a, b) in an [N, N] array of H_res or, if TRANSPOSED, of its transpose.
template <int N, bool FIRST_COLUMNS, bool TRANSPOSED>
FUNCTION int entry(int a, int b) {
    return FIRST_COLUMNS != TRANSPOSED ? a * N + b : b * N + a;
}

// Loads this lane's line from such an array; zeros for padding or if not `there`.
template <int N, bool FIRST_COLUMNS, bool TRANSPOSED, typename P>
FUNCTION Floats<N> load_line(P entries, bool there, Position here) {
    const int b = line<N>(here);
    if (!there || !inside<N>(here)) return zeros<N>();
    Floats<N> v;
    if (FIRST_COLUMNS == TRANSPOSED) {
        v = load<N>(entries + b * N);
    } else {
        UNROLL for (int a = 0; a < N; a++)
            v.at[a] = float(entries[a * N + b]);
    }
    return v;
}

template <int N, bool FIRST_COLUMNS, bool TRANSPOSED, typename P>
FUNCTION void store_line(P entries, Floats<N> v, bool there, Position here) {
    const int b = line<N>(here);
    if (!there || !inside<N>(here)) return;
    if (FIRST_COLUMNS == TRANSPOSED) {
        store(entries + b * N, v);
    } else {
        UNROLL for (int a = 0; a < N; a++)
            store_one(entries + a * N + b, v.at[a]);
    }
}
