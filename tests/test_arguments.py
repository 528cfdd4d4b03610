"""Bad arguments: one text for each on every backend, raised before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest

import mhc_core as mhc
from mhc_conformance.cases import cases, data
from mhc_core import PAPER, Variant, math
from mhc_core.signature import Op

if TYPE_CHECKING:
    from conftest import Plugins

LIKE: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda array: array,
    "jax": jnp.asarray,
    "mlx-compiled": mx.array,
}
NAN = float("nan")


@pytest.fixture(params=LIKE)
def like(request: pytest.FixtureRequest, plugins: Plugins) -> Callable[[Any], Any]:
    """Return a library's arrays; every backend fails the test if it is called."""

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("the backend was called")

    plugins.only()
    functions = dict.fromkeys((*math.OPS, "vjp", "from_host"), called)
    types = {"numpy": "numpy.ndarray", "jax": "jax.Array", "mlx-compiled": "mlx.core.array"}
    plugins.backend(request.param, functions, array_types=(types[request.param],), dtypes=DTYPES)
    return LIKE[request.param]


DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Bad:
    """One call that must fail, and what the error must say."""

    op: str
    shapes: Sequence[Any]  # shapes; or what stands in the place of an array
    error: type[Exception]
    says: str
    static: dict[str, Any] = field(default_factory=dict[str, Any])
    dtypes: dict[int, Any] = field(default_factory=dict[int, Any])

    def __str__(self) -> str:
        return self.says

    def arrays(self, like: Callable[[Any], Any]) -> list[Any]:
        return [
            like(np.zeros(shape, self.dtypes.get(i, np.float32)))
            if isinstance(shape, tuple)
            else shape
            for i, shape in enumerate(self.shapes)
        ]


# --- shapes -----------------------------------------------------------------------------------

STREAMS = (2, 3, 4, 8)
PROJECTION = ((24, 32), (3,), (24,))
V = {"variant": PAPER}
SMALLEST = ", every size but the leading ones at least 1"


def _shape(op: str, shapes: Sequence[Any], says: str, **static: Any) -> Bad:
    return Bad(op, shapes, ValueError, f"{op}: {says}", static)


