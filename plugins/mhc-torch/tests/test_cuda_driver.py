"""torch-cuda's cache of compiled kernels, and which tensors and machines it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mhc_core as mhc
from mhc_backends.kernels import nvrtc
from mhc_core.errors import BackendUnavailableError
from mhc_torch import cuda

# ---- the cache -----------------------------------------------------------------------------------


class Compiler:
    """NVRTC, as far as the cache sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[str] = []
        monkeypatch.setattr(nvrtc, "_compile", self._compile)
        monkeypatch.setattr(nvrtc, "_version", lambda: "nvrtc 13.0")
        monkeypatch.setattr(nvrtc, "_headers_digest", lambda: "the headers")

    def _compile(self, text: str, architecture: str) -> bytes:
        self.compiled.append(architecture)
        return f"{architecture} {text}".encode()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setenv("MHC_CACHE", str(tmp_path / "cache"))
    return Compiler(monkeypatch)


def _files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "cubin").iterdir())


def test_a_text_is_compiled_once_for_each_architecture(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [nvrtc.compiled("text", one) for one in ("sm_80", "sm_90", "sm_80")]
    assert codes[0] == codes[2] != codes[1]
    assert compiler.compiled == ["sm_80", "sm_90"]
    assert [path.suffix for path in _files(tmp_path)] != [".sm_80", ".sm_80"]
    monkeypatch.setattr(nvrtc, "_version", lambda: "nvrtc 13.1")  # another compiler, other code
    nvrtc.compiled("text", "sm_80")
    nvrtc.compiled("another text", "sm_80")
    assert len(compiler.compiled) == len(_files(tmp_path)) == 4


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_compiled_anew(
    compiler: Compiler, tmp_path: Path, damage: bytes | None
) -> None:
    code = nvrtc.compiled("text", "sm_90")
    (path,) = _files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?" if damage is None else damage)
    assert nvrtc.compiled("text", "sm_90") == code
    assert path.read_bytes() == whole
    assert len(compiler.compiled) == 2


def test_without_a_cache_it_still_compiles(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    for cache in (str(tmp_path / "file"), "/dev/null"):
        monkeypatch.setenv("MHC_CACHE", cache)
        assert nvrtc.compiled("text", "sm_90")
    assert len(compiler.compiled) == 2


def test_without_headers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "HEADERS", ("no_such_header.h",))
    with pytest.raises(BackendUnavailableError, match=r"mhc-torch\[cuda\]"):
        nvrtc._headers.__wrapped__()


# ---- what it takes -------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Pretend that there are GPUs of these compute capabilities."""
    found = [(9, 0), (7, 5)]
    monkeypatch.setattr(cuda, "_REFUSED", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    return found


def _on(index: int | None) -> Any:
    where = "cpu" if index is None else f"cuda:{index}"
    return SimpleNamespace(is_cuda=index is not None, device=where, get_device=lambda: index or 0)


@pytest.mark.usefixtures("gpus")
def test_it_takes_tensors_of_gpus_with_tensor_cores() -> None:
    host = object()  # NumPy's arrays have no is_cuda
    assert cuda.takes([_on(0)]) is None
    assert cuda.takes([host, host]) is None
    assert cuda.takes([host, _on(0)]) is None
    for arrays in ([_on(None)], [host, _on(None)]):
        assert "takes CUDA tensors, not those on cpu" in str(cuda.takes(arrays))
    assert "8.0 or later, and GPU 1 has 7.5" in str(cuda.takes([_on(1)]))
    torch.vmap(lambda x: _under_vmap(x))(torch.zeros(2))


def _under_vmap(x: torch.Tensor) -> torch.Tensor:
    assert cuda.takes([_on(0)]) == cuda.NO_VMAP
    return x


def test_a_compilers_tensors_are_taken_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_REFUSED", {})
    with FakeTensorMode(), torch.device("meta"):
        assert "not those on meta" in str(cuda.takes([torch.zeros(3)]))


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reason = mhc.backends()["torch-cuda"].reason
    if reason is None:
        pytest.skip("this machine has one")
    assert any(word in reason for word in ("without CUDA", "cuda-bindings", "driver", "no GPU"))
    (tmp_path / "lib").mkdir()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(cuda, "find_spec", lambda name: spec if name == "torch" else None)
    assert "without CUDA" in str(cuda.missing())
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert "pip install -e 'plugins/mhc-torch[cuda]'" in str(cuda.missing())
    monkeypatch.setattr(cuda, "_bindings", lambda: True)
    monkeypatch.setattr(cuda, "devices", lambda: 0)
    assert cuda.missing() == "NVIDIA's driver finds no GPU"
    monkeypatch.setattr(cuda, "devices", lambda: 1)
    assert cuda.missing() is None


def test_pytorch_alone_is_enough() -> None:
    """Check that neither MLX nor JAX is imported on the way to a plan and its texts."""
    code = """
import sys
sys.modules["mlx"] = sys.modules["jax"] = None  # an import of them fails
import mhc_torch.plans.kernels, mhc_torch.metal.proof, mhc_core
from mhc_backends.kernels.ops import OPS, load
from mhc_backends.kernels.plan import record
from mhc_backends.kernels.cuda_function import function
list(map(load, OPS))
plan = record("forward", "contract", [[((2, 4, 8), "bfloat16")]], {"how": "sum"}, "cuda", 0)
(step,) = plan.steps
assert "__global__" in function(step).text
"""
    subprocess.run([sys.executable, "-c", code], check=True)
