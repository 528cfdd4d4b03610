// project: what the mappings need of the streams, x . phi and x . x over all n C (eqs. 14-15), in
// parts that common_mappings.h adds up.
//
// x[T, n, C], phi[m, n C] -> parts[T, P, m + 1], the last column for the squares. Group y takes part
// y, BLOCKS blocks of channels in all streams; each simdgroup takes tiles of 16 tokens. Which
// simdgroup does what changes no sum: a block is always summed alone, and then the next one added.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
const bool EXACT = sizeof(x[0]) == 2;
const int KEPT = N <= 4 ? N : 1;  // streams that a lane has at a time
const bool AHEAD = EXACT && N <= 4;  // a block is loaded while the one before is multiplied

//// fast where C % BLOCK_CHANNELS == 0 && vectors<8>(x) && vectors<4>(phi) ////
const int lane = here.id % SIMD, channel = 4 * tile_pair(lane);
const int simdgroups = here.threads / SIMD;
const int begin = here.group_y * (BLOCKS * BLOCK_CHANNELS);
const int end = begin + BLOCKS * BLOCK_CHANNELS < C ? begin + BLOCKS * BLOCK_CHANNELS : C;

for (int64_t tile = int64_t(here.group_x) * simdgroups + here.id / SIMD; tile * TILE_TOKENS < T;
     tile += int64_t(here.groups_x) * simdgroups) {
    const int64_t upper = tile * TILE_TOKENS + tile_row(lane), lower = upper + 8;
    // rows that are no token's are not stored
    const auto upper_row = x + (upper < T ? upper : T - 1) * K + channel;
    const auto lower_row = x + (lower < T ? lower : T - 1) * K + channel;

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        Sums<TILES> sums = no_sums<TILES>();
        auto ahead = load_rows<KEPT>(upper_row + begin, lower_row + begin, C, C - begin - channel);
        for (int c = begin; c < end; c += BLOCK_CHANNELS) {
            const int next = c + BLOCK_CHANNELS;
            if (!AHEAD) ahead = load_rows<KEPT>(upper_row + c, lower_row + c, C, C - c - channel);
            const auto streams = ahead;
            if (AHEAD)
                ahead = load_rows<KEPT>(upper_row + next, lower_row + next, C,
                                        next < end ? C - next - channel : 0);

            Sums<TILES> block = no_sums<TILES>();
            UNROLL_SMALL for (int j = 0; j < N; j++) {
                const int64_t at = int64_t(j) * C + c;
                Rows stream =
                    rows(streams.upper[N == KEPT ? j : 0], streams.lower[N == KEPT ? j : 0]);
                if (N > KEPT) {
                    const auto other =
                        load_rows<1>(upper_row + at, lower_row + at, C, C - c - channel);
                    stream = rows(other.upper[0], other.lower[0]);
                }
                block = project<EXACT>(block, stream, phi + column * K + at, K, C - c, M - column,
                                       lane);
            }
            sums = plus(sums, block);
        }
        const int64_t P = here.groups_y, part = here.group_y;
        store_sums(parts + (upper * P + part) * (M + 1), parts + (lower * P + part) * (M + 1),
                   upper < T, lower < T, sums, column, M, lane);
    }
}
