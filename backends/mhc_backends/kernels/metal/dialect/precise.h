// Functions that have a fast form in Metal.

#pragma once

// precise::exp, log, sqrt, max and min: without `precise::` they may be the fast ones, because MLX
// asks for safe maths but not for precise functions (MTLCompileOptions.mathFloatingPointFunctions).
// MLX's own kernels write it too (mlx/backend/metal/kernels/unary_ops.h). fma and fabs are exact
// either way.
