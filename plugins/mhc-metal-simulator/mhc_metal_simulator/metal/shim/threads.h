// Barriers and simdgroup operations. Each switches to other fibers until all threads concerned are
// here; the runtime reports threads that never come.
#pragma once
#include "vectors.h"

struct mhc_exchange {  // Exchange of runtime/schedule.h
    alignas(64) unsigned char value[32][64];
    alignas(64) unsigned char result[64];
    unsigned lanes, ready;
};

#define MHC_RUNTIME extern "C" __attribute__((visibility("hidden")))
MHC_RUNTIME void mhc_threadgroup_barrier(uint flags, uint line, uint column) MHC_CONVERGENT;
MHC_RUNTIME void mhc_simdgroup_barrier(uint flags, uint line, uint column) MHC_CONVERGENT;
MHC_RUNTIME mhc_exchange* mhc_simd_exchange(const void* value, uint size, uint line,
                                            uint column) MHC_CONVERGENT;
MHC_RUNTIME void mhc_missing_lane(uint lane, uint line, uint column);
MHC_RUNTIME uint mhc_lane();
MHC_RUNTIME void mhc_attribute(int which, uint* xyz);
MHC_RUNTIME unsigned char* mhc_shared(const char* name, ulong size);

namespace mhc {
// `threadgroup T x[N]` becomes a reference to storage of each threadgroup; Tag has its name and makes
// each declaration a separate object.
template <typename T, typename Tag>
struct shared_storage {
    static unsigned char* const memory;
};
template <typename T, typename Tag>
unsigned char* const shared_storage<T, Tag>::memory = mhc_shared(Tag::name(), sizeof(T));

template <typename T, typename Tag>
MHC_INLINE threadgroup T& shared() {
    return *(threadgroup T*)(ulong)shared_storage<T, Tag>::memory;
}

template <typename V>
MHC_UNSEEN V attribute(int which) {
    uint xyz[3];
    mhc_attribute(which, xyz);
    if constexpr (vector_of<V>::size == 1)
        return V(xyz[0]);
    else {
        V out = V(0);
        for (int i = 0; i < vector_of<V>::size; i++) out[i] = xyz[i];
        return out;
    }
}
}  // namespace mhc

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }

MHC_INLINE MHC_CONVERGENT void threadgroup_barrier(mem_flags flags, MHC_HERE) {
    mhc_threadgroup_barrier(uint(flags), line, column);
}
MHC_INLINE MHC_CONVERGENT void simdgroup_barrier(mem_flags flags, MHC_HERE) {
    mhc_simdgroup_barrier(uint(flags), line, column);
}

// ---- the value of another lane -----------------------------------------------------------------
}  // namespace metal

namespace mhc {
template <typename T>
MHC_UNSEEN T lane_value(const mhc_exchange* all, uint lane) {
    T out;
    if (lane < all->lanes)
        __builtin_memcpy(&out, all->value[lane], sizeof(T));
    else  // undefined on a GPU: a NaN, or a number that stands out
        __builtin_memset(&out, 0xff, sizeof(T));
    return out;
}

// Reduces as a GPU's tree does, so that sums round alike whatever the order of the fibers.
template <typename T, typename F>
MHC_UNSEEN T reduce(mhc_exchange* all, F f) {
    T out;
    if (!all->ready) {
        T lanes[32];
        for (uint i = 0; i < all->lanes; i++) __builtin_memcpy(&lanes[i], all->value[i], sizeof(T));
        for (uint gap = 16; gap > 0; gap /= 2)
            for (uint i = 0; i < gap && i + gap < all->lanes; i++)
                lanes[i] = f(lanes[i], lanes[i + gap]);
        __builtin_memcpy(all->result, &lanes[0], sizeof(T));
        all->ready = 1;
    }
    __builtin_memcpy(&out, all->result, sizeof(T));
    return out;
}

// Reduces all lanes before this one, and this one if `inclusive`.
template <typename T, typename F>
MHC_UNSEEN T scan(const mhc_exchange* all, T start, bool inclusive, F f) {
    T out = start;
    const uint end = mhc_lane() + (inclusive ? 1 : 0);
    for (uint i = 0; i < end; i++) out = f(out, lane_value<T>(all, i));
    return out;
}

struct add {
    template <typename T>
    MHC_INLINE T operator()(T a, T b) const { return a + b; }
};
struct multiply {
    template <typename T>
    MHC_INLINE T operator()(T a, T b) const { return a * b; }
};
struct larger {
    template <typename T>
    MHC_INLINE T operator()(T a, T b) const { return metal::max(a, b); }
};
struct smaller {
    template <typename T>
    MHC_INLINE T operator()(T a, T b) const { return metal::min(a, b); }
};
struct bit_and {
    template <typename T>
    MHC_INLINE T operator()(T a, T b) const { return a & b; }
};
struct bit_or {
    template <typename T>
    MHC_INLINE T operator()(T a, T b) const { return a | b; }
};
struct bit_xor {
    template <typename T>
    MHC_INLINE T operator()(T a, T b) const { return a ^ b; }
};
}  // namespace mhc

