// The part of MLX's own kernel utilities that custom kernels may call: MLX puts its utilities
// before the text of a custom kernel, and the text that it prints lacks them.
#pragma once
#include "all.h"

// Marks the side that each choice takes: branches.py puts these calls into the text.
extern "C" __attribute__((visibility("hidden"))) void mhc_mark(uint branch, uint bits);
extern "C" __attribute__((visibility("hidden"))) void mhc_next_turn();
extern "C" __attribute__((visibility("hidden"))) void mhc_mark_loop(uint branch, bool enters);
namespace mhc {
inline constexpr bool took(uint branch, bool side) {
    if (!__builtin_is_constant_evaluated()) mhc_mark(branch, side ? 1 : 2);
    return side;
}
// Marks a loop; its step announces that the next condition begins another turn.
inline void next_turn() { mhc_next_turn(); }
inline bool turned(uint branch, bool side) {
    mhc_mark_loop(branch, side);
    return side;
}
}  // namespace mhc

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

// Metal has no double: after the shim itself, the name is hidden.
#define double metal_has_no_double
