// The vjp of combine for a tile whose cotangent of x' is in threadgroup memory.

#pragma once

#include "../../common/floats.h"
#include "../../common/load.h"
#include "../../common/position.h"
#include "../../common/raw.h"
#include "../../common/store.h"
#include "dialect/numbers.h"
#include "dialect/simd.h"
#include "dialect/words.h"
#include "layout.h"
#include "pass.h"

// Cotangents of x' as floats: rows of a stream follow each other.
template <int N>
struct Exchange {
    enum {
        ROW = Slab<N>::CHANNELS / 4 + 1,
        PLANE = TILE_TOKENS * ROW,
        SIZE = N * PLANE,
    };
};

// Some of COUNT sums, which lanes have shared out: those of this lane are numbers `first` to
// `first + left - 1`.
template <int COUNT>
struct SharedOut {
    float at[COUNT];
    int first, left;
};

// The sums over LANES lanes, each in one of them. A step halves what a lane has: it gives the other
// half to its partner.
template <int LANES, int COUNT>
FUNCTION SharedOut<COUNT> share_out(SharedOut<COUNT> sums, int lane) {
    int count = COUNT;
    UNROLL for (int step = LANES / 2; step > 0; step /= 2) {
        const int part = (count + 1) / 2;
        const bool upper = lane & step;
        UNROLL for (int k = 0; k < COUNT; k++) {
            if (k >= part) continue;
            const float other = k + part < count ? sums.at[k + part] : 0.0f;
            const float given = upper ? sums.at[k] : other, own = upper ? other : sums.at[k];
            sums.at[k] = own + simd_partner(given, step);
        }
        sums.first += upper ? part : 0;
        sums.left = upper ? sums.left - part : sums.left < part ? sums.left : part;
        count = part;
    }
    return sums;
}

// Makes dx, dy and this slab's part of dH_res and dh_post for `left` tokens of a tile: the first of
// the latter is at `dh`, the numbers of a token after those of another. dx and dy point to the slab.
template <typename Stage, int N, typename Dx, typename Dy, typename Dh>
FUNCTION void combine_tile_vjp(const uint4* stage, const uint4* exchange, Dx dx, Dy dy, Dh dh,
                               int C, int left, Position here) {
    typedef __nv_bfloat16 T;
    enum {
        LANES = Slab<N>::CHANNELS / 4,  // of a token
        SUMS = N * N + N,
        MOST = (SUMS + LANES - 1) / LANES + 1,  // sums that a lane keeps
    };
    const uint K = N * uint(C);
    const int channel = 4 * (here.id % LANES);
    for (int t = here.id / LANES; t < TILE_TOKENS; t += Slab<N>::THREADS / LANES) {
        const auto matrix =
            reinterpret_cast<const float*>(stage + Stage::RECORD + Stage::Record::MATRICES) +
            t * SUMS;
        Floats<4> g[N];
        UNROLL for (int i = 0; i < N; i++) {
            const auto raw =
                take(exchange + i * Exchange<N>::PLANE + t * Exchange<N>::ROW, channel, 0.0f);
            g[i] = floats(raw);
        }
        SharedOut<SUMS> sums;
        sums.first = 0, sums.left = SUMS;
        const auto row = stage + t * Stage::ROW;
        UNROLL for (int j = 0; j <= N; j++) {  // the streams, then the layer
            const auto from = j < N ? row + Stage::OLD + j * Stage::PLANE : row + Stage::Y;
            const Floats<4> own = floats(take(from, channel, T(0.0f)));
            Floats<4> out = zeros<4>();
            UNROLL for (int i = 0; i < N; i++) {
                const int at = j < N ? i * N + j : N * N + i;
                out = add(out, matrix[at], g[i]);
                sums.at[at] = add_dot(0.0f, g[i], own);
            }
            if (t < left && j < N) store_later(dx + (t * K + uint(j * C + channel)), out);
            if (t < left && j == N) store_later(dy + (t * uint(C) + uint(channel)), out);
        }
        sums = share_out<LANES>(sums, here.id % LANES);
        UNROLL for (int k = 0; k < MOST; k++)
            if (k < sums.left && t < left) dh[t * SUMS + sums.first + k] = sums.at[k];
    }
}
