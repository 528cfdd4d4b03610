// Where a thread is.

#pragma once

#include "dialect/words.h"

enum { SIMD = 32, MOST_SIMDGROUPS = 32 };

// Threadgroups are lines of whole simdgroups, and none is cut off at the end.
struct Position {
    uint group_x, group_y;    // the threadgroup's position
    uint groups_x, groups_y;  // how many there are
    uint id, threads;         // within the threadgroup
};
