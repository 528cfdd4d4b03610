// The work of a threadgroup of the vjps that make dx and dphi in one pass, and what it keeps in
// threadgroup memory, in units of 16 bytes.
//
// A threadgroup takes a slab, some channels of all streams, and a share of the tiles of 16 tokens.
// A simdgroup takes 32 channels of one stream; a lane has four adjacent ones of these, and in a
// tile the tokens 8 h + 2 (lane % 4) + e. The streams are the transposed operand of both products,
// so a number of a stream has the same lane in both.

#pragma once

#include "../../common/position.h"
#include "../../common/project/layout.h"
#include "dialect/words.h"

template <int N>
struct Slab {
    enum {
        CHUNKS = 8 / N,  // of 32 channels
        CHANNELS = CHUNKS * STEP_CHANNELS,
        THREADS = N * CHUNKS * SIMD,
    };
};

// The record of a tile, which vjp_tiles makes for the threadgroups of all slabs:
//
// - DX fragments of each lane: du as the operand of dx, in words of two columns, half h of the
//   tokens from word 2 COLUMN_TILES h on. Both pieces of two tiles of columns follow each other
//   (dx_word): what the tensor cores take together is in adjacent words.
// - DPHI fragments of each lane: du as the operand of dphi, in words of two tokens. Word
//   2 (piece COLUMN_TILES + q) + h.
// - at SCALES, for each stream and token: w, -pull
// - at MATRICES, for each token: H_res, h_post
//
// Piece 0 of a float is the nearest bfloat16, piece 1 that of the rest, and so on: three pieces have
// all its bits. dx, whose other terms are as large and which is rounded, gets two.
FUNCTION int dx_word(int COLUMN_TILES, int q, int piece) {
    return q / 2 < COLUMN_TILES / 2 ? q / 2 * 4 + 2 * piece + q % 2 : q / 2 * 4 + piece;
}

template <int N, int COLUMNS, bool COMBINES>
struct TileRecord {
    enum {
        COLUMN_TILES = (COLUMNS + 7) / 8,
        DX = COLUMN_TILES,
        DPHI = (6 * COLUMN_TILES + 3) / 4,
        SCALES = (DX + DPHI) * SIMD,
        MATRICES = SCALES + N * TILE_TOKENS / 2,
        SIZE = MATRICES + (COMBINES ? TILE_TOKENS / 4 * (N * N + N) : 0),
    };
};

// What is copied of a tile: x first, then what the constants ask for. A row has 16 bytes more than
// its channels, so that the rows which a simdgroup reads at a time are in different banks.
template <int N, int COLUMNS, bool WITH_H, bool WITH_G, bool COMBINES, int DH_BYTES>
struct TileStage {
    typedef TileRecord<N, COLUMNS, COMBINES> Record;
    enum {
        CHANNELS = Slab<N>::CHANNELS,
        ROW = CHANNELS / 8 + 1,
        PLANE = TILE_TOKENS * ROW,
        DH_ROW = CHANNELS * DH_BYTES / 16 + 1,
        G = N * PLANE,
        OLD = G + (WITH_G ? N * PLANE : 0),
        Y = OLD + (COMBINES ? N * PLANE : 0),
        DH = Y + (COMBINES ? PLANE : 0),
        RECORD = DH + (WITH_H ? TILE_TOKENS * DH_ROW : 0),
        SIZE = RECORD + Record::SIZE,
    };
};
