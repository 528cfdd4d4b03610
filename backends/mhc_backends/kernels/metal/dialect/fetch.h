// Loads of rows that are read in small pieces.

#pragma once

#include "../../common/load.h"
#include "words.h"

// fetch_raw<W>(p): load_raw<W>(p) from an input whose rows a simdgroup reads in small pieces, many
// rows at a time.
template <int W, typename P>
FUNCTION auto fetch_raw(P p) {
    return load_raw<W>(p);
}
