// The products with phi: what the kernels that make them share.
//
// Sums over n C go by one tree, whatever the batch or the launch. A block is 32 channels of one stream.
// A part is 256 channels of all streams: AT_ONCE blocks of the first stream, as many of the second one
// and so on, then the next channels. Its leaves are the sums over one block or some that follow one
// another, and are added one by one; so are the parts, by the kernels that end them
// (common_mappings.h).

enum {
    TILE_TOKENS = 16,  // that a simdgroup multiplies at a time, with TILE_COLUMNS of phi
    BLOCK_CHANNELS = 32,
    PART_CHANNELS = 256,
    PART_BLOCKS = PART_CHANNELS / BLOCK_CHANNELS  // of one stream
};

// ---- rows that end anywhere --------------------------------------------------------------------

// The first `rest` numbers from p on, and zeros. Where that is known to be aligned, there are whole blocks
// alone.
template <int W, typename P>
FUNCTION Floats<W> load_within(P p, int rest) {
    Floats<W> out = zeros<W>();
    if (rest >= W || (Address<P>::ALIGNED && rest > 0)) {
        out = load<W>(p);
    } else if (!Address<P>::ALIGNED) {
        UNROLL for (int k = 0; k < W; k++)
            if (k < rest) out.at[k] = float(p[k]);
    }
    return out;
}

template <int W, typename P>
FUNCTION auto load_raw_within(P p, int rest) {
    decltype(load_raw<W>(p)) out = {};
    if (rest >= W || (Address<P>::ALIGNED && rest > 0)) {
        out = fetch_raw<W>(p);
    } else if (!Address<P>::ALIGNED) {
        UNROLL for (int k = 0; k < W; k++)
            if (k < rest) out.word[k / out.PER_WORD] |= bits(p[k]) << (k % out.PER_WORD * 16);
    }
    return out;
}

template <int W, typename P>
FUNCTION void store_within(P p, Floats<W> v, int rest) {
    if (rest >= W || (Address<P>::ALIGNED && rest > 0)) {
        store(p, v);
    } else if (!Address<P>::ALIGNED) {
        UNROLL for (int k = 0; k < W; k++) {
            Floats<1> one;
            one.at[0] = v.at[k];
            if (k < rest) store(p + k, one);
        }
    }
}

// ---- rows on their way to threadgroup memory -----------------------------------------------------
// Quad k of a lane's 8 numbers is beside the next lane's there. Where they are two quads, the four lanes
// of a row copy four that follow one another, as memory gives 32 bytes at least: so what a lane takes
// may be another's copy.

template <typename R>
struct RowQuads;
template <typename T>
struct RowQuads<Raw<T, 8>> {
    enum { COUNT = Raw<T, 8>::WORDS / 4 };
};
template <typename R, typename S, typename P>
FUNCTION void start_row(R, S to, P from, int lane) {
    enum { COUNT = RowQuads<R>::COUNT, NUMBERS = 8 / COUNT };
    const int own = tile_pair(lane) / 2;
    UNROLL for (int k = 0; k < COUNT; k++) {
        const int four = 4 * k + own, owner = row_lane(lane, four / COUNT);
        start_copy(to + four % COUNT * SIMD + owner, from + (four - COUNT * own) * NUMBERS);
    }
}
template <typename R, typename S>
FUNCTION void put_nothing(R, S to, int lane) {
    UNROLL for (int k = 0; k < RowQuads<R>::COUNT; k++) to[k * SIMD + lane] = uint4();
}
template <typename T, typename S>
FUNCTION Raw<T, 8> take_row(Raw<T, 8>, S from, int lane) {
    uint4 quads[RowQuads<Raw<T, 8>>::COUNT];
    UNROLL for (int k = 0; k < RowQuads<Raw<T, 8>>::COUNT; k++) quads[k] = from[k * SIMD + lane];
    return raw_of(quads, T(0.0f));
}

// ---- factors in threadgroup memory ---------------------------------------------------------------

template <typename F, typename S>
FUNCTION void put(S shared, F factor, int lane) {
    UNROLL for (int k = 0; k < F::QUADS; k++) shared[k * SIMD + lane] = factor.four[k];
}
// Those from `from` on, of rows like one that is given, which only names their type.
template <int TILES, typename T, typename S>
FUNCTION Shared<RightFactor<T, TILES>::QUADS, S> shared_factors(Raw<T, 8>, S from, int lane) {
    return {from, lane};
}

