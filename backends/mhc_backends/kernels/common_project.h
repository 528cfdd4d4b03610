// The products with phi: what the kernels that make them share.
//
// Sums over n C go by one tree, whatever the batch or the launch. Its leaves are the sums over 32
// channels of one stream. A part, 256 channels of all streams, adds its leaves one by one: the
// channels are cut in stretches of AT_ONCE leaves, and a stretch's streams follow one another. The
// parts are added one by one by the kernels that end them (common_mappings.h).

enum {
    TILE_TOKENS = 16,     // that a simdgroup multiplies at a time, with TILE_COLUMNS of phi
    BLOCK_CHANNELS = 32,  // of a leaf
    PART_CHANNELS = 256
};

// ---- rows that end anywhere --------------------------------------------------------------------

// The first `rest` numbers from p on, and zeros. Where all is aligned, there are whole blocks alone.
template <int W, typename P>
FUNCTION Floats<W> load_within(P p, int rest) {
    Floats<W> out = zeros<W>();
    if (rest >= W || (ALIGNED && rest > 0)) {
        out = load<W>(p);
    } else if (!ALIGNED) {
        UNROLL for (int k = 0; k < W; k++)
            if (k < rest) out.at[k] = float(p[k]);
    }
    return out;
}

template <int W, typename P>
FUNCTION auto load_raw_within(P p, int rest) {
    decltype(load_raw<W>(p)) out = {};
    if (rest >= W || (ALIGNED && rest > 0)) {
        out = load_raw<W>(p);
    } else if (!ALIGNED) {
        UNROLL for (int k = 0; k < W; k++)
            if (k < rest) out.word[k / out.PER_WORD] |= bits(p[k]) << (k % out.PER_WORD * 16);
    }
    return out;
}

template <int W, typename P>
FUNCTION void store_within(P p, Floats<W> v, int rest) {
    if (rest >= W || (ALIGNED && rest > 0)) {
        store(p, v);
    } else if (!ALIGNED) {
        UNROLL for (int k = 0; k < W; k++) {
            Floats<1> one;
            one.at[0] = v.at[k];
            if (k < rest) store(p + k, one);
        }
    }
}

// ---- factors in threadgroup memory ---------------------------------------------------------------

// The quads of a factor, a lane's beside the next one's, so that no two lanes meet in a bank.
template <typename F, typename S>
FUNCTION void put(S shared, F factor, int lane) {
    UNROLL for (int k = 0; k < F::QUADS; k++) shared[k * SIMD + lane] = factor.quad[k];
}
template <typename F, typename S>
FUNCTION F take(S shared, int lane) {
    F factor;
    UNROLL for (int k = 0; k < F::QUADS; k++) factor.quad[k] = shared[k * SIMD + lane];
    return factor;
}

// Of TILE_COLUMNS columns of phi[M, K] from `column` on and 32 channels from `at` on, `rest` of them in
// a row; columns beyond phi are not stored, so they may be any.
template <typename P>
FUNCTION RightNumbers load_phi(P phi, int64_t K, int M, int column, int64_t at, int rest,
                               int lane) {
    RightNumbers out;
    UNROLL for (int e = 0; e < RUNS; e++) {
        const int row = column + right_column(lane, e), channel = 4 * right_row(lane, e);
        out.run[e] =
            load_within<4>(phi + (row < M ? row : M - 1) * K + at + channel, rest - channel);
    }
    return out;
}
// The factor of rows like one that is given, which only names their type.
template <typename T>
FUNCTION RightFactor<T> factor_for(Raw<T, 8>, RightNumbers numbers) {
    return right_factor(numbers, T(0.0f));
}

