"""Golden cases in files: written, answered by a C++ program, and checked; FlashInfer's traces."""

from __future__ import annotations

import json
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