SHAPES = [
    # rank
    _shape("sinkhorn", [(4,)], f"logits has shape (4,); needs (..., n, n){SMALLEST}"),
    _shape("sinkhorn", [()], f"logits has shape (); needs (..., n, n){SMALLEST}"),
    _shape("aggregate", [(8,), (4,)], f"x has shape (8,); needs (..., n, C){SMALLEST}"),
    _shape("contract", [(8,)], f"x has shape (8,); needs (..., n, C){SMALLEST}"),
    _shape("expand", [()], f"h has shape (); needs (..., C){SMALLEST}", n=2),
    _shape(
        "aggregate",
        [STREAMS, (3, 4)],
        "h_pre has shape (3, 4); needs (..., n) or (n,), here (2, 3, 4) or (4,) with n=4, C=8",
    ),
    _shape(
        "combine",
        [STREAMS, (8,), (4,), (4, 4)],
        "y has shape (8,); needs (..., C), here (2, 3, 8) with n=4, C=8",
    ),
    # no streams, no channels
    _shape("aggregate", [(2, 4, 0), (4,)], f"x has shape (2, 4, 0); needs (..., n, C){SMALLEST}"),
    _shape("sinkhorn", [(2, 0, 0)], f"logits has shape (2, 0, 0); needs (..., n, n){SMALLEST}"),
    # n and C that do not agree
    _shape("sinkhorn", [(2, 3, 4)], f"logits has shape (2, 3, 4); needs (..., n, n){SMALLEST}"),
    _shape(
        "aggregate",
        [STREAMS, (2, 3, 5)],
        "h_pre has shape (2, 3, 5); needs (..., n) or (n,), here (2, 3, 4) or (4,) with n=4, C=8",
    ),
    _shape(
        "combine",
        [STREAMS, (2, 3, 7), (4,), (4, 4)],
        "y has shape (2, 3, 7); needs (..., C), here (2, 3, 8) with n=4, C=8",
    ),
    _shape(
        "combine",
        [STREAMS, (2, 3, 8), (4,), (4, 3)],
        "h_res has shape (4, 3); needs (..., n, n) or (n, n), here (2, 3, 4, 4) or (4, 4) "
        "with n=4, C=8",
    ),
    _shape(
        "residual_add_aggregate",
        [STREAMS, (3, 4, 8), (4,)],
        "res has shape (3, 4, 8); needs (..., n, C), here (2, 3, 4, 8) with n=4, C=8",
    ),
    _shape("rms_norm", [STREAMS, (7,)], "weight has shape (7,); needs (C,), here (8,) with C=8"),
    _shape(
        "static_mappings",
        [(2, 4), (2, 4), (2, 3, 3)],
        "h_res_raw has shape (2, 3, 3); needs (..., n, n), here (2, 4, 4) with n=4",
    ),
    _shape(
        "static_layer",
        [STREAMS, (4,), (4,), (4, 4), (9,)],
        "rms_weight has shape (9,); needs (C,), here (8,) with n=4, C=8",
    ),
    _shape("pre_scale", [(2, 10), (4,)], "x has a last axis of 10; needs a multiple of n=4"),
    _shape(
        "gated_combine",
        [(2, 10), (2, 10), (4,), (4,), (4, 4)],
        "x has a last axis of 10; needs a multiple of n=4",
    ),
    # phi, scale, bias
    *(
        _shape(op, [STREAMS, *wrong], says, **V)
        for op in ("mappings", "pre")
        for wrong, says in (
            (
                ((32, 24), (3,), (24,)),
                "phi has shape (32, 24); needs (m, nC), here (24, 32) with n=4, C=8",
            ),
            (
                ((23, 32), (3,), (24,)),
                "phi has shape (23, 32); needs (m, nC), here (24, 32) with n=4, C=8",
            ),
            (((24, 32), (), (24,)), "scale has shape (); needs (3,)"),
            (((24, 32), (4,), (24,)), "scale has shape (4,); needs (3,)"),
            (((24, 32), (3,), (23,)), "bias has shape (23,); needs (m,), here (24,) with n=4, C=8"),
        )
    ),
    _shape(
        "combine_pre",
        [STREAMS, (2, 3, 8), (4,), (4, 4), *PROJECTION[:2], (4,)],
        "bias has shape (4,); needs (m,), here (24,) with n=4, C=8",
        **V,
    ),
    _shape(
        "combine_pre",
        [STREAMS, (2, 3, 8), (4,), (4, 4), *PROJECTION, (3,)],
        "h_pre has shape (3,); needs (..., n) or (n,), here (2, 3, 4) or (4,) with n=4, C=8",
        **V,
    ),
    _shape(
        "head",
        [STREAMS, *PROJECTION],
        "phi has shape (24, 32); needs (n, nC), here (4, 32) with n=4, C=8",
        **V,
    ),
    _shape("head", [STREAMS, (4, 32), (3,), (4,)], "scale has shape (3,); needs (1,)", **V),
    _shape(
        "head",
        [STREAMS, (4, 32), (1,), (24,)],
        "bias has shape (24,); needs (n,), here (4,) with n=4, C=8",
        **V,
    ),
]


def _call(op: str, arrays: Sequence[Any], static: dict[str, Any]) -> Any:
    if op == "combine_pre" and len(arrays) == 8:
        static = {**static, "h_pre": arrays[7]}
        arrays = arrays[:7]
    return getattr(mhc, op)(*arrays, **static)