// Where leaf number `leaf` of a part is, and phi's numbers for it: of a tile's columns from `column` on.
template <int N, int AT_ONCE>
FUNCTION int leaf_stream(int leaf) {
    return leaf / AT_ONCE % N;
}
template <int N, int AT_ONCE>
FUNCTION int leaf_channel(int leaf) {
    return (leaf / (N * AT_ONCE) * AT_ONCE + leaf % AT_ONCE) * BLOCK_CHANNELS;
}
template <int N, int AT_ONCE, typename P>
FUNCTION RightNumbers load_leaf_phi(P phi, int64_t K, int M, int C, int column, int begin, int leaf,
                                    int lane) {
    const int c = begin + leaf_channel<N, AT_ONCE>(leaf);
    return load_phi(phi, K, M, column, leaf_stream<N, AT_ONCE>(leaf) * int64_t(C) + c, C - c, lane);
}
// Puts the factors of COUNT leaves, from `leaf` on, into threadgroup memory: TILES for each. This
// simdgroup's first one has been loaded ahead.
template <int N, int AT_ONCE, int COUNT, int TILES, typename R, typename S, typename P>
FUNCTION void put_phi(S shared, R like, RightNumbers ahead, P phi, int64_t K, int M, int C,
                      int column, int begin, int leaf, Place here) {
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD;
    for (int slot = simdgroup; slot < COUNT * TILES; slot += here.threads / SIMD) {
        if (slot != simdgroup)
            ahead = load_leaf_phi<N, AT_ONCE>(phi, K, M, C, column + slot % TILES * TILE_COLUMNS,
                                              begin, leaf + slot / TILES, lane);
        put(shared + slot * RIGHT_QUADS * SIMD, factor_for(like, ahead), lane);
    }
}

// Of TILE_COLUMNS columns of du[T, M] and 32 tokens, those below `end`.
template <typename P>
FUNCTION RightNumbers load_du(P du, int M, int column, int64_t first, int64_t end, int lane) {
    RightNumbers out;
    UNROLL for (int e = 0; e < RUNS; e++) {
        const int at = column + right_column(lane, e);
        UNROLL for (int t = 0; t < 4; t++) {
            const int64_t token = first + 4 * right_row(lane, e) + t;
            out.run[e].at[t] = at < M && token < end ? float(du[token * M + at]) : 0.0f;
        }
    }
    return out;
}

// ---- sums over the channels ----------------------------------------------------------------------

// A lane's share of two tokens, 8 channels out of 32, as they are in memory.
template <typename R>
struct Rows {
    R upper, lower;
};
template <typename P>
FUNCTION auto load_rows(P upper, P lower, int rest) {
    const auto above = load_raw_within<8>(upper, rest), below = load_raw_within<8>(lower, rest);
    return Rows<decltype(load_raw<8>(upper))>{above, below};
}

FUNCTION Product no_product() {
    Product out;
    UNROLL for (int h = 0; h < 2; h++) out.in_half[h] = zeros<PLACES>();
    return out;
}
FUNCTION Product plus(Product a, Product b) {
    UNROLL for (int h = 0; h < 2; h++) a.in_half[h] = plus(a.in_half[h], b.in_half[h]);
    return a;
}

// Where this lane's tokens of HEIGHT tiles begin, `channel` included; there is one at least.
template <int HEIGHT>
struct Starts {
    int64_t upper[HEIGHT], lower[HEIGHT];
};
template <int HEIGHT>
FUNCTION Starts<HEIGHT> starts_of(int64_t first, int64_t T, int64_t K, int channel, int lane) {
    Starts<HEIGHT> out;
    UNROLL for (int tile = 0; tile < HEIGHT; tile++) {
        const int64_t upper = first + tile * TILE_TOKENS + tile_row(lane), lower = upper + 8;
        out.upper[tile] = (upper < T ? upper : T - 1) * K + channel;
        out.lower[tile] = (lower < T ? lower : T - 1) * K + channel;
    }
    return out;
}
// Their channels in a stretch that begins `at` farther on; `rest` of them are in a row.
template <typename R, int AT_ONCE, int HEIGHT>
struct Stretch {
    Rows<R> rows[AT_ONCE][HEIGHT];
};
template <int AT_ONCE, int HEIGHT, typename P>
FUNCTION auto load_stretch(P x, Starts<HEIGHT> starts, int64_t at, int rest) {
    Stretch<decltype(load_raw<8>(x)), AT_ONCE, HEIGHT> out;
    UNROLL for (int tile = 0; tile < HEIGHT; tile++) {
        UNROLL for (int b = 0; b < AT_ONCE; b++) {
            const int64_t more = at + b * BLOCK_CHANNELS;
            out.rows[b][tile] = load_rows(x + starts.upper[tile] + more,
                                          x + starts.lower[tile] + more, rest - b * BLOCK_CHANNELS);
        }
    }
    return out;
}

// Of 16 tokens: for TILES tiles of phi's columns, and of the squares of this lane's numbers.
template <int TILES>
struct Sums {
    Product products[TILES];
    Floats<2> squares;
};
template <int TILES>
FUNCTION Sums<TILES> no_sums() {
    Sums<TILES> out;
    UNROLL for (int tile = 0; tile < TILES; tile++) out.products[tile] = no_product();
    out.squares = zeros<2>();
    return out;
}

