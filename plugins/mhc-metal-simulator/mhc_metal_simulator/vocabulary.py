"""Every word of Metal in the generated texts, with evidence that Apple's compiler accepts it.

``WORDS`` has a row for each keyword, type, function, macro, attribute, member and directive that
the texts have and do not declare; ``OVERLOADS`` one for each overload that they call, for each
conversion and for each kind of pointer that a template's argument is deduced as. The shim has these
signatures, and tests compare both tables with all texts.

A row's evidence is one of

* :class:`Mlx`: a line of MLX's own Metal headers, which Apple's compiler accepts whenever MLX is
  built or makes a kernel; they are installed with MLX, so a test finds each line there;
* :class:`Air`: a name in the library of MLX's macOS wheel (``mlx-metal``), which Apple's compiler
  made of MLX's kernels: the overload with its types;
* :class:`Public`: a line of another project's kernel in production;
* :class:`Spec`: a section of the Metal Shading Language specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

__all__ = [
    "AIR_OF",
    "OVERLOADS",
    "WORDS",
    "Air",
    "Evidence",
    "Mlx",
    "Public",
    "Spec",
    "foreign",
    "tokens",
]


class Mlx(NamedTuple):
    """Words in a header of MLX, named from its folder of kernels on."""

    file: str
    words: str


class Air(NamedTuple):
    """A name in ``mlx/lib/mlx.metallib``."""

    name: str


class Public(NamedTuple):
    """Words in a file of a public repository, ``owner/name: path``."""

    file: str
    words: str


class Spec(NamedTuple):
    """A section of the specification, by the number that version 3.1 gives it, and its title."""

    section: str


Evidence = Mlx | Air | Public | Spec
AIR_OF = "mlx-metal 0.32.4"
"""The wheel whose library the names were read in."""

_MMA = "steel/gemm/mma.h"
_SOFT = "softmax.h"
_SORT = "sort.h"
_UTILS = "utils.h"
_CAST = Spec("2.20 Type Conversions and Re-interpreting Data")
_VECTORS = Spec("2.2 Vector Data Types")
_C10_ATOMIC = "pytorch/pytorch: c10/metal/atomic.h"
_C10_UTILS = "pytorch/pytorch: c10/metal/utils.h"

WORDS: Mapping[str, tuple[Evidence, ...]] = {
    # ---- C++ -----------------------------------------------------------------------------------
    "auto": (Mlx(_MMA, "thread auto& accum = Ctile.frag_at(i, j);"),),
    "bool": (Mlx(_MMA, "bool transpose_a,"),),
    "break": (Mlx("atomic.h", "break;"),),
    "const": (Mlx(_MMA, "const short qid = simd_lane_id / 4;"),),
    "constexpr": (Mlx(_MMA, "METAL_FUNC static constexpr void"),),
    "continue": (Mlx("steel/gemm/gemm_nax.h", "continue;"),),
    "decltype": (Mlx(_MMA, "i < decltype(Ctile)::kElemsPerTile"),),
    "do": (Public(_C10_ATOMIC, "do {"), Spec("1.4 Metal and C++14")),
    "else": (Mlx(_MMA, "} else {"),),
    "enum": (
        Public("ggerganov/llama.cpp: ggml-metal.metal", "enum ggml_sort_order {"),
        Spec("1.4 Metal and C++14"),
    ),
    "false": (Mlx(_UTILS, "static constexpr constant bool min = false;"),),
    "for": (Mlx(_MMA, "for (short i = 0; i < kElemRows; i++) {"),),
    "if": (Mlx(_MMA, "if ((off_x + i) < lim_x && (off_y + j) < lim_y) {"),),
    "inline": (Mlx(_SOFT, "inline T softmax_exp(T x) {"),),
    "int": (Mlx(_MMA, "template <typename T, int kFragRows_, int kFragCols_>"),),
    "namespace": (Mlx(_MMA, "namespace steel {"),),
    "operator": (Mlx("complex.h", "constexpr operator vec<T, 2>() const thread {"),),
    "reinterpret_cast": (
        Mlx(_MMA, "reinterpret_cast<thread frag_type&>(A_mat.thread_elements()) = A;"),
    ),
    "return": (Mlx(_MMA, "return short2{fn, fm};"),),
    "sizeof": (Mlx(_UTILS, 'static_assert(sizeof(U) <= 8, "Type too large");'),),
    "static": (Mlx(_MMA, "METAL_FUNC static constexpr short2 get_coord("),),
    "static_assert": (Mlx(_UTILS, 'static_assert(sizeof(U) <= 8, "Type too large");'),),
    "static_cast": (Mlx(_MMA, "static_cast<T>(src[i * str_x + j * str_y])"),),
    "struct": (Mlx(_MMA, "struct BaseMMAFrag {"),),
    "template": (Mlx(_MMA, "template <typename T, int kFragRows_, int kFragCols_>"),),
    "true": (Mlx(_UTILS, "static constexpr constant bool max = true;"),),
    "typedef": (Mlx(_MMA, "typedef metal::vec<T, kElemsPerFrag> frag_type;"),),
    "typename": (Mlx(_MMA, "template <typename T, int kFragRows_, int kFragCols_>"),),
    "using": (Mlx(_MMA, "using namespace metal;"),),
    "void": (Mlx(_MMA, "METAL_FUNC static constexpr void"),),
    "while": (Mlx(_SORT, "while (A_st < A_ed) {"),),
    # ---- address spaces ------------------------------------------------------------------------
    "constant": (Mlx(_SOFT, "constant int& axis_size,"),),
    "device": (Mlx(_SOFT, "const device T* in,"),),
    "thread": (Mlx(_MMA, "load(thread frag_type& dst, SrcPtrType src, StrX str_x, StrY str_y) {"),),
    "threadgroup": (
        Mlx(_MMA, "const threadgroup T* As"),
        Mlx(_SORT, "threadgroup ValT tgp_vals[sort_kernel::N_PER_BLOCK];"),
    ),
    # ---- types ---------------------------------------------------------------------------------
    "bfloat": (Mlx("bf16.h", "typedef bfloat bfloat16_t;"),),
    "bfloat16_t": (Mlx("bf16.h", "typedef bfloat bfloat16_t;"),),
    "bfloat2": (Public(_C10_UTILS, "using type2 = bfloat2;"), _VECTORS),
    "float": (Mlx(_MMA, "typename AccumType = float,"),),
    "float16_t": (Mlx(_UTILS, "typedef half float16_t;"),),
    "float2": (
        Mlx("fft/readwrite.h", "METAL_FUNC bool ReadWriter<float, float2>::out_of_bounds()"),
    ),
    "float4": (Mlx("dot.h", "float4 c = 0.0f;"),),
    "half": (Mlx(_UTILS, "typedef half float16_t;"),),
    "half2": (Public(_C10_UTILS, "using type2 = half2;"), _VECTORS),
    "int64_t": (Mlx(_SORT, "const constant int64_t* in_nc_strides [[buffer(7)]],"),),
    "simdgroup_float8x8": (Mlx("gated_delta_update.h", "simdgroup_float8x8 Tinv, P;"),),
    "uint": (Mlx(_SOFT, "uint gid [[threadgroup_position_in_grid]],"),),
    "uint2": (Mlx(_UTILS, "METAL_FUNC IdxT elem_to_loc_2(uint2 elem,"),),
    "uint3": (Mlx(_SORT, "uint3 lid [[thread_position_in_threadgroup]]) {"),),
    "uint4": (_VECTORS,),
    "ulong": (Mlx("atomic.h", "is_same<T, ulong>,"),),
    "ushort": (Mlx(_MMA, "ushort simd_lane_id [[thread_index_in_simdgroup]]) {"),),
    "vec": (Mlx(_MMA, "typedef metal::vec<T, kElemsPerFrag> frag_type;"),),
    # ---- the library ---------------------------------------------------------------------------
    "INFINITY": (Mlx("steel/attn/kernels/steel_attention_nax.h", "? -INFINITY"),),
    "as_type": (Mlx("bf16.h", "return as_type<uint16_t>(x);"),),
    "fabs": (Mlx(_UTILS, "metal::fmax(metal::fabs(x), metal::fabs(y))"),),
    "exp": (Mlx("unary_ops.h", "return metal::precise::exp(x);"),),
    "fma": (Mlx("bf16_math.h", "METAL_FUNC otype fma(itype x, itype y, itype z) {"),),
    "log": (Mlx("unary_ops.h", "return metal::precise::log(x);"),),
    "max": (Mlx("bf16_math.h", "METAL_FUNC otype max(itype x, itype y) {"),),
    "min": (Mlx("bf16_math.h", "METAL_FUNC otype min(itype x, itype y) {"),),
    "sqrt": (Mlx(_UTILS, "float zabs = metal::precise::sqrt(x * x + y * y);"),),
    "mem_flags": (Mlx(_SOFT, "threadgroup_barrier(mem_flags::mem_threadgroup);"),),
    "mem_none": (Mlx(_MMA, "simdgroup_barrier(mem_flags::mem_none);"),),
    "mem_threadgroup": (Mlx(_SOFT, "threadgroup_barrier(mem_flags::mem_threadgroup);"),),
    "metal": (Mlx(_MMA, "using namespace metal;"),),
    "precise": (Mlx(_UTILS, "float zabs = metal::precise::sqrt(x * x + y * y);"),),
    "simd_any": (Mlx("reduction/ops.h", "return simd_any(val);"), Air("air.simd_any")),
    "simd_shuffle": (Mlx(_UTILS, "metal::simd_shuffle(as_type<uint2>(data), lane)"),),
    "simd_shuffle_xor": (Mlx("steel/attn/mma.h", "simd_shuffle_xor(thr_reduce, ushort(1));"),),
    "simd_sum": (Mlx(_SOFT, "normalizer = simd_sum(normalizer);"),),
    "simdgroup_barrier": (Mlx(_MMA, "simdgroup_barrier(mem_flags::mem_none);"),),
    "simdgroup_multiply_accumulate": (Mlx(_MMA, "simdgroup_multiply_accumulate(D, A, B, C);"),),
    "threadgroup_barrier": (Mlx(_SOFT, "threadgroup_barrier(mem_flags::mem_threadgroup);"),),
    # ---- members -------------------------------------------------------------------------------
    ".thread_elements": (Mlx(_MMA, "val_mat.thread_elements()[ii] = frag_at(i, j)[ii];"),),
    ".x": (Mlx(_SORT, "int i = lid.x;"),),
    ".y": (Mlx(_UTILS, "elem.x * IdxT(strides[1]) + elem.y * IdxT(strides[0])"),),
    ".z": (Mlx(_UTILS, "elem.z * IdxT(strides[0])"),),
    ".w": (Spec("2.2.1 Accessing Vector Components"),),
    # ---- attributes ----------------------------------------------------------------------------
    "[[buffer]]": (Mlx(_SORT, "const device T* inp [[buffer(0)]],"),),
    "[[host_name]]": (Mlx("defines.h", "template [[host_name("),),
    "[[kernel]]": (Mlx(_SOFT, "[[kernel]] void softmax_single_row("),),
    "[[thread_index_in_threadgroup]]": (
        Mlx("fp_quantized.h", "uint lid [[thread_index_in_threadgroup]],"),
        Air("air.thread_index_in_threadgroup"),
    ),
    "[[threadgroup_position_in_grid]]": (
        Mlx(_SORT, "uint3 tid [[threadgroup_position_in_grid]],"),
        Air("air.threadgroup_position_in_grid"),
    ),
    "[[threadgroups_per_grid]]": (
        Mlx("reduction/reduce_row.h", "uint3 gsize [[threadgroups_per_grid]],"),
        Air("air.threadgroups_per_grid"),
    ),
    "[[threads_per_threadgroup]]": (
        Mlx("reduction/reduce_row.h", "uint3 lsize [[threads_per_threadgroup]],"),
        Air("air.threads_per_threadgroup"),
    ),
    # ---- directives and pragmas ----------------------------------------------------------------
    "#define": (Mlx("defines.h", "#define MTL_CONST constant"),),
    "#include <metal_stdlib>": (Mlx(_MMA, "#include <metal_stdlib>"),),
    "#undef": (Mlx("steel/utils/integral_constant.h", "#undef integral_const_binop"),),
    "# (a macro's argument as text)": (Spec("1.4 Metal and C++14: preprocessing directives"),),
    "_Pragma": (Mlx("steel/defines.h", '_Pragma("clang loop unroll(full)")'),),
    "clang loop unroll(full)": (Mlx("steel/defines.h", '_Pragma("clang loop unroll(full)")'),),
    "clang loop unroll_count": (
        Mlx("steel/attn/kernels/steel_attention_nax.h", "#pragma clang loop unroll_count(4)"),
    ),
}

_MATRICES = "air.simdgroup_matrix_8x8_multiply_accumulate.v64f32.v64f32.v64f32.v64f32"
_M8 = "simdgroup_matrix<float, 8, 8>"
_PAIR = Spec("2.2 Vector Data Types: a vector is made of as many scalars as it has places")
_SAME = Spec("2.20 Type Conversions and Re-interpreting Data: as_type of the same size")
_DEDUCED = Mlx(_MMA, "load(thread frag_type& dst, SrcPtrType src, StrX str_x, StrY str_y) {")
_ELEMENT = "steel/utils/type_traits.h"

OVERLOADS: Mapping[str, tuple[Evidence, ...]] = {
    "simd_any(bool)": (Air("air.simd_any"),),
    "precise::exp(float)": (
        Air("air.exp.f32"),
        Mlx("unary_ops.h", "return metal::precise::exp(x);"),
    ),
    "precise::fabs(float)": (Air("air.fabs.f32"),),
    "precise::fma(float, float, float)": (Air("air.fma.f32"),),
    "precise::log(float)": (
        Air("air.log.f32"),
        Mlx("unary_ops.h", "return metal::precise::log(x);"),
    ),
    "precise::max(float, float)": (Air("air.fmax.f32"),),
    "precise::min(float, float)": (Air("air.fmin.f32"),),
    "precise::sqrt(float)": (
        Air("air.sqrt.f32"),
        Mlx(_UTILS, "float zabs = metal::precise::sqrt(x * x + y * y);"),
    ),
    "simd_shuffle(float, ushort)": (Air("air.simd_shuffle.f32"),),
    "simd_shuffle_xor(float, ushort)": (Air("air.simd_shuffle_xor.f32"),),
    "simd_sum(float)": (Air("air.simd_sum.f32"),),
    "simdgroup_barrier(mem_flags)": (Air("air.simdgroup.barrier"),),
    "threadgroup_barrier(mem_flags)": (Air("air.wg.barrier"),),
    # a lane's numbers are [0] and [1] of a vector as wide as the matrix
    f"{_M8}::thread_elements()": (
        Air(_MATRICES),
        Mlx(_MMA, "val_mat.thread_elements()[ii] = frag_at(i, j)[ii];"),
    ),
    f"simdgroup_multiply_accumulate({_M8}&, {_M8}, {_M8}, {_M8})": (
        Air(_MATRICES),
        Mlx(_MMA, "simdgroup_multiply_accumulate(D, A, B, C);"),
    ),
    # ---- as_type -------------------------------------------------------------------------------
    "as_type<bfloat2>(uint)": (_SAME, Public(_C10_UTILS, "using type2 = bfloat2;")),
    "as_type<uint>(bfloat2)": (_SAME, Public(_C10_UTILS, "using type2 = bfloat2;")),
    "as_type<half2>(uint)": (
        Public(_C10_ATOMIC, "as_type<half2>(old)"),
        Public("google/skia: tests/sksl/intrinsics/Unpack.metal", "as_type<half2>(_uniforms.a)"),
    ),
    "as_type<uint>(half2)": (Public(_C10_ATOMIC, "as_type<uint>(as_type<half2>(old) + value)"),),
    "as_type<half>(ushort)": (Mlx("fp4.h", "as_type<half>(ushort((bits & 7) << 9))"),),
    "as_type<ushort>(half)": (Mlx(_UTILS, "(as_type<uint16_t>(val) & 0x7FFF) != 0"), _SAME),
    "as_type<ushort>(bfloat)": (Mlx("bf16.h", "return as_type<uint16_t>(x);"),),
    "as_type<float>(uint)": (Mlx("fp8.h", "as_type<float>(f_bits) + as_type<float>(denorm_mask)"),),
    "as_type<uint>(float)": (Mlx("fp8.h", "as_type<uint32_t>(static_cast<float>(f))"),),
    "as_type<float4>(uint4)": (_SAME,),
    "as_type<uint4>(float4)": (_SAME,),
    # ---- vectors of scalars --------------------------------------------------------------------
    "bfloat2(bfloat, bfloat)": (_PAIR, Public(_C10_UTILS, "using type2 = bfloat2;")),
    "half2(half, half)": (_PAIR, Public(_C10_UTILS, "using type2 = half2;")),
    "float2(float, float)": (_PAIR, Mlx("complex.h", "return vec<T, 2>(real, imag);")),
    "float4(float, float, float, float)": (_PAIR,),
    "uint4()": (Spec("1.4 Metal and C++14: T() is zero"),),
    "uint4(int)": (_PAIR, Mlx("dot.h", "float4 c = 0.0f;")),
    # ---- arrays of a threadgroup ---------------------------------------------------------------
    "threadgroup float[]": (Mlx(_SORT, "threadgroup ValT tgp_vals[sort_kernel::N_PER_BLOCK];"),),
    "threadgroup uint4[]": (
        Mlx(_SORT, "threadgroup ValT tgp_vals[sort_kernel::N_PER_BLOCK];"),
        _VECTORS,
    ),
    # ---- conversions ---------------------------------------------------------------------------
    "conversion: device pointer to integer": (
        Public(_C10_ATOMIC, "auto addr = reinterpret_cast<ulong>(data);"),
    ),
    # ---- pointers that a template's argument is deduced as -------------------------------------
    **{
        f"deduced: {const}{type_} {space}*": evidence
        for type_ in ("float", "half", "bfloat", "int", "uint4")
        for const in ("const ", "")
        for space, evidence in {
            # gemm.h passes both kinds of pointers to templates of SrcPtrType
            "device": (_DEDUCED, Mlx(_ELEMENT, "struct pointer_element<device T*> {")),
            "threadgroup": (_DEDUCED, Mlx(_ELEMENT, "struct pointer_element<threadgroup T*> {")),
            "constant": (Mlx(_ELEMENT, "struct pointer_element<constant T*> {"),),
        }.items()
    },
}
"""The overloads, named as :func:`.front_ends.calls` and :func:`.front_ends.cxx14` name them."""

# ---- the words of a text -------------------------------------------------------------------------

_STRINGS = re.compile(r'"[^"]*"')
_PRAGMAS = re.compile(r'_Pragma\("([^"]*)"\)|PRAGMA\((clang loop \w+)\(')
_ATTRIBUTE = re.compile(r"\[\[\s*(\w+)[^\]]*\]\]")
_MEMBER = re.compile(r"(?<![\d.])(?:\.|->)([A-Za-z_]\w*)")
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")
_DEFINE = re.compile(r"^#define (\w+)(?:\(([^)]*)\))?")
_COMPONENTS = re.compile(r"[xyzw]{1,4}")


def tokens(line: str) -> Iterator[str]:
    """Yield the words of a line as ``WORDS`` names them; a member begins with a dot."""
    if line.startswith("#include"):
        yield line.strip()
        return
    if line.startswith("#"):
        yield line.split()[0]
        line = line.partition(" ")[2] if not line.startswith("#define") else line[len("#define") :]
    for whole, counted in _PRAGMAS.findall(line):
        yield whole or counted
    line = _PRAGMAS.sub(lambda found: "_Pragma" if found[1] else "PRAGMA(", line)
    if "_Pragma(#" in line:
        yield "# (a macro's argument as text)"
    line = _STRINGS.sub('""', line)
    yield from (f"[[{word}]]" for word in _ATTRIBUTE.findall(line))
    line = _ATTRIBUTE.sub("", line)
    yield from (f".{word}" for word in _MEMBER.findall(line))
    yield from _NAME.findall(_MEMBER.sub("", line))


def macros(text: str) -> set[str]:
    """Return the names and the parameters of the macros that a text defines."""
    found: set[str] = set()
    for line in text.splitlines():
        if match := _DEFINE.match(line):
            found.add(match[1])
            found.update(re.findall(r"\w+", match[2] or ""))
    return found


def foreign(lines: Iterable[str], own: set[str]) -> set[str]:
    """Return the words of these lines that are not among those that the texts declare.

    A member that looks like a component of a vector counts as Metal's.
    """
    found: set[str] = set()
    for line in lines:
        for word in tokens(line):
            name = word.removeprefix(".")
            is_component = word != name and _COMPONENTS.fullmatch(name)
            if is_component or (name not in own and not name.startswith("custom_kernel_")):
                found.add(word)
    return found


# ---- names that no text may declare --------------------------------------------------------------


def _each(prefixes: str, suffixes: Iterable[str]) -> set[str]:
    return {prefix + suffix for prefix in prefixes.split() for suffix in suffixes}


_WIDTHS = ("2", "3", "4", "8", "16")
_SHAPES = [f"{rows}x{columns}" for rows in "234" for columns in "234"]

_CPP = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t
    class compl const const_cast constexpr continue decltype default delete do double dynamic_cast
    else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register
    reinterpret_cast return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename union unsigned using virtual
    void volatile wchar_t while xor xor_eq
"""
# 4 Address Spaces; 5.1 Functions; 2.1 Scalar Data Types; 2.4 to 2.19: the other data types. Those
# from llong on are what metal_types keeps: "typedef struct __Reserved_Name__Do_not_use_complex
# complex;" (gfx-rs/naga #702, and its list of keywords); assert is a macro (gfx-rs/wgpu #5347).
_METAL = """
    device constant thread threadgroup threadgroup_imageblock ray_data object_data
    kernel vertex fragment mesh object intersection visible
    half bfloat uchar ushort uint ulong size_t ptrdiff_t intptr_t uintptr_t
    int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t float16_t bfloat16_t
    vec packed_vec matrix simdgroup_matrix array array_ref atomic sampler imageblock uniform
    patch_control_point command_buffer visible_function_table intersection_function_table ray
    intersector acceleration_structure render_pipeline_state compute_pipeline_state tensor
    atomic_int atomic_uint atomic_bool atomic_ulong atomic_float
    simdgroup_float8x8 simdgroup_half8x8 simdgroup_bfloat8x8
    texture1d texture1d_array texture2d texture2d_array texture2d_ms texture2d_ms_array texture3d
    texturecube texturecube_array texture_buffer depth2d depth2d_array depth2d_ms
    depth2d_ms_array depthcube depthcube_array
    r8unorm r8snorm r16unorm r16snorm rg8unorm rg8snorm rg16unorm rg16snorm rgba8unorm srgba8unorm
    rgba8snorm rgba16unorm rgba16snorm rgb10a2 rg11b10f rgb9e5
    as_type metal main assert restrict METAL_FUNC METAL_CONST
    llong ullong quad complex imaginary
    CHAR_BIT SCHAR_MAX SCHAR_MIN UCHAR_MAX CHAR_MAX CHAR_MIN USHRT_MAX SHRT_MAX SHRT_MIN UINT_MAX
    INT_MAX INT_MIN ULONG_MAX LONG_MAX LONG_MIN ULLONG_MAX LLONG_MAX LLONG_MIN
    MAXFLOAT MAXHALF HUGE_VALF HUGE_VALH HUGE_VAL INFINITY NAN FP_ILOGB0 FP_ILOGBNAN
"""
_SCALAR_WORDS = """
    bool char uchar short ushort int uint long ulong llong ullong half bfloat float double quad
"""
_PACKED_WORDS = " ".join(f"packed_{word}" for word in _SCALAR_WORDS.split())
_LIMITS = """
    DIG MANT_DIG MAX_10_EXP MAX_EXP MIN_10_EXP MIN_EXP RADIX MAX MIN EPSILON DECIMAL_DIG
"""
_NUMBERS = "E LOG2E LOG10E LN2 LN10 PI PI_2 PI_4 1_PI 2_PI 2_SQRTPI SQRT2 SQRT1_2"

