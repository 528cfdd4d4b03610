// project_dphi: phi's gradient, dphi = du^T x, in shares of the tokens, which sum_rows adds up.
//
// x[T, n, C], du[T, m] -> dphi[S, m, n C]. A threadgroup takes a share and a strip of the channels; a
// simdgroup takes 32 channels of one stream, and TILES tiles of columns at a time. The left factor is x
// transposed, of which a lane holds 4 channels of 8 tokens. The simdgroups share du, in threadgroup
// memory: that of STAGE times 32 tokens at a time.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = du_shape[1];
const int64_t K = int64_t(N) * C;
threadgroup LAUNCHED uint4 factors[LAUNCH_SIZE(STAGE * RIGHT_QUADS(TILES) * SIMD)];

//// project_dphi<N, TILES, STAGE, AHEAD>(x, du, dphi, factors, T, C, M, K): aligned where C %
// BLOCK_CHANNELS == 0 && vectors<4>(x) && vectors<4>(dphi) ////
typedef decltype(load_raw<8>(x)) Row;
const int FACTOR = decltype(factor_for(Row(), RightTiles<TILES>()))::QUADS * SIMD;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
const int channel = 4 * tile_row(lane);
const int strips = strip_count<N>(C, simdgroups);
const int unit = int(here.group_x % strips) * simdgroups + simdgroup;
const int i = strip_stream<N>(unit), c = strip_channel<N>(unit);  // from C on there is nothing
const int rest = C - c - channel;
const int64_t at = int64_t(i) * C + c + channel;
const int64_t own = here.group_x / strips, begin = own * STAGE * SIMD;
const int64_t turn = here.groups_x / strips * STAGE * SIMD;  // all shares, side by side

for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
    Products<TILES, 1> sums[2];  // of channels 0 and 1 of four, and of 2 and 3
    UNROLL for (int s = 0; s < 2; s++) sums[s] = no_products<TILES, 1>();

    decltype(load_tokens(x, K, 0, 0, 0, 0)) tokens[AHEAD + 1];
    if (AHEAD) tokens[0] = load_tokens(x + at, K, begin, T, rest, lane);
    for (int64_t stage = begin; stage < T; stage += turn) {
        BARRIER;  // those before have been read
        for (int k = simdgroup; k < STAGE; k += simdgroups) {
            const auto numbers = load_du<TILES>(du, M, column, stage + k * SIMD, T, lane);
            put(&factors[k * FACTOR], factor_for(Row(), numbers), lane);
        }
        BARRIER;
        for (int k = 0; k < STAGE; k += 2) {
            UNROLL for (int side = 0; side < 2; side++) {
                const int block = k + side;
                const int64_t first = stage + block * SIMD;
                const int64_t next = !AHEAD ? first : block + 1 < STAGE ? first + SIMD : stage + turn;
                if (next < T)
                    tokens[AHEAD ? 1 - side : 0] = load_tokens(x + at, K, next, T, rest, lane);
                if (first < T) {
                    const auto shared =
                        shared_factors<TILES>(Row(), &factors[block * FACTOR], lane);
                    TOGETHER;
                    UNROLL for (int s = 0; s < 2; s++) {
                        Rows<Row, 1, 1> rows;
                        UNROLL for (int k = 0; k < 2; k++)
                            rows.at[0][0].in_half[k] = transposed(tokens[AHEAD ? side : 0], 2 * s + k);
                        sums[s] = plus(sums[s], multiply<TILES>(rows, shared));
                    }
                }
            }
        }
    }

    UNROLL for (int tile = 0; tile < TILES; tile++) {
        UNROLL for (int j = 0; j < 2; j++) {
            const int to = column + tile * TILE_COLUMNS + sum_column(lane, j);
            const int channel = c + 4 * sum_row(lane, j);
            Floats<4> out;
            UNROLL for (int k = 0; k < 4; k++) out.at[k] = sums[k / 2].at[0].tile[tile].in_half[k % 2].at[j];
            if (to < M)
                store_within(dphi + (own * M + to) * K + int64_t(i) * C + channel, out, C - channel);
        }
    }
}