def _check(bad: Bad, like: Callable[[Any], Any]) -> None:
    arrays = bad.arrays(like)
    for call in (
        lambda: _call(bad.op, arrays, bad.static),
        lambda: mhc.vjp(bad.op, arrays, [like(np.zeros(1, np.float32))], **bad.static),
    ):
        outputs = len(math.load(bad.op).OP.outputs)
        with pytest.raises(bad.error) as caught:
            call()
        assert str(caught.value) == bad.says
        assert type(caught.value) is bad.error
        if outputs != 1:
            break


@pytest.mark.parametrize("bad", SHAPES, ids=str)
def test_wrong_shapes(bad: Bad, like: Callable[[Any], Any]) -> None:
    _check(bad, like)


@pytest.mark.parametrize("op", math.OPS)
def test_every_array_of_every_op_is_checked(op: str, like: Callable[[Any], Any]) -> None:
    case = next(cases(op))
    declared: Op = math.load(op).OP
    good = data(case, "float32", 0).primals
    for index, name in enumerate(list(declared.arrays)[: len(good)]):
        wrong = [(0,) * 9, "a string", good[index].astype(np.int32)]
        for value, kind in zip(wrong, (ValueError, TypeError, TypeError), strict=True):
            arrays = [like(a) for a in good]
            arrays[index] = like(np.zeros(value, np.float32)) if isinstance(value, tuple) else value
            with pytest.raises(kind, match=rf"^{op}: {name} (has shape|is a|has dtype) .*; needs "):
                _call(op, arrays, case.options)


# --- what is no float array -------------------------------------------------------------------

ARRAY = "needs an array (numpy.ndarray, jax.Array, mlx.core.array or that of another backend)"
FLOATS = "needs float32, float16, bfloat16 or float64"
TYPES = [
    Bad("contract", [[[1.0]]], TypeError, f"contract: x is a list; {ARRAY}", {"how": "sum"}),
    Bad("contract", [1.0], TypeError, f"contract: x is a float; {ARRAY}", {"how": "sum"}),
    Bad("contract", [None], TypeError, f"contract: x is a NoneType; {ARRAY}", {"how": "sum"}),
    Bad("aggregate", [STREAMS, None], TypeError, f"aggregate: h_pre is a NoneType; {ARRAY}"),
    Bad("aggregate", [STREAMS, [1.0] * 4], TypeError, f"aggregate: h_pre is a list; {ARRAY}"),
    Bad("pre", [STREAMS, *PROJECTION[:2], 0.0], TypeError, f"pre: bias is a float; {ARRAY}", V),
    *(
        Bad("aggregate", [STREAMS, (4,)], TypeError, f"aggregate: {says}; {FLOATS}", {}, dtypes)
        for dtypes, says in (
            ({0: np.int32}, "x has dtype int32"),
            ({1: np.int32}, "h_pre has dtype int32"),
            ({1: np.uint8}, "h_pre has dtype uint8"),
            ({0: np.complex64}, "x has dtype complex64"),
        )
    ),
]


@pytest.mark.parametrize("bad", TYPES, ids=str)
def test_what_is_no_float_array(bad: Bad, like: Callable[[Any], Any]) -> None:
    _check(bad, like)


@pytest.mark.parametrize(
    ("name", "array", "dtype"),
    [
        ("numpy", np.zeros((2, 2), bool), "bool"),
        ("jax", jnp.zeros((2, 2), bool), "bool"),
        ("mlx-compiled", mx.zeros((2, 2), mx.bool_), "bool"),  # MLX spells it "mlx.core.bool"
        ("numpy", np.zeros((2, 2), ">f4"), ">f4"),
        ("numpy", np.zeros((2, 2), np.complex128), "complex128"),
        ("numpy", np.zeros((2, 2), object), "object"),
        ("numpy", np.array([["a"]]), "<U1"),
    ],
)
def test_dtypes_that_one_library_has(name: str, array: Any, dtype: str) -> None:
    with pytest.raises(TypeError) as caught:
        mhc.sinkhorn(array, backend=name)
    assert str(caught.value) == f"sinkhorn: logits has dtype {dtype}; {FLOATS}"


