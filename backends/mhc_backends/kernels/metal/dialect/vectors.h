// Vectors in memory: how wide an access may be, and where.

#pragma once

#include "words.h"

template <int COUNT>
struct Words {
    typedef vec<uint, COUNT> type;
};

template <>
struct Words<1> {
    typedef uint type;
};
FUNCTION uint word(uint words, int) { return words; }
FUNCTION uint word(uint2 words, int k) { return words[k]; }
FUNCTION uint word(uint4 words, int k) { return words[k]; }
FUNCTION void set_word(thread uint& words, int, uint value) { words = value; }
FUNCTION void set_word(thread uint2& words, int k, uint value) { words[k] = value; }
FUNCTION void set_word(thread uint4& words, int k, uint value) { words[k] = value; }

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
// from p on. A view may begin anywhere, so the address decides. That an address of device memory becomes a
// ulong in this way, PyTorch's kernels show (c10/metal/atomic.h). Constant memory is read number by number.
template <int W, typename T>
FUNCTION bool vectors(const device T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS == 1 || reinterpret_cast<ulong>(p) % A::BYTES == 0;
}

template <int W, typename T>
FUNCTION bool vectors(const constant T*) {
    return true;
}
