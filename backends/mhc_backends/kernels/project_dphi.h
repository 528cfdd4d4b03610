// project_dphi: phi's gradient, dphi = du^T x, in shares of the tokens, which sum_rows adds up.
//
// x[T, n, C], du[T, m] -> dphi[S, m, n C]. Group x sums share x of the tokens. A simdgroup takes 32
// channels of one stream and TILES * 8 columns at a time; the left factor is x transposed, of which
// a lane holds 4 channels of 2 tokens.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = du_shape[1];
const int64_t K = int64_t(N) * C;
const bool EXACT = sizeof(x[0]) == 2;

//// fast where C % BLOCK_CHANNELS == 0 && vectors<4>(x) && vectors<4>(dphi) ////
const int STEPS = 4;  // of 8 tokens, which are summed before they are added to what came before
const int lane = here.id % SIMD, channel = 4 * tile_row(lane);
const int unit = here.group_y * (here.threads / SIMD) + here.id / SIMD;
const int i = unit % N, c = unit / N * BLOCK_CHANNELS;
const int rest = C - c - channel;  // no channels are left to the simdgroups beyond the last unit
const int64_t share = (T + here.groups_x - 1) / here.groups_x;
const int64_t begin = here.group_x * share, end = begin + share < T ? begin + share : T;

for (int column = 0; column < M && c < C; column += TILES * TILE_COLUMNS) {
    Floats<4> sums[2 * TILES];
    UNROLL for (int t = 0; t < 2 * TILES; t++) sums[t] = zeros<4>();

    decltype(load_raw<4>(x)) ahead[2 * STEPS] = {}, raw[2 * STEPS];
    for (int64_t next = begin; next - STEPS * 8 < end; next += STEPS * 8) {
        // the next tokens are under way while these are multiplied
        UNROLL for (int k = 0; k < 2 * STEPS; k++) {
            raw[k] = ahead[k];
            const int64_t token = next + k / 2 * 8 + tile_pair(lane) + k % 2;
            const int64_t at = (token < end ? token : end - 1) * K + int64_t(i) * C + c + channel;
            if (next < end) ahead[k] = load_raw_within<4>(x + at, rest);
        }
        if (next == begin) continue;
        const int64_t first = next - STEPS * 8;

        Floats<4> products[2 * TILES];
        UNROLL for (int t = 0; t < 2 * TILES; t++) products[t] = zeros<4>();
        UNROLL for (int step = 0; step < STEPS; step++) {
            const Floats<4> one = floats(raw[2 * step]), other = floats(raw[2 * step + 1]);
            const Left upper = left<EXACT>(one.at[0], other.at[0], one.at[1], other.at[1]);
            const Left lower = left<EXACT>(one.at[2], other.at[2], one.at[3], other.at[3]);
            UNROLL for (int tile = 0; tile < TILES; tile++) {
                float b[2];
                UNROLL for (int e = 0; e < 2; e++) {
                    const int64_t token = first + step * 8 + right_row(lane, e);
                    const int at = column + tile * TILE_COLUMNS + right_column(lane, e);
                    b[e] = token < end && at < M ? du[token * M + at] : 0.0f;
                }
                const Right factor = right(b[0], b[1]);
                products[tile] = multiply<EXACT>(products[tile], upper, factor);
                products[TILES + tile] = multiply<EXACT>(products[TILES + tile], lower, factor);
            }
        }
        UNROLL for (int t = 0; t < 2 * TILES; t++) sums[t] = plus(sums[t], products[t]);
    }

    UNROLL for (int tile = 0; tile < TILES; tile++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int at = column + tile * TILE_COLUMNS + tile_pair(lane) + e;
            Floats<4> out;
            UNROLL for (int k = 0; k < 4; k++)
                out.at[k] = sums[k / 2 * TILES + tile].at[2 * (k % 2) + e];
            if (at < M)
                store_within(dphi + (int64_t(here.group_x) * M + at) * K + int64_t(i) * C + c +
                                 channel,
                             out, rest);
        }
    }
}
