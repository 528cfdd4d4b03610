// combine_project: combine, x'_i = sum_j H_res[i, j] x_j + h_post_i y (eq. 3), and of its result, as
// rounded to the streams' type, what `project` gives.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n], phi[m, n C] -> out[T, n, C],
// parts[T, P, m + 1]. A threadgroup takes a part and 16 tokens for each simdgroup. They share phi, in
// threadgroup memory: that for 32 channels of GROUP streams at a time.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
const bool KEPT = N <= 4;  // the streams are in registers; others are read again
const int GROUP = KEPT ? N : 1, FACTOR = RIGHT_QUADS * SIMD;
threadgroup uint4 factors[GROUP * TILES * FACTOR];

//// fast where C % BLOCK_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
// vectors<4>(phi) && vectors<N>(h_res) ////
typedef decltype(load_raw<8>(x)) Row;
typedef decltype(factor_for(Row(), RightNumbers())) Factor;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
const int P = (C + PART_CHANNELS - 1) / PART_CHANNELS;
const int tokens = here.threads / SIMD * TILE_TOKENS;  // of a threadgroup

for (int64_t item = here.group_x; item < (T + tokens - 1) / tokens * P; item += here.groups_x) {
    const int part = int(item % P), begin = part * PART_CHANNELS;
    const int end = begin + PART_CHANNELS < C ? begin + PART_CHANNELS : C;
    const int64_t first = item / P * tokens + simdgroup * TILE_TOKENS;
    int64_t own[2];  // this lane's tokens
    bool stores[2];
    UNROLL for (int r = 0; r < 2; r++) {
        const int64_t token = first + 8 * r + tile_row(lane);
        stores[r] = token < T;
        own[r] = token < T ? token : T - 1;
    }

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        const int own_leaf = simdgroup / TILES;  // of a group, whose phi this simdgroup loads
        const int own_column = column + simdgroup % TILES * TILE_COLUMNS;
        Sums<TILES> sums = no_sums<TILES>();
        for (int c = begin; c < end; c += BLOCK_CHANNELS) {
            const int rest = C - c - channel;
            RawStreams<KEPT ? N : 1, Row> streams[2];
            Row layer[2];
            UNROLL for (int r = 0; r < 2; r++) {
                streams[r] = load_streams_within<KEPT ? N : 1>(x + own[r] * K + c + channel, C, rest);
                layer[r] = load_raw_within<8>(y + own[r] * C + c + channel, rest);
            }

            for (int group = 0; group < N; group += GROUP) {
                const int leaf = (c - begin) / BLOCK_CHANNELS * N + group;
                RightNumbers numbers = {};
                if (simdgroup < GROUP * TILES)
                    numbers = load_leaf_phi<N, 1>(phi, K, M, C, own_column, begin, leaf + own_leaf,
                                                  lane);
                BARRIER;  // the phi before has been read
                put_phi<N, 1, GROUP, TILES>(&factors[0], Row(), numbers, phi, K, M, C, column, begin,
                                            leaf, here);
                BARRIER;

                UNROLL for (int g = 0; g < GROUP; g++) {
                    const int i = group + g;
                    Row mixed[2];
                    UNROLL for (int r = 0; r < 2; r++) {
                        const float post = float(h_post[row(h_post_shape[0], own[r]) * N + i]);
                        const auto res =
                            hold<N, KEPT>(h_res + (row(h_res_shape[0], own[r]) * N + i) * N);
                        mixed[r] = packed(out, mix<N, KEPT>(times(post, floats(layer[r])), res,
                                                            streams[r], x + own[r] * K + c + channel,
                                                            C, rest));
                        if (column == 0 && stores[r])
                            store_raw_within(out + own[r] * K + int64_t(i) * C + c + channel,
                                             mixed[r], rest);
                    }
                    const Rows<Row> rows = {mixed[0], mixed[1]};
                    TOGETHER;
                    sums.squares = plus(sums.squares, leaf_squares(rows));
                    UNROLL for (int k = 0; k < TILES; k++) {
                        const Factor factor =
                            take<Factor>(&factors[(g * TILES + k) * FACTOR], lane);
                        sums.products[k] = plus(sums.products[k], leaf_products(rows, factor));
                    }
                }
            }
        }
        store_sums(parts, first, T, P, part, sums, column, M, lane);
    }
}
