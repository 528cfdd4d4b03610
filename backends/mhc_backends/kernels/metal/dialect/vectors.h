// Vectors in memory: where they are allowed, and single accesses to them.

#pragma once

#include "../../common/width.h"
#include "words.h"

template <int COUNT>
struct Words {
    typedef vec<uint, COUNT> type;
};
template <>
struct Words<1> {
    typedef uint type;
};

FUNCTION void load_words(thread uint* to, const device uint* p) { to[0] = *p; }
FUNCTION void load_words(thread uint* to, const device uint2* p) {
    const uint2 v = *p;
    to[0] = v.x, to[1] = v.y;
}
FUNCTION void load_words(thread uint* to, const device uint4* p) {
    const uint4 v = *p;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
FUNCTION void store_words(device uint* p, const thread uint* from) { *p = from[0]; }
FUNCTION void store_words(device uint2* p, const thread uint* from) {
    uint2 v;
    UNROLL for (int k = 0; k < 2; k++)
        v[k] = from[k];
    *p = v;
}
FUNCTION void store_words(device uint4* p, const thread uint* from) {
    uint4 v;
    UNROLL for (int k = 0; k < 4; k++)
        v[k] = from[k];
    *p = v;
}

// vectors<W>(p): whether load<W> and store may use vectors at p and at every multiple of W from p
// on. A view may begin anywhere, so the address decides. PyTorch's kernels convert an address of
// device memory to a ulong in the same way (c10/metal/atomic.h). Constant memory is read number by
// number.
template <int W, typename T>
FUNCTION bool vectors(const device T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS == 1 || reinterpret_cast<ulong>(p) % A::BYTES == 0;
}
template <int W, typename T>
FUNCTION bool vectors(const constant T*) {
    return true;
}
