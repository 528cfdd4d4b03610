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
// Must come before products of matrices, whose instructions are of all lanes together: the loads and
// stores before may have parted them.
#define TOGETHER simdgroup_barrier(mem_flags::mem_none)
#define UNROLL _Pragma("clang loop unroll(full)")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_FEW(COUNT) PRAGMA(clang loop unroll_count(COUNT <= 4 ? COUNT : 1))
#define UNROLL_SMALL UNROLL_FEW(N)
#define MINUS_INFINITY (-INFINITY)
// `threadgroup float p[8];` declares memory of a threadgroup, and simd_sum(v) sums over 32 threads.

// The number of the lane whose place differs in the bits of `step`.
FUNCTION float simd_xor(float v, int step) { return simd_shuffle_xor(v, ushort(step)); }
// The number of a lane, which need not be the same for all.
FUNCTION float simd_from(float v, int lane) { return simd_shuffle(v, ushort(lane)); }
// simd_any(q): whether any lane says so.

// 1 / v for v > 0, to the last place or the one before.
FUNCTION float reciprocal(float v) { return 1.0f / v; }

// Where a thread is. Threadgroups are lines of whole simdgroups, and none is cut off at the end.
struct Place {
    uint group_x, group_y;    // the threadgroup's position
    uint groups_x, groups_y;  // how many there are
    uint id, threads;         // within the threadgroup
};

enum { SIMD = 32, MOST_SIMDGROUPS = 32 };
// Products of matrices: the columns of a left factor, and of uint4 the most that a lane's share of a
// factor takes.
enum { DEPTH = 8, LEFT_QUADS = 1, RIGHT_QUADS = 2 };