namespace metal {
#define MHC_ALL(x) mhc_simd_exchange(&x, sizeof(x), line, column)
#define MHC_REDUCE(name, operation)                              \
    template <typename T>                                        \
    MHC_CONVERGENT MHC_UNSEEN T name(T x, MHC_HERE) {            \
        return mhc::reduce<T>(MHC_ALL(x), mhc::operation());     \
    }
MHC_REDUCE(simd_sum, add)
MHC_REDUCE(simd_product, multiply)
MHC_REDUCE(simd_max, larger)
MHC_REDUCE(simd_min, smaller)
MHC_REDUCE(simd_and, bit_and)
MHC_REDUCE(simd_or, bit_or)
MHC_REDUCE(simd_xor, bit_xor)
#undef MHC_REDUCE

#define MHC_SCAN(name, operation, start, inclusive)                           \
    template <typename T>                                                     \
    MHC_CONVERGENT MHC_UNSEEN T name(T x, MHC_HERE) {                         \
        return mhc::scan<T>(MHC_ALL(x), T(start), inclusive, mhc::operation()); \
    }
MHC_SCAN(simd_prefix_inclusive_sum, add, 0, true)
MHC_SCAN(simd_prefix_exclusive_sum, add, 0, false)
MHC_SCAN(simd_prefix_inclusive_product, multiply, 1, true)
MHC_SCAN(simd_prefix_exclusive_product, multiply, 1, false)
#undef MHC_SCAN

template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle(T x, ushort lane, MHC_HERE) {
    return mhc::lane_value<T>(MHC_ALL(x), lane);
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle_xor(T x, ushort mask, MHC_HERE) {
    return mhc::lane_value<T>(MHC_ALL(x), mhc_lane() ^ mask);
}
// Lanes whose source lies outside the 32 keep their own value.
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle_down(T x, ushort delta, MHC_HERE) {
    const mhc_exchange* all = MHC_ALL(x);
    const uint lane = mhc_lane() + delta;
    return lane < 32 ? mhc::lane_value<T>(all, lane) : x;
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle_up(T x, ushort delta, MHC_HERE) {
    const mhc_exchange* all = MHC_ALL(x);
    return mhc_lane() >= delta ? mhc::lane_value<T>(all, mhc_lane() - delta) : x;
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle_rotate_down(T x, ushort delta, MHC_HERE) {
    return mhc::lane_value<T>(MHC_ALL(x), (mhc_lane() + delta) % 32);
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle_rotate_up(T x, ushort delta, MHC_HERE) {
    return mhc::lane_value<T>(MHC_ALL(x), (mhc_lane() - delta) % 32);
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle_and_fill_down(T x, T fill, ushort delta, MHC_HERE) {
    struct {
        T x, fill;
    } both = {x, fill};
    const mhc_exchange* all = MHC_ALL(both);
    const uint lane = mhc_lane() + delta;
    auto from = mhc::lane_value<decltype(both)>(all, lane % 32);
    return lane < 32 ? from.x : from.fill;
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_shuffle_and_fill_up(T x, T fill, ushort delta, MHC_HERE) {
    struct {
        T x, fill;
    } both = {x, fill};
    const mhc_exchange* all = MHC_ALL(both);
    auto from = mhc::lane_value<decltype(both)>(all, (mhc_lane() - delta) % 32);
    return mhc_lane() >= delta ? from.x : from.fill;
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_broadcast(T x, ushort lane, MHC_HERE) {
    const mhc_exchange* all = MHC_ALL(x);
    if (lane >= all->lanes) mhc_missing_lane(lane, line, column);
    return mhc::lane_value<T>(all, lane);
}
template <typename T>
MHC_CONVERGENT MHC_UNSEEN T simd_broadcast_first(T x, MHC_HERE) {
    return mhc::lane_value<T>(MHC_ALL(x), 0);
}
MHC_CONVERGENT MHC_UNSEEN inline bool simd_is_first(MHC_HERE) { return mhc_lane() == 0; }
MHC_CONVERGENT MHC_UNSEEN inline bool simd_all(bool x, MHC_HERE) {
    const uint bit = x;
    return mhc::reduce<uint>(MHC_ALL(bit), mhc::bit_and());
}
MHC_CONVERGENT MHC_UNSEEN inline bool simd_any(bool x, MHC_HERE) {
    const uint bit = x;
    return mhc::reduce<uint>(MHC_ALL(bit), mhc::bit_or());
}

class simd_vote {
    ulong bits;

public:
    typedef ulong vote_t;
    MHC_INLINE explicit simd_vote(ulong b = 0) : bits(b) {}
    MHC_INLINE explicit operator ulong() const { return bits; }
    MHC_INLINE bool any() const { return bits != 0; }
};
MHC_CONVERGENT MHC_UNSEEN inline simd_vote simd_ballot(bool x, MHC_HERE) {
    const ulong bit = ulong(x) << mhc_lane();
    return simd_vote(mhc::reduce<ulong>(MHC_ALL(bit), mhc::bit_or()));
}
}  // namespace metal
