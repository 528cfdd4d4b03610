// One pass over the streams for dx and dphi, in the steps of a tile.

#pragma once

#include "../../common/access.h"
#include "../../common/floats.h"
#include "../../common/load.h"
#include "../../common/pull.h"
#include "../../common/raw.h"
#include "../../common/store.h"
#include "../../common/store_raw.h"
#include "copies.h"
#include "dialect/numbers.h"
#include "dialect/words.h"
#include "layout.h"
#include "products.h"

// What a lane has of a tile before the products: w dh - pull x + g, and x itself.
struct LaneInputs {
    LaneSums<2> sum;
    LaneRows x;
};

// Four numbers of a lane from a row in threadgroup memory.
template <typename T>
FUNCTION Raw<T, 4> take(const uint4* row, int channel, T) {
    Raw<T, 4> out;
    if (sizeof(T) < 4) {
        const uint2 v = reinterpret_cast<const uint2*>(row)[channel / 4];
        out.word[0] = v.x, out.word[1] = v.y;
    } else {
        const uint4 v = row[channel / 4];
        out.word[0] = v.x, out.word[1] = v.y;
        out.word[Raw<T, 4>::WORDS - 2] = v.z, out.word[Raw<T, 4>::WORDS - 1] = v.w;
    }
    return out;
}

// x in units of 1 / pull_unit(), two numbers at a time: their exponents change, and nothing else.
FUNCTION Raw<__nv_bfloat16, 4> in_pull_units(Raw<__nv_bfloat16, 4> x) {
    const __nv_bfloat162 unit = __float2bfloat162_rn(pull_unit());
    UNROLL for (int k = 0; k < 2; k++) {
        auto& both = *reinterpret_cast<__nv_bfloat162*>(&x.word[k]);
        both = __hmul2(both, unit);
    }
    return x;
}

// `channel` is the lane's first one in the slab, i its stream, column its lane % 4; dh has its type.
template <typename Stage, bool WITH_H, bool WITH_G, typename Dh>
FUNCTION LaneInputs lane_inputs(const uint4* stage, int i, int channel, int column, const Dh*) {
    typedef __nv_bfloat16 T;
    LaneInputs out;
    const auto scales = stage + Stage::RECORD + Stage::Record::SCALES + i * (TILE_TOKENS / 2);
    UNROLL for (int h = 0; h < 2; h++) {
        // w and -pull of two tokens
        const Floats<4> both = floats(take(scales, 4 * (4 * h + column), 0.0f));
        UNROLL for (int e = 0; e < 2; e++) {
            const int t = 8 * h + 2 * column + e;
            const auto at = stage + i * Stage::PLANE + t * Stage::ROW;
            const auto x = take(at, channel, T(0.0f));
            Floats<4> sum = times(both.at[2 * e + 1], floats(in_pull_units(x)));
            if (WITH_H)
                sum = add(sum, both.at[2 * e],
                          floats(take(stage + Stage::DH + t * Stage::DH_ROW, channel, Dh(0.0f))));
            if (WITH_G) sum = plus(sum, floats(take(at + Stage::G, channel, T(0.0f))));
            UNROLL for (int k = 0; k < 4; k++)
                out.sum.at[k / 2][h].at[2 * (k % 2) + e] = sum.at[k];
            out.x.at[h][e] = x;
        }
    }
    return out;
}

// Rounds four numbers and stores them. (`store` keeps its order with all other accesses, so nothing
// could be loaded for what follows.)
template <typename P>
FUNCTION void store_later(P p, Floats<4> v) {
    store(p, v);
}
template <typename P>
FUNCTION void store_later(AlignedAddress<P> to, Floats<4> v) {
    const auto raw = packed(to, v);
    if (raw.WORDS == 2) {
        const uint2 words = {raw.word[0], raw.word[1]};
        *reinterpret_cast<uint2*>(to.p) = words;
    } else {
        const uint4 words = {raw.word[0], raw.word[1], raw.word[raw.WORDS - 2],
                             raw.word[raw.WORDS - 1]};
        *reinterpret_cast<uint4*>(to.p) = words;
    }
}

// Stores a lane's numbers of a tile, whose tokens are K apart; p points to its first channel.
template <typename P>
FUNCTION void store_tile(P p, uint K, LaneSums<2> tile, int left, int lane) {
    const int own = 2 * (lane % 4);
    const auto to = p + own * K;
    if (left == TILE_TOKENS) {
        UNROLL for (int k = 0; k < 4; k++)
            store_later(to + (8 * (k / 2) + k % 2) * K, four_channels(tile, k / 2, k % 2));
    } else {
        UNROLL for (int k = 0; k < 4; k++) {
            const int t = 8 * (k / 2) + k % 2;
            if (own + t < left) store_later(to + t * K, four_channels(tile, k / 2, k % 2));
        }
    }
}

// The same, as floats in threadgroup memory, whose rows are ROW apart.
FUNCTION void put_tile(uint4* to, int ROW, LaneSums<2> tile, int channel, int lane) {
    UNROLL for (int k = 0; k < 4; k++) {
        const int t = 8 * (k / 2) + 2 * (lane % 4) + k % 2;
        const Floats<4> v = four_channels(tile, k / 2, k % 2);
        to[t * ROW + channel / 4] =
            make_uint4(bits(v.at[0]), bits(v.at[1]), bits(v.at[2]), bits(v.at[3]));
    }
}

// Stores a lane's sums of dphi; dphi points to its first channel in column 0 of its share.
template <int COLUMNS, int COLUMN_TILES, typename P>
FUNCTION void store_dphi(P dphi, int64_t K, LaneSums<COLUMN_TILES> sums, int lane) {
    UNROLL for (int q = 0; q < COLUMN_TILES; q++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int column = 8 * q + 2 * (lane % 4) + e;
            if (column < COLUMNS) store(dphi + column * K, four_channels(sums, q, e));
        }
    }
}

template <int COLUMN_TILES>
FUNCTION LaneSums<COLUMN_TILES> zero_dphi() {
    LaneSums<COLUMN_TILES> out;
    UNROLL for (int k = 0; k < 2 * COLUMN_TILES; k++)
        out.at[k % 2][k / 2] = zeros<4>();
    return out;
}