// Of TILES tiles of phi[M, K]'s columns from `column` on and 32 channels from `at` on, `rest` of them
// in a row; columns beyond phi are not stored, so they may be any.
template <int TILES, typename P>
FUNCTION RightTiles<TILES> load_phi(P phi, int64_t K, int M, int column, int64_t at, int rest,
                                    int lane) {
    RightTiles<TILES> out;
    UNROLL for (int k = 0; k < 2 * TILES; k++) {
        const int tile = k / 2, e = k % 2, channel = 4 * right_row(lane, e);
        const int row = column + tile * TILE_COLUMNS + right_column(lane, e);
        out.at[tile].run[e] =
            load_within<4>(phi + (row < M ? row : M - 1) * K + at + channel, rest - channel);
    }
    return out;
}
// The factor of rows like one that is given, which only names their type.
template <int TILES, typename T>
FUNCTION RightFactor<T, TILES> factor_for(Raw<T, 8>, RightTiles<TILES> tiles) {
    return right_factor(tiles, T(0.0f));
}

// Where block number `block` of a part is, and phi's numbers for it: of TILES tiles of columns from
// `column` on.
template <int N, int AT_ONCE>
FUNCTION int block_stream(int block) {
    return block / AT_ONCE % N;
}
template <int N, int AT_ONCE>
FUNCTION int block_channel(int block) {
    return (block / (N * AT_ONCE) * AT_ONCE + block % AT_ONCE) * BLOCK_CHANNELS;
}
template <int N, int AT_ONCE, int TILES, typename P>
FUNCTION RightTiles<TILES> load_block_phi(P phi, int64_t K, int M, int C, int column, int begin,
                                          int block, int lane) {
    const int c = begin + block_channel<N, AT_ONCE>(block);
    const int64_t at = block_stream<N, AT_ONCE>(block) * int64_t(C) + c;
    return load_phi<TILES>(phi, K, M, column, at, C - c, lane);
}

// What a threadgroup takes of the products with phi: a part, and tokens from `begin` on in turns, each
// `step` after the last one. All threadgroups move through the tokens together.
struct Work {
    int parts, part, begin_channel, end_channel;
    int64_t begin, step;
};
FUNCTION Work work_of(int C, int tokens, Place here) {
    Work out;
    out.parts = (C + PART_CHANNELS - 1) / PART_CHANNELS;
    out.part = here.group_x % out.parts;
    out.begin_channel = out.part * PART_CHANNELS;
    out.end_channel = out.begin_channel + PART_CHANNELS < C ? out.begin_channel + PART_CHANNELS : C;
    out.begin = int64_t(here.group_x / out.parts) * tokens;
    out.step = int64_t(here.groups_x / out.parts) * tokens;
    return out;
}

// The factors of BLOCKS blocks, from `block` on, in registers.
template <typename F, int BLOCKS>
struct Factors {
    F at[BLOCKS];
};
template <typename F, int BLOCKS>
FUNCTION uint4 four(Factors<F, BLOCKS> factors, int block, int k) {
    return factors.at[block].four[k];
}
template <int N, int AT_ONCE, int TILES, int BLOCKS, typename R, typename P>
FUNCTION auto load_factors(R like, P phi, int64_t K, int M, int C, int column, int begin, int block,
                           int lane) {
    Factors<decltype(factor_for(like, RightTiles<TILES>())), BLOCKS> out;
    UNROLL for (int b = 0; b < BLOCKS; b++)
        out.at[b] = factor_for(like, load_block_phi<N, AT_ONCE, TILES>(phi, K, M, C, column, begin,
                                                                       block + b, lane));
    return out;
}
// Puts the factors of `count` blocks, from `block` on, into threadgroup memory, when all are done with
// what was there before; a simdgroup has FEW of them under way together. All threads must come here.
template <int N, int AT_ONCE, int TILES, int FEW, typename R, typename S, typename P>
FUNCTION void put_phi(S shared, R like, P phi, int64_t K, int M, int C, int column, int begin,
                      int block, int count, Place here) {
    const int lane = here.id % SIMD, simdgroups = here.threads / SIMD;
    BARRIER;
    for (int k = here.id / SIMD; k < count; k += FEW * simdgroups) {
        RightTiles<TILES> numbers[FEW];
        UNROLL for (int e = 0; e < FEW; e++)
            if (k + e * simdgroups < count)
                numbers[e] = load_block_phi<N, AT_ONCE, TILES>(phi, K, M, C, column, begin,
                                                               block + k + e * simdgroups, lane);
        UNROLL for (int e = 0; e < FEW; e++) {
            const auto factor = factor_for(like, numbers[e]);
            const int at = (k + e * simdgroups) * decltype(factor_for(like, numbers[0]))::QUADS;
            if (k + e * simdgroups < count) put(shared + at * SIMD, factor, lane);
        }
    }
    BARRIER;
}

