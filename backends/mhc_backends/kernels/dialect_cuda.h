// The dialect's words for mx.fast.cuda_kernel. dialect_metal.h has the same words in the same order.
//
// MLX has included cuda_fp16.h, cuda_bf16.h and cooperative_groups.h before this text.

// ---- words -------------------------------------------------------------------------------------

#define FUNCTION __device__ __forceinline__
#define BARRIER __syncthreads()
#define UNROLL _Pragma("unroll")
#define UNROLL_SMALL _Pragma("unroll (N <= 4 ? N : 1)")
#define threadgroup __shared__

// Every thread of the warp must come here; each gets the sum, in the same order everywhere.
FUNCTION float simd_sum(float v) {
    UNROLL for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

// Where a thread is. Threadgroups are lines of whole simdgroups, and none is cut off at the end.
struct Place {
    unsigned group_x, group_y;    // the threadgroup's position
    unsigned groups_x, groups_y;  // how many there are
    unsigned id, threads;         // within the threadgroup
};

// ---- numbers in memory and in registers --------------------------------------------------------

template <int W>
struct Floats {
    float at[W];
};

// Elements per memory access: the largest power of two that divides W and fits in 16 bytes.
template <typename T, int W>
struct Access {
    enum {
        MOST = 16 / int(sizeof(T)),
        ELEMENTS = (W & -W) < MOST ? (W & -W) : MOST,
        BYTES = ELEMENTS * int(sizeof(T)),
    };
    struct alignas(BYTES) type {
        T at[ELEMENTS];
    };
};

// A view may begin anywhere, so the address decides, for a whole row alike.
template <typename T, int W>
FUNCTION bool takes_vectors(const T* p) {
    typedef Access<T, W> A;
    return A::ELEMENTS > 1 && reinterpret_cast<unsigned long long>(p) % A::BYTES == 0;
}

// load<W>(p): the W numbers from p on, as floats.
template <int W, typename T>
FUNCTION Floats<W> load(const T* p) {
    typedef Access<T, W> A;
    Floats<W> out;
    if (takes_vectors<T, W>(p)) {
        UNROLL for (int k = 0; k < W; k += A::ELEMENTS) {
            const typename A::type v = *reinterpret_cast<const typename A::type*>(p + k);
            UNROLL for (int e = 0; e < A::ELEMENTS; e++)
                out.at[k + e] = static_cast<float>(v.at[e]);
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
            typename A::type words;
            UNROLL for (int e = 0; e < A::ELEMENTS; e++)
                words.at[e] = static_cast<T>(v.at[k + e]);
            *reinterpret_cast<typename A::type*>(p + k) = words;
        }
    } else {
        UNROLL for (int k = 0; k < W; k++) p[k] = static_cast<T>(v.at[k]);
    }
}

//// the first lines of every kernel ////
const Place here = {blockIdx.x, blockIdx.y, gridDim.x, gridDim.y, threadIdx.x, blockDim.x};
