"""The kernels' texts, their launch shapes and the spec of mlx-metal; nothing here needs a GPU."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import architectures
import pytest
from cuda_on_cpu import TYPES

import mhc_core
from mhc_backends import kernels
from mhc_backends.kernels import nvidia
from mhc_backends.kernels.launch import BUSY, Launch, launch, shares, slabs
from mhc_backends.kernels.ops import OPS
from mhc_backends.kernels.table import TABLE, VARIABLE
from mhc_backends.kernels.text import body_path, entry, flat, header, headers, signature
from mhc_backends.mlx_metal import SPEC
from mhc_core.cli.bench._arrays import Sizes
from mhc_core.variants import DEEPSEEK_V4 as V4

# ---- the spec ------------------------------------------------------------------------------------


def test_the_spec() -> None:
    assert SPEC.ops == OPS
    assert set(OPS) <= set(mhc_core.math.OPS)
    assert SPEC.sizes == (1, 32)
    assert "float64" not in SPEC.dtypes
    assert SPEC.priority > mhc_core.backends()["mlx-compiled"].spec.priority  # pyright: ignore
    assert "mlx-compiled" in SPEC.without["vmap"]


@pytest.mark.skipif(sys.platform == "darwin", reason="it runs on macOS")
def test_elsewhere_it_refuses_with_the_reason() -> None:
    reason = mhc_core.backends()["mlx-metal"].reason
    assert reason is not None
    assert "macOS" in reason
    assert sys.platform in reason
    with (
        pytest.raises(mhc_core.BackendUnavailableError, match="macOS"),
        mhc_core.use_backend("mlx-metal"),
    ):
        pass


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, mhc_backends.mlx_metal; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the texts -----------------------------------------------------------------------------------


def test_every_kernel_has_a_launch_and_every_op_a_vjp() -> None:
    assert set(TABLE) == EVERY
    for op in OPS:
        text = Path(kernels.__file__).parent.joinpath("ops", f"{op}.py").read_text()
        assert "\ndef forward(" in text
        assert "\ndef vjp(" in text


FOLDER = Path(kernels.__file__).parent
EVERY = {*kernels.KERNELS, *itertools.chain(*kernels.OWN.values())}
NEUTRAL = sorted([*FOLDER.glob("bodies/*.h"), *FOLDER.glob("common/**/*.h")])
DIALECT = {name: sorted(FOLDER.glob(f"{name}/dialect/*.h")) for name in kernels.DIALECTS}


def _code(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda path: path.stem)
def test_bodies_and_what_they_share_are_neutral(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("// ")
    code = re.sub(r"#pragma once|#include \".*\"", "", _code(text))
    foreign = r"\b(device|constant|thread|__\w+|blockIdx|threadIdx|metal|cuda|half|bfloat)\b|#"
    assert not re.search(foreign, code)
    # tokens are counted in 64 bits; the simulator's tests have the compiler look at what follows
    assert not re.search(r"\bint\b[^;\n]*\btoken\b *=", code)
    for length in re.findall(r"const int64_t \w+ = (\w+_shape_0)", code):
        assert f"int64_t {length}" in code
    used = r"\brow\(\s*\w+_shape_0, |const int64_t \w+ = \w+_shape_0|M = phi_shape_0"
    rows = re.sub(rf"{used}|\bint(?:64_t)? \w+_shape_0", "", code)
    assert "_shape_0" not in rows


def test_both_dialects_have_the_same_headers() -> None:
    metal, cuda = ([path.name for path in DIALECT[name]] for name in kernels.DIALECTS)
    assert metal == cuda


def test_dialects_hold_only_differences() -> None:
    """Check that no four meaningful lines that follow one another stand in both."""
    for metal, cuda in zip(*DIALECT.values(), strict=True):
        lines = [
            [
                line.strip()
                for line in _code(path.read_text()).splitlines()
                if len(line.strip()) > 12 and not line.startswith("#")
            ]
            for path in (metal, cuda)
        ]
        runs = [set(zip(*(own[k:] for k in range(4)), strict=False)) for own in lines]
        assert not runs[0] & runs[1], metal.name


def test_every_header_is_included() -> None:
    for dialect in kernels.DIALECTS:
        names = (*kernels.KERNELS, *kernels.OWN[dialect])
        used = {path for name in names for path in headers(body_path(name), dialect)}
        own = FOLDER.glob(f"{dialect}/**/*.h")
        every = {str(path.relative_to(FOLDER)) for path in (*NEUTRAL, *own)}
        assert used == every


@pytest.mark.parametrize("dialect", kernels.DIALECTS)
def test_no_name_is_a_word_of_metal(dialect: str) -> None:
    """Check without Clang: it compiles for the simulator, and knows these as type names at most."""
    words = "half|bfloat|uint|ushort|uchar|ulong|kernel|vertex|fragment|constant|thread"
    names = (*kernels.KERNELS, *kernels.OWN[dialect])
    text = "".join(_text(name, dialect) for name in names)
    assert not re.search(rf"(\.|->)\s*({words})\b|\b({words})\s*(\[|=[^=])", text)


FAST = "exp|exp2|exp10|log|log2|log10|sqrt|rsqrt|sin|cos|tan|tanh|pow|max|min|fmax|fmin|clamp"


def test_functions_with_a_fast_variant_are_called_precise() -> None:
    """Check the texts: the simulator's fast functions err as far as Apple's may, see math.h."""
    for path in FOLDER.glob("**/*.h"):
        if path.name != "precise.h":
            assert not re.search(rf"(?<!precise::)\b({FAST})\(", _code(path.read_text()))


def _text(name: str, dialect: str) -> str:
    return header(name, dialect) + entry(name, dialect)


# In Metal, in KiB, rounded up: MLX hashes or compares a kernel's text at every launch.
LARGEST = {
    **dict.fromkeys(("sum_rows",), 1.5),
    **dict.fromkeys(("head_vjp",), 2.5),
    **dict.fromkeys(("gated_low",), 3),
    **dict.fromkeys(("combine_vjp_wide", "mappings_unmixed_vjp"), 3),
    **dict.fromkeys(("gated_low_vjp", "static_layer_vjp_wide"), 4),
    **dict.fromkeys(("mappings_unmixed",), 4),
    **dict.fromkeys(("weights_vjp",), 6),
    **dict.fromkeys(("aggregate", "write_streams"), 7.5),
    **dict.fromkeys(("combine", "pre_scale"), 8),
    **dict.fromkeys(("aggregate_vjp", "residual_add_aggregate"), 8.5),
    **dict.fromkeys(("pre_scale_vjp",), 9),
    **dict.fromkeys(
        ("combine_vjp", "gated_combine", "head", "residual_add_aggregate_vjp", "rms_norm"), 9.5
    ),
    **dict.fromkeys(("write_streams_vjp",), 9.5),
    **dict.fromkeys(("rms_norm_vjp",), 11),
    **dict.fromkeys(("gated_combine_vjp", "static_layer"), 11.5),
    **dict.fromkeys(("pre_unmixed",), 12),
    **dict.fromkeys(("pre_unmixed_k_blocks",), 12.5),
    **dict.fromkeys(("static_layer_vjp",), 14),
    **dict.fromkeys(("gated_dlow",), 14.5),
    **dict.fromkeys(("gated_collapse",), 15.5),
    **dict.fromkeys(("sinkhorn_knopp",), 16.5),
    **dict.fromkeys(("project_dx", "project_k_blocks"), 17),
    **dict.fromkeys(("project_unmixed_k_blocks",), 17),
    **dict.fromkeys(("gated_collapse_vjp", "project_dphi"), 17.5),
    **dict.fromkeys(("gated_dfactors", "sinkhorn"), 18),
    **dict.fromkeys(("gated_project", "project_few", "static_mappings"), 18.5),
    **dict.fromkeys(("sinkhorn_knopp_vjp", "sinkhorn_vjp"), 19),
    **dict.fromkeys(("gated_dx", "static_mappings_vjp"), 19.5),
    **dict.fromkeys(("mappings",), 21.5),
    **dict.fromkeys(("mappings_vjp",), 22),
    **dict.fromkeys(("project", "write_project_k_blocks"), 23),
    **dict.fromkeys(("combine_project_k_blocks",), 23.5),
    **dict.fromkeys(("write_project_few",), 24),
    **dict.fromkeys(("pre_k_blocks",), 25),
    **dict.fromkeys(("pre",), 25.5),
    **dict.fromkeys(("combine_project_few",), 26),
    **dict.fromkeys(("write_project",), 28),
    **dict.fromkeys(("combine_project",), 28.5),
}


def test_the_size_of_each_text() -> None:
    assert set(LARGEST) <= set(kernels.KERNELS)
    sizes = {name: len(_text(name, "metal")) / 1024 for name in kernels.KERNELS}
    assert max(sizes.values()) <= 32
    assert all(sizes[name] <= most <= sizes[name] * 1.15 + 0.5 for name, most in LARGEST.items())


@pytest.mark.parametrize("dialect", kernels.DIALECTS)
def test_no_definition_stands_twice(dialect: str) -> None:
    """Check that no five meaningful lines appear twice in a text."""
    for name in (*kernels.KERNELS, *kernels.OWN[dialect]):
        lines = [line for line in header(name, dialect).splitlines() if len(line) > 12]
        runs = Counter(zip(*(lines[k:] for k in range(5)), strict=False))
        twice = [run for run, count in runs.items() if count > 1]
        assert not twice, (name, twice[:3])


def test_bodies_that_load_vectors_ask_where_they_may() -> None:
    """Check every body: one that never asks its arrays for vectors would be right, and slow."""
    written = dict.fromkeys(kernels.OWN["cuda"], "cuda")
    written |= dict.fromkeys(kernels.KERNELS, "metal")
    loading = {name for name, dialect in written.items() if "ACCESS::at(" in header(name, dialect)}
    assert len(loading) > 20
    assert {name for name in EVERY if signature(name).aligned} == loading
    for name in loading:
        _, asked = signature(name).aligned or ((), ())
        body = header(name, written[name]).partition(f"FUNCTION void {name}(")[2]
        given = set(re.findall(r"ACCESS::at\((\w+)\)", body))
        assert given == {one for one in asked if "_shape_" not in one}
        assert f"{name}<Aligned" in entry(name, written[name])
        assert f"{name}<Anywhere" in entry(name, written[name])


def test_what_an_entry_says_of_a_launch() -> None:
    plain = entry("pre", "metal", numbers=(("norm_eps", 1e-6),))
    assert "const float norm_eps = 9.999999974752427e-07f;" in plain  # float32's, exactly
    assert "threadgroup float sums[TOKENS * (N * N + 2 * N + 1)];" in plain
    assert "given[1]" not in plain
    without = entry("pre", "metal", frozenset({"given", "u"}))
    assert "float given[1] = {};\nfloat u[1] = {};\n" in without
    assert "const int given_shape_0 = 0;\n" in without
    assert "extern __shared__ uint4 operands[];" in entry("project", "cuda", launched=True)
    assert "threadgroup uint4 operands[STAGE_STEPS * " in entry("project", "metal", launched=True)
    assert "xs[combine_vjp_wide_memory<N>::xs];" in entry("combine_vjp_wide", "metal")


def test_a_text_has_what_its_body_uses() -> None:
    text = header("sum_rows", "metal")
    assert "#define BARRIER" in text
    assert "struct Position" in text
    assert "FUNCTION" not in text  # neither functions nor words that only others use
    assert "sum_rows" not in entry("sum_rows", "metal")  # its statements, without a call
    assert "namespace precise {\nFUNCTION float exp(" in header("head_vjp", "cuda")
    assert "float log(" not in header("head_vjp", "cuda")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="known are aggregate"):
        header("combined", "metal")
    with pytest.raises(ValueError, match="known are metal, cuda"):
        entry("combine", "vulkan")


# ---- the CUDA dialect, as MLX's cuda_kernel puts it together -------------------------------------

_CUDA_BEFORE = """
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cooperative_groups.h>
using Shape = cuda::std::array<int32_t, 10>;
"""


class Launched(NamedTuple):
    """The launch that MLX would be asked to compile."""

    kernel: str
    inputs: tuple[tuple[str, str], ...]  # names and dtypes
    outputs: tuple[tuple[str, str], ...]
    template: tuple[tuple[str, int], ...]
    source: str

    @property
    def types(self) -> tuple[str, frozenset[str], int | None]:
        """The kernel, its dtypes and n: what the compiler's verdict depends on."""
        dtypes = frozenset(dtype for _, dtype in (*self.inputs, *self.outputs))
        return self.kernel, dtypes, dict(self.template).get("N")

    def cuda(self, function: str) -> str:
        """Return the function as MLX writes it around a body."""
        parameters: list[str] = []
        for array, dtype in self.inputs:
            parameters.append(f"const {TYPES[dtype]}* {array}")
            if f"{array}_shape" in self.source:
                parameters.append(f"const __grid_constant__ Shape {array}_shape")
        parameters += [f"{TYPES[dtype]}* {array}" for array, dtype in self.outputs]
        constants = "".join(
            f"  constexpr {'bool' if value is True or value is False else 'int'} {word} = "
            f"{str(value).lower()};\n"
            for word, value in self.template
        )
        head = f"__global__ void {function}({', '.join(parameters)})"
        return f"{head} {{\n{constants}\n{self.source}\n}}\n"