template <typename R>
FUNCTION Floats<2> leaf_squares(Rows<R> rows) {
    Floats<2> out;
    const Floats<8> upper = floats(rows.upper), lower = floats(rows.lower);
    out.at[0] = dot(0.0f, upper, upper), out.at[1] = dot(0.0f, lower, lower);
    return out;
}
// A long sum is taken in leaves, as tensor cores do not round what they add.
template <typename R, typename F>
FUNCTION Product leaf_products(Rows<R> rows, F factor) {
    return multiply(rows.upper, rows.lower, factor);
}

// Stores the sums of the tokens from `first` on in parts[T, P, M + 1]: of TILES tiles of columns from
// `column` on, and once the squares, in the last place.
template <int TILES, typename P>
FUNCTION void store_sums(P parts, int64_t first, int64_t T, int count, int part, Sums<TILES> sums,
                         int column, int M, int lane) {
    UNROLL for (int h = 0; h < 2; h++) {
        UNROLL for (int j = 0; j < PLACES; j++) {
            const int64_t token = first + 8 * h + sum_row(lane, j);
            const int64_t own = (token * count + part) * (M + 1);
            UNROLL for (int tile = 0; tile < TILES; tile++) {
                const int at = column + tile * TILE_COLUMNS + sum_column(lane, j);
                if (at < M && token < T) parts[own + at] = sums.products[tile].in_half[h].at[j];
            }
        }
        const int64_t token = first + 8 * h + tile_row(lane);
        const float squares = row_sum(sums.squares.at[h]);
        if (column == 0 && tile_pair(lane) == 0 && token < T)
            parts[(token * count + part) * (M + 1) + M] = squares;
    }
}

// ---- the streams that combine makes --------------------------------------------------------------

// N streams at 8 channels, `rest` of them in a row, as they are in memory.
template <int COUNT, typename P>
FUNCTION auto load_streams_within(P token, int C, int rest) {
    RawStreams<COUNT, decltype(load_raw<8>(token))> out;
    UNROLL for (int j = 0; j < COUNT; j++)
        out.at[j] = load_raw_within<8>(token + int64_t(j) * C, rest);
    return out;
}
// sum + sum_j res_j x_j, for streams that are in registers, or else from `token` on.
template <int N, bool KEPT, int COUNT, typename R, typename H, typename P>
FUNCTION Floats<8> mix(Floats<8> sum, H res, RawStreams<COUNT, R> streams, P token, int C,
                       int rest) {
    UNROLL_SMALL for (int j = 0; j < N; j++) {
        const R stream =
            KEPT ? streams.at[KEPT ? j : 0] : load_raw_within<8>(token + int64_t(j) * C, rest);
        sum = add(sum, value(res, j), floats(stream));
    }
    return sum;
}
template <typename P, typename T>
FUNCTION void store_raw_within(P p, Raw<T, 8> v, int rest) {
    if (rest >= 8 || (ALIGNED && rest > 0))
        store_raw(p, v);
    else if (!ALIGNED)
        store_within(p, floats(v), rest);
}

// ---- sums whose leaves several simdgroups make ---------------------------------------------------

// Numbers of a token in threadgroup memory: its products, then its squares, a number for each of the
// four lanes that have some.
template <int TILES>
struct Width {
    enum { NUMBERS = TILES * TILE_COLUMNS + 4 };
};

