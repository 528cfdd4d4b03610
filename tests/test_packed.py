"""Fewer arrays between the launches of a compiled chain: the same bits, and what MLX is given."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import launcher, needs_gcc

import mhc_core as mhc

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mhc_backends.kernels.functions import Ops  # noqa: E402
from mhc_backends.kernels.mlx import Kernels  # noqa: E402
from mhc_backends.mlx_cuda import packed as packed_module  # noqa: E402
from mhc_backends.mlx_cuda.packed import MOST_TOKENS, Packed  # noqa: E402

MEMORY = 227 * 1024
M, N, C = 24, 4, 64
V4 = {"variant": mhc.DEEPSEEK_V4}
Call = Callable[..., Any]


def kernels(launch: Call) -> Kernels:
    """Return the kernels by a launcher."""
    return Kernels(launch, "cuda", MEMORY)


class Launches:
    """Launches of a launcher, each by its name and how many arrays it reads and writes."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self._make = make

    def __call__(self, *, name: str, **texts: Any) -> Any:
        kernel = self._make(name=name, **texts)

        def launch(**given: Any) -> Any:
            self.seen.append((name, len(given["inputs"]), len(given["output_shapes"])))
            return kernel(**given)

        return launch

    def arrays(self) -> list[tuple[int, int]]:
        """Return the numbers of arrays, and forget them."""
        seen, self.seen = self.seen, []
        return [(reads, writes) for _, reads, writes in seen]


def lazily(**_: Any) -> Any:
    """Make a kernel whose outputs MLX computes when it needs them: the sum of its inputs' sizes."""

    def launch(
        *, inputs: Any, output_shapes: Any, output_dtypes: Any, template: Any, **_: Any
    ) -> list[Any]:
        total = sum((array.astype(mx.float32).sum() for array in inputs), mx.array(0.0)) * 1e-4
        return [
            mx.broadcast_to(total.astype(dtype), shape) + k
            for k, (shape, dtype) in enumerate(zip(output_shapes, output_dtypes, strict=True))
        ]

    return launch


def drawn(*ahead: int, dtype: Any = None) -> list[Any]:
    """Draw streams, and the parameters of one sublayer."""
    rng = np.random.default_rng(0)

    def normal(size: float, *shape: int) -> Any:
        return mx.array((size * rng.normal(size=shape)).astype(np.float32))

    x = normal(1, *ahead, N, C).astype(dtype or mx.bfloat16)
    return [x, normal(0.05, M, N * C), mx.ones(3), normal(1, M)]


def chain(call: Call, x: Any, *parameters: Any) -> list[Any]:
    """Run a layer's end and the next one's beginning three times, from ``pre`` to ``combine``.

    The third layer's input has the weights of the layer before, as in the single-pass order.
    """
    h, h_post, h_res = call("pre", x, *parameters)
    layers, given = [h], list[Any]()
    for k in range(3):
        made = call("combine_pre", x, h, h_post, h_res, *parameters, *given)
        x, h, h_pre, h_post, h_res = made
        layers.append(h)
        given = [h_pre] if k == 1 else []
    return [*layers, call("combine", x, h, h_post, h_res), x, h_pre, h_post, h_res]


def calls(ops: Any) -> Call:
    def call(op: str, *arrays: Any) -> Any:
        return getattr(ops, op)(*arrays, **({} if op == "combine" else V4))

    return call


def packed_calls(packed: Packed) -> Call:
    def call(op: str, *arrays: Any) -> Any:
        made = packed(op, {} if op == "combine" else V4, arrays)
        assert made is not None, op
        return made if len(made) > 1 else made[0]

    return call


# ---- bits ----------------------------------------------------------------------------------------