// Of TILES tiles of du[T, M]'s columns and 32 tokens, those below `end`.
template <int TILES, typename P>
FUNCTION RightTiles<TILES> load_du(P du, int M, int column, int64_t first, int64_t end, int lane) {
    RightTiles<TILES> out;
    UNROLL for (int k = 0; k < 2 * TILES; k++) {
        const int tile = k / 2, e = k % 2;
        const int at = column + tile * TILE_COLUMNS + right_column(lane, e);
        UNROLL for (int t = 0; t < 4; t++) {
            const int64_t token = first + 4 * right_row(lane, e) + t;
            out.at[tile].run[e].at[t] = at < M && token < end ? float(du[token * M + at]) : 0.0f;
        }
    }
    return out;
}

// ---- sums over the channels ----------------------------------------------------------------------

template <int TILES, int HEIGHT>
FUNCTION Products<TILES, HEIGHT> no_products() {
    Products<TILES, HEIGHT> out;
    UNROLL for (int k = 0; k < 2 * TILES * HEIGHT; k++)
        out.at[k / 2 / TILES].tile[k / 2 % TILES].in_half[k % 2] = zeros<2>();
    return out;
}
template <int TILES, int HEIGHT>
FUNCTION Products<TILES, HEIGHT> plus(Products<TILES, HEIGHT> a, Products<TILES, HEIGHT> b) {
    Products<TILES, HEIGHT> out;
    UNROLL for (int k = 0; k < 2 * TILES * HEIGHT; k++) {
        const int at = k / 2 / TILES, tile = k / 2 % TILES;
        out.at[at].tile[tile].in_half[k % 2] =
            plus(a.at[at].tile[tile].in_half[k % 2], b.at[at].tile[tile].in_half[k % 2]);
    }
    return out;
}

// Where this lane's tokens of HEIGHT tiles from `first` on begin; those beyond T are the last one.
template <int HEIGHT, typename P>
struct Starts {
    P at[HEIGHT][2];
};
template <int HEIGHT, typename P>
FUNCTION Starts<HEIGHT, P> starts_of(P x, int64_t first, int64_t T, int64_t K, int lane) {
    Starts<HEIGHT, P> out;
    UNROLL for (int k = 0; k < 2 * HEIGHT; k++) {
        const int64_t token = first + 8 * k + tile_row(lane);
        out.at[k / 2][k % 2] = x + (token < T ? token : T - 1) * K;
    }
    return out;
}
// This lane's numbers of BLOCKS blocks that begin `at` farther on; `rest` channels are in a row.
template <int BLOCKS, int HEIGHT, typename P>
FUNCTION auto load_blocks(Starts<HEIGHT, P> starts, int64_t at, int rest) {
    Rows<decltype(load_raw<8>(starts.at[0][0])), BLOCKS, HEIGHT> out;
    UNROLL for (int k = 0; k < 2 * HEIGHT; k++) {
        const P from = starts.at[k / 2][k % 2] + at;
        UNROLL for (int b = 0; b < BLOCKS; b++)
            out.at[b][k / 2].in_half[k % 2] =
                load_raw_within<8>(from + b * BLOCK_CHANNELS, rest - b * BLOCK_CHANNELS);
    }
    return out;
}
// Those of leaf number `leaf` of a part, whose BLOCKS are of one stream; from the part's first channel
// of this lane, `rest` are in a row.
template <int N, int BLOCKS, int HEIGHT, typename P>
FUNCTION auto load_leaf(Starts<HEIGHT, P> starts, int C, int leaf, int rest) {
    const int c = leaf / N * (BLOCKS * BLOCK_CHANNELS);
    return load_blocks<BLOCKS>(starts, leaf % N * int64_t(C) + c, rest - c);
}

