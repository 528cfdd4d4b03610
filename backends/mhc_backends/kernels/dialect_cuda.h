// The dialect's words for mx.fast.cuda_kernel. dialect_metal.h has the same words in the same order.
//
// MLX has included cuda_fp16.h, cuda_bf16.h and cooperative_groups.h before this text.

// ---- words -------------------------------------------------------------------------------------

#define FUNCTION __device__ __forceinline__
#define BARRIER __syncthreads()
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_FEW(COUNT) PRAGMA(unroll (COUNT <= 4 ? COUNT : 1))
#define UNROLL_SMALL UNROLL_FEW(N)
#define threadgroup __shared__
#define MINUS_INFINITY __uint_as_float(0xff800000u)

// Every thread of the warp must come here; each gets the sum, in the same order everywhere.
FUNCTION float simd_sum(float v) {
    UNROLL for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

// The number of the lane whose place differs in the bits of `step`.
FUNCTION float simd_xor(float v, int step) { return __shfl_xor_sync(0xffffffffu, v, step); }
// The number of a lane, which need not be the same for all.
FUNCTION float simd_from(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
// simd_any(q): whether any lane says so.
FUNCTION bool simd_any(bool q) { return __any_sync(0xffffffffu, q); }

// 1 / v for v > 0, to the last place or the one before.
FUNCTION float reciprocal(float v) {
    float out;
    asm("rcp.approx.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

// Where a thread is. Threadgroups are lines of whole simdgroups, and none is cut off at the end.
struct Place {
    unsigned group_x, group_y;    // the threadgroup's position
    unsigned groups_x, groups_y;  // how many there are
    unsigned id, threads;         // within the threadgroup
};

enum { SIMD = 32, MOST_SIMDGROUPS = 32 };

//// twice: where vectors begin anywhere, and where all begin at their own multiples ////

// ---- numbers in memory and in registers --------------------------------------------------------

template <int W>
struct Floats {
    float at[W];
};

template <int COUNT>
struct Words {
    typedef uint4 type;
};
template <>
struct Words<2> {
    typedef uint2 type;
};
template <>
struct Words<1> {
    typedef uint1 type;
};
FUNCTION unsigned word(uint1 words, int) { return words.x; }
FUNCTION unsigned word(uint2 words, int k) { return k ? words.y : words.x; }
FUNCTION unsigned word(uint4 words, int k) {
    return k == 0 ? words.x : k == 1 ? words.y : k == 2 ? words.z : words.w;
}
// In PTX, since the compiler may make four stores of one, which cost four times as much.
FUNCTION void store_words(uint1* p, const unsigned* w) { p->x = w[0]; }
FUNCTION void store_words(uint2* p, const unsigned* w) {
    asm volatile("st.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}
FUNCTION void store_words(uint4* p, const unsigned* w) {
    asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                 "r"(w[3])
                 : "memory");
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

FUNCTION unsigned bits(float v) { return __float_as_uint(v); }
FUNCTION unsigned bits(__half v) { return __half_as_ushort(v); }
FUNCTION unsigned bits(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
// Number k of a word of 32 bits, which is one float or two of the narrow types; the last argument
// only names the type.
FUNCTION float number(unsigned word, int, float) { return __uint_as_float(word); }
FUNCTION float number(unsigned word, int k, __half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(k ? word >> 16 : word)));
}
FUNCTION float number(unsigned word, int k, __nv_bfloat16) {
    return __uint_as_float(k ? word & 0xffff0000u : word << 16);
}

// A view may begin anywhere, so the address decides, for a whole row alike.
template <typename T, int W>
FUNCTION bool takes_vectors(const T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS > 1 && (ALIGNED || reinterpret_cast<unsigned long long>(p) % A::BYTES == 0);
}
// Whether load<W> and store need not look at addresses that are whole multiples of W from p on.
template <int W, typename T>
FUNCTION bool vectors(const T* p) {
    return Access<T, W>::ELEMENTS == 1 || takes_vectors<T, W>(p);
}

// load<W>(p): the W numbers from p on, as floats.
template <int W, typename T>
FUNCTION Floats<W> load(const T* p) {
    typedef Access<T, W> A;
    Floats<W> out;
    if (takes_vectors<T, W>(p)) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            const typename A::type words = *reinterpret_cast<const typename A::type*>(p + k);
            UNROLL for (int e = 0; e < A::ELEMENTS; e++)
                out.at[k + e] =
                    number(word(words, e / A::PER_WORD), e % A::PER_WORD, static_cast<T>(0.0f));
        }
    } else {
        UNROLL for (int k = 0; k < W; k++) out.at[k] = static_cast<float>(p[k]);
    }
    return out;
}

// store(p, v): v's numbers from p on, each rounded to the nearest of p's type.
template <int W, typename T>
FUNCTION void store(T* p, Floats<W> v) {
    typedef Access<T, W> A;
    if (takes_vectors<T, W>(p)) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            unsigned words[A::WORDS] = {};
            UNROLL for (int e = 0; e < A::ELEMENTS; e++)
                words[e / A::PER_WORD] |= bits(static_cast<T>(v.at[k + e]))
                                          << (e % A::PER_WORD * 16);
            store_words(reinterpret_cast<typename A::type*>(p + k), words);
        }
    } else {
        UNROLL for (int k = 0; k < W; k++) p[k] = static_cast<T>(v.at[k]);
    }
}

// W numbers of memory as they are there, in words of 32 bits: a narrow one is half a register.
template <typename T, int W>
struct Raw {
    enum { PER_WORD = 4 / int(sizeof(T)), WORDS = (W + PER_WORD - 1) / PER_WORD };
    unsigned word[WORDS];
};

// load_raw<W>(p): what floats(load_raw<W>(p)) makes load<W>(p) of. Where several are loaded before
// the first becomes floats, all are under way at once: a load that may have to take scalars is a
// branch, behind which the next one would wait.
template <int W, typename T>
FUNCTION Raw<T, W> load_raw(const T* p) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    Raw<T, W> out;
    if (takes_vectors<T, W>(p)) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            const typename A::type words = *reinterpret_cast<const typename A::type*>(p + k);
            UNROLL for (int e = 0; e < A::WORDS; e++)
                out.word[k / PER_WORD + e] = word(words, e);
        }
    } else {
        UNROLL for (int k = 0; k < Raw<T, W>::WORDS; k++) out.word[k] = 0;
        UNROLL for (int k = 0; k < W; k++)
            out.word[k / PER_WORD] |= bits(p[k]) << (k % PER_WORD * 16);
    }
    return out;
}
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
FUNCTION Floats<W> rounded(const T*, Floats<W> v) {
    UNROLL for (int k = 0; k < W; k++)
        v.at[k] = static_cast<float>(static_cast<T>(v.at[k]));
    return v;
}