def _kernel(name: str) -> str:
    """Return the name of the kernel that MLX's name belongs to."""
    return max((k for k in EVERY if name.startswith(f"mhc_{k}_")), key=len)


class Recorder:
    """A stand-in for ``mx.fast.cuda_kernel`` that records what is launched and returns zeros."""

    def __init__(self) -> None:
        self.launched: set[Launched] = set()

    def __call__(
        self, *, name: str, input_names: list[str], output_names: list[str], **texts: Any
    ) -> Any:
        import mlx.core as mx

        kernel = _kernel(name)

        def call(
            *, inputs: Any, template: Any, output_shapes: Any, output_dtypes: Any, **how: Any
        ) -> Any:
            given = (str(array.dtype).removeprefix("mlx.core.") for array in inputs)
            made = (str(dtype).removeprefix("mlx.core.") for dtype in output_dtypes)
            self.launched.add(
                Launched(
                    kernel,
                    tuple(zip(input_names, given, strict=True)),
                    tuple(zip(output_names, made, strict=True)),
                    tuple(template),
                    texts["source"],
                )
            )
            pairs = zip(output_shapes, output_dtypes, strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in pairs]

        return call


def _launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """Run the kit's cases on every op, forward and back: n = 4 in every dtype, others in one.

    The products with phi have other kernels for many tokens, which run as well.
    """
    from mhc_backends.kernels.functions import Ops, has_kernels
    from mhc_backends.kernels.mlx import Kernels
    from mhc_backends.mlx_common import as_tuple, from_host
    from mhc_conformance.cases import cases, data

    recorder = Recorder()
    own = Ops(Kernels(recorder, "cuda", 227 * 1024))
    for busy, sizes in ((BUSY, (1, 4, 9, 32)), (0, (1, 4))):
        monkeypatch.setattr("mhc_backends.kernels.launch.BUSY", busy)
        for op, dtype in itertools.product(OPS, TYPES):
            for case in cases(op, dtype):
                if case.sizes.n not in sizes or (dtype != "float32" and case.sizes.n != 4):
                    continue
                primals = case.placed(tuple(map(from_host, data(case, dtype, seed=0).primals)))
                if not has_kernels(op, case.options):
                    continue
                outputs = as_tuple(getattr(own, op)(*primals, **case.options))
                own.vjp(op, primals, outputs, **case.options)
                with mhc_core.no_grad():
                    getattr(own, op)(*primals, **case.options)
    return sorted(recorder.launched, key=str)