// The same on its way to `slot`.
template <int BLOCKS, int HEIGHT, typename R>
struct Slot {
    enum { QUADS = 2 * BLOCKS * HEIGHT * RowQuads<R>::COUNT * SIMD };
};
template <int N, int BLOCKS, int HEIGHT, typename R, typename S, typename P>
FUNCTION void start_leaf(R like, S slot, Starts<HEIGHT, P> starts, int C, int leaf, int rest,
                         int lane) {
    const int c = leaf / N * (BLOCKS * BLOCK_CHANNELS);
    const int64_t at = leaf % N * int64_t(C) + c;
    UNROLL for (int k = 0; k < 2 * HEIGHT * BLOCKS; k++) {
        const int row = k / BLOCKS, more = k % BLOCKS * BLOCK_CHANNELS;
        const auto to = slot + k * RowQuads<R>::COUNT * SIMD;
        if (rest > c + more)
            start_row(like, to, starts.at[row / 2][row % 2] + at + more, lane);
        else
            put_nothing(like, to, lane);
    }
    mark_copies();
}
template <int BLOCKS, int HEIGHT, typename R, typename S>
FUNCTION Rows<R, BLOCKS, HEIGHT> take_leaf(R like, S slot, int lane) {
    Rows<R, BLOCKS, HEIGHT> out;
    UNROLL for (int k = 0; k < 2 * HEIGHT * BLOCKS; k++)
        out.at[k % BLOCKS][k / BLOCKS / 2].in_half[k / BLOCKS % 2] =
            take_row(like, slot + k * RowQuads<R>::COUNT * SIMD, lane);
    return out;
}

// Of HEIGHT tiles of 16 tokens: for TILES tiles of phi's columns, and of the squares of this lane's
// numbers.
template <int TILES, int HEIGHT>
struct Sums {
    Products<TILES, HEIGHT> products;
    Floats<2> squares[HEIGHT];
};
template <int TILES, int HEIGHT>
FUNCTION Sums<TILES, HEIGHT> no_sums() {
    Sums<TILES, HEIGHT> out;
    out.products = no_products<TILES, HEIGHT>();
    UNROLL for (int tile = 0; tile < HEIGHT; tile++) out.squares[tile] = zeros<2>();
    return out;
}
// A long sum is taken in leaves, as tensor cores do not round what they add.
template <int TILES, int HEIGHT, int BLOCKS, typename R, typename F>
FUNCTION Sums<TILES, HEIGHT> add_leaf(Sums<TILES, HEIGHT> sums, Rows<R, BLOCKS, HEIGHT> rows,
                                      F factors) {
    UNROLL for (int k = 0; k < 2 * HEIGHT; k++) {
        float squares = 0.0f;
        UNROLL for (int b = 0; b < BLOCKS; b++) {
            const Floats<8> row = floats(rows.at[b][k / 2].in_half[k % 2]);
            squares = add_dot(squares, row, row);
        }
        sums.squares[k / 2].at[k % 2] =
            fma(squares, squares_unit(), sums.squares[k / 2].at[k % 2]);  // see inverse_rms
    }
    sums.products = plus(sums.products, multiply<TILES>(rows, factors));
    return sums;
}

