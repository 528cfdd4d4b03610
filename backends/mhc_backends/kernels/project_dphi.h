// project_dphi: phi's gradient, dphi = du^T x, in shares of the tokens, which sum_rows adds up.
//
// x[T, n, C], du[T, m] -> dphi[S, m, n C]. A threadgroup takes a share and a strip of the channels; a
// simdgroup takes 32 channels of one stream, and TILES tiles of columns at a time. The left factor is x
// transposed, of which a lane holds 4 channels of 8 tokens. The simdgroups share du, of which 64
// tokens go into threadgroup memory while those before are multiplied.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = du_shape[1];
const int64_t K = int64_t(N) * C;
const int FACTORS = AT_ONCE * TILES * RIGHT_QUADS * SIMD;  // of AT_ONCE times 32 tokens
threadgroup uint4 factors[2 * FACTORS];

//// fast where C % BLOCK_CHANNELS == 0 && vectors<4>(x) && vectors<4>(dphi) ////
typedef decltype(load_raw<8>(x)) Row;
typedef decltype(load_raw<4>(x)) Piece;
typedef decltype(factor_for(Row(), RightNumbers())) Factor;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
const int channel = 4 * tile_row(lane), SLOTS = AT_ONCE * TILES;
const int strips = strip_count<N>(C, simdgroups);
const int unit = int(here.group_x % strips) * simdgroups + simdgroup;
const int i = strip_stream<N>(unit), c = strip_channel<N>(unit);  // from C on there is nothing
const int rest = C - c - channel;
const int64_t at = int64_t(i) * C + c + channel;
const int64_t shares = here.groups_x / strips, own = here.group_x / strips;
const int64_t share = (T + shares - 1) / shares, begin = own * share;
const int64_t end = begin + share < T ? begin + share : T;
int side = 0;  // of `factors`

for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
    Product sums[2][TILES];  // of channels 0 and 1 of four, and of 2 and 3
    UNROLL for (int k = 0; k < 2 * TILES; k++) sums[k / TILES][k % TILES] = no_product();
    RightNumbers ahead = {};
    if (simdgroup < SLOTS)
        ahead = load_du(du, M, column + simdgroup % TILES * TILE_COLUMNS,
                        begin + simdgroup / TILES * SIMD, end, lane);

    for (int64_t first = begin; first < end; first += AT_ONCE * SIMD) {
        RawTokens<Piece> tokens[AT_ONCE];
        UNROLL for (int b = 0; b < AT_ONCE; b++) {
            UNROLL for (int k = 0; k < 8; k++) {
                const int64_t token = first + b * SIMD + 4 * tile_pair(lane) + k;
                tokens[b].at[k] =
                    load_raw_within<4>(x + (token < end ? token : end - 1) * K + at, rest);
            }
        }

        // This side was last read before the last barrier.
        const auto shared = &factors[side * FACTORS];
        side = 1 - side;
        for (int slot = simdgroup; slot < SLOTS; slot += simdgroups) {
            if (slot != simdgroup)
                ahead = load_du(du, M, column + slot % TILES * TILE_COLUMNS,
                                first + slot / TILES * SIMD, end, lane);
            put(shared + slot * RIGHT_QUADS * SIMD, factor_for(Row(), ahead), lane);
        }
        BARRIER;
        if (simdgroup < SLOTS)
            ahead = load_du(du, M, column + simdgroup % TILES * TILE_COLUMNS,
                            first + AT_ONCE * SIMD + simdgroup / TILES * SIMD, end, lane);

        TOGETHER;
        UNROLL for (int b = 0; b < AT_ONCE; b++) {
            Row rows[4];
            UNROLL for (int k = 0; k < 4; k++) rows[k] = transposed(tokens[b], k);
            UNROLL for (int k = 0; k < TILES; k++) {
                const Factor factor =
                    take<Factor>(shared + (b * TILES + k) * RIGHT_QUADS * SIMD, lane);
                UNROLL for (int s = 0; s < 2; s++)
                    sums[s][k] = plus(sums[s][k], multiply(rows[2 * s], rows[2 * s + 1], factor));
            }
        }
    }

    UNROLL for (int tile = 0; tile < TILES; tile++) {
        UNROLL for (int j = 0; j < PLACES; j++) {
            const int to = column + tile * TILE_COLUMNS + sum_column(lane, j);
            const int channel = c + 4 * sum_row(lane, j);
            Floats<4> out;
            UNROLL for (int k = 0; k < 4; k++) out.at[k] = sums[k / 2][tile].in_half[k % 2].at[j];
            if (to < M)
                store_within(dphi + (own * M + to) * K + int64_t(i) * C + channel, out, C - channel);
        }
    }
}
