"""Tests that the sides of a kernel's choices are reported right, and its text is unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Run

import mhc_metal_simulator as simulator

A = np.arange(8, dtype=np.float32)
HEADER = """
#define FUNCTION static inline
template <int N>
FUNCTION float chosen(float v) {
    const int WIDTH = N > 2 ? 2 : N > 1 ? 1 : 0;
    float kept[WIDTH ? WIDTH : 1];
    kept[0] = N == 3 ? v : -v;
    return kept[0];
}
FUNCTION float never(float v) { return v > 0.0f ? v : 0.0f; }
"""


def taken(run: Run, source: str, **more: Any) -> set[tuple[str, str, str, str]]:
    with simulator.record() as launches:
        run(source, [A], header=HEADER, **more)
    (one,) = launches
    return {(b.function, b.kind, b.condition, side) for b, side in one.took}


Taken = set[tuple[str, str, str]]
CASES: dict[str, tuple[str, Taken]] = {
    "if": ("if (a[0] == 0.0f) o[0] = 1;", {("if", "a[0] == 0.0f", "true")}),
    "else": ("if (a[1] == 0.0f) o[0] = 1; else o[0] = 2;", {("if", "a[1] == 0.0f", "false")}),
    "both, of several turns": (
        "o[0] = 0;\nfor (int k = 0; k < 3; k++) if (k % 2) o[0] = k;",
        {
            ("for", "k < 3", "enters"),
            ("for", "k < 3", "again"),
            ("if", "k % 2", "true"),
            ("if", "k % 2", "false"),
        },
    ),
    "one turn": (
        "for (int k = 0; k < int(a[1]); k++) o[0] = k;",
        {("for", "k < int(a[1])", "enters")},
    ),
    "no turn": ("o[0] = 0;\nfor (int k = 0; k < int(a[0]); k++) o[0] = k;", set()),
    "a loop in a loop, of one turn each": (
        "o[0] = 0;\nfor (int i = 0; i < a[1]; i++)\nfor (int k = 0; k < a[1] + i; k++) o[0] += 1;",
        {("for", "i < a[1]", "enters"), ("for", "k < a[1] + i", "enters")},
    ),
    "unrolled": ("UNROLL for (int k = 0; k < 2; k++) o[0] = k;", set()),
    "while": (
        "int k = 1;\nwhile (k < 2) k++;\no[0] = k;",
        {("while", "k < 2", "true"), ("while", "k < 2", "false")},
    ),
    "a loop without a step": (
        "int k = 1;\nfor (; k < 2;) k++;\no[0] = k;",
        {("while", "k < 2", "true"), ("while", "k < 2", "false")},
    ),
    "conditional": ("o[0] = a[2] > 1.0f ? 1 : 2;", {("?:", "a[2] > 1.0f", "true")}),
    "conditional of a conditional": (
        "o[0] = (a[2] > 1.0f ? a[0] : a[1]) > 0.0f ? 1 : 2;",
        {("?:", "a[2] > 1.0f", "true"), ("?:", "(a[2] > 1.0f ? a[0] : a[1]) > 0.0f", "false")},
    ),
    "in an if": (
        "o[0] = 1;\nif (a[0] > 0.0f ? true : a[1] > 0.0f) o[0] = 2;",
        {
            ("?:", "a[0] > 0.0f", "false"),
            ("if", "a[0] > 0.0f ? true : a[1] > 0.0f", "true"),
        },
    ),
    "else of else": (
        "o[0] = a[0] > 0.0f ? 1 : a[1] > 0.0f ? 2 : 3;",
        {("?:", "a[0] > 0.0f", "false"), ("?:", "a[1] > 0.0f", "true")},
    ),
    "a constant": (
        "const int k = sizeof(float) == 4 ? 1 : 2;\nfloat x[k];\nx[0] = 1;\no[0] = x[0];",
        {("?:", "sizeof(float) == 4", "true")},
    ),
    "in a template argument": ("vec<float, true ? 2 : 3> v = 1.0f;\no[0] = v.x;", set()),
    "in the length of an array": (
        "threadgroup float x[sizeof(float) == 4 ? 1 : 2];\nx[0] = 1;\no[0] = x[0];",
        set(),
    ),
    "in an enum": ("enum { K = sizeof(float) == 4 ? 1 : 2 };\no[0] = K;", set()),
}


@pytest.mark.parametrize("what", CASES)
def test_what_ran(run: Run, what: str) -> None:
    source, wanted = CASES[what]
    assert taken(run, f"#define UNROLL\n{source}") == {("", *one) for one in wanted}


@pytest.mark.parametrize(
    ("n", "wanted"),
    [
        (1, {("N > 2", "false"), ("N > 1", "false"), ("N == 3", "false")}),
        (2, {("N > 2", "false"), ("N > 1", "true"), ("N == 3", "false")}),
        (3, {("N > 2", "true"), ("N == 3", "true")}),
    ],
)
def test_choices_that_are_compiled_in(run: Run, n: int, wanted: set[tuple[str, str]]) -> None:
    found = taken(run, f"o[0] = chosen<{n}>(a[1]);")
    assert {(condition, side) for _, _, condition, side in found} == wanted
    assert {function for function, *_ in found} == {"chosen"}


def test_a_function_in_a_macro(run: Run) -> None:
    source = """
    #define MAKE(name) \\
        struct name { static float of(float v) { \\
            if (v > 1.0f) return 2.0f; \\
            return v; } };
    MAKE(First)
    MAKE(Second)
    o[0] = First::of(a[0]) + Second::of(a[2]);
    """
    assert taken(run, source) == {("", "if", "v > 1.0f", "true"), ("", "if", "v > 1.0f", "false")}


def test_values_and_lines_stay(run: Run) -> None:
    source = """
    float s = 0;
    for (int k = 0; k < COUNT; k++)
        s += a[k] > 3 ? a[k] : -1.0f;
    o[0] = s;
    """
    assert run(source.replace("COUNT", "8"), [A]) == 4 + 5 + 6 + 7 - 4
    with pytest.raises(simulator.KernelFaultError) as caught:
        run(source.replace("COUNT", "9"), [A])
    assert str(caught.value).endswith("s += a[k] > 3 ? a[k] : -1.0f;")
