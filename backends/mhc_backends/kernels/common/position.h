// The position of a thread.

#pragma once

#include "dialect/words.h"

enum { SIMD = 32, MOST_SIMDGROUPS = 32 };

// Threadgroups have one dimension of whole simdgroups, and the last one is complete too.
struct Position {
    uint group_x, group_y;    // the threadgroup's position
    uint groups_x, groups_y;  // how many there are
    uint id, threads;         // within the threadgroup
};
