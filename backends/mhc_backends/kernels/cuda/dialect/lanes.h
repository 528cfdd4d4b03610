// The places of a matrix fragment that a lane holds.

#pragma once

#include "words.h"

// Accumulators of matrices: the columns of a left factor, those of a tile of the right one, and how many
// uint4 a lane's share of a left factor takes, and at most of COLUMN_TILES tiles of a long right one.
enum { DEPTH = 8, TILE_COLUMNS = 8, A_FRAGMENTS = 2 };
FUNCTION int tile_row(int lane) { return lane / 4; }
FUNCTION int tile_pair(int lane) { return lane % 4 * 2; }
FUNCTION int b_row(int lane, int e) { return tile_pair(lane) + e % 2; }
FUNCTION int b_column(int lane, int) { return tile_row(lane); }