RESERVED = frozenset(
    set(_CPP.split())
    | set(_METAL.split())
    | _each(_SCALAR_WORDS, _WIDTHS)
    | _each(_PACKED_WORDS, _WIDTHS)
    | _each("half bfloat float", _SHAPES)
    | _each("FLT_ HALF_ DBL_", _LIMITS.split())
    | _each("M_", [f"{word}_{kind}" for word in _NUMBERS.split() for kind in "FH"])
)
"""Keywords and types: no name at all may be one of them."""

# 6.9 SIMD-Group Functions
_OF_LANES = """
    and broadcast broadcast_first max min or prefix_exclusive_product prefix_exclusive_sum
    prefix_inclusive_product prefix_inclusive_sum product shuffle shuffle_and_fill_down
    shuffle_and_fill_up shuffle_down shuffle_rotate_down shuffle_rotate_up shuffle_up shuffle_xor
    sum xor all any ballot is_first active_threads_mask is_helper_thread vote
"""
# 6.2 to 6.8: common, integer, relational, math, matrix and geometric functions; synchronisation
_FUNCTIONS = """
    clamp mix saturate sign smoothstep step abs absdiff addsat clz ctz extract_bits hadd
    insert_bits mad24 madhi madsat max max3 median3 min min3 mul24 mulhi popcount reverse_bits
    rhadd rotate subsat all any isfinite isinf isnan isnormal isordered isunordered not select
    signbit acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh cospi divide exp exp2
    exp10 fabs fdim floor fma fmax fmax3 fmedian3 fmin fmin3 fmod fract frexp ilogb ldexp log
    log2 log10 modf nextafter pow powr rint round rsqrt sin sincos sinh sinpi sqrt tan tanh
    tanpi trunc determinant transpose cross distance distance_squared dot faceforward length
    length_squared normalize reflect refract precise fast
    threadgroup_barrier simdgroup_barrier mem_flags discard_fragment dfdx dfdy fwidth
    simdgroup_load simdgroup_store simdgroup_multiply simdgroup_multiply_accumulate
    make_filled_simdgroup_matrix make_uniform numeric_limits
    memory_order memory_order_relaxed thread_scope atomic_thread_fence
    enable_if enable_if_t conditional conditional_t is_same is_same_v declval remove_cv
    integral_constant true_type false_type bool_constant swap move forward
"""
# 6.15 Atomic Functions
_ATOMIC = """
    load_explicit store_explicit exchange_explicit fetch_add_explicit fetch_and_explicit
    fetch_max_explicit fetch_min_explicit fetch_or_explicit fetch_sub_explicit fetch_xor_explicit
    compare_exchange_weak_explicit
"""
# 6.14 Pack and Unpack Functions
_PACKED = "unorm4x8 snorm4x8 unorm2x16 snorm2x16"

LIBRARY = frozenset(
    set(_FUNCTIONS.split())
    | _each("simd_ quad_", _OF_LANES.split())
    | _each("atomic_", _ATOMIC.split())
    | _each("pack_float_to_ pack_half_to_", _PACKED.split())
)
"""Names of the namespace ``metal``, which ``using namespace metal`` brings to every text.

A parameter or a variable in a function may hide one. What a text declares in a namespace may not:
a call would find both.
"""
