// Stream numbers beyond the last stream.

#pragma once

#include "dialect/words.h"

// Stream i, or the last stream if i is beyond it.
template <int N>
FUNCTION int within(int i) {
    return i < N ? i : N - 1;
}
