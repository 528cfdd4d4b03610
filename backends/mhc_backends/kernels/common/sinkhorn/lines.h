// A lane's line from and to memory.

#pragma once

#include "../floats.h"
#include "../load.h"
#include "../position.h"
#include "../store.h"
#include "../store_one.h"
#include "lanes.h"
#include "dialect/words.h"

// Where the number at (a, b) is in an [N, N] array, which holds H_res or its transpose.
template <int N, bool FIRST_COLUMNS, bool TRANSPOSED>
FUNCTION int entry(int a, int b) {
    return FIRST_COLUMNS != TRANSPOSED ? a * N + b : b * N + a;
}

// A lane's line from and to such an array; zeros where there is none.
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
