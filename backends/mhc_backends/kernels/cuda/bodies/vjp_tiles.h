// vjp_tiles: the records of tiles of 16 tokens, which project_vjp and combine_project_vjp read for
// every slab of channels: ../vjp/layout.h.
//
// du[T, m], pull[T, 1], w[T or 1, n], h_post[T or 1, n], h_res[T or 1, n, n] -> tiles[ceil(T / 16),
// 4 TileRecord::SIZE]. WITH_H: there is a w. COMBINES: there are h_post and h_res. A threadgroup
// takes a tile. Beyond the tokens, du is zero and the rest that of the last token. Also the sums of
// terms[T, B] over the tokens of a tile, sums[ceil(T / 16), B].

#pragma once

#include "../../common/channels.h"
#include "../../common/position.h"
#include "../../common/project/layout.h"
#include "../vjp/layout.h"
#include "../vjp/products.h"
#include "dialect/words.h"

template <int N, int COLUMNS, bool WITH_H, bool COMBINES, typename Du, typename Pull,
          typename Weights, typename HPost, typename HRes, typename Terms, typename Tiles,
          typename Sums>
FUNCTION void vjp_tiles(Du du, int64_t du_shape_0, Pull pull, Weights w, int w_shape_0,
                        HPost h_post, int h_post_shape_0, HRes h_res, int h_res_shape_0,
                        Terms terms, int terms_shape_1, Tiles tiles, Sums sums, Position here) {
    typedef TileRecord<N, COLUMNS, COMBINES> Record;
    const int64_t T = du_shape_0;
    const int COLUMN_TILES = Record::COLUMN_TILES, WIDTH = 8 * COLUMN_TILES, MATRIX = N * N + N;

    for (int64_t tile = here.group_x; tile * TILE_TOKENS < T; tile += here.groups_x) {
        const int64_t first = tile * TILE_TOKENS;
        const auto record = tiles + tile * (4 * Record::SIZE);
        for (int at = here.id; at < TILE_TOKENS * WIDTH / 2; at += here.threads) {
            float v[2];
            // two columns of a token
            const int t = at / (WIDTH / 2), pair = at % (WIDTH / 2);
            UNROLL for (int e = 0; e < 2; e++) {
                const int column = 2 * pair + e;
                v[e] = first + t < T && column < COLUMNS ? float(du[(first + t) * COLUMNS + column])
                                                         : 0.0f;
            }
            const auto columns = split<2>(v[0], v[1]);
            UNROLL for (int piece = 0; piece < 2; piece++) {
                const int word = t / 8 * 2 * COLUMN_TILES + dx_word(COLUMN_TILES, pair / 4, piece);
                const int lane = t % 8 * 4 + pair % 4;
                record[(word / 4 * SIMD + lane) * 4 + word % 4] =
                    __uint_as_float(columns.word[piece]);
            }
            // two tokens of a column
            const int column = at % WIDTH, tokens = at / WIDTH;
            UNROLL for (int e = 0; e < 2; e++) {
                const int64_t token = first + 2 * tokens + e;
                v[e] = token < T && column < COLUMNS ? float(du[token * COLUMNS + column]) : 0.0f;
            }
            const auto pieces = split<3>(v[0], v[1]);
            UNROLL for (int piece = 0; piece < 3; piece++) {
                const int word = 2 * (piece * COLUMN_TILES + column / 8) + tokens / 4;
                const int lane = column % 8 * 4 + tokens % 4;
                record[((Record::DX + word / 4) * SIMD + lane) * 4 + word % 4] =
                    __uint_as_float(pieces.word[piece]);
            }
        }
        for (int at = here.id; at < TILE_TOKENS * N; at += here.threads) {
            const int t = at / N, i = at % N;
            const int64_t token = first + t < T ? first + t : T - 1;
            const auto to = record + 4 * Record::SCALES + 2 * (i * TILE_TOKENS + t);
            to[0] = WITH_H ? float(w[row(w_shape_0, token) * N + i]) : 0.0f;
            to[1] = -float(pull[token]);
        }
        // by the last threads, which have no number of du
        for (int k = here.threads - 1 - here.id; k < terms_shape_1; k += here.threads) {
            float sum = 0.0f;
            UNROLL for (int t = 0; t < TILE_TOKENS; t++)
                if (first + t < T) sum += float(terms[(first + t) * terms_shape_1 + k]);
            sums[tile * terms_shape_1 + k] = sum;
        }
        for (int at = here.id; COMBINES && at < TILE_TOKENS * MATRIX; at += here.threads) {
            const int t = at / MATRIX, k = at % MATRIX;
            const int64_t token = first + t < T ? first + t : T - 1;
            record[4 * Record::MATRICES + at] =
                k < N * N ? float(h_res[row(h_res_shape_0, token) * N * N + k])
                          : float(h_post[row(h_post_shape_0, token) * N + k - N * N]);
        }
    }
}
