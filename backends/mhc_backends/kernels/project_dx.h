// project_dx: the streams' gradient through the projection, dx = du . phi - pull x; WITH_H adds what
// h = sum_i w_i x_i brings, w_i dh, and WITH_G another gradient of the streams, g.
//
// pull comes in units of pull_unit(). x[T, n, C], phi[m, n C], du[T, m], pull[T, 1], w[T or 1, n], dh[T, C], g[T, n, C] -> dx[T, n, C].
// Threadgroups share the tokens and the strips, of 64 channels of all streams where n = 4; a
// simdgroup takes 32 channels of one stream. Where m <= 32, it keeps phi, and du goes through
// threadgroup memory.

const int64_t T = x_shape[0];
const int C = x_shape[2];
const int64_t K = int64_t(N) * C;
const int M = COLUMNS, DEPTHS = (M + DEPTH - 1) / DEPTH, STAGE = 4;  // tiles of tokens at a time
const bool KEPT = DEPTHS <= 4;
threadgroup uint4 factors[KEPT ? STAGE * DEPTHS * LEFT_QUADS * SIMD : 1];

//// project_dx<N, bool WITH_H, bool WITH_G, M, DEPTHS, STAGE, bool KEPT>(x, phi, du, pull, w,
// w_shape, dh, g, dx, factors, T, C, K): aligned where C % BLOCK_CHANNELS == 0 && vectors<8>(x) &&
// vectors<4>(phi) && vectors<8>(dx) && (!WITH_H || vectors<8>(dh)) && (!WITH_G || vectors<8>(g)) ////
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, simdgroups = here.threads / SIMD;
const int channel = 4 * tile_pair(lane), FACTOR = LEFT_QUADS * SIMD;
const int strips = strip_count<N>(C, simdgroups);
const int unit = int(here.group_x % strips) * simdgroups + simdgroup;
const int i = strip_stream<N>(unit), c = strip_channel<N>(unit);  // from C on there is nothing
const int rest = C - c - channel;
const int64_t at = int64_t(i) * C + c;
const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;
const int64_t turn = here.groups_x / strips * STAGE;  // all shares, side by side

AcrossFactors<KEPT ? DEPTHS : 1> kept;
UNROLL for (int depth = 0; depth < (KEPT ? DEPTHS : 0); depth++)
    kept.at[depth] = across(phi, K, M, depth * DEPTH, at, C - c, lane);

for (int64_t stage = here.group_x / strips * STAGE; stage < tiles; stage += turn) {
    if (KEPT) {
        BARRIER;  // the stage before is done
        for (int slot = simdgroup; slot < STAGE * DEPTHS; slot += simdgroups) {
            const int64_t upper = (stage + slot / DEPTHS) * TILE_TOKENS + tile_row(lane);
            const Left a = load_left(du, M, slot % DEPTHS * DEPTH, upper, T, lane);
            UNROLL for (int k = 0; k < LEFT_QUADS; k++)
                factors[slot * FACTOR + k * SIMD + lane] = a.four[k];
        }
        BARRIER;
    }
    for (int64_t tile = stage; tile < stage + STAGE && tile < tiles && c < C; tile++) {
        const int64_t first = tile * TILE_TOKENS + tile_row(lane);
        const int64_t tokens[2] = {first < T ? first : T - 1, first + 8 < T ? first + 8 : T - 1};

        // all that the tile needs is under way before anything is waited for
        decltype(load_raw<8>(x)) xs[2];
        decltype(load_raw<8>(dh)) layers[2];
        decltype(load_raw<8>(g)) gs[2];
        float pulls[2], weights[2];
        UNROLL for (int r = 0; r < 2; r++) {
            const int64_t from = tokens[r] * K + at + channel;
            xs[r] = load_raw_within<8>(x + from, rest);
            if (WITH_H) layers[r] = load_raw_within<8>(dh + tokens[r] * C + c + channel, rest);
            if (WITH_G) gs[r] = load_raw_within<8>(g + from, rest);
            pulls[r] = pull[tokens[r]];
            if (WITH_H) weights[r] = float(w[row(w_shape[0], tokens[r]) * N + i]);
        }

        Floats<4> products[4];
        UNROLL for (int t = 0; t < 4; t++) products[t] = zeros<4>();
        UNROLL_FEW(DEPTHS) for (int depth = 0; depth < DEPTHS; depth++) {
            if (KEPT) {
                const auto shared = &factors[int(tile - stage) * DEPTHS * FACTOR + depth * FACTOR];
                Left a;
                UNROLL for (int k = 0; k < LEFT_QUADS; k++) a.four[k] = shared[k * SIMD + lane];
                TOGETHER;
                UNROLL for (int t = 0; t < 4; t++)
                    products[t] = multiply(products[t], a, kept.at[KEPT ? depth : 0].at[t]);
            } else {  // long sums in pieces: tensor cores do not round what they add
                const int column = depth * DEPTH;
                const Left a = load_left(du, M, column, first, T, lane);
                const AcrossFactor b = across(phi, K, M, column, at, C - c, lane);
                TOGETHER;
                UNROLL for (int t = 0; t < 4; t++)
                    products[t] = plus(products[t], multiply(zeros<4>(), a, b.at[t]));
            }
        }

        UNROLL for (int r = 0; r < 2; r++) {
            Floats<8> sum;
            UNROLL for (int k = 0; k < 8; k++) sum.at[k] = products[k % 4].at[2 * r + k / 4];
            sum = add(sum, -pulls[r], times(pull_unit(), floats(xs[r])));
            if (WITH_H) sum = add(sum, weights[r], floats(layers[r]));
            if (WITH_G) sum = plus(sum, floats(gs[r]));
            const auto to = dx + tokens[r] * K + at + channel;
            if (first + 8 * r < T) store_raw_within(to, packed(dx, sum), rest);
        }
    }
}
