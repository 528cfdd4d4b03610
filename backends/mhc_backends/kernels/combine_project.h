// combine_project: combine, x'_i = sum_j H_res[i, j] x_j + h_post_i y (eq. 3), and of its result, as
// rounded to the streams' type, what `project` gives.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n], phi[m, n C] -> out[T, n, C],
// parts[T, P, m + 1]. A threadgroup takes a part and 16 tokens for each simdgroup. They share phi as
// in project.h. A leaf is a block of each of BLOCKS streams; while one block of all streams is mixed
// and multiplied, the next AHEAD are on their way.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
const bool KEPT = N <= 4;            // the streams are in registers; others are read again
const int MADE = KEPT ? N : BLOCKS;  // streams at a time
threadgroup LAUNCHED uint4 factors[LAUNCH_SIZE(STAGE * RIGHT_QUADS(TILES) * SIMD + SLOTS)];

//// combine_project<N, TILES, BLOCKS, STAGE, AHEAD, bool KEPT, MADE>(x, y, h_post, h_post_shape,
// h_res, h_res_shape, phi, out, parts, factors, T, C, M, K): aligned where C % BLOCK_CHANNELS == 0
// && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) && vectors<4>(phi) && vectors<N>(h_post) &&
// vectors<N * N>(h_res) ////
typedef decltype(load_raw<8>(x)) Row;
const bool ALIGNED = Address<decltype(x)>::ALIGNED;
const int FACTOR = decltype(factor_for(Row(), RightTiles<TILES>()))::QUADS * SIMD;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
const Work work = work_of(C, here.threads / SIMD * TILE_TOKENS, here);
const int begin = work.begin_channel, end = work.end_channel;
const bool once = STAGE == N * PART_BLOCKS && M <= TILES * TILE_COLUMNS;  // phi is put there
const int SLOT = 2 * (MADE + 1) * RowQuads<Row>::COUNT * SIMD;
const auto slot = &factors[STAGE * FACTOR + simdgroup * AHEAD * SLOT];

for (int64_t turn = work.begin; turn < T; turn += work.step) {
    const int64_t first = turn + simdgroup * TILE_TOKENS, next = first + work.step;
    const auto from = starts_of<1>(x + channel, first, T, K, lane);
    const auto layer = starts_of<1>(y + channel, first, T, C, lane);
    const auto to = starts_of<1>(out + channel, first, T, K, lane);
    decltype(hold<N, KEPT>(h_post)) post[2];
    decltype(hold<N * N, KEPT>(h_res)) res[2];
    bool stores[2];
    UNROLL for (int r = 0; r < 2; r++) {
        const int64_t token = first + 8 * r + tile_row(lane);
        const int64_t own = token < T ? token : T - 1;
        post[r] = hold<N, KEPT>(h_post + row(h_post_shape[0], own) * N);
        res[r] = hold<N * N, KEPT>(h_res + row(h_res_shape[0], own) * N * N);
        stores[r] = token < T;
    }

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        auto sums = no_sums<TILES, 1>();
        if (ALIGNED && AHEAD && (!once || turn == work.begin))
            start_unmixed<MADE>(Row(), slot, from, layer, C, begin, lane);
        for (int c = begin; c < end; c += BLOCK_CHANNELS) {
            const int rest = C - c - channel;
            Unmixed<KEPT ? N : 1, Row> given;
            if (!(ALIGNED && AHEAD)) given = load_unmixed<KEPT ? N : 1>(from, layer, C, c, rest);

            for (int i = 0; i < N; i += MADE) {
                const int block = (c - begin) / BLOCK_CHANNELS * N + i, place = block % STAGE;
                if (place == 0 && (!once || turn == work.begin))
                    put_phi<N, 1, TILES, 1>(&factors[0], Row(), phi, K, M, C, column, begin, block,
                                            STAGE, here);
                if (ALIGNED && AHEAD) {
                    end_copies<0>();
                    SIMD_BARRIER;
                    given = take_unmixed<KEPT ? N : 1>(Row(), slot, lane);
                    SIMD_BARRIER;
                    if (c + BLOCK_CHANNELS < end)
                        start_unmixed<MADE>(Row(), slot, from, layer, C, c + BLOCK_CHANNELS, lane);
                    else if (once && next < T)
                        start_unmixed<MADE>(
                            Row(), slot, starts_of<1>(x + channel, next, T, K, lane),
                            starts_of<1>(y + channel, next, T, C, lane), C, begin, lane);
                }
                Rows<Row, MADE, 1> mixed;
                UNROLL for (int k = 0; k < 2 * MADE; k++) {
                    const int r = k / MADE, stream = k % MADE;
                    const Floats<8> sum =
                        mix_streams<N, KEPT>(times(value(post[r], i + stream), floats(given.layer[r])),
                                     res[r], (i + stream) * N, given.streams[r], from.at[0][r] + c,
                                     C, rest);
                    mixed.at[stream][0].in_half[r] = packed(out, sum);
                    if (column == 0 && stores[r])
                        store_raw_within(to.at[0][r] + int64_t(i + stream) * C + c,
                                         mixed.at[stream][0].in_half[r], rest);
                }
                UNROLL for (int leaf = 0; leaf < MADE; leaf += BLOCKS) {
                    Rows<Row, BLOCKS, 1> rows;
                    UNROLL for (int b = 0; b < BLOCKS; b++) rows.at[b][0] = mixed.at[leaf + b][0];
                    const auto at_leaf = &factors[(place + leaf) * FACTOR];
                    TOGETHER;
                    sums = add_leaf(sums, rows, shared_factors<TILES>(Row(), at_leaf, lane));
                }
            }
        }
        store_sums(parts, first, T, work.parts, work.part, sums, column, M, lane);
    }
}