// Puts a tile's numbers of one leaf, where `tokens` of them belong.
template <int TILES, typename S>
FUNCTION void put_products(S leaf, Product product, int tile, int tokens, int lane) {
    UNROLL for (int h = 0; h < 2; h++) {
        UNROLL for (int j = 0; j < PLACES; j++) {
            const int token = 8 * h + sum_row(lane, j);
            if (token < tokens)
                leaf[token * Width<TILES>::NUMBERS + tile * TILE_COLUMNS + sum_column(lane, j)] =
                    product.in_half[h].at[j];
        }
    }
}
template <int TILES, typename S>
FUNCTION void put_squares(S leaf, Floats<2> squares, int tokens, int lane) {
    const int row = tile_row(lane), at = TILES * TILE_COLUMNS + tile_pair(lane) / 2;
    UNROLL for (int k = 0; k < 2; k++)
        if (row + k * 8 < tokens)
            leaf[(row + k * 8) * Width<TILES>::NUMBERS + at] = squares.at[k];
}
// Adds `count` leaves, one by one, to the totals of `tokens`; a thread has the same of them always.
template <int TILES, typename S>
FUNCTION void add_leaves(S totals, S leaves, int count, int tokens, bool first, Place here) {
    const int NUMBERS = Width<TILES>::NUMBERS;
    for (int at = here.id; at < tokens * NUMBERS; at += here.threads) {
        float sum = first ? 0.0f : totals[at];
        for (int leaf = 0; leaf < count; leaf++) sum += leaves[leaf * TILE_TOKENS * NUMBERS + at];
        totals[at] = sum;
    }
}
// Stores the totals, as store_sums does; `parts` is the first token's, and `stride` between them.
template <int TILES, typename S, typename P>
FUNCTION void store_totals(S totals, P parts, int64_t stride, int column, int M, int tokens,
                           Place here) {
    const int NUMBERS = Width<TILES>::NUMBERS, PRODUCTS = TILES * TILE_COLUMNS;
    for (int at = here.id; at < tokens * (PRODUCTS + 1); at += here.threads) {
        const int token = at / (PRODUCTS + 1), k = at % (PRODUCTS + 1);
        const auto own = totals + token * NUMBERS;
        if (k < PRODUCTS && column + k < M) parts[token * stride + column + k] = own[k];
        if (k == PRODUCTS && column == 0)
            parts[token * stride + M] = (own[k] + own[k + 1]) + (own[k + 2] + own[k + 3]);
    }
}

// ---- back through the projection -----------------------------------------------------------------

// Simdgroups take units of 32 channels of one stream; two of a stream, then the next stream's, so that
// a threadgroup reads whole lines of memory and shares what all streams need.
template <int N>
FUNCTION int strip_stream(int unit) {
    return unit / 2 % N;
}
template <int N>
FUNCTION int strip_channel(int unit) {
    return (unit / (2 * N) * 2 + unit % 2) * BLOCK_CHANNELS;
}
template <int N>
FUNCTION int strip_count(int C, int simdgroups) {
    const int units = (C + 2 * BLOCK_CHANNELS - 1) / (2 * BLOCK_CHANNELS) * 2 * N;
    return (units + simdgroups - 1) / simdgroups;
}

// The right factors of 8 columns of phi and 4 times 8 channels. Of their products a lane gets 8
// channels side by side, those from 4 * tile_pair on: product t has channels t and 4 + t of them.
struct AcrossFactor {
    Right at[4];
};
template <int COUNT>
struct AcrossFactors {
    AcrossFactor at[COUNT];
};
template <typename P>
FUNCTION AcrossFactor across(P phi, int64_t K, int M, int column, int64_t at, int rest, int lane) {
    Floats<4> b[2];
    UNROLL for (int e = 0; e < 2; e++) {
        const int row = column + right_row(lane, e), channel = 4 * right_column(lane, e);
        b[e] = load_within<4>(phi + row * K + at + channel, row < M ? rest - channel : 0);
    }
    AcrossFactor out;
    UNROLL for (int t = 0; t < 4; t++) out.at[t] = right(b[0].at[t], b[1].at[t]);
    return out;
}
// The left factor of 16 tokens from `first` on and 8 columns of du[T, M]; `upper` is this lane's
// first token.
template <typename P>
FUNCTION Left load_left(P du, int M, int column, int64_t upper, int64_t T, int lane) {
    float given[4];
    UNROLL for (int k = 0; k < 4; k++) {
        const int64_t token = upper + k / 2 * 8;
        const int at = column + tile_pair(lane) + k % 2;
        given[k] = at < M && token < T ? float(du[token * M + at]) : 0.0f;
    }
    return left(given[0], given[1], given[2], given[3]);
}

// 4 channels of 8 tokens, as they are in memory.
template <typename R>
struct RawTokens {
    R at[8];
};
// One channel of them.
template <typename T>
FUNCTION Raw<T, 8> transposed(RawTokens<Raw<T, 4>> tokens, int channel) {
    enum { PER_WORD = Raw<T, 8>::PER_WORD };
    Raw<T, 8> out = {};
    UNROLL for (int k = 0; k < 8; k++) {
        const auto both = tokens.at[k].word[channel / PER_WORD];
        out.word[k / PER_WORD] |=
            PER_WORD == 1 ? both
                          : (both >> (channel % 2 * 16) & 0xffff) << (k % 2 * 16);
    }
    return out;
}
