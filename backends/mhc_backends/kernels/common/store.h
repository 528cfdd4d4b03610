// Stores W numbers to memory, at any address.

#pragma once

#include "access.h"
#include "floats.h"
#include "store_one.h"
#include "write.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// store(p, v): stores the numbers of v from p on, each rounded to the nearest in p's type.
template <int W, typename P>
FUNCTION void store(P p, Floats<W> v) {
    write(p, v, vectors<W>(p));
}

template <int W, typename P>
FUNCTION void store(AlignedAddress<P> to, Floats<W> v) {
    write(to.p, v, true);
}

template <typename P>
FUNCTION void store_one(AlignedAddress<P> to, float v) {
    store_one(to.p, v);
}
