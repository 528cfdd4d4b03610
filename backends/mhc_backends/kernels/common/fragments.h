// One product of matrix fragments. A simdgroup multiplies [16, DEPTH] by [DEPTH, 8]. Of the A
// operand a lane holds rows tile_row and tile_row + 8 in columns tile_pair and tile_pair + 1, of
// the sum the same places, and of the B operand two numbers: number e is in row b_row and column
// b_column.
//
// TOGETHER must come before a product, whose instructions are of all lanes together: the loads and
// stores before may have parted them.

#pragma once

#include "dialect/lanes.h"
#include "dialect/words.h"

// In words, so that it can be in threadgroup memory.
struct AFragment {
    uint4 frag[A_FRAGMENTS];
};
