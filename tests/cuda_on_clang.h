// For clangd (kernels/compile_flags.txt): clang knows no operands of PTX, so its statements are left out.
#pragma once

#include "cuda_on_cpu.h"

#define volatile
#define asm(...) (void)0
