// The places of a matrix fragment that a lane holds, for common/fragments.h and common/operands.h.
// They are the places of numbers 0 and 1 of simdgroup_matrix's thread_elements, a vector with as
// many numbers as the matrix has places. MLX's own kernels rely on both facts
// (mlx/backend/metal/kernels/steel/gemm/mma.h).

#pragma once

#include "words.h"

// The columns of an A operand, those of a tile of the B operand, and the 16-byte fragments of a
// lane's share of an A operand.
enum { DEPTH = 8, TILE_COLUMNS = 8, A_FRAGMENTS = 1 };

FUNCTION int tile_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
FUNCTION int tile_pair(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
// The lane of the same row whose tile_pair is 2 k.
FUNCTION int row_lane(int lane, int k) { return (lane & 22) + (k & 2) * 4 + k % 2; }
FUNCTION int b_row(int lane, int) { return tile_row(lane); }
FUNCTION int b_column(int lane, int e) { return tile_pair(lane) + e; }
FUNCTION int sum_row(int lane, int) { return tile_row(lane); }
FUNCTION int sum_column(int lane, int j) { return tile_pair(lane) + j; }