@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed: the CUDA dialect is not compiled"
)
def test_every_body_compiles_as_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = list({one.types: one for one in _launched(monkeypatch)}.values())
    assert {one.kernel for one in launched} == EVERY
    text = (
        _CUDA_BEFORE
        + flat("cuda", *map(body_path, sorted(EVERY)))
        + "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;\n"
        + "".join(one.cuda(f"kernel_{number}") for number, one in enumerate(launched))
        + "}\n"
    )
    source = tmp_path / "kernels.cu"
    source.write_text(text)
    # what it says of the language does not depend on the optimizer, which takes minutes
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-ptx", "-Xcicc", "-O0"]
    done = subprocess.run(
        [*command, "-Werror", "all-warnings", str(source), "-o", str(tmp_path / "kernels.ptx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    shutil.which("nvcc") is None,
    reason="nvcc is not installed: no kernel is held to a GPU's limits",
)
def test_kernels_have_what_a_gpu_gives_them() -> None:
    """Compile for the first and the last GPUs that are taken; by hand, for all and every op."""
    sizes = [Sizes(1, T, 4, 4096, "bfloat16") for T in (1, 4096)]
    for architecture in ("sm_80", "sm_120"):
        steps = architectures.launches(("pre",), sizes, nvidia.memory(architecture))
        made = architectures.compiled(steps, architecture)
        assert [problem for one in made for problem in one.problems()] == []
        assert {one.kernel for one in made} > {"project", "pre", "project_k_blocks", "project_vjp"}
    steps = architectures.launches(("pre",), sizes, nvidia.memory("sm_90"))
    wide = [one for one in steps if one.program.memory > nvidia.memory("sm_120")]
    for one in architectures.compiled(wide[:1], "sm_120"):  # the check itself
        assert [*one.problems()] == [f"{one.memory} bytes of memory; there are {99 * 1024}"]
    assert wide


@pytest.mark.parametrize("kibibytes", [99, 163, 227])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 32])
def test_factors_fit_in_any_gpu(n: int, kibibytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the memory that NVIDIA's GPUs give a threadgroup, from sm_80 on."""
    import mlx.core as mx

    from mhc_backends.kernels.mlx import Kernels
    from mhc_backends.kernels.ops import _projection

    monkeypatch.setattr("mhc_backends.kernels.launch.BUSY", 0)  # the kernels for many tokens
    monkeypatch.setattr("mhc_backends.kernels.launch.FEWEST_TOKENS", {"cuda": 0})
    asked: list[int] = []

    class Asked(Recorder):
        def __call__(self, *, shared_memory: int = 0, **texts: Any) -> Any:
            asked.append(shared_memory)
            return super().__call__(**texts)

    own = Kernels(Asked(), "cuda", kibibytes * 1024)
    T, C, m = 64, 512, n * n + 2 * n
    mappings = mx.zeros((T, n)), mx.zeros((T, n, n))
    phi = mx.zeros((m, n * C))
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        x, layer = mx.zeros((T, n, C), dtype), mx.zeros((T, C), dtype)
        _projection.project(own, x, phi)
        _projection.combine_project(own, x, layer, *mappings, phi)
    products = [size for size in asked if size]
    assert len(products) == 3 * (1 + (n <= _projection.KEPT))  # else combine has its own kernel
    assert all(size <= kibibytes * 1024 for size in products)


def test_nothing_adds_gradients_of_streams_after_pre_residual(tmp_path: Path) -> None:
    """Count the additions of a sublayer's gradient of x: with pre, MLX adds two gradients."""
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    own = Ops(Kernels(Recorder(), "cuda", 227 * 1024))
    x, n, C = mx.zeros((3, 4, 64), mx.bfloat16), 4, 64
    projection = mx.zeros((n * n + 2 * n, n * C)), mx.zeros(3), mx.zeros(n * n + 2 * n)

    def additions(op: str) -> int:
        def sublayer(x: Any) -> Any:
            h, h_post, h_res, *passed = getattr(own, op)(x, *projection, variant=V4)
            return own.combine(passed[0] if passed else x, mx.tanh(h), h_post, h_res)

        _, (dx,) = mx.vjp(sublayer, [x], [x])
        mx.export_to_dot(str(tmp_path / op), dx)
        return (tmp_path / op).read_text().count('"Add"')

    assert (additions("pre"), additions("pre_residual")) == (1, 0)


# ---- launch shapes -------------------------------------------------------------------------------

SIZES = [
    (T, n, C) for T in (1, 7, 1000, 2**24) for n in (1, 4, 9, 32) for C in (1, 7, 1028, 4096, 2**20)
]


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_launches_are_whole_and_within_bounds(kernel: str, dtype: str) -> None:
    for T, n, C in SIZES:
        made = launch(kernel, T, n, C, dtype)
        threads, *flat = made.threadgroup
        assert flat == [1, 1]
        assert threads % 32 == 0
        assert 32 <= threads <= 256  # which every Apple GPU has registers for, whatever the kernel
        assert made.grid[0] % threads == 0  # no threadgroup is cut off
        assert 0 < made.grid[0] < 2**31
        assert 0 < made.grid[1] < 2**16
        assert C % made.elements == 0  # every row begins where a vector may
        assert made.elements * (2 if dtype != "float32" else 4) <= 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_launch_bounds_hold_for_every_launch(dtype: str) -> None:
    """A GPU refuses a threadgroup with more threads than its text says."""
    from mhc_backends.kernels.program import Sizes, program

    for kernel in EVERY:
        for T in (1, 16, 33, 64, 65, 200, 1000, 2**20):
            for n, C in ((4, 64), (4, 4096), (2, 7168)):
                runs = program(kernel, "cuda", dtype, Sizes(T, n, C))
                assert runs.bounds
                assert runs.launch.threadgroup[0] <= runs.bounds[0], (kernel, T)


def test_each_launch_in_mlx_has_its_own_bounds() -> None:
    """Kernels of one text and several bounds are several kernels, also of one process."""
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    import mhc_core as mhc
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    kept: list[tuple[str, str, int]] = []

    def launching(*, name: str, header: str, **_: Any) -> Any:
        def launch(*, threadgroup: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> Any:
            kept.append((name, header, threadgroup[0]))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    own, n, C = Ops(Kernels(launching, "cuda", 227 * 1024)), 4, 4096
    m = n * n + 2 * n
    parameters = mx.zeros((m, n * C)), mx.zeros(3), mx.zeros(m)
    for T in (1, 64, 96, 200):
        x, y = mx.zeros((T, n, C), mx.bfloat16), mx.zeros((T, C), mx.bfloat16)
        h_post, h_res = mx.zeros((T, n)), mx.zeros((T, n, n))
        with mhc.no_grad():
            own.pre(x, *parameters, variant=mhc.DEEPSEEK_V4)
            own.combine_pre(x, y, h_post, h_res, *parameters, variant=mhc.DEEPSEEK_V4)
    assert len({threads for name, _, threads in kept if "pre_k_blocks" in name}) > 1
    for name, text, threads in kept:
        bounds = re.findall(r"__launch_bounds__\((\d+), \d+\)", text)
        assert len(bounds) == 1
        assert threads <= int(bounds[0]), name
    assert len({(name, text) for name, text, _ in kept}) == len({name for name, _, _ in kept})


def test_launches_by_example() -> None:
    assert launch("combine", 1, 4, 4096, "bfloat16") == Launch((256, 2, 1), (256, 1, 1), 8)
    assert launch("combine", 4096, 4, 4096, "bfloat16") == Launch((2**20, 1, 1), (256, 1, 1), 8)
    assert launch("combine", 4096, 4, 4096, "float32") == Launch((2**20, 2, 1), (256, 1, 1), 4)
    assert launch("combine", 3, 9, 37, "float16") == Launch((192, 1, 1), (64, 1, 1), 1)
    assert launch("sinkhorn", 9, 3, 1, "float32") == Launch((64, 1, 1), (64, 1, 1), 1)
    assert launch("sinkhorn", 4096, 4, 1, "float32") == Launch((2**14, 1, 1), (128, 1, 1), 1)
    assert launch("sum_rows", 4096, 1, 20, "float32") == Launch((16 * 256, 1, 1), (256, 1, 1), 1)


def test_slabs_by_example() -> None:
    """Check the threadgroups of `project_vjp`: full rounds, few shares, the slab's threads."""

    def shape(T: int, n: int, C: int) -> tuple[int, int, int]:
        made = launch("project_vjp", T, n, C, "bfloat16", "cuda")
        return slabs(n, C), shares("project_vjp", T, n, C, "cuda"), made.threadgroup[0]

    assert shape(4096, 4, 4096) == (64, 4, 256)  # 256 of 264
    assert shape(16384, 4, 7168) == (112, 7, 256)  # three rounds of 264; two shares leave 40 idle
    assert shape(4096, 4, 6144) == (96, 8, 256)
    assert shape(4096, 2, 4096) == (32, 8, 256)
    assert shape(4096, 3, 4096) == (64, 4, 192)
    assert shape(1, 4, 64) == (1, 1, 256)
    assert slabs(4, 4096 + 32) == slabs(1, 4096) == slabs(5, 4096) == 0


def test_what_a_thread_keeps_in_registers() -> None:
    def kept(kernel: str, C: int, dtype: str, dialect: str = "metal") -> tuple[int, bool]:
        made = launch(kernel, 4096, 4, C, dtype, dialect)
        assert made.threadgroup == (256, 1, 1)  # as many as either dialect has registers for
        return made.held, made.rest

    assert kept("static_layer", 4096, "bfloat16") == (2, False)  # 16 words each
    assert kept("static_layer", 8192, "float32") == (4, True)
    assert kept("static_layer_vjp", 4096, "bfloat16") == (2, False)  # of x and of g
    assert kept("static_layer_vjp", 4096, "float32") == (2, True)
    assert kept("static_layer_vjp", 4096, "float32", "cuda") == (4, False)


def test_shares_depend_on_nothing_but_the_sizes() -> None:
    assert shares("static_layer_vjp", 0, 4, 4096) == 0
    assert shares("static_layer_vjp", 255, 4, 4096) == 255
    assert shares("static_layer_vjp", 4097, 4, 4096) == 241  # of 17 tokens each
    assert shares("rms_norm_vjp", 4096, 1, 1024) == 1024


def test_sums_over_C_do_not_depend_on_the_batch() -> None:
    summing = [name for name, shape in TABLE.items() if shape.groups == "token"]
    assert "combine_vjp" in summing
    for kernel in summing:
        one, many = (launch(kernel, T, 4, 4096, "bfloat16") for T in (1, 5000))
        assert (one.threadgroup, one.elements) == (many.threadgroup, many.elements)


# ---- the tuning file -----------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a tuning file and choose it."""

    def write(content: Any) -> None:
        path = tmp_path / "tuning.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(VARIABLE, str(path))

    return write


def test_no_tuning_file_has_more_threads_than_metal_takes(tuned: Any) -> None:
    tuned({kernel: {"threads": 1024} for kernel in kernels.KERNELS})
    for kernel in kernels.KERNELS:
        for T, n, C in SIZES:
            made = launch(kernel, T, n, C, "bfloat16")
            assert made.threadgroup[0] <= 256
            assert made.grid[0] % made.threadgroup[0] == 0
    assert launch("combine", 4096, 4, 2**14, "bfloat16", "cuda").threadgroup == (1024, 1, 1)
    few = launch("project_few", 1, 4, 4096, "bfloat16", "cuda")
    assert few.threadgroup[0] > 256


def test_a_tuning_file_overrides_what_it_names(tuned: Any) -> None:
    plain = launch("aggregate", 1, 4, 4096, "bfloat16")
    tuned({"combine": {"threads": 64, "elements": 2}})
    assert launch("combine", 1, 4, 4096, "bfloat16") == Launch((64, 32, 1), (64, 1, 1), 2)
    assert launch("aggregate", 1, 4, 4096, "bfloat16") == plain


def nested(depth: int) -> Any:
    inside: list[Any] = []
    for _ in range(depth):
        inside = [inside]
    return inside


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ({"combine": nested(500)}, "'combine' is [[[[[[[...]]]]]]]; needs an object"),
        ([], "needs an object"),
        ({"combined": {}}, "'combined' is no kernel; known are aggregate"),
        ({"combine": 3}, "'combine' is 3; needs an object with threads, elements, iterations"),
        ({"combine": {"thread": 3}}, "'thread'; known are threads, elements, iterations"),
        ({"combine": {"threads": 100}}, "threads is 100; needs a multiple of 32 up to 1024"),
        ({"combine": {"threads": 2048}}, "threads is 2048; needs"),
        ({"combine": {"elements": 3}}, "elements is 3; needs 1, 2, 4, 8 or 16"),
        ({"combine": {"iterations": 0}}, "iterations is 0; needs an integer of at least 1"),
        ({"combine": {"iterations": True}}, "iterations is True; needs"),
        ({"combine": {"groups": "token"}}, "'groups'; known are"),
        ({"project_vjp": {"threads": 64}}, "'threads'; known are elements, iterations, resident"),
    ],
)
def test_a_wrong_tuning_file_says_what_it_needs(tuned: Any, content: Any, says: str) -> None:
    tuned(content)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        launch("combine", 1, 4, 4096, "bfloat16")
    assert VARIABLE in str(caught.value)


