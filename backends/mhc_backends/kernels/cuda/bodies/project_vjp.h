// project_vjp: the gradients of the streams and of phi through the projection, in one pass over the
// streams: dx = du . phi - pull x (+ w_i dh with WITH_H, + g with WITH_G), dphi = du^T x. With
// COMBINES, x is the x' that combine made: its gradient stays in the threadgroup, as floats, and is
// pulled back to combine's inputs there.
//
// x[T, n, C] in bfloat16, phi[m, n C], tiles of du, pull and w (vjp_tiles), dh[T, C], g[T, n, C] ->
// dx[T, n, C] and, for each share of the tokens, dphi[S, m, n C]. With COMBINES, the tiles have
// H_res and h_post, and there are old[T, n, C], y[T, C] -> dx, dphi, dy[T, C] and, for each slab of
// channels, dmix[B, T, n n + n]: dH_res, then dh_post. sum_rows adds up the shares, sum_slabs the
// slabs.
//
// A threadgroup takes a slab and a share (../vjp/layout.h). While it works on a tile, STAGES - 1
// more are copied. It needs n from 2 to 4, m <= 32, and C a multiple of the slab's channels.

#pragma once

#include "../../common/access.h"
#include "../../common/position.h"
#include "../../common/project/layout.h"
#include "../../common/store.h"
#include "../vjp/combine.h"
#include "../vjp/copies.h"
#include "../vjp/layout.h"
#include "../vjp/pass.h"
#include "../vjp/products.h"
#include "dialect/copies.h"
#include "dialect/sync.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// The sizes of the kernel's threadgroup arrays.
template <int BUFFER_FRAGMENTS>
struct project_vjp_memory {
    enum { shared = BUFFER_FRAGMENTS };
};

// Whether all arrays begin where whole vectors may be loaded and stored.
template <bool WITH_H, bool WITH_G, bool COMBINES, typename X, typename Phi, typename Tiles,
          typename Dh, typename G, typename Old, typename Y, typename Dx, typename Dphi,
          typename Dy>
FUNCTION bool project_vjp_aligned(X x, Phi phi, Tiles tiles, Dh dh, G g, Old old, Y y, Dx dx,
                                  Dphi dphi, Dy dy) {
    return vectors<8>(x) && vectors<4>(phi) && vectors<4>(tiles) && vectors<4>(dx) &&
           vectors<4>(dphi) && (!WITH_H || vectors<8>(dh)) && (!WITH_G || vectors<8>(g)) &&
           (!COMBINES || (vectors<8>(old) && vectors<8>(y) && vectors<4>(dy)));
}

template <typename ACCESS, int N, int COLUMNS, bool WITH_H, bool WITH_G, bool COMBINES, int STAGES,
          int BUFFER_FRAGMENTS, typename X, typename Phi, typename Tiles, typename Dh, typename G,
          typename Old, typename Y, typename Dx, typename Dphi, typename Dy, typename Dmix>
