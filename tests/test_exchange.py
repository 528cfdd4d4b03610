"""Golden cases in files: written, answered by a C++ program, and checked; FlashInfer's traces."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mhc_core
from mhc_conformance.cases import numpy_dtype
from mhc_conformance.exchange import ANSWER, INDEX, against, cases_for, export, read, write
from mhc_conformance.flashinfer import definitions
from mhc_conformance.golden import Golden
from mhc_core.cli import app

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the compiled program that answers cases of combine."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert compiler, "needs a C++ compiler, as MLX on a CPU does"
    made = tmp_path_factory.mktemp("program") / "golden_combine"
    source = HERE / "golden_combine.cpp"
    assert len(source.read_text().splitlines()) <= 60  # it shows how little it takes
    subprocess.run([compiler, "-std=c++17", "-O1", str(source), "-o", str(made)], check=True)
    return made


def folder_of(folder: Path, ops: list[str], variant: str = "DEEPSEEK_V4", **sizes: int) -> Path:
    """Write cases of some ops in two dtypes."""
    cases = cases_for(ops, variant, **sizes)
    export(folder, [Golden(case, dtype, 3) for dtype in DTYPES for case in cases])
    return folder


def test_a_program_in_another_language(program: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    words = ["--op", "combine", "--n", "5", "--C", "37", "--tokens", "9", "--seed", "2"]
    made = run(app, ["conformance", "--export", str(tmp_path), *words])
    assert made.exit_code == 0, made.output
    names = [entry["case"] for entry in json.loads((tmp_path / INDEX).read_text())["cases"]]
    assert len(names) == 2
    for name in names:
        subprocess.run([str(program), str(tmp_path / f"{name}.safetensors")], check=True)
    checked = run(app, ["conformance", "--against", str(tmp_path)])
    assert checked.exit_code == 0, checked.output
    assert "2 hold, 0 off, 0 without an answer" in checked.output

    file = tmp_path / f"{names[0]}{ANSWER}"
    wrong = dict(read(file))
    wrong["out.x"] = np.where(np.arange(37) == 36, 0, wrong["out.x"]).astype(wrong["out.x"].dtype)
    write(file, wrong)  # a tail that is dead code
    checked = run(app, ["conformance", "--against", str(tmp_path)])
    assert checked.exit_code == 1
    assert "off   combine-float32-n5-C37-combine: out.x is off by" in checked.output


@pytest.mark.parametrize("variant", ["DEEPSEEK_V4", "HY_V4"])
def test_a_backend_answers_its_own_cases(variant: str, tmp_path: Path) -> None:
    ops = ["mappings", "combine_pre", "contract", "expand", "head"]
    folder = folder_of(tmp_path, ops, variant, n=3, C=6, tokens=2)
    for entry in json.loads((folder / INDEX).read_text())["cases"]:
        arrays = read(folder / f"{entry['case']}.safetensors")
        static: dict[str, Any] = dict(entry["static"])
        if "variant" in static:
            fields = static["variant"]
            assert fields["norm_eps"] == getattr(mhc_core, variant).norm_eps
            static["variant"] = getattr(mhc_core, variant)
        given = {name: arrays[f"in.{name}"] for name in entry["inputs"]}
        if entry["unmixed"]:
            given["h_res"] = None
        outputs = getattr(mhc_core, entry["op"])(**given, **static, backend="numpy")
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        names = [key for key in entry["wanted"] if key.startswith("out.")]
        answer = [np.asarray(one) for one in several if one is not None]
        write(folder / f"{entry['case']}{ANSWER}", dict(zip(names, answer, strict=True)))
    verdicts = list(against(folder))
    assert [one for one in verdicts if one.outcome != "holds"] == []
    assert len(verdicts) == 2 * len(ops)


def test_wrong_answers_are_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["rms_norm"], tokens=2)
    names = [entry["case"] for entry in json.loads((folder / INDEX).read_text())["cases"]]
    assert {one.outcome for one in against(folder)} == {"missing"}
    right = read(folder / f"{names[0]}.safetensors")
    out = right["out.y"].astype(np.float32)
    for given, says in (
        ({"out.z": out}, "out.z is none of out.y"),
        ({"out.y": out.astype(np.float64)}, "out.y is float64 [2, 64]; needs float32 [2, 64]"),
        ({"out.y": out[:1]}, "needs float32 [2, 64]"),
        ({"grad.x": right["grad.x"].astype(np.float32)}, "grad.weight is not there"),
        ({"out.y": np.full_like(out, np.nan)}, "out.y is off by inf"),
    ):
        write(folder / f"{names[0]}{ANSWER}", given)
        told = next(iter(against(folder)))
        assert told.outcome == "off"
        assert says in told.says
    (folder / f"{names[0]}{ANSWER}").write_bytes(b"no file of safetensors")
    assert "is no file of safetensors" in next(iter(against(folder))).says
    with pytest.raises(ValueError, match="cannot be read"):
        list(against(folder / "nothing"))


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(2, 3)), "b": np.float32([[1]]), "c": np.zeros((0, 4), "f2")}
    write(tmp_path / "one.safetensors", arrays)
    theirs = load_file(tmp_path / "one.safetensors")
    ours = read(tmp_path / "one.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name], array)
        assert ours[name].dtype == array.dtype
    narrow = {"d": arrays["a"].astype(numpy_dtype("bfloat16"))}
    write(tmp_path / "two.safetensors", narrow)
    np.testing.assert_array_equal(read(tmp_path / "two.safetensors")["d"], narrow["d"])


def test_trace_definitions() -> None:
    assert definitions(mhc_core.LIGER, 4, 64) == {}
    assert definitions(mhc_core.DEEPSEEK_V4, 3, 64) == {}
    found = definitions(mhc_core.DEEPSEEK_V4, 4, 64)
    for one in found.values():
        axes = one["axes"]
        for array in (*one["inputs"].values(), *one["outputs"].values()):
            assert array["shape"] is None or set(array["shape"]) <= set(axes)
        code: dict[str, Any] = {}
        taken = [line for line in one["reference"].splitlines() if line != "import torch"]
        text = "\n".join(taken).replace("@torch.no_grad()", "")
        exec(compile(text, one["name"], "exec"), code)
        arguments = code["run"].__code__.co_varnames[: code["run"].__code__.co_argcount]
        assert list(arguments) == list(one["inputs"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--export x --mutations", "--mutations came with --export; needs one of them"),
        ("--against x --op combine", "--op came with --against; it goes with"),
        ("--n 4", "--n came alone; it goes with --export"),
        ("--tokens 0", "--tokens came alone; it goes with --export"),
        ("--checkout a=b", "--checkout came alone; it goes with --peers"),
        ("--peers --full", "--full came with --peers; it goes with the plain command"),
        ("--mutations --quick", "--quick came with --mutations; it goes with the plain command"),
    ],
)
def test_an_option_of_another_way_to_use_the_command_is_refused(options: str, says: str) -> None:
    result = CliRunner().invoke(app, ["conformance", *options.split()])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_a_folder_that_cannot_be_made_is_named_with_its_option() -> None:
    result = CliRunner().invoke(app, ["conformance", "--export", "/dev/null"])
    assert result.exit_code == 2
    assert "--export /dev/null cannot be written: File exists" in " ".join(result.output.split())


NO_INDEX = [
    ("", "cannot be read"),
    ("{", "cannot be read"),
    ("[" * 100_000, "cannot be read"),
    ("[]", "the whole is []; needs an object"),
    ("3", "the whole is 3; needs an object"),
    ("{}", "has format None; needs 1"),
    ('{"format": 2}', "has format 2; needs 1"),
    ('{"format": 1}', "cases is None; needs a list"),
    ('{"format": 1, "cases": {}}', "cases is {}; needs a list"),
    ('{"format": 1, "cases": [7]}', "cases[0] is 7; needs an object"),
    ('{"format": 1, "cases": [{}]}', "cases[0]['case'] is None; needs the name of a file"),
]
WRONG_ENTRIES: list[tuple[str, Any, str]] = [
    ("case", "../combine", "cases[0]['case'] is '../combine'; needs the name of a file"),
    ("case", "another", "another.safetensors cannot be read: No such file"),
    ("op", "combined", "cases[0]['op'] is 'combined'; needs one of aggregate"),
    ("op", "pre", "cases[0]['inputs'] are x, y, h_post, h_res; pre has x, phi"),
    ("dtype", "int8", "cases[0]['dtype'] is 'int8'; needs one of float64"),
    ("seed", True, "cases[0]['seed'] is True; needs an integer"),
    ("seed", -1, "cases[0]['seed'] is -1; needs an integer"),
    ("label", None, "cases[0]['label'] is None; needs a text"),
    ("unmixed", 0, "cases[0]['unmixed'] is 0; needs true or false"),
    ("sizes", {"leading": [8], "n": 4}, "cases[0]['sizes'] is"),
    ("sizes", {"leading": "8", "n": 4, "C": 64}, "cases[0]['sizes'] is"),
    ("inputs", {"x": 3}, "cases[0]['inputs']['x'] is 3; needs an object with dtype, shape"),
    ("wanted", {"out.x": {}}, "cases[0]['wanted']['out.x'] is {}; needs dtype, shape, allowed"),
    ("static", {"variant": {"odd": 1}}, "cases[0]['static'] has no variant"),
    ("static", [], "cases[0]['static'] is []; needs an object"),
]


def _refused(folder: Path, says: str) -> None:
    result = CliRunner().invoke(app, ["conformance", "--against", str(folder)])
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert says in line, line
    with pytest.raises(ValueError, match=re.escape(says)):
        list(against(folder))


@pytest.mark.parametrize(("text", "says"), NO_INDEX)
def test_an_index_that_is_none_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    _refused(tmp_path, says)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path, "cannot be read")
    (tmp_path / INDEX).write_bytes(b"\xff\xfe\x00")
    _refused(tmp_path, "cannot be read")


def test_a_wrong_entry_is_refused(tmp_path: Path) -> None:
    cases = cases_for(["combine"], C=8, tokens=2)
    export(tmp_path, [Golden(case, "float32", 3) for case in cases])
    file = tmp_path / INDEX
    index = json.loads(file.read_text())
    assert [one.outcome for one in against(tmp_path)] == ["missing"]
    for key, value, says in WRONG_ENTRIES:
        file.write_text(json.dumps({**index, "cases": [{**index["cases"][0], key: value}]}))
        _refused(tmp_path, says)
    entry = index["cases"][0]
    inputs = {**entry["inputs"], "x": {"dtype": "float32", "shape": [2, 4, 9]}}
    file.write_text(json.dumps({**index, "cases": [{**entry, "inputs": inputs}]}))
    _refused(tmp_path, "in.x is float32 [2, 4, 8]; ")
    file.write_text(json.dumps(index))
    (tmp_path / f"{entry['case']}.safetensors").write_bytes(b"damaged")
    _refused(tmp_path, "is no file of safetensors")
