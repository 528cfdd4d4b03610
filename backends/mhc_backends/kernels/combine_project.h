// combine_project: combine, x'_i = sum_j H_res[i, j] x_j + h_post_i y (eq. 3), and of its result, as
// rounded to the streams' type, what `project` gives, in the same order.
//
// x[T, n, C], y[T, C], h_post[T or 1, n], h_res[T or 1, n, n], phi[m, n C] -> out[T, n, C],
// parts[T, P, m + 1]. Groups and simdgroups share the work as in project.h.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
const bool EXACT = sizeof(x[0]) == 2;
const int KEPT = N <= 4 ? N : 1;  // streams that a lane holds; others are read again
const bool AHEAD = EXACT && N <= 4;  // a block is loaded while the one before is multiplied

//// fast where C % BLOCK_CHANNELS == 0 && vectors<8>(x) && vectors<8>(y) && vectors<8>(out) &&
// vectors<4>(phi) ////
const int lane = here.id % SIMD, channel = 4 * tile_pair(lane);
const int simdgroups = here.threads / SIMD;
const int begin = here.group_y * (BLOCKS * BLOCK_CHANNELS);
const int end = begin + BLOCKS * BLOCK_CHANNELS < C ? begin + BLOCKS * BLOCK_CHANNELS : C;

for (int64_t tile = int64_t(here.group_x) * simdgroups + here.id / SIMD; tile * TILE_TOKENS < T;
     tile += int64_t(here.groups_x) * simdgroups) {
    const int64_t upper = tile * TILE_TOKENS + tile_row(lane), lower = upper + 8;
    const int64_t tokens[2] = {upper < T ? upper : T - 1, lower < T ? lower : T - 1};
    const auto upper_row = x + tokens[0] * K + channel, lower_row = x + tokens[1] * K + channel;
    const auto upper_y = y + tokens[0] * C + channel, lower_y = y + tokens[1] * C + channel;
    const auto upper_post = h_post + row(h_post_shape[0], tokens[0]) * N;
    const auto lower_post = h_post + row(h_post_shape[0], tokens[1]) * N;
    const auto upper_res = h_res + row(h_res_shape[0], tokens[0]) * N * N;
    const auto lower_res = h_res + row(h_res_shape[0], tokens[1]) * N * N;

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        Sums<TILES> sums = no_sums<TILES>();
        const int rest = C - begin - channel;
        auto ahead = load_rows<KEPT>(upper_row + begin, lower_row + begin, C, rest);
        auto layer_ahead = load_rows<1>(upper_y + begin, lower_y + begin, C, rest);
        for (int c = begin; c < end; c += BLOCK_CHANNELS) {
            const int next = c + BLOCK_CHANNELS, left = next < end ? C - next - channel : 0;
            if (!AHEAD) {
                ahead = load_rows<KEPT>(upper_row + c, lower_row + c, C, C - c - channel);
                layer_ahead = load_rows<1>(upper_y + c, lower_y + c, C, C - c - channel);
            }
            const auto streams = ahead;
            const auto layer = layer_ahead;
            if (AHEAD) {
                ahead = load_rows<KEPT>(upper_row + next, lower_row + next, C, left);
                layer_ahead = load_rows<1>(upper_y + next, lower_y + next, C, left);
            }

            Sums<TILES> block = no_sums<TILES>();
            UNROLL_FEW(1) for (int i = 0; i < N; i++) {
                const Rows y_rows = rows(layer.upper[0], layer.lower[0]);
                Rows mixed;
                mixed.upper = times(float(upper_post[i]), y_rows.upper);
                mixed.lower = times(float(lower_post[i]), y_rows.lower);
                UNROLL_SMALL for (int j = 0; j < N; j++) {
                    Rows stream = rows(streams.upper[N == KEPT ? j : 0],
                                       streams.lower[N == KEPT ? j : 0]);
                    if (N > KEPT) {
                        const int64_t at = int64_t(j) * C + c;
                        const auto other =
                            load_rows<1>(upper_row + at, lower_row + at, C, C - c - channel);
                        stream = rows(other.upper[0], other.lower[0]);
                    }
                    mixed.upper = add(mixed.upper, float(upper_res[i * N + j]), stream.upper);
                    mixed.lower = add(mixed.lower, float(lower_res[i * N + j]), stream.lower);
                }
                mixed.upper = rounded(out, mixed.upper);
                mixed.lower = rounded(out, mixed.lower);
                const int64_t at = int64_t(i) * C + c;
                if (column == 0) {
                    const int64_t to = at + channel;
                    if (upper < T)
                        store_within(out + upper * K + to, mixed.upper, C - c - channel);
                    if (lower < T)
                        store_within(out + lower * K + to, mixed.lower, C - c - channel);
                }
                block = project<EXACT>(block, mixed, phi + column * K + at, K, C - c, M - column,
                                       lane);
            }
            sums = plus(sums, block);
        }
        const int64_t P = here.groups_y, part = here.group_y;
        store_sums(parts + (upper * P + part) * (M + 1), parts + (lower * P + part) * (M + 1),
                   upper < T, lower < T, sums, column, M, lane);
    }
}