//// twice: where vectors begin anywhere, and where all begin at their own multiples ////

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
FUNCTION void unpack(uint word, thread float* to, float) { to[0] = as_type<float>(word); }
FUNCTION void unpack(uint word, thread float* to, half) {
    const half2 pair = as_type<half2>(word);
    to[0] = float(pair.x), to[1] = float(pair.y);
}
FUNCTION void unpack(uint word, thread float* to, bfloat) {
    const bfloat2 pair = as_type<bfloat2>(word);
    to[0] = float(pair.x), to[1] = float(pair.y);
}
FUNCTION uint pack(const thread float* from, float) { return as_type<uint>(from[0]); }
FUNCTION uint pack(const thread float* from, half) {
    return as_type<uint>(half2(half(from[0]), half(from[1])));
}
FUNCTION uint pack(const thread float* from, bfloat) {
    return as_type<uint>(bfloat2(bfloat(from[0]), bfloat(from[1])));
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

// A view may begin anywhere, so the address decides, for a whole row alike.
template <typename T, int W, typename P>
FUNCTION bool takes_vectors(P p) {
    typedef Access<T, W> A;
    return A::ELEMENTS > 1 && (ALIGNED || reinterpret_cast<uintptr_t>(p) % A::BYTES == 0);
}
// Whether load<W> and store need not look at addresses that are whole multiples of W from p on.
template <int W, typename T>
FUNCTION bool vectors(const device T* p) {
    return Access<T, W>::ELEMENTS == 1 || takes_vectors<T, W>(p);
}
template <int W, typename T>
FUNCTION bool vectors(const constant T* p) {
    return Access<T, W>::ELEMENTS == 1 || takes_vectors<T, W>(p);
}

// load<W>(p): the W numbers from p on, as floats.
#define MHC_LOAD(space)                                                                      \
    template <int W, typename T>                                                             \
    FUNCTION Floats<W> load(const space T* p) {                                              \
        typedef Access<T, W> A;                                                              \
        Floats<W> out;                                                                       \
        if (takes_vectors<T, W>(p)) {                                                        \
            UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {                                \
                const typename A::type words = *(const space typename A::type*)(p + k);      \
                UNROLL for (int e = 0; e < A::WORDS; e++)                                    \
                    unpack(word(words, e), out.at + k + e * A::PER_WORD, T(0.0f));           \
            }                                                                                \
        } else {                                                                             \
            UNROLL for (int k = 0; k < W; k++) out.at[k] = float(p[k]);                      \
        }                                                                                    \
        return out;                                                                          \
    }
MHC_LOAD(device)
MHC_LOAD(constant)
#undef MHC_LOAD

// store(p, v): v's numbers from p on, each rounded to the nearest of p's type.
template <int W, typename T>
FUNCTION void store(device T* p, Floats<W> v) {
    typedef Access<T, W> A;
    if (takes_vectors<T, W>(p)) {
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

// W numbers of memory as they are there, in words of 32 bits: a narrow one is half a register.
template <typename T, int W>
struct Raw {
    enum { PER_WORD = 4 / int(sizeof(T)), WORDS = (W + PER_WORD - 1) / PER_WORD };
    uint word[WORDS];
};
FUNCTION uint bits(float v) { return as_type<uint>(v); }
FUNCTION uint bits(half v) { return as_type<ushort>(v); }
FUNCTION uint bits(bfloat v) { return as_type<ushort>(v); }
// The last argument only names the type.
FUNCTION float number(uint word, int, float) { return as_type<float>(word); }
FUNCTION float number(uint word, int second, half) {
    return float(as_type<half>(ushort(second ? word >> 16 : word & 0xffff)));
}
FUNCTION float number(uint word, int second, bfloat) {
    return as_type<float>(second ? word & 0xffff0000 : word << 16);
}

// load_raw<W>(p): what floats(load_raw<W>(p)) makes load<W>(p) of. Where several are loaded before
// the first becomes floats, all are under way at once: a load that may have to take scalars is a
// branch, behind which the next one would wait.
#define MHC_LOAD_RAW(space)                                                                  \
    template <int W, typename T>                                                             \
    FUNCTION Raw<T, W> load_raw(const space T* p) {                                          \
        typedef Access<T, W> A;                                                              \
        enum { PER_WORD = Raw<T, W>::PER_WORD };                                             \
        Raw<T, W> out;                                                                       \
        if (takes_vectors<T, W>(p)) {                                                        \
            UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {                                \
                const typename A::type words = *(const space typename A::type*)(p + k);      \
                UNROLL for (int e = 0; e < A::WORDS; e++)                                    \
                    out.word[k / PER_WORD + e] = word(words, e);                             \
            }                                                                                \
        } else {                                                                             \
            UNROLL for (int k = 0; k < Raw<T, W>::WORDS; k++) out.word[k] = 0;               \
            UNROLL for (int k = 0; k < W; k++)                                               \
                out.word[k / PER_WORD] |= bits(p[k]) << (k % PER_WORD * 16);                 \
        }                                                                                    \
        return out;                                                                          \
    }
MHC_LOAD_RAW(device)
MHC_LOAD_RAW(constant)
#undef MHC_LOAD_RAW
template <typename T, int W>
FUNCTION Floats<W> floats(Raw<T, W> raw) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Floats<W> out;
    UNROLL for (int k = 0; k < W; k++)
        out.at[k] = number(raw.word[k / PER_WORD], k % PER_WORD, T(0.0f));
    return out;
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
// store_raw(p, v): v's numbers from p on.
template <int W, typename T>
FUNCTION void store_raw(device T* p, Raw<T, W> v) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (takes_vectors<T, W>(p)) {
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

// ---- products of matrices ------------------------------------------------------------------------
// A simdgroup multiplies [16, DEPTH] by [DEPTH, 8]. Of the left factor a lane holds rows tile_row and
// tile_row + 8 in columns tile_pair and tile_pair + 1, of the sum the same places, and of the right
// factor two numbers: number e is in row right_row and column right_column. These are the places
// that simdgroup_matrix's thread_elements has, on which MLX's own kernels build as well
// (mlx/backend/metal/kernels/steel/gemm/mma.h).

FUNCTION int tile_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
FUNCTION int tile_pair(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
// The sum over the four lanes that hold a row.
FUNCTION float row_sum(float v) {
    v += simd_xor(v, 1);
    return v + simd_xor(v, 8);
}
FUNCTION int right_row(int lane, int) { return tile_row(lane); }
FUNCTION int right_column(int lane, int e) { return tile_pair(lane) + e; }

// Factors are in words, so that they can be in threadgroup memory.
struct Left {
    uint4 quad[LEFT_QUADS];
};
struct Right {
    float2 pair;
};

// The upper row's two numbers, then the lower row's.
FUNCTION Left left(float upper, float upper_next, float lower, float lower_next) {
    Left out;
    out.quad[0] = as_type<uint4>(float4(upper, upper_next, lower, lower_next));
    return out;
}
FUNCTION Right right(float first, float second) {
    Right out;
    out.pair = float2(first, second);
    return out;
}

// sum + a b
FUNCTION Floats<4> multiply(Floats<4> sum, Left a, Right b) {
    const float4 rows = as_type<float4>(a.quad[0]);
    simdgroup_float8x8 upper, lower, other, above, below;
    upper.thread_elements() = rows.xy, lower.thread_elements() = rows.zw;
    other.thread_elements() = b.pair;
    above.thread_elements() = float2(sum.at[0], sum.at[1]);
    below.thread_elements() = float2(sum.at[2], sum.at[3]);
    simdgroup_multiply_accumulate(above, upper, other, above);
    simdgroup_multiply_accumulate(below, lower, other, below);
    sum.at[0] = above.thread_elements()[0], sum.at[1] = above.thread_elements()[1];
    sum.at[2] = below.thread_elements()[0], sum.at[3] = below.thread_elements()[1];
    return sum;
}

// The longer product, of 16 rows of 32 numbers of T, is [16, 32] by [32, TILE_COLUMNS]. A lane holds 8
// numbers of each of its two rows, those from 4 tile_pair on, as they are in memory; and of the right
// factor RUNS runs of 4 numbers, run e in rows 4 right_row(lane, e) to 4 right_row(lane, e) + 3 and
// column right_column(lane, e). Of the sum it gets PLACES numbers in each half of the rows: number j
// of half h is in row 8 h + sum_row(lane, j) and column sum_column(lane, j).
enum { TILE_COLUMNS = 8, RUNS = 2, PLACES = 2 };
FUNCTION int sum_row(int lane, int) { return tile_row(lane); }
FUNCTION int sum_column(int lane, int j) { return tile_pair(lane) + j; }

struct RightNumbers {
    Floats<4> run[RUNS];
};
struct Product {
    Floats<PLACES> in_half[2];
};

// Product t of four takes the numbers t and 4 + t of every run of 8: any order will do.
template <typename T>
struct RightFactor {
    enum { QUADS = 2 };
    uint4 quad[QUADS];
};
// The last argument only names the type.
template <typename T>
FUNCTION RightFactor<T> right_factor(RightNumbers numbers, T) {
    RightFactor<T> out;
    const thread float *f = numbers.run[0].at, *s = numbers.run[1].at;
    out.quad[0] = as_type<uint4>(float4(f[0], s[0], f[1], s[1]));
    out.quad[1] = as_type<uint4>(float4(f[2], s[2], f[3], s[3]));
    return out;
}
// a b
template <typename T>
FUNCTION Product multiply(Raw<T, 8> upper, Raw<T, 8> lower, RightFactor<T> b) {
    const Floats<8> u = floats(upper), l = floats(lower);
    Floats<4> sum = {};
    UNROLL for (int t = 0; t < 4; t++) {
        const float4 two = as_type<float4>(b.quad[t / 2]);
        const Right factor = t % 2 ? right(two.z, two.w) : right(two.x, two.y);
        sum = multiply(sum, left(u.at[t], u.at[4 + t], l.at[t], l.at[4 + t]), factor);
    }
    Product out;
    UNROLL for (int j = 0; j < PLACES; j++) {
        out.in_half[0].at[j] = sum.at[j];
        out.in_half[1].at[j] = sum.at[PLACES + j];
    }
    return out;
}

//// the first lines of every kernel ////
const Place here = {
    threadgroup_position_in_grid.x, threadgroup_position_in_grid.y, threadgroups_per_grid.x,
    threadgroups_per_grid.y, thread_index_in_threadgroup, threads_per_threadgroup.x};