def test_float64_beside_float32() -> None:
    narrow, wide = np.zeros((2, 2), np.float32), np.zeros((2, 2))
    says = (
        "aggregate: h_pre has dtype float64 beside x of float32; needs float32 or less there, or "
        "float64 x (nothing is narrowed silently)"
    )
    with pytest.raises(TypeError) as caught:
        mhc.aggregate(narrow, wide[0])
    assert str(caught.value) == says
    assert mhc.aggregate(wide, narrow[0]).dtype == np.float64
    says = (
        "vjp of sinkhorn: the cotangent of h_res has dtype float64 beside streams of float32; "
        "needs float32 or less (nothing is narrowed silently)"
    )
    with pytest.raises(TypeError) as caught:
        mhc.vjp("sinkhorn", (narrow,), wide)
    assert str(caught.value) == says
    assert mhc.vjp("sinkhorn", (wide,), narrow)[0].dtype == np.float64


# --- static arguments -------------------------------------------------------------------------

INTEGER = "needs an integer of at least 1"
MOST = "needs an integer of at most 1000"
NUMBER = "needs a finite number of at least 0"
ORDER = "needs 'columns' or 'rows'"
BOUNDS = "needs None or two finite numbers, the smaller one first"
VARIANT = "needs a mhc_core.Variant, such as PAPER or DEEPSEEK_V4"


def _static(
    op: str, shapes: Sequence[Any], values: dict[Any, type[Exception]], name: str, need: str
) -> list[Bad]:
    return [
        Bad(op, shapes, error, f"{op}: {name} is {value!r}; {need}", {name: value})
        for value, error in values.items()
    ]


INTEGERS: dict[Any, type[Exception]] = {
    0: ValueError,
    -3: ValueError,
    2.0: TypeError,
    True: TypeError,
    "20": TypeError,
    None: TypeError,
    (2,): TypeError,
}
TOO_MANY: dict[Any, type[Exception]] = {1001: ValueError, 10**9: ValueError}
NUMBERS: dict[Any, type[Exception]] = {
    -1e-6: ValueError,
    NAN: ValueError,
    float("inf"): ValueError,
    True: TypeError,
    "0": TypeError,
    None: TypeError,
    1j: TypeError,
}
WORDS: dict[Any, type[Exception]] = {"row": ValueError, 0: ValueError, None: ValueError}
RAW = [(4,), (4,), (4, 4)]

STATICS = [
    *_static("sinkhorn", [(4, 4)], INTEGERS, "iterations", INTEGER),
    *_static("sinkhorn", [(4, 4)], NUMBERS, "eps", NUMBER),
    *_static("sinkhorn", [(4, 4)], WORDS, "first", ORDER),
    *_static("sinkhorn_knopp", [(4, 4)], INTEGERS, "max_iterations", INTEGER),
    *_static("sinkhorn_knopp", [(4, 4)], NUMBERS, "epsilon", NUMBER),
    *_static("sinkhorn_knopp", [(4, 4)], {1: TypeError}, "log_space", "needs True or False"),
    *_static("expand", [(4,)], INTEGERS, "n", INTEGER),
    *_static("contract", [STREAMS], {"max": ValueError}, "how", "needs 'sum' or 'mean'"),
    *_static("rms_norm", [(8,), (8,)], NUMBERS, "eps", NUMBER),
    *_static("static_layer", [STREAMS, *RAW, (8,)], {-1.0: ValueError}, "eps", NUMBER),
    *_static("static_layer", [STREAMS, *RAW, (8,)], {0: ValueError}, "iterations", INTEGER),
    *_static("static_mappings", RAW, {0: ValueError}, "iterations", INTEGER),
    *_static("sinkhorn", [(4, 4)], TOO_MANY, "iterations", MOST),
    *_static("sinkhorn_knopp", [(4, 4)], TOO_MANY, "max_iterations", MOST),
    *_static("static_layer", [STREAMS, *RAW, (8,)], TOO_MANY, "iterations", MOST),
    *_static("static_mappings", RAW, TOO_MANY, "iterations", MOST),
    *_static("mappings", [STREAMS, *PROJECTION], {"PAPER": TypeError}, "variant", VARIANT),
    *_static("head", [STREAMS, *PROJECTION], {None: TypeError}, "variant", VARIANT),
]


