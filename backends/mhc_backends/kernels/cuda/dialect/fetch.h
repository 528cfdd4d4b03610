// Loads of rows that are read in small pieces.

#pragma once

#include "../../common/access.h"
#include "../../common/raw.h"
#include "../../common/read.h"
#include "../../common/width.h"
#include "constant.h"
#include "vectors.h"
#include "words.h"

// fetch_raw<W>(p): load_raw<W>(p) from an input whose rows a simdgroup reads in pieces of 64 bytes,
// many rows at a time. It requests whole lines of 128 bytes from memory, because the other half is
// read soon after.
FUNCTION void fetch_words(uint* to, const uint4* p) {
    asm volatile("ld.global.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(__cvta_generic_to_global(p)));
}

FUNCTION void fetch_words(uint* to, const uint2* p) {
    asm volatile("ld.global.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "l"(__cvta_generic_to_global(p)));
}

FUNCTION void fetch_words(uint* to, const uint1* p) { to[0] = p->x; }

template <int W, typename T>
FUNCTION Raw<T, W> fetch(const T* p, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS == 1 || !by_vectors) return read<W>(p, false);
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += A::ELEMENTS)
        fetch_words(out.word + k / PER_WORD, (const DEVICE typename A::type*)(p + k));
    return out;
}

template <int W, typename P>
FUNCTION auto fetch_raw(P p) {
    return fetch<W>(p, vectors<W>(p));
}
template <int W, typename P>
FUNCTION auto fetch_raw(AlignedAddress<P> from) {
    return fetch<W>(from.p, true);
}