FUNCTION void project_vjp(X x, int64_t x_shape_0, int x_shape_2, Phi phi, Tiles tiles, Dh dh, G g,
                          Old old, Y y, Dx dx, Dphi dphi, Dy dy, Dmix dmix,
                          threadgroup uint4* shared, Position here) {
    const int64_t T = x_shape_0;
    const int C = x_shape_2;
    const int64_t K = int64_t(N) * C;
    typedef TileStage<N, COLUMNS, WITH_H, WITH_G, COMBINES, int(sizeof(*dh))> Stage;
    typedef typename Stage::Record Record;
    enum {
        CHANNELS = Slab<N>::CHANNELS,
        THREADS = Slab<N>::THREADS,
        LAYER = 16 / int(sizeof(*dh)),  // numbers of dh in 16 bytes
        LAST = (STAGES - 1) * Stage::SIZE,
    };
    static_assert(
        BUFFER_FRAGMENTS == STAGES * Stage::SIZE + (COMBINES ? int(Exchange<N>::SIZE) : 0),
        "the launch and the kernel have other sizes of threadgroup memory");
    const auto exchange = shared + STAGES * Stage::SIZE;

    const int id = here.id, lane = id % SIMD, simdgroup = id / SIMD;
    const int slabs = C / CHANNELS, slab = here.group_x % slabs;
    const int share = here.group_x / slabs, shares = here.groups_x / slabs;
    const int tile_count = int((T + TILE_TOKENS - 1) / TILE_TOKENS);
    const int rest = int(T - int64_t(tile_count - 1) * TILE_TOKENS);  // tokens of the last tile
    const int i = simdgroup / Slab<N>::CHUNKS;
    const int channel = simdgroup % Slab<N>::CHUNKS * STEP_CHANNELS + lane / 4 * 4;
    const int begin = slab * CHANNELS;

    const auto kept =
        load_lane_phi<COLUMNS>(ACCESS::at(phi) + (int64_t(i) * C + begin + channel), K, lane);
    auto dphi_sums = zero_dphi<Record::COLUMN_TILES>();

    // the first rounds, before this share's first tile, only fill the stages
    uint stage = Stage::SIZE;
    for (int tile = share - (STAGES - 1) * shares; tile < tile_count; tile += shares) {
        if (tile >= share) {
            end_copies<STAGES - 2>();
            BARRIER;
        }
        const int ahead = tile + (STAGES - 1) * shares;
        if (ahead < tile_count) {
            const int left = ahead == tile_count - 1 ? rest : TILE_TOKENS;
            const int64_t streams = begin + int64_t(ahead) * (TILE_TOKENS * N * C);
            const int64_t layers = begin + int64_t(ahead) * (TILE_TOKENS * C);
            const auto to = shared + (stage == 0 ? LAST : stage - Stage::SIZE);
            copy_streams<N, CHANNELS, THREADS>(to, ACCESS::at(x) + streams, C, left, id);
            if (WITH_G)
                copy_streams<N, CHANNELS, THREADS>(to + Stage::G, ACCESS::at(g) + streams, C, left,
                                                   id);
            if (COMBINES) {
                copy_streams<N, CHANNELS, THREADS>(to + Stage::OLD, ACCESS::at(old) + streams, C,
                                                   left, id);
                copy_layers<8, CHANNELS, THREADS>(to + Stage::Y, ACCESS::at(y) + layers, C, left,
                                                  id);
            }
            if (WITH_H)
                copy_layers<LAYER, CHANNELS, THREADS>(to + Stage::DH, ACCESS::at(dh) + layers, C,
                                                      left, id);
            copy_record<Record::SIZE, THREADS>(
                to + Stage::RECORD, ACCESS::at(tiles) + int64_t(ahead) * (4 * Record::SIZE), id);
        }
        mark_copies();

        if (tile >= share) {
            const auto now = shared + stage;
            const int left = tile == tile_count - 1 ? rest : TILE_TOKENS;
            const auto to = ACCESS::at(dx) + (begin + int64_t(tile) * (TILE_TOKENS * N * C));
            TOGETHER;
            LaneInputs given = lane_inputs<Stage, WITH_H, WITH_G>(now, i, channel, lane % 4, dh);
            given.sum =
                add_dx(given.sum, kept, lane_words<Record::DX>(now + Stage::RECORD, 0, lane));
            if (COMBINES)
                put_tile(exchange + i * Exchange<N>::PLANE, Exchange<N>::ROW, given.sum, channel,
                         lane);
            dphi_sums = add_dphi(dphi_sums, given.x,
                                 lane_words<Record::DPHI>(now + Stage::RECORD, Record::DX, lane));
            if (COMBINES) {
                BARRIER;
                const auto layers = begin + int64_t(tile) * (TILE_TOKENS * C);
                const auto mixed = int64_t(slab) * T + int64_t(tile) * TILE_TOKENS;
                combine_tile_vjp<Stage, N>(now, exchange, to, ACCESS::at(dy) + layers,
                                           dmix + mixed * (N * N + N), C, left, here);
            } else {
                store_tile(to + (i * C + channel), N * uint(C), given.sum, left, lane);
            }
        }
        stage = stage == LAST ? 0 : stage + Stage::SIZE;
    }
    store_dphi<COLUMNS>(
        ACCESS::at(dphi) + (share * int64_t(COLUMNS) * K + int64_t(i) * C + begin + channel), K,
        dphi_sums, lane);
}
