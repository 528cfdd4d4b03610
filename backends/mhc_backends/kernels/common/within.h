// Numbers of streams beyond the last one.

#pragma once

#include "dialect/words.h"

// The number of a stream, of the last one for those beyond.
template <int N>
FUNCTION int within(int i) {
    return i < N ? i : N - 1;
}
