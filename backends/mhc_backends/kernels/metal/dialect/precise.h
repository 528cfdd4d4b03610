// Functions that Metal has fast forms of.

#pragma once

// precise::exp, log, sqrt, max and min: without the word they may be the fast ones, since MLX asks
// for safe maths but not for precise functions (MTLCompileOptions.mathFloatingPointFunctions);
// MLX's own kernels say it too (mlx/backend/metal/kernels/unary_ops.h). fma and fabs are exact
// either way.
