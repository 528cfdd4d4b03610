"""The functions that PyTorch compiles: accepted as MLX's are, without MLX's own utilities."""

from __future__ import annotations

import functools
import re

import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_backends.kernels import KERNELS
from mhc_backends.kernels.metal_function import LENGTHS, MOST_BUFFERS, NAME, written

from mhc_metal_simulator import CompileError, front_ends, vocabulary
from mhc_metal_simulator.texts import Text, complete, texts
from mhc_metal_simulator.vocabulary import WORDS

OWN = {NAME, LENGTHS, "mhc_instance"}


@functools.cache
def _texts() -> dict[str, list[Text]]:
    """Return a text for each kernel, of two numbers of streams and two dtypes."""
    every: dict[str, list[Text]] = {}
    for text in texts((4, 8), ("float32", "bfloat16"), every=False, library="torch"):
        every.setdefault(text.kernel, []).append(text)
    return every


def _chosen(kernel: str) -> Text:
    mine = _texts()[kernel]
    return mine[KERNELS.index(kernel) % len(mine)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_front_ends_accept_the_text(kernel: str) -> None:
    text = _chosen(kernel)
    front_ends.metal(complete(text), kernel)
    if reason := front_ends.missing_opencl():
        pytest.skip(reason)
    front_ends.opencl(text.text, kernel)


@pytest.mark.parametrize("kernel", ["combine", "pre", "project", "sinkhorn", "sum_rows"])
def test_no_word_is_new_to_metal(kernel: str) -> None:
    text = _chosen(kernel).text
    names, conversions = front_ends.cxx14(text, kernel)
    assert conversions <= set(vocabulary.OVERLOADS)
    own = {one.name for one in names} | vocabulary.macros(text) | OWN
    assert not vocabulary.foreign(text.splitlines(), own) - set(WORDS)


def test_every_text_is_one_function_of_few_buffers() -> None:
    """Check also that it is ASCII, as which PyTorch hands it to Metal."""
    for text in (one for many in _texts().values() for one in many):
        assert text.text.isascii()
        assert text.text.count("[[kernel]] void") == 1
        assert f'[[host_name("{NAME}")]]' in text.text or f"void {NAME}(" in text.text
        buffers = [int(k) for k in re.findall(r"\[\[buffer\((\d+)\)\]\]", text.text)]
        assert buffers == [*range(len(buffers))]
        assert len(buffers) <= MOST_BUFFERS
        assert "_shape[" not in text.text


def test_mlx_utilities_are_not_there() -> None:
    text = complete(_chosen("sum_rows"))
    slip = text.replace("const Position here", "int k = ceildiv(3, 2);\nconst Position here", 1)
    assert slip != text
    with pytest.raises(CompileError, match="ceildiv"):
        front_ends.metal(slip, "sum_rows")


def test_too_many_buffers_and_an_unknown_array_are_refused() -> None:
    many = tuple((f"x{k}", "float32") for k in range(MOST_BUFFERS))
    written("", "", (), many, ())
    with pytest.raises(ValueError, match=f"{MOST_BUFFERS + 1} arrays and lengths"):
        written("", "int n = x0_shape[0];", (), many, ())
    with pytest.raises(ValueError, match="the shape of y, which is no array"):
        written("", "int n = y_shape[0];", (), many[:1], ())
