"""A second front end: the texts are C++ for OpenCL, whose keywords and address spaces are clang's.

test_vocabulary.py checks that they are C++14 and nothing later, with the names that they declare.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_backends.kernels import KERNELS
from text_sample import all_texts, chosen

from mhc_metal_simulator import CompileError, front_ends, texts
from mhc_metal_simulator.headers import utilities
from mhc_metal_simulator.texts import complete


@pytest.fixture
def opencl() -> None:
    if reason := front_ends.missing_opencl():
        pytest.skip(reason)


@pytest.mark.usefixtures("opencl")
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_text_is_cpp_for_opencl(kernel: str) -> None:
    front_ends.opencl(chosen(kernel).text, kernel)


SLIPS = {
    "half as a name": (
        "const Position here",
        "float half = 1;\nconst Position here",
        "cannot combine",
    ),
    "kernel as a name": (
        "const Position here",
        "float kernel = 1;\nconst Position here",
        "expected",
    ),
    "constant as a name": (
        "const Position here",
        "float constant = 1;\nconst Position here",
        "expected",
    ),
    "a cast to another space": (
        "const Position here",
        "(void)(device int*)logits_shape;\nconst Position here",
        "address space",
    ),
    "memory of a threadgroup in a function": (
        "struct Position {",
        "inline void f() { threadgroup float x[4]; }\nstruct Position {",
        "non-kernel function",
    ),
    "quad as a function": ("struct Position {", "inline int quad(int);\nstruct Position {", "quad"),
}


@pytest.mark.usefixtures("opencl")
@pytest.mark.parametrize("what", SLIPS)
def test_a_slip_is_refused(what: str) -> None:
    right, wrong, says = SLIPS[what]
    text = chosen("sinkhorn", "float32").text
    assert right in text
    text = text.replace(right, wrong, 1)
    if "logits_shape [[" not in text:
        shape = "const constant int* logits_shape [[buffer(9)]],\nuint thread_index"
        text = text.replace("uint thread_index", shape, 1)
    with pytest.raises(CompileError) as caught:
        front_ends.opencl(text, "slip")
    first = next(line for line in str(caught.value).splitlines() if "error: " in line)
    assert re.search(says, first), first


# ---- whole files ---------------------------------------------------------------------------------


def test_a_whole_file_passes_with_mlx_utilities_before_it() -> None:
    text = chosen("combine_project_few", "bfloat16")
    whole = complete(text)
    assert whole.startswith(utilities())
    assert whole.endswith(f"{text.text}\n")
    front_ends.metal(whole, text.kernel)


def test_a_name_of_mlx_utilities_would_be_found() -> None:
    text = chosen("sum_rows")
    assert "struct Limits" in utilities()
    slip = complete(text).replace(
        "struct Position {", "struct Limits { int k; };\nstruct Position {", 1
    )
    with pytest.raises(CompileError, match="Limits"):
        front_ends.metal(slip, text.kernel)


def test_the_command_writes_whole_files_and_a_list_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = [chosen("sum_rows"), chosen("combine_project_few", "bfloat16")]
    monkeypatch.setattr(texts, "texts", lambda **asked: iter([] if asked else two))
    texts.main([str(tmp_path / "new")])
    assert capsys.readouterr().out == f"2 texts in {tmp_path / 'new'}\n"
    for text in two:
        assert (tmp_path / "new" / f"{text.name}.metal").read_text() == complete(text)
    listed = json.loads((tmp_path / "new" / "texts.json").read_text())
    assert [(one["kernel"], one["n"], one["dtype"]) for one in listed] == [
        (text.kernel, text.n, text.dtype) for text in two
    ]


def test_every_text_has_a_name_and_a_text_of_its_own() -> None:
    """Check also inputs in another memory, and launches that leave out other arrays."""
    made = list(texts.texts(streams=(2,), dtypes=("float16",)))
    assert len({text.name for text in made}) == len({text.text for text in made}) == len(made)
    few = [text for text in all_texts() if (text.n, text.dtype) == (2, "float16")]
    assert len(made) > len(few) > 20
    assert {text.kernel for text in few} <= {text.kernel for text in made}
