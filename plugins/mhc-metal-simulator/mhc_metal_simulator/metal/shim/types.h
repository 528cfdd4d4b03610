// Address spaces, scalars and vectors.
#pragma once

// The attributes are real here, so a pointer of the wrong space is a compile error. The compiler's
// output then has them erased before code is generated: see compiler.py.
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel

#define MHC_INLINE inline __attribute__((always_inline))
#define METAL_FUNC MHC_INLINE  // the name of Apple's headers for the same, as MLX's use it
// Keeps the compiler from duplicating or moving a call that threads must reach together.
#define MHC_CONVERGENT __attribute__((convergent))
// Not instrumented: the shim's own accesses are not the kernel's.
#define MHC_UNSEEN __attribute__((noinline, no_sanitize("kernel-address")))
// The caller's line and column: the last two parameters of functions that threads must reach together.
#define MHC_HERE unsigned line = __builtin_LINE(), unsigned column = __builtin_COLUMN()

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uchar, uint8_t;
typedef unsigned short ushort, uint16_t;
typedef unsigned int uint, uint32_t;
typedef unsigned long ulong, uint64_t, size_t;
typedef long ptrdiff_t;
// Keywords in Metal, so here words that are clang's keywords: no variable or function has such a name
// (gfx-rs/wgpu#4545, #5072).
#define half _Float16
#define bfloat __bf16
typedef half float16_t;  // the names that MLX uses
typedef bfloat bfloat16_t;

// The names that Apple's metal_types reserves, as types that are never complete
// ("typedef struct __Reserved_Name__Do_not_use_complex complex;", gfx-rs/naga #702).
typedef struct __Reserved_Name__Do_not_use_llong llong;
typedef struct __Reserved_Name__Do_not_use_ullong ullong;
typedef struct __Reserved_Name__Do_not_use_quad quad;
typedef struct __Reserved_Name__Do_not_use_complex complex;
typedef struct __Reserved_Name__Do_not_use_imaginary imaginary;

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <typename T, int N>
using packed_vec = T __attribute__((ext_vector_type(N), aligned(alignof(T))));
}  // namespace metal

#define MHC_VECTORS(T, name)              \
    typedef metal::vec<T, 2> name##2;     \
    typedef metal::vec<T, 3> name##3;     \
    typedef metal::vec<T, 4> name##4;     \
    typedef metal::packed_vec<T, 2> packed_##name##2; \
    typedef metal::packed_vec<T, 4> packed_##name##4;
MHC_VECTORS(float, float)
MHC_VECTORS(half, half)
MHC_VECTORS(bfloat, bfloat)
typedef signed char mhc_char;
MHC_VECTORS(mhc_char, char)
MHC_VECTORS(uchar, uchar)
MHC_VECTORS(short, short)
MHC_VECTORS(ushort, ushort)
MHC_VECTORS(int, int)
MHC_VECTORS(uint, uint)
MHC_VECTORS(long, long)
MHC_VECTORS(ulong, ulong)
#undef MHC_VECTORS
// A comparison of vectors gives integers, 0 or -1 in each place; so these are integers too.
typedef int bool2 __attribute__((ext_vector_type(2)));
typedef int bool3 __attribute__((ext_vector_type(3)));
typedef int bool4 __attribute__((ext_vector_type(4)));