@needs_gcc
@pytest.mark.parametrize("ahead", [(3,), (1, 2)], ids=["flat", "batch"])
def test_a_packed_chain_has_the_same_bits(
    ahead: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "packed"  # both compile the same texts
    folder.mkdir(exist_ok=True)
    apart, joint = Launches(launcher(folder)), Launches(launcher(folder))
    packed = Packed(kernels(joint))
    with mhc.no_grad():
        want = chain(calls(Ops(kernels(apart))), *drawn(*ahead))
        got = chain(packed_calls(packed), *drawn(*ahead))
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert mx.array_equal(one, other)
    # pre: its sums, then h and the mappings; combine_pre: x' with its sums, then the same; combine
    assert apart.arrays() == [(2, 1), (4, 4), *[(5, 2), (4, 4)] * 2, (5, 2), (5, 4), (4, 1)]
    assert joint.arrays() == [(2, 1), (4, 2), *[(4, 1), (3, 2)] * 2, (4, 1), (4, 2), (3, 1)]
    del got, one
    gc.collect()
    assert not packed._views


@needs_gcc
def test_other_forms_have_the_same_bits(tmp_path: Path) -> None:
    """HY-V4's, without H_res, and the norm of h inside, given h_pre."""
    own, packed = (
        Ops(Kernels(launcher(tmp_path), "cuda", MEMORY)),
        Packed(kernels(launcher(tmp_path))),
    )
    x, phi, scale, bias = drawn(2)
    y, h_post, h_pre = x[:, 0], mx.ones((2, N)), mx.full((2, N), 0.3)
    unmixed = [phi[: 2 * N], scale[:2], bias[: 2 * N]]
    norm = {**V4, "h_norm_eps": 1e-6, "h_raw": True}
    work: list[tuple[str, dict[str, Any], list[Any]]] = [
        ("combine_pre", {"variant": mhc.HY_V4}, [x, y, h_post, None, *unmixed]),
        ("pre_norm", norm, [x, phi, scale, bias, mx.ones(C, x.dtype)]),
        ("combine_pre", V4, [x, y, h_post, mx.ones((2, N, N)), phi, scale, bias, h_pre]),
    ]
    for op, static, arrays in work:
        with mhc.no_grad():
            want = [one for one in getattr(own, op)(*arrays, **static) if one is not None]
        got = packed(op, static, arrays)
        assert got is not None
        assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True)), op


def test_what_is_not_packed() -> None:
    """Many tokens; parts that do not begin where vectors may; an op that no chain has."""
    packed = Packed(kernels(lazily))
    x, *parameters = drawn(MOST_TOKENS + 1)
    assert packed("pre", V4, [x, *parameters]) is None
    assert packed("pre", V4, [x[:0], *parameters]) is None
    assert packed("pre", V4, [x[:MOST_TOKENS], *parameters]) is not None
    assert packed("head", V4, [x[:2], parameters[0][:N], mx.ones(1), mx.ones(N)]) is None
    odd = mx.zeros((2, 3, 5)), mx.zeros((15, 15)), mx.ones(3), mx.zeros(15)
    assert packed("pre", V4, odd) is None


# ---- in a caller's graph -------------------------------------------------------------------------


@pytest.fixture
def launches() -> Launches:
    return Launches(lazily)


@pytest.fixture
def own(launches: Launches) -> Ops:
    return Ops(kernels(launches), mx.compile, Packed(kernels(launches)))


def test_only_a_caller_s_graph_is_packed(own: Ops, launches: Launches) -> None:
    arrays = drawn(1)
    plain = [(2, 1), (4, 4), *[(5, 2), (4, 4)] * 2, (5, 2), (5, 4), (4, 1)]
    with mhc.no_grad():
        chain(calls(own), *arrays)  # MLX compiles each op: combine_pre without h_pre and with it
        assert launches.arrays() == [(2, 1), (4, 4), (5, 2), (4, 4), (5, 2), (5, 4), (4, 1)]
        chain(calls(own), *arrays)
        assert launches.arrays() == []

        def whole(*arrays: Any) -> list[Any]:
            return chain(calls(own), *arrays)

        compiled = mx.compile(whole)
        mx.eval(compiled(*arrays))
        traced = launches.arrays()  # each op twice: as it is, then packed
        assert [one for k, one in enumerate(traced) if k % 4 in (2, 3)][:2] == [(2, 1), (4, 2)]
        assert traced.count((3, 2)) == 2
        assert traced.count((4, 1)) == 3 + 1  # the last one is combine's, before it is packed
        assert len(traced) == 2 * len(plain)
        mx.eval(compiled(*arrays))
        assert launches.arrays() == []
    compiled_with_gradients = mx.compile(whole)
    mx.eval(compiled_with_gradients(*arrays))
    assert all(writes != 2 or reads != 3 for reads, writes in launches.arrays())


