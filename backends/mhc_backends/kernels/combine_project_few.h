// combine_project_few: what `combine_project` gives, to the bit, where tokens are few.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n], phi[m, n C] -> out[T, n, C],
// parts[T, P, m + 1]. Threadgroups and simdgroups share the work as in project_few.h.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
threadgroup float numbers[LEAF_NUMBERS];

//// combine_project_few<N, TILES, BLOCKS>(x, y, h_post, h_post_shape, h_res, h_res_shape, phi, out,
// parts, numbers, T, C, M, K): aligned where C % BLOCK_CHANNELS == 0 && vectors<8>(x) &&
// vectors<8>(y) && vectors<8>(out) && vectors<4>(phi) && vectors<N>(h_res) ////
typedef decltype(load_raw<8>(x)) Row;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
const int simdgroups = here.threads / SIMD;
const int P = (C + PART_CHANNELS - 1) / PART_CHANNELS;
const int NUMBERS = TILE_TOKENS * Width<TILES>::NUMBERS;  // of a leaf
const auto totals = &numbers[0], leaves = &numbers[NUMBERS];

for (int64_t item = here.group_x; item < (T + TILE_TOKENS - 1) / TILE_TOKENS * P;
     item += here.groups_x) {
    const int part = int(item % P), begin = part * PART_CHANNELS;
    const int end = begin + PART_CHANNELS < C ? begin + PART_CHANNELS : C;
    const int count = (end - begin + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS * N / BLOCKS;
    const int64_t first = item / P * TILE_TOKENS;
    const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        for (int done = 0; done < count; done += simdgroups) {
            if (done + simdgroup < count) {
                const int block = (done + simdgroup) * BLOCKS;
                const int c = begin + block_channel<N, 1>(block);
                const int rest = C - c - channel;
                const auto right = load_factors<N, 1, TILES, BLOCKS>(Row(), phi, K, M, C, column,
                                                                     begin, block, lane);
                Rows<Row, BLOCKS, 1> rows;
                UNROLL for (int k = 0; k < 2 * BLOCKS; k++) {
                    const int own = tile_row(lane) + k % 2 * 8;
                    const int i = block_stream<N, 1>(block + k / 2);
                    const int64_t token = own < tokens ? first + own : T - 1;
                    const float post = float(h_post[row(h_post_shape[0], token) * N + i]);
                    const auto res =
                        hold<N, (N <= 4)>(h_res + (row(h_res_shape[0], token) * N + i) * N);
                    const auto from = x + token * K + c + channel;
                    const Floats<8> layer =
                        floats(load_raw_within<8>(y + token * C + c + channel, rest));
                    const Floats<8> sum = mix_streams<N, false>(times(post, layer), res, 0,
                                                        RawStreams<1, Row>(), from, C, rest);
                    const Row mixed = packed(out, sum);
                    const auto to = out + token * K + int64_t(i) * C + c + channel;
                    if (column == 0 && own < tokens) store_raw_within(to, mixed, rest);
                    rows.at[k / 2][0].in_half[k % 2] = mixed;
                }
                const auto leaf = leaves + simdgroup * NUMBERS;
                TOGETHER;
                put_sums(leaf, add_leaf(no_sums<TILES, 1>(), rows, right), tokens, lane);
            }
            BARRIER;
            const int made = count - done < simdgroups ? count - done : simdgroups;
            add_leaves<TILES>(totals, leaves, made, tokens, done == 0, here);
            BARRIER;  // the leaves, and with the last ones the totals, are whole
        }
        store_totals<TILES>(totals, parts + (first * P + part) * (M + 1), int64_t(P) * (M + 1),
                            column, M, tokens, here);
    }
}
