// The position of a thread.

#pragma once

#include "dialect/words.h"

enum { SIMD = 32, MOST_SIMDGROUPS = 32 };

// Threadgroups have one dimension of whole simdgroups, and the last one is complete too.
struct Position {
    // the threadgroup's position, the number of threadgroups, the position in the threadgroup
    uint group_x, group_y, groups_x, groups_y, id, threads;
};
