// W numbers from memory, from any space, at any address.

#pragma once

#include "access.h"
#include "floats.h"
#include "raw.h"
#include "read.h"
#include "dialect/constant.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// load_raw<W>(p): what floats(load_raw<W>(p)) makes load<W>(p) of. Where several are loaded before
// the first becomes floats, all are under way at once: a load that may have to take scalars is a
// branch, behind which the next one would wait.
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
