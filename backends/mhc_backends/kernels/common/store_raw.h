// store_raw

#pragma once

#include "access.h"
#include "floats.h"
#include "raw.h"
#include "dialect/packed.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// store_raw(p, v): v's numbers from p on.
template <typename P, typename T, int W>
FUNCTION void store_raw(P p, Raw<T, W> v) {
    write_raw(p, v, vectors<W>(p));
}

template <typename P, typename T, int W>
FUNCTION void store_raw(AlignedAddress<P> to, Raw<T, W> v) {
    write_raw(to.p, v, true);
}

// v as it would be in memory of p's type.
template <int W, typename P>
FUNCTION auto packed(AlignedAddress<P> like, Floats<W> v) {
    return packed(like.p, v);
}
