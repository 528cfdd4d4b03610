// The channels of a thread, and the row of a token's mappings.

#pragma once

#include "position.h"
#include "dialect/words.h"

// A thread takes W channels at first_channel, then W more every next_channel.
template <int W>
FUNCTION int first_channel(Position here) {
    return int(here.group_y * here.threads + here.id) * W;
}

template <int W>
FUNCTION int next_channel(Position here) {
    return int(here.groups_y * here.threads) * W;
}

// The row of a token in an array with one row per token, or one row for all tokens.
FUNCTION int64_t row(int rows, int64_t token) { return rows == 1 ? 0 : token; }
