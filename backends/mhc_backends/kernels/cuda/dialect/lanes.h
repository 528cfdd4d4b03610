// The places of a matrix fragment that a lane holds, for common/fragments.h and common/operands.h.
// (The tensor cores number the columns of the A operand, and the rows of the B operand, in another
// order; the sum over them is the same.)

#pragma once

#include "words.h"

// The columns of an A operand, those of a tile of the B operand, and the 16-byte fragments of a
// lane's share of an A operand.
enum { DEPTH = 8, TILE_COLUMNS = 8, A_FRAGMENTS = 2 };

FUNCTION int tile_row(int lane) { return lane / 4; }
FUNCTION int tile_pair(int lane) { return lane % 4 * 2; }
// The lane of the same row whose tile_pair is 2 k.
FUNCTION int row_lane(int lane, int k) { return lane / 4 * 4 + k; }
FUNCTION int b_row(int lane, int e) { return tile_pair(lane) + e % 2; }
FUNCTION int b_column(int lane, int) { return tile_row(lane); }
FUNCTION int sum_row(int lane, int j) { return tile_pair(lane) + j; }
FUNCTION int sum_column(int lane, int) { return tile_row(lane); }
