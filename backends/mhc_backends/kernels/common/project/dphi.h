// Operands of dphi = du^T x: du in threadgroup memory, x transposed in registers.

#pragma once

#include "../load.h"
#include "../operands.h"
#include "../raw.h"
#include "raw_within.h"
#include "dialect/lanes.h"
#include "dialect/words.h"

// The B operand from du[T, M]: COLUMN_TILES tiles of columns, 32 tokens from `first` on; zeros from
// token `end` on.
template <int COLUMN_TILES, typename P>
FUNCTION BTiles<COLUMN_TILES> load_du(P du, int M, int column, int64_t first, int64_t end,
                                      int lane) {
    BTiles<COLUMN_TILES> out;
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES; k++) {
        const int tile = k / 2, e = k % 2;
        const int at = column + tile * TILE_COLUMNS + b_column(lane, e);
        UNROLL for (int t = 0; t < 4; t++) {
            const int64_t token = first + 4 * b_row(lane, e) + t;
            out.at[tile].run[e].at[t] = at < M && token < end ? float(du[token * M + at]) : 0.0f;
        }
    }
    return out;
}

// 4 channels of 8 tokens, in the format of memory.
template <typename R>
struct RawTokens {
    R at[8];
};

// Loads this lane's 8 of the 32 tokens from `first` on. The last token before `end` replaces those
// beyond it: their du is zero.
template <typename P>
FUNCTION auto load_tokens(P x, int64_t K, int64_t first, int64_t end, int rest, int lane) {
    RawTokens<decltype(load_raw<4>(x))> out;
    UNROLL for (int k = 0; k < 8; k++) {
        const int64_t token = first + 4 * tile_pair(lane) + k;
        out.at[k] = load_raw_within<4>(x + (token < end ? token : end - 1) * K, rest);
    }
    return out;
}

// One channel of the 8 tokens.
template <typename T>
FUNCTION Raw<T, 8> transposed(RawTokens<Raw<T, 4>> tokens, int channel) {
    enum { PER_WORD = Raw<T, 8>::PER_WORD };
    Raw<T, 8> out = {};
    UNROLL for (int k = 0; k < 8; k++) {
        const auto both = tokens.at[k].word[channel / PER_WORD];
        out.word[k / PER_WORD] |=
            PER_WORD == 1 ? both : (both >> (channel % 2 * 16) & 0xffff) << (k % 2 * 16);
    }
    return out;
}