// Stores the sums of the tokens from `first` on in parts[T, P, M + 1]: of TILES tiles of columns from
// `column` on, and once the squares, in the last place.
template <int TILES, int HEIGHT, typename P>
FUNCTION void store_sums(P parts, int64_t first, int64_t T, int count, int part,
                         Sums<TILES, HEIGHT> sums, int column, int M, int lane) {
    UNROLL for (int k = 0; k < 2 * HEIGHT; k++) {
        UNROLL for (int j = 0; j < 2; j++) {
            const int64_t token = first + 8 * k + sum_row(lane, j);
            const int64_t own = (token * count + part) * (M + 1);
            UNROLL for (int tile = 0; tile < TILES; tile++) {
                const int at = column + tile * TILE_COLUMNS + sum_column(lane, j);
                if (at < M && token < T)
                    parts[own + at] = sums.products.at[k / 2].tile[tile].in_half[k % 2].at[j];
            }
        }
        const int64_t token = first + 8 * k + tile_row(lane);
        const float squares = row_sum(sums.squares[k / 2].at[k % 2]);
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
// What a lane mixes: the streams of its two tokens, where they are kept, and their layer.
template <int COUNT, typename R>
struct Unmixed {
    RawStreams<COUNT, R> streams[2];
    R layer[2];
};
template <int COUNT, typename P, typename Q>
FUNCTION auto load_unmixed(Starts<1, P> x, Starts<1, Q> y, int C, int c, int rest) {
    Unmixed<COUNT, decltype(load_raw<8>(x.at[0][0]))> out;
    UNROLL for (int r = 0; r < 2; r++) {
        out.streams[r] = load_streams_within<COUNT>(x.at[0][r] + c, C, rest);
        out.layer[r] = load_raw_within<8>(y.at[0][r] + c, rest);
    }
    return out;
}
// The same on its way to `slot`, where all streams are kept.
template <int COUNT, typename R, typename S, typename P, typename Q>
FUNCTION void start_unmixed(R like, S slot, Starts<1, P> x, Starts<1, Q> y, int C, int c, int lane) {
    enum { STEP = RowQuads<R>::COUNT * SIMD };
    UNROLL for (int k = 0; k < 2 * COUNT + 2; k++) {
        const int r = k % 2, j = k / 2;
        if (j < COUNT)
            start_row(like, slot + k * STEP, x.at[0][r] + int64_t(j) * C + c, lane);
        else
            start_row(like, slot + k * STEP, y.at[0][r] + c, lane);
    }
    mark_copies();
}
template <int COUNT, typename R, typename S>
FUNCTION Unmixed<COUNT, R> take_unmixed(R like, S slot, int lane) {
    enum { STEP = RowQuads<R>::COUNT * SIMD };
    Unmixed<COUNT, R> out;
    UNROLL for (int k = 0; k < 2 * COUNT + 2; k++) {
        const R row = take_row(like, slot + k * STEP, lane);
        if (k / 2 < COUNT)
            out.streams[k % 2].at[k / 2 % COUNT] = row;
        else
            out.layer[k % 2] = row;
    }
    return out;
}
// sum + sum_j res_{first + j} x_j, for streams that are in registers, or else from `token` on.
template <int N, bool KEPT, int COUNT, typename R, typename H, typename P>
FUNCTION Floats<8> mix_streams(Floats<8> sum, H res, int first, RawStreams<COUNT, R> streams, P token,
                       int C, int rest) {
    UNROLL_SMALL for (int j = 0; j < N; j++) {
        R stream;
        if (KEPT)
            stream = streams.at[KEPT ? j : 0];
        else
            stream = load_raw_within<8>(token + int64_t(j) * C, rest);
        sum = add(sum, value(res, first + j), floats(stream));
    }
    return sum;
}
template <typename P, typename T>
FUNCTION void store_raw_within(P p, Raw<T, 8> v, int rest) {
    if (rest >= 8 || (Address<P>::ALIGNED && rest > 0))
        store_raw(p, v);
    else if (!Address<P>::ALIGNED)
        store_within(p, floats(v), rest);
}

// ---- sums whose leaves several simdgroups make ---------------------------------------------------

// Numbers of a token in threadgroup memory: its products, then its squares, a number for each of the
// four lanes that have some.
template <int TILES>
struct Width {
    enum { NUMBERS = TILES * TILE_COLUMNS + 4 };
};

// Puts the numbers of one leaf, where `tokens` of them belong.
template <int TILES, typename S>
FUNCTION void put_sums(S leaf, Sums<TILES, 1> sums, int tokens, int lane) {
    UNROLL for (int h = 0; h < 2; h++) {
        UNROLL for (int j = 0; j < 2; j++) {
            const int token = 8 * h + sum_row(lane, j);
            UNROLL for (int tile = 0; tile < TILES; tile++) {
                const int at = tile * TILE_COLUMNS + sum_column(lane, j);
                if (token < tokens)
                    leaf[token * Width<TILES>::NUMBERS + at] =
                        sums.products.at[0].tile[tile].in_half[h].at[j];
            }
        }
        const int token = 8 * h + tile_row(lane), at = TILES * TILE_COLUMNS + tile_pair(lane) / 2;
        if (token < tokens) leaf[token * Width<TILES>::NUMBERS + at] = sums.squares[0].at[h];
    }
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
// Of this lane's tokens, of 32 from `first` on; the last one before `end` in the place of those beyond.
template <typename P>
FUNCTION auto load_tokens(P x, int64_t K, int64_t first, int64_t end, int rest, int lane) {
    RawTokens<decltype(load_raw<4>(x))> out;
    UNROLL for (int k = 0; k < 8; k++) {
        const int64_t token = first + 4 * tile_pair(lane) + k;
        out.at[k] = load_raw_within<4>(x + (token < end ? token : end - 1) * K, rest);
    }
    return out;
}
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
