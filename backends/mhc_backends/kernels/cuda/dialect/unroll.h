// Unrolling of short loops.

#pragma once

#define PRAGMA(text) _Pragma(#text)
#define UNROLL_FEW(COUNT) PRAGMA(unroll(COUNT <= 4 ? COUNT : 1))
#define UNROLL_SMALL UNROLL_FEW(N)
