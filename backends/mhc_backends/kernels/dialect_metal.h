// The dialect's words for mx.fast.metal_kernel. dialect_cuda.h has the same words in the same order.
//
// MLX passes an input of fewer than 8 elements in constant memory and the others in device memory.
// So no body spells the space of an input or casts its pointer: it takes `const auto p = x + ...`
// and calls load, of which there is one for each space.

#include <metal_stdlib>
using namespace metal;

// ---- words -------------------------------------------------------------------------------------

#define FUNCTION inline
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
// SIMD_BARRIER is a BARRIER of the lanes of a simdgroup. TOGETHER must come before products of matrices,
// whose instructions are of all lanes together: the loads and stores before may have parted them.
#define TOGETHER simdgroup_barrier(mem_flags::mem_none)
#define SIMD_BARRIER simdgroup_barrier(mem_flags::mem_threadgroup)
#define UNROLL _Pragma("clang loop unroll(full)")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_FEW(COUNT) PRAGMA(clang loop unroll_count(COUNT <= 4 ? COUNT : 1))
#define UNROLL_SMALL UNROLL_FEW(N)
#define MINUS_INFINITY (-INFINITY)
// `threadgroup LAUNCHED uint4 p[LAUNCH_SIZE(8)];` is the same in CUDA where the launch gives the memory.
#define LAUNCHED
#define LAUNCH_SIZE(NUMBER) (NUMBER)
// `threadgroup float p[8];` declares memory of a threadgroup, and simd_sum(v) sums over 32 threads.

// The number of the lane whose place differs in the bits of `step`.
FUNCTION float simd_partner(float v, int step) { return simd_shuffle_xor(v, ushort(step)); }
// The number of a lane, which need not be the same for all.
FUNCTION float simd_from(float v, int lane) { return simd_shuffle(v, ushort(lane)); }
// simd_any(q): whether any lane says so.

// precise::exp, log, sqrt, max and min: without the word they may be the fast ones, since MLX asks for
// safe maths but not for precise functions (MTLCompileOptions.mathFloatingPointFunctions); MLX's own kernels
// say it too (mlx/backend/metal/kernels/unary_ops.h). fma and fabs are exact either way.

// 1 / v for v > 0, to the last place or the one before.
FUNCTION float reciprocal(float v) { return 1.0f / v; }

// Where a thread is. Threadgroups are lines of whole simdgroups, and none is cut off at the end.
struct Place {
    uint group_x, group_y;    // the threadgroup's position
    uint groups_x, groups_y;  // how many there are
    uint id, threads;         // within the threadgroup
};

enum { SIMD = 32, MOST_SIMDGROUPS = 32 };
// Products of matrices: the columns of a left factor, those of a tile of the right one, and how many
// uint4 a lane's share of a left factor takes, and at most of TILES tiles of a long right one.
enum { DEPTH = 8, TILE_COLUMNS = 8, LEFT_QUADS = 1 };
#define RIGHT_QUADS(TILES) (2 * (TILES))

// ---- numbers in memory and in registers --------------------------------------------------------

template <int W>
struct Floats {
    float at[W];
};

template <int COUNT>
struct Words {
    typedef vec<uint, COUNT> type;
};
template <>
struct Words<1> {
    typedef uint type;
};
FUNCTION uint word(uint words, int) { return words; }
FUNCTION uint word(uint2 words, int k) { return words[k]; }
FUNCTION uint word(uint4 words, int k) { return words[k]; }
FUNCTION void set_word(thread uint& words, int, uint value) { words = value; }
FUNCTION void set_word(thread uint2& words, int k, uint value) { words[k] = value; }
FUNCTION void set_word(thread uint4& words, int k, uint value) { words[k] = value; }

// A word of 32 bits is one float or two of the narrow types; the last argument only names the type.
FUNCTION uint pack(const thread float* from, float) { return as_type<uint>(from[0]); }
FUNCTION uint pack(const thread float* from, half) {
    return as_type<uint>(half2(half(from[0]), half(from[1])));
}
FUNCTION uint pack(const thread float* from, bfloat) {
    return as_type<uint>(bfloat2(bfloat(from[0]), bfloat(from[1])));
}
FUNCTION uint bits(float v) { return as_type<uint>(v); }
FUNCTION uint bits(half v) { return as_type<ushort>(v); }
FUNCTION uint bits(bfloat v) { return as_type<ushort>(v); }
// Number k of a word.
FUNCTION float number(uint word, int, float) { return as_type<float>(word); }
FUNCTION float number(uint word, int k, half) {
    return float(as_type<half>(ushort(k ? word >> 16 : word & 0xffff)));
}
FUNCTION float number(uint word, int k, bfloat) {
    return as_type<float>(k ? word & 0xffff0000 : word << 16);
}