namespace metal {
using ::bfloat16_t, ::float16_t;

// ---- type traits -------------------------------------------------------------------------------
template <typename T, T v>
struct integral_constant {
    static constexpr T value = v;
    constexpr operator T() const { return v; }
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <bool v>
using bool_constant = integral_constant<bool, v>;
template <typename A, typename B>
struct is_same : integral_constant<bool, __is_same(A, B)> {};
template <typename A, typename B>
constexpr bool is_same_v = __is_same(A, B);
template <typename A, typename B>
struct is_convertible : integral_constant<bool, __is_convertible(A, B)> {};
template <typename A, typename B>
constexpr bool is_convertible_v = __is_convertible(A, B);
template <bool, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
    typedef T type;
};
template <bool c, typename T = void>
using enable_if_t = typename enable_if<c, T>::type;
template <bool, typename A, typename B>
struct conditional {
    typedef A type;
};
template <typename A, typename B>
struct conditional<false, A, B> {
    typedef B type;
};
template <bool c, typename A, typename B>
using conditional_t = typename conditional<c, A, B>::type;
template <typename T>
struct remove_cv {
    typedef __remove_cv(T) type;
};
template <typename T>
using remove_cv_t = __remove_cv(T);
template <typename T>
using remove_const_t = __remove_const(T);
template <typename T>
using remove_reference_t = __remove_reference_t(T);
template <typename T>
struct remove_addrspace {
    typedef T type;
};
template <typename T>
struct remove_addrspace<device T> {
    typedef T type;
};
template <typename T>
struct remove_addrspace<constant T> {
    typedef const T type;
};
template <typename T>
struct remove_addrspace<threadgroup T> {
    typedef T type;
};
template <typename T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <typename T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
struct is_floating_point : integral_constant<bool, is_floating_point_v<remove_cv_t<T>>> {};
template <typename T>
constexpr bool is_integral_v = __is_integral(T);
template <typename T>
struct is_integral : integral_constant<bool, is_integral_v<T>> {};
template <typename T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <typename T>
constexpr bool is_signed_v = __is_signed(T);
template <typename T>
constexpr bool is_unsigned_v = __is_unsigned(T);

template <typename To, typename From>
MHC_INLINE constexpr To as_type(From x) {
    static_assert(sizeof(To) == sizeof(From), "as_type needs two types of one size");
    // shader-slang/slang#9716; reinterpret_cast<ulong>(p) is how an address becomes a number
    static_assert(!__is_pointer(To) && !__is_pointer(From), "as_type takes no pointer");
    return __builtin_bit_cast(To, x);
}
}  // namespace metal

// ---- copying structs ---------------------------------------------------------------------------
// source.py writes `*(to) = *(from);` as a call of this, because clang copies structs within the plain
// address space only.
namespace mhc {
template <typename T, typename F>
MHC_INLINE void assign(T to, F from) {
    typedef __remove_cv(__remove_reference_t(decltype(*from))) Copied;
    if constexpr (__is_class(metal::remove_addrspace_t<Copied>))
        __builtin_memcpy((void*)(ulong)to, (const void*)(ulong)from, sizeof(Copied));
    else
        *to = *from;
}
}  // namespace mhc

// ---- making vectors ----------------------------------------------------------------------------
// source.py writes float4(...) and (float4)x as calls of these: clang's own casts between vectors
// reinterpret the bits, where Metal's convert each element.
namespace mhc {
template <typename V>
struct vector_of {
    static constexpr int size = 1;
    typedef V element;
};
template <typename T, int N>
struct vector_of<T __attribute__((ext_vector_type(N)))> {
    static constexpr int size = N;
    typedef T element;
};
template <typename T>
struct vector_of<const T> : vector_of<T> {};

// Through float between the two 16-bit types, which clang does not convert into one another.
template <typename T, typename U>
MHC_INLINE constexpr T convert(U x) {
    if constexpr (__is_same(T, bfloat) && __is_same(U, half))
        return (T)(float)x;
    else if constexpr (__is_same(T, half) && __is_same(U, bfloat))
        return (T)(float)x;
    else
        return (T)x;
}

template <typename V, typename A>
MHC_INLINE constexpr void put(V& out, int& at, A a) {
    typedef typename vector_of<V>::element T;
    if constexpr (vector_of<A>::size == 1)
        out[at++] = convert<T>(a);
    else
        for (int i = 0; i < vector_of<A>::size; i++)
            out[at++] = convert<T>((typename vector_of<A>::element)a[i]);
}

template <typename V, typename... A>
MHC_INLINE constexpr V make(A... a) {
    typedef typename vector_of<V>::element T;
    constexpr int given = (0 + ... + vector_of<A>::size);
    if constexpr (vector_of<V>::size == 1)
        return V(a...);
    else if constexpr (sizeof...(A) == 1 && given == 1)
        return V((convert<T>(a), ...));  // one scalar fills all places
    else if constexpr (given == 0)
        return V(T(0));
    else {
        static_assert(given == vector_of<V>::size,
                      "a vector needs one value for each of its places");
        V out = V(T(0));
        int at = 0;
        (put(out, at, a), ...);
        return out;
    }
}

// `to<float4>() ->* x` binds as tightly as the cast that it stands for.
template <typename V>
struct to {
    template <typename A>
    MHC_INLINE friend constexpr V operator->*(to, A a) {
        return make<V>(a);
    }
};
}  // namespace mhc