@pytest.mark.parametrize("bad", STATICS, ids=str)
def test_wrong_static_arguments(bad: Bad, like: Callable[[Any], Any]) -> None:
    _check(bad, like)


@pytest.mark.parametrize("value", [np.array(2), np.zeros(2), jnp.array(2), mx.array(2), [2], {}])
def test_static_arguments_are_never_arrays_or_containers(value: Any) -> None:
    matrix = np.zeros((2, 2), np.float32)
    for name, error in (("iterations", TypeError), ("eps", TypeError), ("first", ValueError)):
        with pytest.raises(error, match=rf"^sinkhorn: {name} is .*; needs"):
            mhc.sinkhorn(matrix, **{name: value})
    for call in (
        lambda: mhc.sinkhorn(matrix, iterations=value),
        lambda: mhc.vjp("sinkhorn", (matrix,), matrix, iterations=value),
    ):
        with pytest.raises(TypeError, match=f"^sinkhorn: iterations is .*; {INTEGER}$"):
            call()


@pytest.mark.parametrize(
    "eps", [0, 1, np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 2)]
)
def test_plain_numbers_of_every_kind_are_taken(eps: Any) -> None:
    matrix = np.eye(2)
    expected = mhc.sinkhorn(matrix, iterations=3, eps=float(eps))
    result = mhc.sinkhorn(matrix, iterations=np.int32(3), eps=eps)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("name", "value", "error", "need"),
    [
        ("norm_eps", -1.0, ValueError, NUMBER),
        ("pre_eps", NAN, ValueError, NUMBER),
        ("post_scale", "2", TypeError, NUMBER),
        ("sinkhorn_iterations", 0, ValueError, INTEGER),
        ("sinkhorn_iterations", True, TypeError, INTEGER),
        ("sinkhorn_iterations", 1001, ValueError, MOST),
        ("sinkhorn_eps", None, TypeError, NUMBER),
        ("sinkhorn_first", "colums", ValueError, ORDER),
        ("sinkhorn_first", np.zeros(2), ValueError, ORDER),
        ("sinkhorn_start", "soft", ValueError, "needs 'softmax' or 'exp'"),
        ("sinkhorn_clamp", 30.0, TypeError, BOUNDS),
        ("sinkhorn_clamp", (-30.0, None), TypeError, BOUNDS),
        ("sinkhorn_clamp", (30.0, -30.0), ValueError, BOUNDS),
        ("sinkhorn_clamp", (-30.0, NAN), ValueError, BOUNDS),
        ("res_transposed", 1, TypeError, "needs True or False"),
    ],
)
def test_a_wrong_variant_cannot_be_made(
    name: str, value: Any, error: type[Exception], need: str
) -> None:
    with pytest.raises(error) as caught:
        Variant(**{name: value})
    assert str(caught.value) == f"Variant: {name} is {value!r}; {need}"


def test_every_op_with_iterations_has_the_bound() -> None:
    checks = {
        (op, name): check
        for op in math.OPS
        for name, check in math.load(op).OP.static.items()
        if name.endswith("iterations")
    }
    assert set(checks) == {
        ("sinkhorn", "iterations"),
        ("sinkhorn_knopp", "max_iterations"),
        ("static_layer", "iterations"),
        ("static_mappings", "iterations"),
    }
    for (op, name), check in checks.items():
        assert check(op, name, 1000) == 1000
        with pytest.raises(ValueError, match=MOST):
            check(op, name, 1001)
    assert Variant(sinkhorn_iterations=1000).sinkhorn_iterations == 1000


@pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["large", "small"])
def test_integers_beyond_what_python_spells_are_refused_in_our_words(value: int) -> None:
    matrix = np.eye(2)
    for name in ("iterations", "eps"):
        with pytest.raises(ValueError, match=f"^sinkhorn: {name} is .*; needs"):
            mhc.sinkhorn(matrix, **{name: value})  # pyright: ignore[reportArgumentType]


# --- vjp --------------------------------------------------------------------------------------

X, H, H_PRE = (2, 3), (3,), (2,)
OPS_TEXT = ", ".join(math.OPS)


@dataclass(frozen=True)
class BadVjp:
    """A call of vjp on zeros of the given shapes that must fail."""

    op: Any
    primals: Any
    cotangents: Any
    error: type[Exception]
    says: str
    static: dict[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        return self.says


def _zeros(like: Callable[[Any], Any], shapes: Any) -> Any:
    """Replace shapes, which are tuples of integers, by arrays of zeros."""
    if isinstance(shapes, list):
        return tuple(_zeros(like, shape) for shape in shapes)
    return like(np.zeros(shapes, np.float32)) if isinstance(shapes, tuple) else shapes


VJPS = [
    BadVjp(
        "agregate",
        [X, H_PRE],
        H,
        ValueError,
        f"vjp: op is 'agregate'; the nearest is 'aggregate'; needs one of {OPS_TEXT}",
    ),
    BadVjp(None, [X], H, ValueError, f"vjp: op is None; needs one of {OPS_TEXT}"),
    BadVjp([], [X], H, ValueError, f"vjp: op is []; needs one of {OPS_TEXT}"),
    BadVjp(np.copysign, [X], H, ValueError, f"vjp: op is 'copysign'; needs one of {OPS_TEXT}"),
    BadVjp(
        "aggregate", 3, H, TypeError, "vjp of aggregate: primals is a int; needs a tuple of arrays"
    ),
    BadVjp(
        "aggregate",
        [X],
        H,
        ValueError,
        "vjp of aggregate: primals has length 1; needs x, h_pre",
    ),
    BadVjp(
        "aggregate",
        [X, H_PRE, H],
        H,
        ValueError,
        "vjp of aggregate: primals has length 3; needs x, h_pre",
    ),
    BadVjp(
        "combine_pre",
        [X],
        [X],
        ValueError,
        "vjp of combine_pre: primals has length 1; needs x, y, h_post, h_res, phi, scale, bias and "
        "perhaps h_pre",
        V,
    ),
    BadVjp(
        "aggregate",
        [X, H_PRE],
        [H, H],
        ValueError,
        "vjp of aggregate: cotangents has length 2; needs 1, for h",
    ),
    BadVjp(
        "residual_add_aggregate",
        [X, X, H_PRE],
        [X],
        ValueError,
        "vjp of residual_add_aggregate: cotangents has length 1; needs 2, for x, h",
    ),
    BadVjp(
        "residual_add_aggregate",
        [X, X, H_PRE],
        3,
        TypeError,
        "vjp of residual_add_aggregate: cotangents is a int; needs a tuple of arrays",
    ),
    BadVjp(
        "aggregate",
        [X, H_PRE],
        X,
        ValueError,
        "vjp of aggregate: the cotangent of h has shape (2, 3); needs the output's (3,)",
    ),
    BadVjp(
        "residual_add_aggregate",
        [X, X, H_PRE],
        [X, X],
        ValueError,
        "vjp of residual_add_aggregate: the cotangent of h has shape (2, 3); needs the output's "
        "(3,)",
    ),
    BadVjp(
        "aggregate",
        [X, H_PRE],
        [None],
        TypeError,
        f"vjp of aggregate: the cotangent of h is a NoneType; {ARRAY}",
    ),
    BadVjp(
        "sinkhorn",
        [(2, 2)],
        (2, 2),
        TypeError,
        "vjp of sinkhorn: itertions is no argument of sinkhorn; the nearest is 'iterations'; known "
        "are iterations, eps, first",
        {"itertions": 3},
    ),
    BadVjp(
        "aggregate",
        [X, H_PRE],
        H,
        TypeError,
        "vjp of aggregate: eps is no argument of aggregate; known are none",
        {"eps": 3},
    ),
    BadVjp(
        "combine_pre",
        [X, H, H_PRE, (2, 2), (8, 6), (3,), (8,)],
        [X, H, H_PRE, H_PRE, (2, 2)],
        TypeError,
        "vjp of combine_pre: h_pre is an array; needs it among the primals",
        {**V, "h_pre": None},
    ),
    *(
        BadVjp(
            op,
            shapes,
            [],
            TypeError,
            f"vjp of {op}: variant is missing; {op} needs it",
        )
        for op, shapes in {
            "mappings": [X, (8, 6), (3,), (8,)],
            "head": [X, (2, 6), (1,), (2,)],
        }.items()
    ),
    BadVjp("expand", [H], X, TypeError, "vjp of expand: n is missing; expand needs it"),
]


@pytest.mark.parametrize("bad", VJPS, ids=str)
def test_wrong_calls_of_vjp(bad: BadVjp, like: Callable[[Any], Any]) -> None:
    primals, cotangents = _zeros(like, bad.primals), _zeros(like, bad.cotangents)
    with pytest.raises(bad.error) as caught:
        mhc.vjp(bad.op, primals, cotangents, **bad.static)
    assert str(caught.value) == bad.says


def test_cotangents_that_are_one_array_for_several_outputs() -> None:
    x = np.zeros((2, 3), np.float32)  # its length is the number of outputs
    says = "cotangents is a ndarray; needs a tuple of arrays"
    with pytest.raises(TypeError, match=f"^vjp of residual_add_aggregate: {says}$"):
        mhc.vjp("residual_add_aggregate", (x, x, x[:, 0]), x)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_cotangents_that_are_no_floats(dtype: Any, like: Callable[[Any], Any]) -> None:
    x, h_pre = _zeros(like, [X, H_PRE])
    with pytest.raises(TypeError) as caught:
        mhc.vjp("aggregate", (x, h_pre), like(np.zeros(H, dtype)))
    name = np.dtype(dtype).name
    assert str(caught.value) == f"vjp of aggregate: the cotangent of h has dtype {name}; {FLOATS}"


# --- the cache of checks ----------------------------------------------------------------------


def test_a_right_call_does_not_excuse_a_wrong_one() -> None:
    matrix = np.zeros((2, 2), np.float32)
    mhc.sinkhorn(matrix, iterations=1, eps=1)
    for wrong in (True, 1.0):
        with pytest.raises(TypeError, match=INTEGER):
            mhc.sinkhorn(matrix, iterations=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=NUMBER):
        mhc.sinkhorn(matrix, iterations=1, eps=True)


def test_a_right_forward_does_not_excuse_a_wrong_vjp() -> None:
    x = np.zeros((2, 2), np.float32)
    mhc.aggregate(x, x[0])
    mhc.vjp("aggregate", (x, x[0]), x[0])
    for wrong in ([], [x[0], x[0]]):
        with pytest.raises(ValueError, match=f"cotangents has length {len(wrong)}; needs 1, for h"):
            mhc.vjp("aggregate", (x, x[0]), wrong)
    with pytest.raises(ValueError, match="the cotangent of h has shape"):
        mhc.vjp("aggregate", (x, x[0]), x)


def test_the_cache_of_checks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mhc_core import signature

    monkeypatch.setattr(signature, "_CACHE", {})
    monkeypatch.setattr(signature, "_CACHE_LIMIT", 4)
    for tokens in range(20):
        mhc.contract(np.zeros((tokens, 2, 2), np.float32))
        assert 1 <= len(signature._CACHE) <= 4