// Elements per memory access: the largest power of two that divides W and fits in 16 bytes.
template <typename T, int W>
struct Access {
    enum {
        MOST = 16 / int(sizeof(T)),
        ELEMENTS = (W & -W) < MOST ? (W & -W) : MOST,
        BYTES = ELEMENTS * int(sizeof(T)),
        PER_WORD = 4 / int(sizeof(T)),
        WORDS = BYTES < 4 ? 1 : BYTES / 4,
    };
    typedef typename Words<WORDS>::type type;
};

// vectors<W>(p): whether load<W> and store may take vectors at addresses that are whole multiples of W
// from p on. A view may begin anywhere, so the address decides. That an address of device memory becomes a
// ulong in this way, PyTorch's kernels show (c10/metal/atomic.h). Constant memory is read number by number.
template <int W, typename T>
FUNCTION bool vectors(const device T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS == 1 || reinterpret_cast<ulong>(p) % A::BYTES == 0;
}
template <int W, typename T>
FUNCTION bool vectors(const constant T*) {
    return true;
}

// Where `vectors` has been asked already, so that load and store do not look at the address: a branch
// there would have all wait that follows. Address<P>::ALIGNED is whether a type is one of these.
template <typename P>
struct Aligned {
    P p;
    Aligned operator+(int64_t k) const { return {p + k}; }
    auto operator[](int64_t k) const -> decltype(p[k]) { return p[k]; }
};
template <typename P>
FUNCTION Aligned<P> aligned(P p) {
    return {p};
}
template <typename P>
struct Address {
    enum { ALIGNED = 0 };
};
template <typename P>
struct Address<Aligned<P>> {
    enum { ALIGNED = 1 };
};

// W numbers of memory as they are there, in words of 32 bits: a narrow one is half a register.
template <typename T, int W>
struct Raw {
    enum { PER_WORD = 4 / int(sizeof(T)), WORDS = (W + PER_WORD - 1) / PER_WORD };
    uint word[WORDS];
};
template <typename T, int W>
FUNCTION Floats<W> floats(Raw<T, W> raw) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Floats<W> out;
    UNROLL for (int k = 0; k < W; k++)
        out.at[k] = number(raw.word[k / PER_WORD], k % PER_WORD, T(0.0f));
    return out;
}

template <int W, typename T>
FUNCTION Raw<T, W> read(const constant T* p, bool) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out = {};
    UNROLL for (int k = 0; k < W; k++) out.word[k / PER_WORD] |= bits(p[k]) << (k % PER_WORD * 16);
    return out;
}
template <int W, typename T>
FUNCTION Raw<T, W> read(const device T* p, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out = {};
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            const typename A::type words = *(const device typename A::type*)(p + k);
            UNROLL for (int e = 0; e < A::WORDS; e++) out.word[k / PER_WORD + e] = word(words, e);
        }
    } else {
        UNROLL for (int k = 0; k < W; k++)
            out.word[k / PER_WORD] |= bits(p[k]) << (k % PER_WORD * 16);
    }
    return out;
}
// load_raw<W>(p): what floats(load_raw<W>(p)) makes load<W>(p) of. Where several are loaded before
// the first becomes floats, all are under way at once: a load that may have to take scalars is a
// branch, behind which the next one would wait.
template <int W, typename P>
FUNCTION auto load_raw(P p) {
    return read<W>(p, vectors<W>(p));
}
template <int W, typename P>
FUNCTION auto load_raw(Aligned<P> from) {
    return read<W>(from.p, true);
}
// load<W>(p): the W numbers from p on, as floats.
template <int W, typename P>
FUNCTION Floats<W> load(P p) {
    return floats(load_raw<W>(p));
}
// fetch_raw<W>(p): load_raw<W>(p) from an input whose rows a simdgroup reads in small pieces, many rows
// at a time.
template <int W, typename P>
FUNCTION auto fetch_raw(P p) {
    return load_raw<W>(p);
}
// start_copy(to, from): begins to copy 16 bytes of an input, which begin at a multiple of 16, to
// threadgroup memory. end_copies<LEFT>() waits for this thread's, but for those of the last LEFT times
// that it said mark_copies(). Here the first one waits. Nothing is copied from what is not Aligned.
template <typename P>
FUNCTION void start_copy(threadgroup uint4*, P) {}
template <typename T>
FUNCTION void start_copy(threadgroup uint4* to, Aligned<const device T*> from) {
    *to = *(const device uint4*)from.p;
}
FUNCTION void mark_copies() {}
template <int LEFT>
FUNCTION void end_copies() {}
// 8 numbers of T as they came there, 16 bytes a quad
template <typename T>
FUNCTION Raw<T, 8> raw_of(const thread uint4* quads, T) {
    Raw<T, 8> out;
    UNROLL for (int k = 0; k < Raw<T, 8>::WORDS; k++) out.word[k] = quads[k / 4][k % 4];
    return out;
}

