// The dialect's words for mx.fast.cuda_kernel. dialect_metal.h has the same words in the same order.
//
// MLX has included cuda_fp16.h, cuda_bf16.h and cooperative_groups.h before this text. It is for GPUs
// from compute capability 8.0 on, whose tensor cores take bfloat16 and parts of floats.

// ---- words -------------------------------------------------------------------------------------

#define FUNCTION __device__ __forceinline__
#define BARRIER __syncthreads()
// SIMD_BARRIER is a BARRIER of the lanes of a simdgroup. TOGETHER must come before products of matrices,
// whose instructions are of all lanes together: the loads and stores before may have parted them.
#define TOGETHER __syncwarp()
#define SIMD_BARRIER __syncwarp()
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_FEW(COUNT) PRAGMA(unroll (COUNT <= 4 ? COUNT : 1))
#define UNROLL_SMALL UNROLL_FEW(N)
#define threadgroup __shared__
// `threadgroup LAUNCHED uint4 p[LAUNCH_SIZE(8)];`: as many as the launch gives, which are that many.
#define LAUNCHED extern
#define LAUNCH_SIZE(NUMBER)
#define MINUS_INFINITY __uint_as_float(0xff800000u)

// Every thread of the warp must come here; each gets the sum, in the same order everywhere.
FUNCTION float simd_sum(float v) {
    UNROLL for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

// The number of the lane whose place differs in the bits of `step`.
FUNCTION float simd_partner(float v, int step) { return __shfl_xor_sync(0xffffffffu, v, step); }
// The number of a lane, which need not be the same for all.
FUNCTION float simd_from(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
// simd_any(q): whether any lane says so.
FUNCTION bool simd_any(bool q) { return __any_sync(0xffffffffu, q); }

// The functions as the dialect for Metal has to call them, for floats.
struct precise {
    static FUNCTION float exp(float v) { return ::exp(v); }
    static FUNCTION float log(float v) { return ::log(v); }
    static FUNCTION float sqrt(float v) { return ::sqrt(v); }
    static FUNCTION float max(float u, float v) { return ::max(u, v); }
    static FUNCTION float min(float u, float v) { return ::min(u, v); }
};

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
// Products of matrices: the columns of a left factor, those of a tile of the right one, and how many
// uint4 a lane's share of a left factor takes, and at most of TILES tiles of a long right one.
enum { DEPTH = 8, TILE_COLUMNS = 8, LEFT_QUADS = 2 };
#define RIGHT_QUADS(TILES) (4 * (TILES))

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

// vectors<W>(p): whether load<W> and store may take vectors at addresses that are whole multiples of W
// from p on. A view may begin anywhere, so the address decides.
template <int W, typename T>
FUNCTION bool vectors(const T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS == 1 || reinterpret_cast<unsigned long long>(p) % A::BYTES == 0;
}

// Where `vectors` has been asked already, so that load and store do not look at the address: a branch
// there would have all wait that follows. Address<P>::ALIGNED is whether a type is one of these.
template <typename P>
struct Aligned {
    P p;
    FUNCTION Aligned operator+(int64_t k) const { return {p + k}; }
    FUNCTION auto operator[](int64_t k) const -> decltype(p[k]) { return p[k]; }
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
    unsigned word[WORDS];
};
template <typename T, int W>
FUNCTION Floats<W> floats(Raw<T, W> raw) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Floats<W> out;
    UNROLL for (int k = 0; k < W; k++)
        out.at[k] = number(raw.word[k / PER_WORD], k % PER_WORD, static_cast<T>(0.0f));
    return out;
}

template <int W, typename T>
FUNCTION Raw<T, W> read(const T* p, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    Raw<T, W> out;
    if (A::ELEMENTS > 1 && by_vectors) {
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
// fetch_raw<W>(p): load_raw<W>(p) from an input whose rows a simdgroup reads in pieces of 64 bytes, many
// rows at a time: the memory is asked for their whole lines, as the other half is read soon after.
FUNCTION uint4 fetch_words(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}
FUNCTION uint2 fetch_words(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}
FUNCTION uint1 fetch_words(const uint1* p) { return *p; }
template <int W, typename T>
FUNCTION Raw<T, W> fetch(const T* p, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS == 1 || !by_vectors) return read<W>(p, false);
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
        const typename A::type words = fetch_words(reinterpret_cast<const typename A::type*>(p + k));
        UNROLL for (int e = 0; e < A::WORDS; e++) out.word[k / PER_WORD + e] = word(words, e);
    }
    return out;
}
template <int W, typename P>
FUNCTION auto fetch_raw(P p) {
    return fetch<W>(p, vectors<W>(p));
}
template <int W, typename P>
FUNCTION auto fetch_raw(Aligned<P> from) {
    return fetch<W>(from.p, true);
}
// start_copy(to, from): begins to copy 16 bytes of an input, which begin at a multiple of 16, to
// threadgroup memory. end_copies<LEFT>() waits for this thread's, but for those of the last LEFT times
// that it said mark_copies(). Until then a row on its way needs no registers, nor a place in the cache,
// where rows that lie a power of two apart would drive out each other. Nothing is copied from what is not
// Aligned.
template <typename P>
FUNCTION void start_copy(uint4*, P) {}
template <typename P>
FUNCTION void start_copy(uint4* to, Aligned<P> from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from.p))
                 : "memory");
}
FUNCTION void mark_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
FUNCTION void end_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
// 8 numbers of T as they came there, 16 bytes a quad
template <typename T>
FUNCTION Raw<T, 8> raw_of(const uint4* quads, T) {
    Raw<T, 8> out;
    UNROLL for (int k = 0; k < Raw<T, 8>::WORDS; k++) out.word[k] = word(quads[k / 4], k % 4);
    return out;
}
template <int W, typename T>
FUNCTION void write(T* p, Floats<W> v, bool by_vectors) {
    typedef Access<T, W> A;
    if (A::ELEMENTS > 1 && by_vectors) {
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
FUNCTION unsigned pair(float first, float second, __half) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&both);
}
FUNCTION unsigned pair(float first, float second, __nv_bfloat16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&both);
}
FUNCTION unsigned pair(float first, float, float) { return bits(first); }
template <int W, typename T>
FUNCTION Raw<T, W> packed(const T*, Floats<W> v) {
    enum { PER_WORD = Raw<T, W>::PER_WORD };
    Raw<T, W> out;
    UNROLL for (int k = 0; k < W; k += PER_WORD)
        out.word[k / PER_WORD] = pair(v.at[k], v.at[k + PER_WORD - 1], static_cast<T>(0.0f));
    return out;
}
template <int W, typename P>
FUNCTION auto packed(Aligned<P> like, Floats<W> v) {
    return packed(like.p, v);
}
template <int W, typename T>
FUNCTION void write_raw(T* p, Raw<T, W> v, bool by_vectors) {
    typedef Access<T, W> A;
    enum { PER_WORD = A::PER_WORD };
    if (A::ELEMENTS > 1 && by_vectors) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS)
            store_words(reinterpret_cast<typename A::type*>(p + k), v.word + k / PER_WORD);
    } else {
        UNROLL for (int k = 0; k < W; k++)
            p[k] = static_cast<T>(number(v.word[k / PER_WORD], k % PER_WORD, static_cast<T>(0.0f)));
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
// factor two numbers: number e is in row right_row and column right_column. (The tensor cores call
// the columns of the left factor, and the rows of the right one, by other numbers, which is one.)

FUNCTION int tile_row(int lane) { return lane / 4; }
FUNCTION int tile_pair(int lane) { return lane % 4 * 2; }
// The lane of the same row whose tile_pair is 2 k.
FUNCTION int row_lane(int lane, int k) { return lane / 4 * 4 + k; }
// The sum over the four lanes that hold a row.
FUNCTION float row_sum(float v) {
    v += simd_partner(v, 1);
    return v + simd_partner(v, 2);
}
FUNCTION int right_row(int lane, int e) { return tile_pair(lane) + e % 2; }
FUNCTION int right_column(int lane, int) { return tile_row(lane); }

// Factors are in words, so that they can be in threadgroup memory.
struct Left {
    uint4 four[LEFT_QUADS];
};
struct Right {
    uint4 four;
};

// The tensor cores multiply numbers of 11 significant bits (TF32), and of others leave off the last 13.
// So a float is the sum of two of them, to float32's own rounding: its nearest, and the rest; the
// product of two rests is below that and left out. (cvt.rna.tf32 takes 5 instructions. Where a NaN's
// bits overflow here, the rest is one.)
FUNCTION unsigned tensor_float(float v) { return (__float_as_uint(v) + 0x1000u) & 0xffffe000u; }
FUNCTION unsigned tensor_rest(float v, unsigned upper) {
    return __float_as_uint(v - __uint_as_float(upper));
}
FUNCTION Floats<4> tensor_multiply(Floats<4> sum, uint4 a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    return sum;
}

// The upper row's two numbers, then the lower row's.
FUNCTION Left left(float upper, float upper_next, float lower, float lower_next) {
    Left out;
    out.four[0] = make_uint4(tensor_float(upper), tensor_float(lower), tensor_float(upper_next),
                             tensor_float(lower_next));
    out.four[1] = make_uint4(
        tensor_rest(upper, out.four[0].x), tensor_rest(lower, out.four[0].y),
        tensor_rest(upper_next, out.four[0].z), tensor_rest(lower_next, out.four[0].w));
    return out;
}
FUNCTION Right right(float first, float second) {
    Right out;
    out.four.x = tensor_float(first), out.four.y = tensor_float(second);
    out.four.z = tensor_rest(first, out.four.x), out.four.w = tensor_rest(second, out.four.y);
    return out;
}

// sum + a b, in full float32, and the smallest products first: a tensor core does not round a sum but
// cuts it off.
FUNCTION Floats<4> multiply(Floats<4> sum, Left a, Right b) {
    sum = tensor_multiply(sum, a.four[0], b.four.z, b.four.w);
    sum = tensor_multiply(sum, a.four[1], b.four.x, b.four.y);
    return tensor_multiply(sum, a.four[0], b.four.x, b.four.y);
}

// The longer product, of 16 rows of 32 numbers of T, is [16, 32] by [32, 8 TILES]. A lane holds 8
// numbers of each of its two rows, those from 4 tile_pair on, as they are in memory; and of each tile
// of the right factor two runs of 4 numbers, run e in rows 4 right_row(lane, e) to 4 right_row(lane, e)
// + 3 and column right_column(lane, e). Of the sum it gets two numbers of each tile in each half of the
// rows: number j of half h is in row 8 h + sum_row(lane, j) and column sum_column(lane, j).
//
// The tensor cores take the right factor as their left one, transposed: so a row's numbers are in the
// registers in which they came. A float is the sum of PARTS numbers that they can multiply, and the
// rows of their left factor are the columns of the first part of all tiles, then those of the next
// part: 16 make a pair.
FUNCTION int sum_row(int lane, int j) { return tile_pair(lane) + j; }
FUNCTION int sum_column(int lane, int) { return tile_row(lane); }

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

// One instruction's share of a row: its numbers, and for floats what these leave.
struct Piece {
    unsigned whole[2], rest[2];
};
// A step takes the numbers t and 4 + t of every run of 8: any order will do.
template <typename T>
struct Parts {
    enum { PARTS = 2, STEPS = 4 };
};
template <typename T>
FUNCTION Piece piece_of(Raw<T, 8> row, int t) {
    const Floats<8> v = floats(row);
    if (sizeof(T) < 4) return {{bits(v.at[t]), bits(v.at[4 + t])}, {}};  // they are whole
    const Right both = right(v.at[t], v.at[4 + t]);
    return {{both.four.x, both.four.y}, {both.four.z, both.four.w}};
}
// The first part of the numbers, which keep the rest.
template <typename T>
FUNCTION void split_off(unsigned words[][2], RightNumbers& numbers, T) {
    UNROLL for (int k = 0; k < 8; k++) {
        float& v = numbers.run[k / 4].at[k % 4];
        // without a rest that stays one, a NaN must be one here (0x7fffffff, which GPUs make, is not)
        words[k % 4][k / 4] = v != v ? 0x7fffffffu : tensor_float(v);
        v -= __uint_as_float(words[k % 4][k / 4]);
    }
}
template <typename T>
FUNCTION Floats<4> step_multiply(Floats<4> sum, uint4 a, const unsigned* b, T) {
    return tensor_multiply(sum, a, b[0], b[1]);
}

// Numbers of 8 significant bits are multiplied twice as fast, 16 at a time.
template <>
struct Parts<__nv_bfloat16> {
    enum { PARTS = 3, STEPS = 2 };
};
FUNCTION Piece piece_of(Raw<__nv_bfloat16, 8> row, int t) {
    return {{row.word[2 * t], row.word[2 * t + 1]}, {}};
}
FUNCTION void split_off(unsigned words[][2], RightNumbers& numbers, __nv_bfloat16 t) {
    UNROLL for (int k = 0; k < 4; k++) {
        float* v = numbers.run[k / 2].at + k % 2 * 2;
        const unsigned both = pair(v[0], v[1], t);
        v[0] -= number(both, 0, t), v[1] -= number(both, 1, t);
        words[k / 2][k % 2] = both;
    }
}
FUNCTION Floats<4> step_multiply(Floats<4> sum, uint4 a, const unsigned* b, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]));
    return sum;
}

