// The products with phi: what the kernels that make them share.
//
// Sums over n C go by one tree, whatever the batch or the launch. Its leaves are the sums over 32
// channels of one stream. A part, 256 channels of all streams, adds its leaves one by one: the
// channels are cut in stretches of AT_ONCE leaves, and a stretch's streams follow one another. The
// parts are added one by one by the kernels that end them (common_mappings.h).

enum {
    TILE_TOKENS = 16,     // that a simdgroup multiplies at a time
    TILE_COLUMNS = 8,     // of phi, likewise
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

// A lane's numbers of a right factor, before they are split.
struct RightNumbers {
    Floats<4> first, second;
};
// Of 8 columns of phi[M, K] from `column` on and 32 channels from `at` on, `rest` of them in a row;
// columns beyond phi are not stored, so they may be any.
template <typename P>
FUNCTION RightNumbers load_phi(P phi, int64_t K, int M, int column, int64_t at, int rest,
                               int lane) {
    Floats<4> both[2];
    UNROLL for (int e = 0; e < 2; e++) {
        const int row = column + right_column(lane, e), channel = 4 * right_row(lane, e);
        both[e] = load_within<4>(phi + (row < M ? row : M - 1) * K + at + channel, rest - channel);
    }
    return {both[0], both[1]};
}
// The factor of rows like one that is given, which only names their type.
template <typename T>
FUNCTION RightFactor<T> factor_for(Raw<T, 8>, RightNumbers numbers) {
    return right_factor(numbers.first, numbers.second, T(0.0f));
}

// A step multiplies a stretch of one stream: AT_ONCE * TILES factors, in threadgroup memory.
template <int N, int AT_ONCE, int TILES, typename P>
FUNCTION RightNumbers load_phi_of(P phi, int64_t K, int M, int C, int column, int begin, int step,
                                  int slot, int lane) {
    const int c = begin + (step / N * AT_ONCE + slot / TILES) * BLOCK_CHANNELS;
    return load_phi(phi, K, M, column + slot % TILES * TILE_COLUMNS, step % N * int64_t(C) + c,
                    C - c, lane);
}
// Puts them there; this simdgroup's first one has been loaded ahead.
template <int N, int AT_ONCE, int TILES, typename R, typename S, typename P>
FUNCTION void put_phi(S shared, R like, RightNumbers ahead, P phi, int64_t K, int M, int C,
                      int column, int begin, int step, Place here) {
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD;
    for (int slot = simdgroup; slot < AT_ONCE * TILES; slot += here.threads / SIMD) {
        if (slot != simdgroup)
            ahead = load_phi_of<N, AT_ONCE, TILES>(phi, K, M, C, column, begin, step, slot, lane);
        put(shared + slot * RIGHT_QUADS * SIMD, factor_for(like, ahead), lane);
    }
}

// Of 8 columns of du[T, M] and 32 tokens, those below `end`.
template <typename P>
FUNCTION RightNumbers load_du(P du, int M, int column, int64_t first, int64_t end, int lane) {
    Floats<4> both[2];
    UNROLL for (int e = 0; e < 2; e++) {
        const int at = column + right_column(lane, e);
        UNROLL for (int t = 0; t < 4; t++) {
            const int64_t token = first + 4 * right_row(lane, e) + t;
            both[e].at[t] = at < M && token < end ? float(du[token * M + at]) : 0.0f;
        }
    }
    return {both[0], both[1]};
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

// Of 16 tokens: for TILES * 8 columns of phi, and of the squares of this lane's numbers.
template <int TILES>
struct Sums {
    Floats<4> products[TILES];
    Floats<2> squares;
};
template <int TILES>
FUNCTION Sums<TILES> no_sums() {
    Sums<TILES> out;
    UNROLL for (int tile = 0; tile < TILES; tile++) out.products[tile] = zeros<4>();
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
FUNCTION Floats<4> leaf_products(Rows<R> rows, F factor) {
    return multiply(zeros<4>(), rows.upper, rows.lower, factor);
}

// Stores a tile's sums: of TILES * 8 columns from `column` on, and once the squares, in the last one
// of M + 1. `upper` and `lower` are where the two tokens' numbers go.
template <int TILES, typename P>
FUNCTION void store_sums(P upper, P lower, bool has_upper, bool has_lower, Sums<TILES> sums,
                         int column, int M, int lane) {
    UNROLL for (int tile = 0; tile < TILES; tile++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int at = column + tile * TILE_COLUMNS + tile_pair(lane) + e;
            if (at < M && has_upper) upper[at] = sums.products[tile].at[e];
            if (at < M && has_lower) lower[at] = sums.products[tile].at[2 + e];
        }
    }
    const float square = row_sum(sums.squares.at[0]), other = row_sum(sums.squares.at[1]);
    if (column == 0 && tile_pair(lane) == 0) {
        if (has_upper) upper[M] = square;
        if (has_lower) lower[M] = other;
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

// Puts a tile's numbers of one leaf, or of COUNT columns of them, where `tokens` of them belong.
template <int TILES, typename S>
FUNCTION void put_products(S leaf, Floats<4> product, int tile, int tokens, int lane) {
    const int row = tile_row(lane), at = tile * TILE_COLUMNS + tile_pair(lane);
    UNROLL for (int k = 0; k < 4; k++)
        if (row + k / 2 * 8 < tokens)
            leaf[(row + k / 2 * 8) * Width<TILES>::NUMBERS + at + k % 2] = product.at[k];
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
