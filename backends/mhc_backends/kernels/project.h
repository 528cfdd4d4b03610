// project: what the mappings need of the streams, x . phi and x . x over all n C (eqs. 14-15), in
// parts that common_mappings.h adds up.
//
// x[T, n, C], phi[m, n C] -> parts[T, P, m + 1], the last column for the squares. A threadgroup takes
// a part and HEIGHT tiles of 16 tokens for each simdgroup, which share phi: a stretch of one stream
// goes into threadgroup memory while the one before is multiplied.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
const int FACTORS = AT_ONCE * TILES * RIGHT_QUADS * SIMD;  // of a stretch
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
    const int64_t first = item / P * tokens + simdgroup * HEIGHT * TILE_TOKENS + tile_row(lane);

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        Sums<TILES> sums[HEIGHT];
        UNROLL for (int tile = 0; tile < HEIGHT; tile++) sums[tile] = no_sums<TILES>();
        RightNumbers ahead = load_phi_of<N, AT_ONCE, TILES>(phi, K, M, C, column, begin, 0,
                                                            simdgroup, lane);
        for (int step = 0; step < steps; step++) {
            const int c = begin + step / N * STRETCH;
            Rows<Row> rows[AT_ONCE][HEIGHT];
            UNROLL for (int tile = 0; tile < HEIGHT; tile++) {
                const int64_t upper = first + tile * TILE_TOKENS, lower = upper + 8;
                const int64_t at = step % N * int64_t(C) + c + channel;
                const auto above = x + (upper < T ? upper : T - 1) * K + at;
                const auto below = x + (lower < T ? lower : T - 1) * K + at;
                UNROLL for (int b = 0; b < AT_ONCE; b++)
                    rows[b][tile] =
                        load_rows(above + b * BLOCK_CHANNELS, below + b * BLOCK_CHANNELS,
                                  C - c - b * BLOCK_CHANNELS - channel);
            }

            // This side was last read before the last barrier.
            const auto shared = &factors[side * FACTORS];
            side = 1 - side;
            put_phi<N, AT_ONCE, TILES>(shared, Row(), ahead, phi, K, M, C, column, begin, step,
                                       here);
            BARRIER;
            if (step + 1 < steps)
                ahead = load_phi_of<N, AT_ONCE, TILES>(phi, K, M, C, column, begin, step + 1,
                                                       simdgroup, lane);

            UNROLL for (int b = 0; b < AT_ONCE; b++) {
                UNROLL for (int tile = 0; tile < HEIGHT; tile++)
                    sums[tile].squares = plus(sums[tile].squares, leaf_squares(rows[b][tile]));
                UNROLL for (int k = 0; k < TILES; k++) {
                    const Factor factor =
                        take<Factor>(shared + (b * TILES + k) * RIGHT_QUADS * SIMD, lane);
                    UNROLL for (int tile = 0; tile < HEIGHT; tile++)
                        sums[tile].products[k] =
                            plus(sums[tile].products[k], leaf_products(rows[b][tile], factor));
                }
            }
        }
        UNROLL for (int tile = 0; tile < HEIGHT; tile++) {
            const int64_t upper = first + tile * TILE_TOKENS, lower = upper + 8;
            store_sums(parts + (upper * P + part) * (M + 1), parts + (lower * P + part) * (M + 1),
                       upper < T, lower < T, sums[tile], column, M, lane);
        }
    }
}