def test_a_tuning_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
        launch("combine", 1, 4, 4096, "bfloat16")


# ---- from kernels to ops, with a launcher that computes by the maths -----------------------------


class Launcher:
    """A stand-in for ``mx.fast.metal_kernel`` whose kernels compute with mhc_core.math."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.launches: list[dict[str, Any]] = []

    def __call__(self, *, name: str, input_names: list[str], **texts: Any) -> Any:
        self.names.append(name)
        kernel = _kernel(name)

        def call(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **how: Any) -> Any:
            self.launches.append({"kernel": kernel, **how})
            answer = _ANSWERS[kernel](dict(zip(input_names, inputs, strict=True)), output_shapes)
            return [
                array.reshape(shape).astype(dtype)
                for array, shape, dtype in zip(answer, output_shapes, output_dtypes, strict=True)
            ]

        return call


def _per_token(array: Any, T: int) -> Any:
    import mlx.core as mx

    return mx.broadcast_to(array, (T, *array.shape[1:]))


def _by_the_maths(op: str, arrays: dict[str, Any], vjp: bool) -> Any:
    module = mhc_core.math.load(op)
    T = arrays["x"].shape[0]
    primals = tuple(_per_token(arrays[name], T) for name in module.OP.arrays)
    return module.vjp(primals, (arrays["g"],)) if vjp else (module.forward(*primals),)


_ANSWERS: dict[str, Any] = {
    "aggregate": lambda arrays, _: _by_the_maths("aggregate", arrays, vjp=False),
    "aggregate_vjp": lambda arrays, _: _by_the_maths("aggregate", arrays, vjp=True),
    "combine": lambda arrays, _: _by_the_maths("combine", arrays, vjp=False),
    "combine_vjp": lambda arrays, _: _by_the_maths("combine", arrays, vjp=True),
    "combine_vjp_wide": lambda arrays, _: _by_the_maths("combine", arrays, vjp=True),
    "sum_rows": lambda arrays, _: (arrays["a"].sum(axis=0),),
}


@pytest.fixture
def mx() -> Any:
    return pytest.importorskip("mlx.core", reason="MLX is not installed")


def _inputs(mx: Any, T: int, n: int, shared: bool) -> tuple[Any, ...]:
    mx.random.seed(7)
    ahead = () if shared else (T,)
    shapes = [(T, n, 6), (T, 6), (*ahead, n), (*ahead, n, n)]
    return tuple(mx.random.normal(shape) for shape in shapes)


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_ops_are_joined_with_their_vjps(mx: Any, n: int, shared: bool, compiled: bool) -> None:
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    launcher = Launcher()
    own = Ops(Kernels(launcher, "metal"), mx.compile if compiled else None)
    arrays = _inputs(mx, 3, n, shared)

    def loss(combine: Any, *arrays: Any) -> Any:
        return mx.sum(mx.sin(combine(*arrays)))

    argnums = [1, 2, 3, 4]
    want = mx.grad(loss, argnums)(mhc_core.math.load("combine").forward, *arrays)
    got = mx.grad(loss, argnums)(own.combine, *arrays)
    assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    names = {launched["kernel"] for launched in launcher.launches}
    vjp = "combine_vjp" if n <= 4 else "combine_vjp_wide"
    assert names == {"combine", vjp} | ({"sum_rows"} if shared else set())


def test_compiled_ops_launch_by_what_was_traced(mx: Any) -> None:
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    launcher = Launcher()
    own = Ops(Kernels(launcher, "metal"), mx.compile)
    arrays = _inputs(mx, 3, 4, shared=False)
    for _ in range(3):
        mx.eval(own.combine(*arrays))
        mx.eval(own.vjp("combine", arrays, (arrays[0],)))
    assert [launched["kernel"] for launched in launcher.launches] == ["combine", "combine_vjp"]
    mx.eval(own.combine(*_inputs(mx, 5, 4, shared=False)))
    assert launcher.launches[-1]["grid"] == (5 * 32, 1, 1)


def test_without_gradients_an_op_is_its_kernels_alone(mx: Any, tmp_path: Path) -> None:
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    own = Ops(Kernels(Launcher(), "metal"), mx.compile)
    arrays = _inputs(mx, 3, 4, shared=False)
    with mhc_core.no_grad():
        alone = own.combine(*arrays)
    assert mx.array_equal(alone, own.combine(*arrays))

    def graph(*outputs: Any) -> str:
        path = tmp_path / "graph.dot"
        mx.export_to_dot(str(path), *outputs)
        return path.read_text()

    assert "CustomTransforms" in graph(own.combine(*arrays))
    with mhc_core.no_grad():
        assert "CustomTransforms" not in graph(own.combine(*arrays))
    assert "CustomTransforms" in graph(own.combine(*arrays))


def test_no_tokens_launch_nothing(mx: Any) -> None:
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    launcher = Launcher()
    own = Ops(Kernels(launcher, "metal"))
    arrays = _inputs(mx, 0, 4, shared=True)
    assert own.combine(*arrays).shape == (0, 4, 6)
    gradients = own.vjp("combine", arrays, (arrays[0],))
    assert [g.shape for g in gradients] == [a.shape for a in arrays]
    assert not any(mx.any(g != 0) for g in gradients)
    assert launcher.launches == []


def test_each_generated_text_has_a_name_of_its_own(mx: Any) -> None:
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    launcher = Launcher()
    own = Ops(Kernels(launcher, "metal"))
    for T, dtype in ((1, mx.float32), (9, mx.float32), (9, mx.float16), (8, mx.float16)):
        own.aggregate(mx.zeros((T, 2, 3), dtype), mx.zeros((T, 2)))
    assert launcher.names == [
        "mhc_aggregate_float32c_float32c_float32",  # c: in Metal's constant memory
        "mhc_aggregate_float32_float32_float32",
        "mhc_aggregate_float16_float32_float16",
    ]


# ---- where they run ------------------------------------------------------------------------------


def test_kernels_are_for_those_who_compute_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    from mhc_backends import mlx_cuda

    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert "finds no NVIDIA GPU" in str(mlx_cuda.missing())
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    before = mx.default_device()
    try:
        mx.set_default_device(mx.cpu)
        assert "MLX's default device is the CPU" in str(mlx_cuda.missing())
    finally:
        mx.set_default_device(before)

    monkeypatch.setattr("mhc_backends.mlx_common.not_the_default", lambda: None)
    for major, architecture in ((7, "sm_75"), (8, "sm_80"), (12, "sm_120")):
        told = {"compute_capability_major": major, "architecture": architecture}
        monkeypatch.setattr(mx, "device_info", lambda _device, told=told: told)
        reason = mlx_cuda.missing()
        assert reason is None if major >= 8 else "8.0 or later, and this is sm_75" in str(reason)
