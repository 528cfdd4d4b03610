// Numbers in registers in the format of memory.

#pragma once

#include "floats.h"
#include "dialect/numbers.h"
#include "dialect/words.h"

// W numbers in words of 32 bits, as in memory: two narrow numbers share a register.
template <typename T, int W>
struct Raw {
    enum { PER_WORD = 4 / int(sizeof(T)), WORDS = (W + PER_WORD - 1) / PER_WORD };
    uint word[WORDS];
};

template <typename T, int W>
FUNCTION Floats<W> floats(Raw<T, W> raw) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Floats<W> out;
    UNROLL for (int k = 0; k < W; k++)
        out.at[k] = number(raw.word[k / PER_WORD], k % PER_WORD, T(0.0f));
    return out;
}
