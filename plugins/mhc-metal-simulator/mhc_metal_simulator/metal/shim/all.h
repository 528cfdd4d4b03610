// The contents of metal_stdlib, for clang on a host machine.
#pragma once
#include "types.h"
#include "numbers.h"
#include "math.h"
#include "vectors.h"
#include "threads.h"
#include "atomic.h"
#include "matrix.h"
#ifdef MHC_WITH_MLX_HEADERS
#include "builtins.h"
#endif
