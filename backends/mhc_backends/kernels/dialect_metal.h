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
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_SMALL _Pragma("clang loop unroll_count(N <= 4 ? N : 1)")
// `threadgroup float p[8];` declares memory of a threadgroup, and simd_sum(v) sums over 32 threads.

// Where a thread is. Threadgroups are lines of whole simdgroups, and none is cut off at the end.
struct Place {
    uint group_x, group_y;    // the threadgroup's position
    uint groups_x, groups_y;  // how many there are
    uint id, threads;         // within the threadgroup
};

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
    return A::ELEMENTS > 1 && reinterpret_cast<uintptr_t>(p) % A::BYTES == 0;
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

//// the first lines of every kernel ////
const Place here = {
    threadgroup_position_in_grid.x, threadgroup_position_in_grid.y, threadgroups_per_grid.x,
    threadgroups_per_grid.y, thread_index_in_threadgroup, threads_per_threadgroup.x};
