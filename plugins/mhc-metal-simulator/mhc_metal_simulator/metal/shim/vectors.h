// The functions of vectors: the scalar function in each place.
#pragma once
#include "math.h"

namespace metal {
#define MHC_VECTOR_1(name)                                  \
    template <typename T, int N>                            \
    MHC_INLINE vec<T, N> name(vec<T, N> x) {                \
        vec<T, N> out = x;                                  \
        for (int i = 0; i < N; i++) out[i] = name(T(x[i])); \
        return out;                                         \
    }
#define MHC_VECTOR_2(name)                                             \
    template <typename T, int N>                                       \
    MHC_INLINE vec<T, N> name(vec<T, N> x, vec<T, N> y) {              \
        vec<T, N> out = x;                                             \
        for (int i = 0; i < N; i++) out[i] = name(T(x[i]), T(y[i]));   \
        return out;                                                    \
    }
#define MHC_VECTOR_3(name)                                                       \
    template <typename T, int N>                                                 \
    MHC_INLINE vec<T, N> name(vec<T, N> x, vec<T, N> y, vec<T, N> z) {           \
        vec<T, N> out = x;                                                       \
        for (int i = 0; i < N; i++) out[i] = name(T(x[i]), T(y[i]), T(z[i]));    \
        return out;                                                              \
    }
MHC_FOR_1(MHC_VECTOR_1)
MHC_FOR_2(MHC_VECTOR_2)
MHC_VECTOR_1(abs)
MHC_VECTOR_2(max)
MHC_VECTOR_2(min)
MHC_VECTOR_3(fma)
MHC_VECTOR_3(mix)
MHC_VECTOR_3(clamp)
MHC_VECTOR_3(smoothstep)
#undef MHC_VECTOR_1
#undef MHC_VECTOR_2
#undef MHC_VECTOR_3
#undef MHC_FOR_1
#undef MHC_FOR_2

template <typename T, int N>
MHC_INLINE vec<T, N> max(vec<T, N> x, T y) {
    return max(x, vec<T, N>(y));
}
template <typename T, int N>
MHC_INLINE vec<T, N> min(vec<T, N> x, T y) {
    return min(x, vec<T, N>(y));
}
template <typename T, int N>
MHC_INLINE vec<T, N> clamp(vec<T, N> x, T low, T high) {
    return min(max(x, low), high);
}
template <typename T, int N>
MHC_INLINE vec<T, N> mix(vec<T, N> x, vec<T, N> y, T a) {
    return mix(x, y, vec<T, N>(a));
}
template <typename T, int N>
MHC_INLINE T dot(vec<T, N> x, vec<T, N> y) {
    T sum = x[0] * y[0];
    for (int i = 1; i < N; i++) sum += x[i] * y[i];
    return sum;
}
template <typename T, int N>
MHC_INLINE T length_squared(vec<T, N> x) {
    return dot(x, x);
}
template <typename T, int N>
MHC_INLINE T length(vec<T, N> x) {
    return sqrt(dot(x, x));
}
template <typename T, int N>
MHC_INLINE T distance(vec<T, N> x, vec<T, N> y) {
    return length(x - y);
}
template <typename T, int N>
MHC_INLINE vec<T, N> normalize(vec<T, N> x) {
    return x * vec<T, N>(rsqrt(dot(x, x)));
}
template <typename T>
MHC_INLINE vec<T, 3> cross(vec<T, 3> x, vec<T, 3> y) {
    return x.yzx * y.zxy - x.zxy * y.yzx;
}
template <typename B, int N>
MHC_INLINE bool any(vec<B, N> x) {
    bool out = false;
    for (int i = 0; i < N; i++) out = out || x[i] != 0;
    return out;
}
template <typename B, int N>
MHC_INLINE bool all(vec<B, N> x) {
    bool out = true;
    for (int i = 0; i < N; i++) out = out && x[i] != 0;
    return out;
}
MHC_INLINE bool any(bool x) { return x; }
MHC_INLINE bool all(bool x) { return x; }
template <typename T, typename B, int N>
MHC_INLINE vec<T, N> select(vec<T, N> no, vec<T, N> yes, vec<B, N> which) {
    vec<T, N> out = no;
    for (int i = 0; i < N; i++)
        if (which[i] != 0) out[i] = yes[i];
    return out;
}
}  // namespace metal
