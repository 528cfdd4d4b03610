"""Every word of Metal in the texts has evidence, and no name of ours is one of Metal's."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_backends.kernels import KERNELS
from text_sample import all_texts, chosen

from mhc_metal_simulator import CompileError, front_ends, vocabulary
from mhc_metal_simulator.headers import KERNELS as HEADERS
from mhc_metal_simulator.headers import include_folder
from mhc_metal_simulator.texts import DTYPES, STREAMS
from mhc_metal_simulator.vocabulary import LIBRARY, OVERLOADS, RESERVED, WORDS, Air, Mlx, Public

ROWS = {**WORDS, **OVERLOADS}


def test_the_texts_are_of_every_kernel_number_of_streams_and_dtype() -> None:
    found = {(text.kernel, text.n, text.dtype) for text in all_texts()}
    assert {kernel for kernel, _, _ in found} == set(KERNELS)
    assert {n for _, n, _ in found} == set(STREAMS)
    assert {dtype for _, _, dtype in found} == set(DTYPES)


# ---- the tables' evidence ------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["WORDS", "OVERLOADS"])
def test_every_row_has_evidence(table: str) -> None:
    for word, evidence in getattr(vocabulary, table).items():
        assert evidence, word
        assert all(all(part.strip() for part in one) for one in evidence), word


def test_what_is_cited_of_mlx_is_there() -> None:
    texts: dict[str, str] = {}
    for word, evidence in ROWS.items():
        for one in evidence:
            if isinstance(one, Mlx):
                if one.file not in texts:
                    file = include_folder() / HEADERS / one.file
                    texts[one.file] = " ".join(file.read_text(encoding="utf-8").split())
                assert one.words in texts[one.file], f"{word}: no {one.words!r} in {one.file}"


def test_what_is_cited_of_mlx_has_the_word() -> None:
    for word, evidence in WORDS.items():
        plain = re.sub(r"^\.|^\[\[|\]\]$", "", word)
        cited = [one.words for one in evidence if isinstance(one, Mlx | Public)]
        if plain[0] != "#" and cited:
            assert any(
                re.search(rf"\b{re.escape(plain)}\b|{re.escape(plain)}", c) for c in cited
            ), word


def test_what_is_cited_of_the_library_is_there() -> None:
    library = Path(str(mx.__file__)).parent / "lib" / "mlx.metallib"
    if not library.exists():
        pytest.skip(f"this MLX has no Metal library: there is no {library}")
    content = library.read_bytes()
    for word, evidence in ROWS.items():
        for one in evidence:
            assert not isinstance(one, Air) or one.name.encode() in content, (word, one.name)


# ---- the texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_word_has_a_row_and_no_name_is_metals(kernel: str) -> None:
    """Check also that the text is C++14, every later extension an error: a second front end."""
    own, conversions = front_ends.cxx14(chosen(kernel).text, kernel)
    assert conversions <= set(OVERLOADS)
    for name in own:
        assert name.name not in RESERVED, f"{name} is a keyword or a type of Metal"
        assert not (name.shared and name.name in LIBRARY), f"{name} is a name of Metal's library"
    mine = [text.text for text in all_texts() if text.kernel == kernel]
    names = {name.name for name in own}.union(*map(vocabulary.macros, mine))
    lines = {line for text in mine for line in text.splitlines()}
    unknown = vocabulary.foreign(lines, names) - set(WORDS)
    assert not unknown, f"{sorted(unknown)} in the text of {kernel} have no row in vocabulary.py"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_overload_has_a_row(kernel: str, dtype: str) -> None:
    text = chosen(kernel, dtype)
    if text.dtype != dtype:
        return  # a kernel of float32 alone
    unknown = front_ends.calls(text.text, kernel) - set(OVERLOADS)
    assert not unknown, f"{sorted(unknown)} in the text of {kernel} have no row in vocabulary.py"


# ---- the checks see what they are for ------------------------------------------------------------


def with_slip(right: str, wrong: str) -> str:
    text = chosen("sinkhorn", "float32").text
    assert right in text
    return text.replace(right, wrong, 1)


def test_a_name_of_metal_is_found() -> None:
    text = with_slip(
        "struct Position {", "int distance;\nstruct ushort3_t { int uint; };\nstruct Position {"
    )
    found, _ = front_ends.cxx14(text.replace("int distance;", "constant int distance = 1;"), "slip")
    assert {"uint"} <= {one.name for one in found} & RESERVED
    assert ("distance", True) in {(one.name, one.shared) for one in found}
    assert "distance" in LIBRARY


def test_a_word_without_a_row_is_found() -> None:
    line = "const float z = metal::fract(v.x) + simd_product(v.rg.y) [[stage_in]]; // none"
    found = vocabulary.foreign([line.partition("//")[0]], {"v", "z"}) - set(WORDS)
    assert found == {"fract", "simd_product", ".rg", "[[stage_in]]"}


def test_an_overload_without_a_row_is_found() -> None:
    body = "const Position here = {"
    text = with_slip(
        body, f"(void)simd_sum(half(1)); (void)sin(1.0f);\n(void)ushort4(1, 2, 3, 4);\n{body}"
    )
    found = front_ends.calls(text, "slip") - set(OVERLOADS)
    assert found == {"simd_sum(half)", "fast::sin(float)", "ushort4(int, int, int, int)"}


@pytest.mark.parametrize("space", ["constant", "thread"])
def test_a_conversion_without_a_row_is_found(space: str) -> None:
    own = "float own = 0;\n" if space == "thread" else ""
    address = "&own" if space == "thread" else "logits_shape"
    body = "const Position here = {"
    text = with_slip(body, f"{own}(void)reinterpret_cast<ulong>({address});\n{body}")
    shape = "  const constant int* logits_shape [[buffer(9)]],\n  uint thread_index"
    text = text if "logits_shape [[" in text else text.replace("  uint thread_index", shape, 1)
    _, conversions = front_ends.cxx14(text, "slip")
    assert conversions - set(OVERLOADS) == {f"conversion: {space} pointer to integer"}


def test_what_is_later_than_cxx14_is_refused() -> None:
    text = with_slip(
        "struct Position {", "inline int two() { if constexpr (true) return 2; }\nstruct Position {"
    )
    with pytest.raises(CompileError, match=r"constexpr if is a C\+\+17 extension"):
        front_ends.cxx14(text, "slip")