template <typename T, int TILES>
struct RightFactor {
    enum {
        PARTS = Parts<T>::PARTS,
        STEPS = Parts<T>::STEPS,
        PAIRS = (PARTS * TILES + 1) / 2,
        QUADS = PAIRS * STEPS
    };
    uint4 four[QUADS];
};
// The last argument only names the type.
template <int TILES, typename T>
FUNCTION RightFactor<T, TILES> right_factor(RightTiles<TILES> tiles, T t) {
    typedef RightFactor<T, TILES> Factor;
    Factor out = {};
    UNROLL for (int eight = 0; eight < Factor::PARTS * TILES; eight++) {
        unsigned words[Factor::STEPS][2];
        split_off(words, tiles.at[eight % TILES], t);
        UNROLL for (int k = 0; k < Factor::STEPS; k++) {
            uint4& four = out.four[eight / 2 * Factor::STEPS + k];
            if (eight % 2 == 0)
                four.x = words[k][0], four.z = words[k][1];
            else
                four.y = words[k][0], four.w = words[k][1];
        }
    }
    return out;
}
// The products of BLOCKS times 32 numbers of each row with as many factors, added up in full float32,
// the smallest first.
template <int TILES, int BLOCKS, int HEIGHT, typename T, typename F>
FUNCTION Products<TILES, HEIGHT> multiply(Rows<Raw<T, 8>, BLOCKS, HEIGHT> rows, F factors) {
    typedef RightFactor<T, TILES> Factor;
    Products<TILES, HEIGHT> out;
    UNROLL for (int pair = Factor::PAIRS - 1; pair >= 0; pair--) {
        Floats<4> sums[2 * HEIGHT] = {};
        // of floats, first what their own rests bring with the first parts of the factors
        UNROLL for (int whole = sizeof(T) == 4 && 2 * pair < TILES ? 0 : 1; whole < 2; whole++) {
            UNROLL for (int k = 0; k < BLOCKS * Factor::STEPS; k++) {
                const int block = k / Factor::STEPS, step = k % Factor::STEPS;
                const uint4 a = four(factors, block, pair * Factor::STEPS + step);
                UNROLL for (int h = 0; h < 2 * HEIGHT; h++) {
                    const Piece b = piece_of(rows.at[block][h / 2].in_half[h % 2], step);
                    sums[h] = step_multiply(sums[h], a, whole ? b.whole : b.rest, T(0.0f));
                }
            }
        }
        // of a single tile, both parts are in one pair: the second one is the smaller one
        UNROLL for (int k = 0; k < 8 * HEIGHT; k++) {
            const int h = k / 4, j = (k + 2) % 4, eight = 2 * pair + j / 2;
            const float sum = sums[h].at[j];
            if (eight < Factor::PARTS * TILES) {
                float& own = out.at[h / 2].tile[eight % TILES].in_half[h % 2].at[j % 2];
                own = eight / TILES == Factor::PARTS - 1 ? sum : own + sum;
            }
        }
    }
    return out;
}

//// the first lines of every kernel ////
const Place here = {blockIdx.x, blockIdx.y, gridDim.x, gridDim.y, threadIdx.x, blockDim.x};