template <int W, typename T>
FUNCTION void write(device T* p, Floats<W> v, bool by_vectors) {
    typedef Access<T, W> A;
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            typename A::type words;
            UNROLL for (int e = 0; e < A::WORDS; e++)
                set_word(words, e, pack(v.at + k + e * A::PER_WORD, T(0.0f)));
            *(device typename A::type*)(p + k) = words;
        }
    } else {
        UNROLL for (int k = 0; k < W; k++) p[k] = T(v.at[k]);
    }
}
// store(p, v): v's numbers from p on, each rounded to the nearest of p's type.
template <int W, typename P>
FUNCTION void store(P p, Floats<W> v) {
    write(p, v, vectors<W>(p));
}
template <int W, typename P>
FUNCTION void store(Aligned<P> to, Floats<W> v) {
    write(to.p, v, true);
}

// v as it would be in memory of p's type.
template <int W, typename T>
FUNCTION Raw<T, W> packed(const device T*, Floats<W> v) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += PER_WORD)
        out.word[k / PER_WORD] = pack(v.at + k, T(0.0f));
    return out;
}
template <int W, typename P>
FUNCTION auto packed(Aligned<P> like, Floats<W> v) {
    return packed(like.p, v);
}
template <int W, typename T>
FUNCTION void write_raw(device T* p, Raw<T, W> v, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            typename A::type words;
            UNROLL for (int e = 0; e < A::WORDS; e++)
                set_word(words, e, v.word[k / PER_WORD + e]);
            *(device typename A::type*)(p + k) = words;
        }
    } else {
        UNROLL for (int k = 0; k < W; k++)
            p[k] = T(number(v.word[k / PER_WORD], k % PER_WORD, T(0.0f)));
    }
}
// store_raw(p, v): v's numbers from p on.
template <typename P, typename T, int W>
FUNCTION void store_raw(P p, Raw<T, W> v) {
    write_raw(p, v, vectors<W>(p));
}
template <typename P, typename T, int W>
FUNCTION void store_raw(Aligned<P> to, Raw<T, W> v) {
    write_raw(to.p, v, true);
}

// ---- products of matrices ------------------------------------------------------------------------
// A simdgroup multiplies [16, DEPTH] by [DEPTH, 8]. Of the left factor a lane holds rows tile_row and
// tile_row + 8 in columns tile_pair and tile_pair + 1, of the sum the same places, and of the right
// factor two numbers: number e is in row right_row and column right_column. These are the places
// of numbers 0 and 1 of simdgroup_matrix's thread_elements, which is as wide as the matrix has places: MLX's
// own kernels build on both (mlx/backend/metal/kernels/steel/gemm/mma.h).

