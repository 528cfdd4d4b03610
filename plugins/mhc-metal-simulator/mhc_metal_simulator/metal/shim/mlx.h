// The part of MLX's own kernel utilities that custom kernels may call: MLX puts its utilities
// before the text of a custom kernel, and the text that it prints lacks them.
#pragma once
#include "all.h"

template <typename T, typename U>
inline T ceildiv(T n, U m) {
    return (n + m - 1) / m;
}

#define MHC_ELEM_TO_LOC(index)                                                        \
    template <typename IdxT = int64_t>                                                \
    inline IdxT elem_to_loc(index elem, constant int* shape, constant int64_t* strides, \
                            int ndim) {                                               \
        IdxT loc = 0;                                                                 \
        for (int i = ndim - 1; i >= 0 && elem > 0; --i) {                             \
            loc += (elem % shape[i]) * IdxT(strides[i]);                              \
            elem /= shape[i];                                                         \
        }                                                                             \
        return loc;                                                                   \
    }
MHC_ELEM_TO_LOC(uint)
MHC_ELEM_TO_LOC(int64_t)
#undef MHC_ELEM_TO_LOC

// Metal has no double; here its name is known to nobody, once the shim itself is through.
#define double metal_has_no_double
