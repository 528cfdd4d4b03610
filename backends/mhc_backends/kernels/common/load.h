// Loads W numbers from any address space, at any address.

#pragma once

#include "access.h"
#include "floats.h"
#include "raw.h"
#include "read.h"
#include "dialect/constant.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// load_raw<W>(p): the W numbers from p on, not yet converted: load<W>(p) is floats(load_raw<W>(p)).
// Load several rows raw before converting the first, so that all loads are in flight at once: a
// load that may fall back to scalars is a branch, and the next load would wait for it.
template <int W, typename P>
FUNCTION auto load_raw(P p) {
    return read<W>(p, vectors<W>(p));
}

template <int W, typename P>
FUNCTION auto load_raw(AlignedAddress<P> from) {
    return read<W>(from.p, true);
}

// load<W>(p): the W numbers from p on, as floats.
template <int W, typename P>
FUNCTION Floats<W> load(P p) {
    return floats(load_raw<W>(p));
}