FUNCTION int tile_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
FUNCTION int tile_pair(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
// The lane of the same row whose tile_pair is 2 k.
FUNCTION int row_lane(int lane, int k) { return (lane & 22) + (k & 2) * 4 + k % 2; }
// The sum over the four lanes that hold a row.
FUNCTION float row_sum(float v) {
    v += simd_partner(v, 1);
    return v + simd_partner(v, 8);
}
FUNCTION int right_row(int lane, int) { return tile_row(lane); }
FUNCTION int right_column(int lane, int e) { return tile_pair(lane) + e; }

// Factors are in words, so that they can be in threadgroup memory.
struct Left {
    uint4 four[LEFT_QUADS];
};
struct Right {
    float2 pair;
};

// The upper row's two numbers, then the lower row's.
FUNCTION Left left(float upper, float upper_next, float lower, float lower_next) {
    Left out;
    out.four[0] = as_type<uint4>(float4(upper, upper_next, lower, lower_next));
    return out;
}
FUNCTION Right right(float first, float second) {
    Right out;
    out.pair = float2(first, second);
    return out;
}

// sum + a b, with the matrices of 8 by 8 that MLX's kernels fill and read in the same way.
FUNCTION Floats<4> multiply(Floats<4> sum, Left a, Right b) {
    const float4 rows = as_type<float4>(a.four[0]);
    simdgroup_float8x8 upper, lower, other, above, below;
    UNROLL for (int k = 0; k < 2; k++) {
        upper.thread_elements()[k] = rows[k], lower.thread_elements()[k] = rows[2 + k];
        other.thread_elements()[k] = b.pair[k];
        above.thread_elements()[k] = sum.at[k], below.thread_elements()[k] = sum.at[2 + k];
    }
    simdgroup_multiply_accumulate(above, upper, other, above);
    simdgroup_multiply_accumulate(below, lower, other, below);
    UNROLL for (int k = 0; k < 2; k++) {
        sum.at[k] = above.thread_elements()[k], sum.at[2 + k] = below.thread_elements()[k];
    }
    return sum;
}

// The longer product, of 16 rows of 32 numbers of T, is [16, 32] by [32, 8 TILES]. A lane holds 8
// numbers of each of its two rows, those from 4 tile_pair on, as they are in memory; and of each tile
// of the right factor two runs of 4 numbers, run e in rows 4 right_row(lane, e) to 4 right_row(lane, e)
// + 3 and column right_column(lane, e). Of the sum it gets two numbers of each tile in each half of the
// rows: number j of half h is in row 8 h + sum_row(lane, j) and column sum_column(lane, j).
FUNCTION int sum_row(int lane, int) { return tile_row(lane); }
FUNCTION int sum_column(int lane, int j) { return tile_pair(lane) + j; }

struct RightNumbers {
    Floats<4> run[2];
};
template <int TILES>
struct RightTiles {
    RightNumbers at[TILES];
};
// A lane's share of 16 rows and of a tile's columns: of the rows 8 numbers of each of its two.
struct Product {
    Floats<2> in_half[2];
};
template <int TILES>
struct Tiles {
    Product tile[TILES];
};
template <int TILES, int HEIGHT>
struct Products {
    Tiles<TILES> at[HEIGHT];
};
template <typename R>
struct Halves {
    R in_half[2];
};
// HEIGHT times 16 rows, BLOCKS times 32 numbers of each.
template <typename R, int BLOCKS, int HEIGHT>
struct Rows {
    Halves<R> at[BLOCKS][HEIGHT];
};

// Factors in threadgroup memory, where quad k of a lane is beside the next one's, so that no two lanes
// meet in a bank. (Others may be in registers: four(factors, block, k) is what a product asks for.)
template <int QUADS, typename S>
struct Shared {
    S from;
    int lane;
};
template <int QUADS, typename S>
FUNCTION uint4 four(Shared<QUADS, S> factors, int block, int k) {
    return factors.from[(block * QUADS + k) * SIMD + factors.lane];
}

// Product t of four takes the numbers t and 4 + t of every run of 8: any order will do.
template <typename T, int TILES>
struct RightFactor {
    enum { QUADS = 2 * TILES };
    uint4 four[QUADS];
};
// The last argument only names the type.
template <int TILES, typename T>
FUNCTION RightFactor<T, TILES> right_factor(RightTiles<TILES> tiles, T) {
    RightFactor<T, TILES> out;
    UNROLL for (int tile = 0; tile < TILES; tile++) {
        const Floats<4> f = tiles.at[tile].run[0], s = tiles.at[tile].run[1];
        out.four[2 * tile] = as_type<uint4>(float4(f.at[0], s.at[0], f.at[1], s.at[1]));
        out.four[2 * tile + 1] = as_type<uint4>(float4(f.at[2], s.at[2], f.at[3], s.at[3]));
    }
    return out;
}
// The products of BLOCKS times 32 numbers of each row with as many factors, added up.
template <int TILES, int BLOCKS, int HEIGHT, typename T, typename F>
FUNCTION Products<TILES, HEIGHT> multiply(Rows<Raw<T, 8>, BLOCKS, HEIGHT> rows, F factors) {
    Products<TILES, HEIGHT> out;
    UNROLL for (int k = 0; k < TILES * HEIGHT; k++) {
        const int tile = k % TILES;
        Floats<4> sum = {};
        UNROLL for (int block = 0; block < BLOCKS; block++) {
            const Halves<Raw<T, 8>> row = rows.at[block][k / TILES];
            const Floats<8> u = floats(row.in_half[0]), l = floats(row.in_half[1]);
            UNROLL for (int t = 0; t < 4; t++) {
                const float4 two = as_type<float4>(four(factors, block, 2 * tile + t / 2));
                const Right factor = t % 2 ? right(two.z, two.w) : right(two.x, two.y);
                sum = multiply(sum, left(u.at[t], u.at[4 + t], l.at[t], l.at[4 + t]), factor);
            }
        }
        UNROLL for (int j = 0; j < 4; j++)
            out.at[k / TILES].tile[tile].in_half[j / 2].at[j % 2] = sum.at[j];
    }
    return out;
}

//// the first lines of every kernel ////
const Place here = {
    threadgroup_position_in_grid.x, threadgroup_position_in_grid.y, threadgroups_per_grid.x,
    threadgroups_per_grid.y, thread_index_in_threadgroup, threads_per_threadgroup.x};
