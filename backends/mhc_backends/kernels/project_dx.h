// project_dx: the streams' gradient through the projection, dx = du . phi - pull x; WITH_H adds what
// h = sum_i w_i x_i brings, w_i dh, and WITH_G another gradient of the streams, g.
//
// x[T, n, C], phi[m, n C], du[T, m], pull[T, 1], w[T or 1, n], dh[T, C], g[T, n, C] -> dx[T, n, C]. A
// simdgroup takes 32 channels of one stream, of which it keeps phi where m <= 32, and tiles of 16
// tokens; its neighbours take the same channels of the other streams, which share dh.

const int64_t T = x_shape[0];
const int C = x_shape[2];
const int64_t K = int64_t(N) * C;

//// fast where C % BLOCK_CHANNELS == 0 && vectors<8>(x) && vectors<8>(dx) &&
// (!WITH_H || vectors<8>(dh)) && (!WITH_G || vectors<8>(g)) ////
const int M = COLUMNS, DEPTHS = (M + TILE_COLUMNS - 1) / TILE_COLUMNS;
const bool KEPT = DEPTHS <= 4;
const int lane = here.id % SIMD, channel = 4 * tile_pair(lane);
const int unit = here.group_y * (here.threads / SIMD) + here.id / SIMD;
const int i = unit % N, c = unit / N * BLOCK_CHANNELS;
const int rest = C - c - channel;  // no channels are left to the simdgroups beyond the last unit

// phi's numbers in the right factor of 8 columns of phi and 4 times 8 channels
RightFactors<KEPT ? DEPTHS : 1> kept;
UNROLL for (int depth = 0; depth < (KEPT ? DEPTHS : 0); depth++)
    kept.at[depth] = across(phi + i * int64_t(C) + c, K, C - c, depth * TILE_COLUMNS, M, lane);

for (int64_t tile = here.group_x; tile * TILE_TOKENS < T && c < C; tile += here.groups_x) {
    Floats<4> products[4];
    UNROLL for (int t = 0; t < 4; t++) products[t] = zeros<4>();
    const int64_t first = tile * TILE_TOKENS + tile_row(lane);
    const int64_t tokens[2] = {first < T ? first : T - 1, first + 8 < T ? first + 8 : T - 1};

    // all that the tile needs is under way before anything is waited for
    decltype(load_raw<8>(x)) xs[2];
    decltype(load_raw<8>(dh)) layers[2];
    decltype(load_raw<8>(g)) gs[2];
    UNROLL for (int r = 0; r < 2; r++) {
        const int64_t at = tokens[r] * K + int64_t(i) * C + c + channel;
        xs[r] = load_raw_within<8>(x + at, rest);
        if (WITH_H) layers[r] = load_raw_within<8>(dh + tokens[r] * C + c + channel, rest);
        if (WITH_G) gs[r] = load_raw_within<8>(g + at, rest);
    }

    UNROLL_FEW(DEPTHS) for (int depth = 0; depth < DEPTHS; depth++) {
        const int column = depth * TILE_COLUMNS + tile_pair(lane);
        float given[4];  // du's columns and the next, of the upper and the lower token
        UNROLL for (int k = 0; k < 4; k++)
            given[k] = column + k % 2 < M ? du[tokens[k / 2] * M + column + k % 2] : 0.0f;
        const Left a = left<false>(given[0], given[1], given[2], given[3]);
        const RightFactor b = KEPT ? kept.at[KEPT ? depth : 0]
                                   : across(phi + i * int64_t(C) + c, K, C - c,
                                            depth * TILE_COLUMNS, M, lane);
        UNROLL for (int t = 0; t < 4; t++)  // long sums in pieces: tensor cores do not round them
            products[t] = KEPT ? multiply<false>(products[t], a, b.at[t])
                               : plus(products[t], multiply<false>(zeros<4>(), a, b.at[t]));
    }

    UNROLL for (int r = 0; r < 2; r++) {
        const int64_t token = tokens[r], at = token * K + int64_t(i) * C + c + channel;
        Floats<8> sum;
        UNROLL for (int k = 0; k < 8; k++) sum.at[k] = products[k / 2].at[2 * r + k % 2];
        sum = add(sum, -pull[token], floats(xs[r]));
        if (WITH_H)
            sum = add(sum, float(w[row(w_shape[0], token) * N + i]),
                      floats(layers[r]));
        if (WITH_G) sum = plus(sum, floats(gs[r]));
        if (first + 8 * r < T) store_within(dx + at, sum, rest);
    }
}
