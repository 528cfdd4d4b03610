// The products with phi: what the kernels that make them share.

enum {
    TILE_TOKENS = 16,     // that a simdgroup takes at a time
    TILE_COLUMNS = 8,     // of phi, likewise
    BLOCK_CHANNELS = 32,  // of every stream: their sum is one number of the fixed tree
    SPAN_BLOCKS = 8       // whose sums are added one by one; then the spans are, one by one
};

// ---- rows that end anywhere --------------------------------------------------------------------

// The first `rest` numbers from p on, and zeros. Where all is aligned, there are whole blocks alone.
template <int W, typename P>
FUNCTION Floats<W> load_within(P p, int rest) {
    Floats<W> out;
    if (ALIGNED || rest >= W) {
        out = load<W>(p);
    } else {
        UNROLL for (int k = 0; k < W; k++) out.at[k] = k < rest ? float(p[k]) : 0.0f;
    }
    return out;
}

template <int W, typename P>
FUNCTION auto load_raw_within(P p, int rest) {
    decltype(load_raw<W>(p)) out = {};
    if (ALIGNED || rest >= W) {
        out = load_raw<W>(p);
    } else {
        UNROLL for (int k = 0; k < W; k++) {
            if (k < rest) out.word[k / out.PER_WORD] |= bits(p[k]) << (k % out.PER_WORD * 16);
        }
    }
    return out;
}

template <int W, typename P>
FUNCTION void store_within(P p, Floats<W> v, int rest) {
    if (ALIGNED || rest >= W) {
        store(p, v);
    } else {
        UNROLL for (int k = 0; k < W; k++) {
            Floats<1> one;
            one.at[0] = v.at[k];
            if (k < rest) store(p + k, one);
        }
    }
}

// ---- sums over the channels ----------------------------------------------------------------------

// A lane's share of two rows of a tile of tokens, 8 channels out of 32: the numbers from
// 4 * tile_pair on. A product over 32 numbers is four over 8, and as the order in a sum is free,
// product t of them takes the numbers t, 4 + t, ..., 28 + t.
struct Rows {
    Floats<8> upper, lower;
};

// The same of COUNT streams, as they are in memory. They are loaded a block ahead, so that they are
// under way while the block before is multiplied.
template <int COUNT, typename R>
struct RawRows {
    R upper[COUNT], lower[COUNT];
};
// From `upper` and `lower` on, C from a stream to the next; `rest` channels are left.
template <int COUNT, typename P>
FUNCTION auto load_rows(P upper, P lower, int C, int rest) {
    RawRows<COUNT, decltype(load_raw<8>(upper))> out = {};
    if (rest > 0) {
        UNROLL for (int j = 0; j < COUNT; j++) {
            out.upper[j] = load_raw_within<8>(upper + int64_t(j) * C, rest);
            out.lower[j] = load_raw_within<8>(lower + int64_t(j) * C, rest);
        }
    }
    return out;
}
template <typename R>
FUNCTION Rows rows(R upper, R lower) {
    Rows out;
    out.upper = floats(upper), out.lower = floats(lower);
    return out;
}

// Sums for TILES * 8 columns of phi, and of the squares of this lane's numbers.
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
template <int TILES>
FUNCTION Sums<TILES> plus(Sums<TILES> a, Sums<TILES> b) {
    UNROLL for (int tile = 0; tile < TILES; tile++)
        a.products[tile] = plus(a.products[tile], b.products[tile]);
    a.squares = plus(a.squares, b.squares);
    return a;
}

// sums + rows . phi, over 32 channels of one stream, which are at `from` in the first of `columns`
// rows of phi. K is the length of such a row, and `rest` says how many of the channels there are.
template <bool EXACT, int TILES, typename P>
FUNCTION Sums<TILES> project(Sums<TILES> sums, Rows rows, P from, int64_t K, int rest, int columns,
                             int lane) {
    sums.squares.at[0] = dot(sums.squares.at[0], rows.upper, rows.upper);
    sums.squares.at[1] = dot(sums.squares.at[1], rows.lower, rows.lower);
    Left a[4];
    UNROLL for (int t = 0; t < 4; t++)
        a[t] = left<EXACT>(rows.upper.at[t], rows.upper.at[4 + t], rows.lower.at[t],
                           rows.lower.at[4 + t]);
    UNROLL for (int tile = 0; tile < TILES; tile++) {
        Floats<4> b[2];
        UNROLL for (int e = 0; e < 2; e++) {
            const int column = tile * TILE_COLUMNS + right_column(lane, e);
            const int channel = 4 * right_row(lane, e);
            const int row = column < columns ? column : columns - 1;  // others are not stored
            b[e] = load_within<4>(from + row * K + channel, rest - channel);
        }
        Floats<4> product = zeros<4>();
        UNROLL for (int t = 0; t < 4; t++)
            product = multiply<EXACT>(product, a[t], right(b[0].at[t], b[1].at[t]));
        sums.products[tile] = plus(sums.products[tile], product);
    }
    return sums;
}

// Stores a tile's sums: of TILES * 8 columns from `column` on, and once the squares, in the last one
// of M + 1. `upper` and `lower` are where the two rows' numbers go.
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

// ---- back through the projection -----------------------------------------------------------------

// The right factors of 8 columns of phi and 4 times 8 channels. Of their products a lane gets 8
// channels side by side, those from 4 * tile_pair on: product t has channels 2 t and 2 t + 1 of each.
struct RightFactor {
    Right at[4];
};
template <int COUNT>
struct RightFactors {
    RightFactor at[COUNT];
};
template <typename P>
FUNCTION RightFactor across(P from, int64_t K, int rest, int column, int columns, int lane) {
    RightFactor out;
    UNROLL for (int t = 0; t < 4; t++) {
        float b[2];
        UNROLL for (int e = 0; e < 2; e++) {
            const int at = column + right_row(lane, e), place = right_column(lane, e);
            const int channel = place / 2 * 8 + 2 * t + place % 2;
            b[e] = at < columns && channel < rest ? float(from[at * K + channel]) : 0.0f;
        }
        out.at[t] = right(b[0], b[1]);
    }
    return out;
}
