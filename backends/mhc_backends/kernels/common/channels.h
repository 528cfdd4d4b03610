// Which channels a thread takes, and where a token has its mappings.

#pragma once

#include "position.h"
#include "dialect/words.h"

// The channels that a thread takes are from first_channel on, next_channel apart.
template <int W>
FUNCTION int first_channel(Position here) {
    return int(here.group_y * here.threads + here.id) * W;
}

template <int W>
FUNCTION int next_channel(Position here) {
    return int(here.groups_y * here.threads) * W;
}

// Where a token's row begins in an array of so many rows: one per token, or one for all.
FUNCTION int64_t row(int rows, int64_t token) { return rows == 1 ? 0 : token; }
