// Vectors in memory: how wide an access may be, and where.

#pragma once

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
FUNCTION unsigned word(uint1 words, int) { return words.x; }
FUNCTION unsigned word(uint2 words, int k) { return k ? words.y : words.x; }
FUNCTION unsigned word(uint4 words, int k) {
    return k == 0 ? words.x : k == 1 ? words.y : k == 2 ? words.z : words.w;
}

// In PTX, since the compiler may make four stores of one, which cost four times as much.
FUNCTION void store_words(uint1* p, const unsigned* w) { p->x = w[0]; }
FUNCTION void store_words(uint2* p, const unsigned* w) {
    asm volatile("st.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}

FUNCTION void store_words(uint4* p, const unsigned* w) {
    asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                 "r"(w[3])
                 : "memory");
}

// Elements per memory access: the largest power of two that divides W and fits in 16 bytes.
template <typename T, int W>
struct Access {
    enum {
        MOST = 16 / int(sizeof(T)),
        ELEMENTS = (W & -W) < MOST ? (W & -W) : MOST,
        BYTES = ELEMENTS * int(sizeof(T)),
        PER_WORD = 4 / int(sizeof(T)),
        WORDS = BYTES < 4 ? 1 : BYTES / 4,
    };
    typedef typename Words<WORDS>::type type;
};

// vectors<W>(p): whether load<W> and store may take vectors at addresses that are whole multiples of W
// from p on. A view may begin anywhere, so the address decides.
template <int W, typename T>
FUNCTION bool vectors(const T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS == 1 || reinterpret_cast<unsigned long long>(p) % A::BYTES == 0;
}