// ---- products of matrices ------------------------------------------------------------------------
// A simdgroup multiplies [16, 8] by [8, 8]. Of the left factor a lane holds rows tile_row and
// tile_row + 8 in columns tile_pair and tile_pair + 1, of the sum the same places, and of the right
// factor two numbers: number e is in row right_row and column right_column. (The tensor cores call
// the columns of the left factor, and the rows of the right one, by other numbers, which is one.)

FUNCTION int tile_row(int lane) { return lane / 4; }
FUNCTION int tile_pair(int lane) { return lane % 4 * 2; }
// The sum over the four lanes that hold a row.
FUNCTION float row_sum(float v) {
    v += simd_xor(v, 1);
    return v + simd_xor(v, 2);
}
FUNCTION int right_row(int lane, int e) { return tile_pair(lane) + e; }
FUNCTION int right_column(int lane, int) { return tile_row(lane); }

#if __CUDA_ARCH__ >= 800

// The tensor cores multiply numbers of 11 significant bits. So a float is the sum of two of them,
// to float32's own rounding; the product of the two lower ones is below it and left out.
struct Split {
    unsigned upper, lower;
};
FUNCTION unsigned tensor_float(float v) {
    unsigned out;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
    return out;
}
FUNCTION Split split(float v) {
    Split out;
    out.upper = tensor_float(v);
    out.lower = tensor_float(v - __uint_as_float(out.upper));
    return out;
}
FUNCTION Split whole(float v) {
    Split out;
    out.upper = __float_as_uint(v), out.lower = 0;
    return out;
}

struct Left {
    Split at[4];  // the upper row's two numbers, then the lower row's
};
struct Right {
    Split at[2];
};
FUNCTION Right right(float first, float second) {
    Right out;
    out.at[0] = split(first), out.at[1] = split(second);
    return out;
}
// EXACT: the numbers have no more than 11 significant bits, as those of narrow types.
template <bool EXACT>
FUNCTION Left left(float upper, float upper_next, float lower, float lower_next) {
    const float all[4] = {upper, upper_next, lower, lower_next};
    Left out;
    UNROLL for (int k = 0; k < 4; k++) out.at[k] = EXACT ? whole(all[k]) : split(all[k]);
    return out;
}

// The tensor cores count down the rows first.
FUNCTION Floats<4> tensor_multiply(Floats<4> sum, unsigned a0, unsigned a1, unsigned a2,
                                   unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    return sum;
}

// sum + a b, in full float32
template <bool EXACT>
FUNCTION Floats<4> multiply(Floats<4> sum, Left a, Right b) {
    const Split *l = a.at, *r = b.at;
    sum = tensor_multiply(sum, l[0].upper, l[2].upper, l[1].upper, l[3].upper, r[0].lower,
                          r[1].lower);
    if (!EXACT)
        sum = tensor_multiply(sum, l[0].lower, l[2].lower, l[1].lower, l[3].lower, r[0].upper,
                              r[1].upper);
    return tensor_multiply(sum, l[0].upper, l[2].upper, l[1].upper, l[3].upper, r[0].upper,
                           r[1].upper);
}

#else  // before there were tensor cores for floats

typedef Floats<4> Left;
typedef Floats<2> Right;
FUNCTION Right right(float first, float second) { return {{first, second}}; }
template <bool EXACT>
FUNCTION Left left(float upper, float upper_next, float lower, float lower_next) {
    return {{upper, upper_next, lower, lower_next}};
}
template <bool EXACT>
FUNCTION Floats<4> multiply(Floats<4> sum, Left a, Right b) {
    const int lane = threadIdx.x % 32, pair = tile_pair(lane);
    UNROLL for (int k = 0; k < 8; k++) {
        const float upper = __shfl_sync(0xffffffffu, a.at[k % 2], lane / 4 * 4 + k / 2);
        const float lower = __shfl_sync(0xffffffffu, a.at[2 + k % 2], lane / 4 * 4 + k / 2);
        UNROLL for (int e = 0; e < 2; e++) {
            const float other = __shfl_sync(0xffffffffu, b.at[k % 2], (pair + e) * 4 + k / 2);
            sum.at[e] = fma(upper, other, sum.at[e]);
            sum.at[2 + e] = fma(lower, other, sum.at[2 + e]);
        }
    }
    return sum;
}

#endif

//// the first lines of every kernel ////
const Place here = {blockIdx.x, blockIdx.y, gridDim.x, gridDim.y, threadIdx.x, blockDim.x};
