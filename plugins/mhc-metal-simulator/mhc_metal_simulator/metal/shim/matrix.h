// simdgroup_matrix: 8 by 8 elements, two of them in each of the 32 lanes.
//
// thread_elements() is a reference to a vector of all Rows * Columns numbers: MLX's kernels index it with 0 and
// 1, or cast the reference to one to vec<T, 2> (kernels/steel/gemm/mma.h), and Apple's compiler makes products of
// vectors of 64 from them (air.simdgroup_matrix_8x8_multiply_accumulate.v64f32 in mlx.metallib).
#pragma once
#include "threads.h"

namespace metal {
template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
    static_assert(Rows == 8 && Columns == 8, "a simdgroup matrix is 8 by 8");
    typedef vec<T, Rows * Columns> Elements;
    Elements elements;  // this lane's are numbers 0 and 1
    MHC_INLINE simdgroup_matrix() = default;
    MHC_INLINE explicit simdgroup_matrix(T diagonal);
    MHC_INLINE thread Elements& thread_elements() { return elements; }
    MHC_INLINE const thread Elements& thread_elements() const { return elements; }
    MHC_INLINE vec<T, 2> mhc_pair() const {
        vec<T, 2> out;
        out[0] = elements[0], out[1] = elements[1];
        return out;
    }
    MHC_INLINE void mhc_set(vec<T, 2> pair) { elements[0] = pair[0], elements[1] = pair[1]; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
}  // namespace metal

namespace mhc {
// The place of a lane's first element; the second one is to its right.
MHC_INLINE uint matrix_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
MHC_INLINE uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
MHC_INLINE uint matrix_lane(uint row, uint column) {
    return (row & 4) * 4 + (column & 4) * 2 + row % 4 * 2 + column / 2 % 2;
}

template <typename D, typename A, typename B, typename C>
MHC_UNSEEN MHC_CONVERGENT metal::vec<D, 2> multiply_accumulate(
    metal::vec<A, 2> a, metal::vec<B, 2> b, metal::vec<C, 2> c, uint line, uint column) {
    struct Pair {
        metal::vec<A, 2> a;
        metal::vec<B, 2> b;
    } mine = {a, b};
    const mhc_exchange* all = mhc_simd_exchange(&mine, sizeof(mine), line, column);
    const uint row = matrix_row(mhc_lane()), first = matrix_column(mhc_lane());
    metal::vec<D, 2> out = metal::vec<D, 2>(D(0));
    for (uint j = 0; j < 2; j++) {
        float sum = float(c[j]);
        for (uint k = 0; k < 8; k++) {
            const float x = float(lane_value<Pair>(all, matrix_lane(row, k)).a[k % 2]);
            const Pair other = lane_value<Pair>(all, matrix_lane(k, first + j));
            const float y = float(other.b[(first + j) % 2]);
            sum += x * y;
        }
        out[j] = D(sum);
    }
    return out;
}

// Only full simdgroups have matrices, and all lanes take part.
MHC_UNSEEN MHC_CONVERGENT inline void matrix_together(uint line, uint column) {
    const uint nothing = 0;
    const mhc_exchange* all = mhc_simd_exchange(&nothing, sizeof(nothing), line, column);
    if (all->lanes < 32) mhc_missing_lane(all->lanes, line, column);
}
}  // namespace mhc

namespace metal {
template <typename T, int R, int C>
MHC_INLINE simdgroup_matrix<T, R, C>::simdgroup_matrix(T diagonal) {
    const uint row = mhc::matrix_row(mhc_lane()), column = mhc::matrix_column(mhc_lane());
    elements[0] = row == column ? diagonal : T(0);
    elements[1] = row == column + 1 ? diagonal : T(0);
}

template <typename T, int R, int C>
MHC_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
    simdgroup_matrix<T, R, C> out;
    out.mhc_set(vec<T, 2>(x));
    return out;
}

template <typename T, typename P>
MHC_INLINE MHC_CONVERGENT void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, P from,
                                              ulong stride = 8, ulong2 origin = ulong2(0ul),
                                              bool transpose = false, MHC_HERE) {
    mhc::matrix_together(line, column);
    const ulong r = mhc::matrix_row(mhc_lane()), c = mhc::matrix_column(mhc_lane());
    for (ulong j = 0; j < 2; j++) {
        const ulong y = origin.y + (transpose ? c + j : r), x = origin.x + (transpose ? r : c + j);
        d.elements[j] = from[y * stride + x];
    }
}

template <typename T, typename P>
MHC_INLINE MHC_CONVERGENT void simdgroup_store(simdgroup_matrix<T, 8, 8> a, P to, ulong stride = 8,
                                               ulong2 origin = ulong2(0ul), bool transpose = false,
                                               MHC_HERE) {
    mhc::matrix_together(line, column);
    const ulong r = mhc::matrix_row(mhc_lane()), c = mhc::matrix_column(mhc_lane());
    for (ulong j = 0; j < 2; j++) {
        const ulong y = origin.y + (transpose ? c + j : r), x = origin.x + (transpose ? r : c + j);
        to[y * stride + x] = T(a.elements[j]);
    }
}

template <typename D, typename A, typename B, typename C>
MHC_INLINE MHC_CONVERGENT void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<C, 8, 8> c, MHC_HERE) {
    d.mhc_set(mhc::multiply_accumulate<D>(a.mhc_pair(), b.mhc_pair(), c.mhc_pair(), line, column));
}

template <typename D, typename A, typename B>
MHC_INLINE MHC_CONVERGENT void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d,
                                                  simdgroup_matrix<A, 8, 8> a,
                                                  simdgroup_matrix<B, 8, 8> b, MHC_HERE) {
    const vec<float, 2> zero = vec<float, 2>(0.0f);
    d.mhc_set(mhc::multiply_accumulate<D>(a.mhc_pair(), b.mhc_pair(), zero, line, column));
}
}  // namespace metal
