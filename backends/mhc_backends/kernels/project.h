// project: what the mappings need of the streams, x . phi and x . x over all n C (eqs. 14-15), in
// parts that common_mappings.h adds up.
//
// x[T, n, C], phi[m, n C] -> parts[T, P, m + 1], the last column for the squares. A threadgroup takes
// a part and HEIGHT tiles of 16 tokens for each simdgroup. They share phi, in threadgroup memory; while
// a stretch of one stream is multiplied, the next one and its phi are on their way.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
const int SLOTS = AT_ONCE * TILES, FACTORS = SLOTS * RIGHT_QUADS * SIMD;  // of a stretch
threadgroup uint4 factors[2 * FACTORS];

//// fast where C % BLOCK_CHANNELS == 0 && vectors<8>(x) && vectors<4>(phi) ////
typedef decltype(load_raw<8>(x)) Row;
typedef decltype(factor_for(Row(), RightNumbers())) Factor;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
const int P = (C + PART_CHANNELS - 1) / PART_CHANNELS, STRETCH = AT_ONCE * BLOCK_CHANNELS;
const int tokens = here.threads / SIMD * HEIGHT * TILE_TOKENS;  // of a threadgroup
int side = 0;                                                   // of `factors`

for (int64_t item = here.group_x; item < (T + tokens - 1) / tokens * P; item += here.groups_x) {
    const int part = int(item % P), begin = part * PART_CHANNELS;
    const int end = begin + PART_CHANNELS < C ? begin + PART_CHANNELS : C;
    const int steps = (end - begin + STRETCH - 1) / STRETCH * N;
    const int64_t first = item / P * tokens + simdgroup * HEIGHT * TILE_TOKENS;
    const auto starts = starts_of<HEIGHT>(first, T, K, begin + channel, lane);

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        const int own_leaf = simdgroup / TILES;  // of a stretch, whose phi this simdgroup loads
        const int own_column = column + simdgroup % TILES * TILE_COLUMNS;
        Sums<TILES> sums[HEIGHT];
        UNROLL for (int tile = 0; tile < HEIGHT; tile++) sums[tile] = no_sums<TILES>();
        RightNumbers ahead = {};
        if (simdgroup < SLOTS)
            ahead = load_leaf_phi<N, AT_ONCE>(phi, K, M, C, own_column, begin, own_leaf, lane);
        auto next = load_stretch<AT_ONCE>(x, starts, 0, C - begin - channel);
        for (int step = 0; step < steps; step++) {
            // This side was last read before the last barrier.
            const auto shared = &factors[side * FACTORS];
            side = 1 - side;
            put_phi<N, AT_ONCE, AT_ONCE, TILES>(shared, Row(), ahead, phi, K, M, C, column, begin,
                                                step * AT_ONCE, here);
            BARRIER;
            const auto stretch = next;
            if (step + 1 < steps) {
                const int c = (step + 1) / N * STRETCH;
                next = load_stretch<AT_ONCE>(x, starts, (step + 1) % N * int64_t(C) + c,
                                             C - begin - c - channel);
                if (simdgroup < SLOTS)
                    ahead = load_leaf_phi<N, AT_ONCE>(phi, K, M, C, own_column, begin,
                                                      (step + 1) * AT_ONCE + own_leaf, lane);
            }

            TOGETHER;
            UNROLL for (int b = 0; b < AT_ONCE; b++) {
                UNROLL for (int tile = 0; tile < HEIGHT; tile++)
                    sums[tile].squares = plus(sums[tile].squares, leaf_squares(stretch.rows[b][tile]));
                UNROLL for (int k = 0; k < TILES; k++) {
                    const Factor factor =
                        take<Factor>(shared + (b * TILES + k) * RIGHT_QUADS * SIMD, lane);
                    UNROLL for (int tile = 0; tile < HEIGHT; tile++)
                        sums[tile].products[k] =
                            plus(sums[tile].products[k], leaf_products(stretch.rows[b][tile], factor));
                }
            }
        }
        UNROLL for (int tile = 0; tile < HEIGHT; tile++)
            store_sums(parts, first + tile * TILE_TOKENS, T, P, part, sums[tile], column, M, lane);
    }
}