def test_a_view_that_is_used_otherwise_is_an_array(own: Ops, launches: Launches) -> None:
    """Check that a number computed from a mapping is no part of a packed array any more."""
    arrays = drawn(1)

    def scaled(x: Any, *parameters: Any) -> Any:
        _, h_post, h_res = own.pre(x, *parameters, **V4)
        return own.combine(x, x[..., 0, :], h_post * 2, h_res)

    with mhc.no_grad():
        scaled(*arrays)
        launches.arrays()
        mx.eval(mx.compile(scaled)(*arrays))
    assert launches.arrays()[-1] == (4, 1)  # x, y, the scaled h_post, and h_res where it is


CHANGES: list[Callable[[Any], Any]] = [
    lambda array: array.__iadd__(1),
    lambda array: array.__imul__(2),
    lambda array: array.__setitem__(0, 3),
    lambda array: array.__setitem__(Ellipsis, 3),
]


@needs_gcc
@pytest.mark.parametrize("place", [0, 3, 4], ids=["x", "h_post", "h_res"])
def test_a_view_that_is_changed_in_place(place: int, tmp_path_factory: Any) -> None:
    """MLX changes the array of the same Python object: the op must read what it is then."""
    folder = tmp_path_factory.getbasetemp() / "packed"
    folder.mkdir(exist_ok=True)
    own, packed = (
        Ops(kernels(launcher(folder))),
        Packed(kernels(launcher(folder))),
    )
    x, *parameters = drawn(3)
    y, h_post, h_res = x[:, 0], mx.ones((3, N)), mx.ones((3, N, N))

    def changed(call: Call, change: Callable[[Any], Any]) -> Any:
        made = list(call("combine_pre", x, y, h_post, h_res, *parameters))
        kept = made[place]
        change(made[place])
        assert made[place] is kept
        return call("combine", made[0], made[1], made[3], made[4])

    for change in CHANGES:
        with mhc.no_grad():
            want = changed(calls(own), change)
            assert mx.array_equal(changed(packed_calls(packed), change), want)


def test_a_view_is_one_node_of_the_graph_or_two(tmp_path: Path) -> None:
    """Where something reads views, each costs MLX a node; streams of 16 bits cost another."""
    x, *parameters = drawn(3)
    arrays = [x, mx.ones((3, C), x.dtype), mx.ones((3, N)), mx.ones((3, N, N)), *parameters]
    made = Packed(kernels(lazily))("combine_pre", V4, arrays)
    assert made is not None
    x_new, _, *mappings = made
    for view, nodes in (
        (x_new, ["AsStrided", "View"]),
        *((one, ["AsStrided"]) for one in mappings),
    ):
        file = tmp_path / "graph.dot"
        mx.export_to_dot(str(file), view)
        text = file.read_text()
        assert [name for name in ("AsStrided", "View", "Slice", "Reshape") if name in text] == nodes


def test_nothing_is_packed_where_changes_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed_module.changes_show()
    monkeypatch.setattr(packed_module, "_memory_of", lambda _: b"")
    packed_module.changes_show.cache_clear()
    assert not packed_module.changes_show()
    assert Packed(kernels(lazily))("pre", V4, drawn(1)) is None
    packed_module.changes_show.cache_clear()


def test_threads_and_other_shapes_stay_right(own: Ops, launches: Launches) -> None:
    """New shapes are not a caller's graph, the first time that they are seen."""
    with mhc.no_grad():
        for T in (1, 2, 3, 2, 1):
            own.pre(*drawn(T), **V4)
    assert launches.arrays() == [(2, 1), (4, 4)] * 3
