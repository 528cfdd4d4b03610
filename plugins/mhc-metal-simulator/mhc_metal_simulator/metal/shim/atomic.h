// Atomic operations. Fibers switch only at barriers and simd operations, so each of these is
// atomic without further code.
#pragma once
#include "threads.h"

MHC_RUNTIME void mhc_atomic_access(ulong address, ulong size, uint read, uint write,
                                   uint line, uint column);

namespace metal {
enum memory_order { memory_order_relaxed };

template <typename T>
struct _atomic {
    T value;
};
template <typename T>
using atomic = _atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#define MHC_ATOMIC(space)                                                                         \
    template <typename T>                                                                         \
    MHC_UNSEEN T atomic_load_explicit(const volatile space atomic<T>* at, memory_order,           \
                                      MHC_HERE) {                                                 \
        mhc_atomic_access((ulong)at, sizeof(T), 1, 0, line, column);                              \
        return *(T*)(ulong)at;                                                                    \
    }                                                                                             \
    template <typename T, typename U>                                                             \
    MHC_UNSEEN void atomic_store_explicit(volatile space atomic<T>* at, U x, memory_order,        \
                                          MHC_HERE) {                                             \
        mhc_atomic_access((ulong)at, sizeof(T), 0, 1, line, column);                              \
        *(T*)(ulong)at = T(x);                                                                    \
    }                                                                                             \
    template <typename T, typename U>                                                             \
    MHC_UNSEEN bool atomic_compare_exchange_weak_explicit(                                        \
        volatile space atomic<T>* at, T* expected, U desired, memory_order, memory_order,         \
        MHC_HERE) {                                                                               \
        mhc_atomic_access((ulong)at, sizeof(T), 1, 1, line, column);                              \
        T* place = (T*)(ulong)at;                                                                 \
        const bool same = __builtin_memcmp(place, expected, sizeof(T)) == 0;                      \
        *(same ? place : expected) = same ? T(desired) : *place;                                  \
        return same;                                                                              \
    }                                                                                             \
    MHC_FETCH(space, atomic_exchange_explicit, T(x))                                              \
    MHC_FETCH(space, atomic_fetch_add_explicit, T(old + T(x)))                                    \
    MHC_FETCH(space, atomic_fetch_sub_explicit, T(old - T(x)))                                    \
    MHC_FETCH(space, atomic_fetch_max_explicit, old < T(x) ? T(x) : old)                          \
    MHC_FETCH(space, atomic_fetch_min_explicit, T(x) < old ? T(x) : old)                          \
    MHC_FETCH(space, atomic_fetch_and_explicit, T(old & T(x)))                                    \
    MHC_FETCH(space, atomic_fetch_or_explicit, T(old | T(x)))                                     \
    MHC_FETCH(space, atomic_fetch_xor_explicit, T(old ^ T(x)))
#define MHC_FETCH(space, name, result)                                                            \
    template <typename T, typename U>                                                             \
    MHC_UNSEEN T name(volatile space atomic<T>* at, U x, memory_order, MHC_HERE) {                \
        mhc_atomic_access((ulong)at, sizeof(T), 1, 1, line, column);                              \
        T* place = (T*)(ulong)at;                                                                 \
        const T old = *place;                                                                     \
        *place = result;                                                                          \
        return old;                                                                               \
    }
MHC_ATOMIC(device)
MHC_ATOMIC(threadgroup)
#undef MHC_ATOMIC
#undef MHC_FETCH
}  // namespace metal
