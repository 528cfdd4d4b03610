// One product of matrix fragments: a simdgroup multiplies [16, DEPTH] by [DEPTH, 8]. A lane holds
//
// - of the A operand and of the sum: rows tile_row and tile_row + 8, in columns tile_pair and
//   tile_pair + 1;
// - of the B operand: two numbers, of which number e is in row b_row and column b_column.
//
// TOGETHER must come before a product, because all lanes execute its instructions together, and
// earlier loads and stores may have diverged.

#pragma once

#include "dialect/lanes.h"
#include "dialect/words.h"

// Stored as words, so that it can be in threadgroup memory.
struct AFragment {
    uint4 frag[A_FRAGMENTS];
};
