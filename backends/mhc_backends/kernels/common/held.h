// A token's mappings, kept in registers where they are few.

#pragma once

#include "floats.h"
#include "load.h"
#include "dialect/words.h"

// COUNT numbers of a token: kept in registers if KEEP, else read again from the cache. Read kept
// numbers in unrolled loops only, because registers cannot be indexed.
template <int COUNT, bool KEEP, typename P>
struct Held {
    P from;
    Floats<KEEP ? COUNT : 1> kept;
};

template <int COUNT, bool KEEP = (COUNT <= 16), typename P>
FUNCTION Held<COUNT, KEEP, P> hold(P from) {
    Held<COUNT, KEEP, P> held;
    held.from = from;
    if (KEEP) held.kept = load<KEEP ? COUNT : 1>(from);
    return held;
}

template <int COUNT, bool KEEP, typename P>
FUNCTION float value(Held<COUNT, KEEP, P> held, int k) {
    return KEEP ? held.kept.at[KEEP ? k : 0] : float(held.from[k]);
}
