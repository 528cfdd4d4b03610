// Rows that are read in small pieces.

#pragma once

#include "../../common/access.h"
#include "../../common/raw.h"
#include "read.h"
#include "vectors.h"
#include "words.h"

// fetch_raw<W>(p): load_raw<W>(p) from an input whose rows a simdgroup reads in pieces of 64 bytes, many
// rows at a time: the memory is asked for their whole lines, as the other half is read soon after.
FUNCTION uint4 fetch_words(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}

FUNCTION uint2 fetch_words(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}

FUNCTION uint1 fetch_words(const uint1* p) { return *p; }

template <int W, typename T>
FUNCTION Raw<T, W> fetch(const T* p, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS == 1 || !by_vectors) return read<W>(p, false);
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
        const typename A::type words = fetch_words(reinterpret_cast<const typename A::type*>(p + k));
        UNROLL for (int e = 0; e < A::WORDS; e++) out.word[k / PER_WORD + e] = word(words, e);
    }
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
