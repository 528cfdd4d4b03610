"""The compiled code of mlx-cuda, put where MLX looks for it, on a machine without a GPU."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mhc_backends.kernels import nvrtc  # noqa: E402
from mhc_backends.mlx_cuda import compiled, launcher  # noqa: E402
from mhc_core.errors import BackendUnavailableError  # noqa: E402

NAME = "mhc_doubled_bfloat16_float32_float32_sm_90"
KERNEL = compiled.Kernel(
    name=NAME,
    passed=('#include "/texts/header.h"\n', '// x_shape\n#include "/texts/source.h"\n'),
    whole=(
        "template <typename T> __device__ T twice(T x) { return x + x; }\n",
        "out[0] = twice(x[0]);",
    ),
    inputs=(("x", "bfloat16", True), ("dx", "float32", False)),
    outputs=(("out", "float32"),),
    template=(("N", 4), ("LOG", True), ("W", 8)),
)


class Gpu:
    """A machine with one GPU, whose compiler is a stand-in; it counts what it compiles."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.broken = False

    def compile(self, text: str, architecture: str) -> bytes:
        if self.broken:
            raise BackendUnavailableError("NVRTC cannot compile")
        self.texts.append(text)
        return f"{architecture} {len(text)}".encode()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    """Make a machine with a GPU, and empty folders of ours and of MLX's."""
    made = Gpu()
    monkeypatch.setenv("MHC_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "mlx"))
    monkeypatch.setattr(nvrtc, "_compile", made.compile)
    monkeypatch.setattr(nvrtc, "_version", lambda: "nvrtc 13.0")
    monkeypatch.setattr(nvrtc, "_headers_digest", lambda: "the headers")
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    monkeypatch.setattr(mx, "__version__", "0.32.4")
    monkeypatch.setattr(mx, "device_info", lambda *_: {"architecture": "sm_90"})
    compiled.architecture.cache_clear()
    yield made
    compiled.finish()
    compiled.architecture.cache_clear()


# ---- names and texts -----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, whose hash it is")
def test_the_hash_is_that_of_libstdcxx(tmp_path: Path) -> None:
    lines = [b"", b"a", b"1234567", b"12345678", b"123456789", "é" * 11, compiled.mlx_text(KERNEL)]
    contents = [one if isinstance(one, bytes) else one.encode() for one in lines]
    contents += [bytes((7 * k) % 251 for k in range(length)) for length in range(60, 80)]
    source = tmp_path / "hash.cpp"
    written = ["".join(f"\\x{byte:02x}" for byte in one) for one in contents]
    calls = "".join(
        f'std::cout << std::hash<std::string>{{}}(std::string("{text}", {len(one)})) << "\\n";\n'
        for one, text in zip(contents, written, strict=True)
    )
    source.write_text(
        f"#include <functional>\n#include <iostream>\n#include <string>\nint main() {{\n{calls}}}\n"
    )
    program = tmp_path / "hash"
    subprocess.run(["g++", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert list(map(int, printed.split())) == list(map(compiled.hashed, contents))


def test_the_text_is_what_mlx_writes() -> None:
    """As ``build_kernel`` of mlx/backend/cuda/custom_kernel.cpp puts it together."""
    name = f"custom_kernel_{NAME}_4_t_8"
    assert compiled.mlx_name(KERNEL) == name
    assert compiled.mlx_text(KERNEL) == (
        '\n#include "mlx/backend/cuda/device/utils.cuh"\n'
        "\n#include <cooperative_groups.h>\n"
        '\n#include "/texts/header.h"\n'
        "namespace mlx::core::cu {\n"
        "\nnamespace cg = cooperative_groups;\n"
        f"\n__global__ void {name}(\n"
        "    const __nv_bfloat16* x,\n"
        "    const __grid_constant__ Shape x_shape,\n"
        "    const float* dx,\n"
        "    float* out) {\n"
        "  constexpr int N = 4;\n  constexpr bool LOG = true;\n  constexpr int W = 8;\n"
        '\n// x_shape\n#include "/texts/source.h"\n'
        "\n}\n\n} // namespace mlx::core::cu\n"
    )


def test_mlx_finds_a_name_in_any_word() -> None:
    """MLX passes a shape where the text has its name, also as the end of another's."""
    asked = KERNEL._replace(passed=("", "// dx_shape"))
    assert [shape for _, _, shape in compiled._inputs(asked)] == [True, False]  # dx has no axes
    axes = asked._replace(inputs=(("x", "float32", True), ("dx", "float32", True)))
    assert [shape for _, _, shape in compiled._inputs(axes)] == [True, True]
    text = compiled.function_text(axes)
    assert text.index("Shape x_shape") < text.index("float* dx,") < text.index("Shape dx_shape")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_what_is_compiled_takes_the_same_parameters(tmp_path: Path) -> None:
    """Two pointers, MLX's Shape of ten lengths, and a pointer."""
    file = tmp_path / "kernel.cu"
    headers = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
    file.write_text(headers + compiled.function_text(KERNEL))
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-ptx", str(file), "-o", "-"]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kinds = [line.split()[1:-1] for line in made.splitlines() if line.strip().startswith(".param")]
    sizes = [kind[-1] for kind in kinds]
    assert sizes == [".u64", ".b8", ".u64", ".u64"]
    assert "_param_1[40]" in made


# ---- files ---------------------------------------------------------------------------------------


def test_the_files_of_a_kernel(gpu: Gpu, tmp_path: Path) -> None:
    path = compiled.place(KERNEL, "sm_90")
    assert path.parent == tmp_path / "mlx"
    assert path.name == f"{compiled.module_name(KERNEL)}.ptx"
    assert path.read_bytes().startswith(b"sm_90 ")
    names = path.with_suffix(".txt").read_text()
    assert names == f"mlx::core::cu::custom_kernel_{NAME}_4_t_8\tmhc_kernel\n"
    assert len(gpu.texts) == 1
    # another process finds the code in our cache, and mends what is damaged
    path.write_bytes(b"half a fi")
    path.with_suffix(".txt").unlink()
    assert compiled.place(KERNEL, "sm_90").read_bytes().startswith(b"sm_90 ")
    assert path.with_suffix(".txt").read_text() == names
    assert len(gpu.texts) == 1
    assert sorted(one.name for one in path.parent.iterdir()) == [
        path.name,
        path.with_suffix(".txt").name,
    ]


def test_a_file_that_is_there_is_not_written_again(gpu: Gpu) -> None:
    path = compiled.place(KERNEL, "sm_90")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    compiled.place(KERNEL, "sm_90")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_a_long_name_becomes_folders(gpu: Gpu, tmp_path: Path) -> None:
    """As ``get_ptx_path`` of mlx/backend/cuda/jit_module.cpp cuts it."""
    long = KERNEL._replace(name="k" * 600)
    name = compiled.module_name(long)
    path = compiled.place(long, "sm_90")
    assert path == tmp_path / "mlx" / name[:245] / name[245:490] / f"{name[490:]}.ptx"
    assert path.with_suffix(".txt").is_file()


def test_mlx_s_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``ptx_cache_dir`` and ``std::filesystem::temp_directory_path`` find it."""
    for word in ("MLX_PTX_CACHE_DIR", "TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(word, raising=False)
    version = mx.__version__
    assert compiled.folder() == Path("/tmp", "mlx", version, "ptx")
    monkeypatch.setenv("TEMPDIR", "/c")
    monkeypatch.setenv("TMP", "/b")
    assert compiled.folder() == Path("/b", "mlx", version, "ptx")
    monkeypatch.setenv("TMPDIR", "/a")
    assert compiled.folder() == Path("/a", "mlx", version, "ptx")
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/own")
    assert compiled.folder() == Path("/own")


# ---- launches ------------------------------------------------------------------------------------


class Made:
    """``mx.fast.cuda_kernel``, which tells what it was given."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []
        self.launches: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> Any:
        self.kernels.append(given)
        return functools.partial(self._launch, len(self.kernels) - 1)

    def _launch(self, which: int, **given: Any) -> list[Any]:
        self.launches.append({"kernel": which, **given})
        return []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Stand in for MLX's function, which its build for CPUs does not have."""
    stand_in = Made()
    monkeypatch.setattr(mx.fast, "cuda_kernel", stand_in, raising=False)
    return stand_in


def launched(dtype: Any = mx.bfloat16, width: int = 8) -> Any:
    """Make a kernel and launch it once."""
    kernel = launcher.cuda_kernel(
        name="mhc_doubled",
        input_names=["x"],
        output_names=["out"],
        source="out[0] = twice(x[0], x_shape[0]);",
        header="// the header\n",
    )
    arguments = {
        "inputs": [mx.zeros((2, 3), dtype)],
        "template": [("W", width)],
        "grid": (32, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(1,)],
        "output_dtypes": [mx.float32],
    }
    kernel(**arguments)
    return functools.partial(kernel, **arguments)


def test_a_launch_places_its_kernel_once(gpu: Gpu, made: Made, tmp_path: Path) -> None:
    again = launched()
    again()
    compiled.finish()
    assert len(gpu.texts) == 1
    assert len(made.launches) == 2
    assert len(list((tmp_path / "mlx").glob("*.ptx"))) == 1
    (given,) = made.kernels
    assert given["name"] == "mhc_doubled_sm_90"
    # what MLX would hash and compile is what the file is named by
    kernel = compiled.Kernel(
        given["name"],
        (given["header"], given["source"]),
        ("", ""),
        (("x", "bfloat16", True),),
        (("out", "float32"),),
        (("W", 8),),
    )
    assert (tmp_path / "mlx" / f"{compiled.module_name(kernel)}.ptx").is_file()


def test_each_dtype_and_template_is_a_kernel(gpu: Gpu, made: Made, tmp_path: Path) -> None:
    for dtype, width in ((mx.bfloat16, 8), (mx.float32, 8), (mx.float32, 4)):
        launched(dtype, width)
    compiled.finish()
    assert len(set(gpu.texts)) == 3
    assert len(list((tmp_path / "mlx").glob("*.ptx"))) == 3


def test_the_texts_of_another_process_have_the_same_name(gpu: Gpu, made: Made) -> None:
    launched()
    launched()
    first, second = made.kernels
    assert (first["header"], first["source"]) == (second["header"], second["source"])
    assert os.environ["MHC_CACHE"] in first["source"]
    text = Path(first["source"].split('"')[1]).read_text()
    assert text == "out[0] = twice(x[0], x_shape[0]);"
    Path(first["source"].split('"')[1]).write_text("half a te")
    launched()
    assert Path(first["source"].split('"')[1]).read_text() == text


@pytest.mark.parametrize("why", ["version", "compiler", "folder", "broken"])
def test_mlx_compiles_where_nothing_can_be_placed(
    why: str, gpu: Gpu, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if why == "version":  # whose names and texts may be others
        monkeypatch.setattr(mx, "__version__", "0.40.0")
    if why == "compiler":
        monkeypatch.setattr(nvrtc, "missing", lambda: "no NVRTC")
    if why == "folder":
        (tmp_path / "mlx").write_text("a file")
    gpu.broken = why == "broken"
    launched()
    compiled.finish()
    assert len(made.launches) == 1
    assert not list((tmp_path / "mlx").glob("**/*.ptx"))
    assert made.kernels[0]["name"] == (
        "mhc_doubled" if why in ("version", "compiler") else "mhc_doubled_sm_90"
    )


def test_the_kernels_of_an_op_are_placed_before_mlx_runs_it(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards, vjps and what runs without gradients wait, once each kernel has been built."""
    import mhc_core as mhc
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    told: list[str] = []

    def launching(*, name: str, **_: Any) -> Any:
        def launch(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[Any]:
            told.append(name.split("_")[1])
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    own = Ops(Kernels(launching, "cuda", 227 * 1024, lambda: told.append("built")))
    x, w = mx.ones((3, 4, 64)), mx.ones((3, 4))
    with mhc.no_grad():
        own.aggregate(x, w)
    assert told == ["aggregate", "built"]
    told.clear()
    mx.grad(lambda x: own.aggregate(x, w).sum())(x)
    assert told[-1] == "built"
    assert told.count("built") == 2
    told.clear()
    own.vjp("aggregate", (x, w), (mx.ones((3, 64)),))
    assert told[-1] == "built"
