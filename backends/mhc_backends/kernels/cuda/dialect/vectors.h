// Vectors in memory: where they are allowed, and single accesses to them.

#pragma once

#include "../../common/width.h"
#include "words.h"

template <int COUNT>
struct Words {
    typedef uint4 type;
};
template <>
struct Words<2> {
    typedef uint2 type;
};
template <>
struct Words<1> {
    typedef uint1 type;
};

FUNCTION void load_words(uint* to, const uint1* p) { to[0] = p->x; }
FUNCTION void load_words(uint* to, const uint2* p) {
    const uint2 v = *p;
    to[0] = v.x, to[1] = v.y;
}
FUNCTION void load_words(uint* to, const uint4* p) {
    const uint4 v = *p;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
// In PTX, because the compiler may split one store into four, which take four times as long.
FUNCTION void store_words(uint1* p, const uint* w) { p->x = w[0]; }
FUNCTION void store_words(uint2* p, const uint* w) {
    asm volatile("st.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}
FUNCTION void store_words(uint4* p, const uint* w) {
    asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                 "r"(w[3])
                 : "memory");
}

// vectors<W>(p): whether load<W> and store may use vectors at p and at every multiple of W from p
// on. A view may begin anywhere, so the address decides.
template <int W, typename T>
FUNCTION bool vectors(const T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS == 1 || reinterpret_cast<unsigned long long>(p) % A::BYTES == 0;
}
