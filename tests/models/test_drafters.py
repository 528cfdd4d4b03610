"""accelerate on mlx-vlm's drafters: those with hyper-connections, and why others are left."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import mlx.core as mx
import small
from mlx.utils import tree_flatten

import mhc_core as mhc
from mhc_backends.mlx_nn import models
from mhc_core.mlx import accelerate, restore

OURS = ("deepseek_v4_mtp", "deepseek_v4_dspark", "qwen4_exp_mtp")
PACKAGE = "mlx_vlm.speculative.drafters"


@pytest.mark.parametrize("name", OURS)
def test_an_accelerated_drafter_drafts_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare what is drafted and generated, with an accelerated model as well."""
    make = small.DRAFTERS[name].make
    drafter, before = small.drafter(name), small.classes(small.drafter(name))
    want = small.drafted(make(), name, small.drafter(name), 10)
    report = accelerate(drafter)
    changed = {path for path, cls in small.classes(drafter).items() if cls is not before[path]}
    assert {note.path for note in report.replaced} == changed
    accelerate(drafter, trainable=True)
    restore(drafter)
    assert small.classes(drafter) == before
    accelerate(drafter)
    fast = make()
    accelerate(fast)
    calls: list[str] = []
    counted = counting(monkeypatch, calls)
    with mhc.no_grad():
        assert small.drafted(fast, name, drafter, 10) == want
    assert counted in calls
    assert len(want[0]) == 10
    assert len(want[1]) >= 5


def counting(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> str:
    """Count the calls of the op that writes streams, by modules of drafters too."""
    name, op = "combine", mhc.combine

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return op(*args, **kwargs)

    monkeypatch.setattr(mhc, name, call)
    return name


@pytest.mark.parametrize("name", OURS)
def test_a_drafter_by_itself(name: str) -> None:
    """Compare the hidden states that it gives for streams, closely."""
    plain, fast = small.drafter(name), small.drafter(name)
    accelerate(fast, trainable=True)
    target = small.DRAFTERS[name].make()
    width = 4 * 64 if name == "qwen4_exp_mtp" else 64
    hidden = mx.random.normal((1, 5, width), key=mx.random.key(2))
    ids = small.tokens(1, 5)
    outputs: list[mx.array] = []
    for drafter in (plain, fast):
        cache = drafter.reset(target)
        embedded = drafter._input_embed(ids)
        if name == "deepseek_v4_dspark":
            outputs.append(drafter._hidden(ids, mx.concatenate([hidden, hidden], -1), cache))
            continue
        streams = hidden
        if name == "deepseek_v4_mtp":
            streams = mx.broadcast_to(hidden[:, :, None], (1, 5, 4, 64))
        outputs.append(drafter._forward_hidden(embedded, streams, ids, cache)[0])
    expected, got = outputs
    assert small.apart(got, expected) < 1e-5
    assert expected.std().item() > 0.1


# ------------------------------------------------------------------- drafters that are not for us

REFUSED = {
    "glm5_next_mtp": "Glm5NextMTPDraftModel",
    "hy_v4_mtp": "HyV4MTPDraftModel",
    "dspark": "DSparkDraftModel",
}
WORDS = re.compile(
    r"hyper_?connection|HyperHead|GatedResidual|hc_mult|hc_count|"
    r"DeepseekV4(1)?Block|HyV4DecoderLayer|Qwen4ExpDecoderLayer|xing4_0|deepseek_v41",
    re.IGNORECASE,
)


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_drafter_without_hyper_connections_is_refused(name: str) -> None:
    library: Any = import_module(f"{PACKAGE}.{name}")
    made = library.Model.__new__(library.Model)
    assert type(made).__name__ == REFUSED[name]
    with pytest.raises(TypeError, match="whose drafting layers have no hyper-connections"):
        accelerate(made)


@pytest.mark.parametrize("name", ["glm5_next_mtp", "hy_v4_mtp"])
def test_the_reason_is_true(name: str) -> None:
    """Check that no module of these drafters is or has a hyper-connection, unlike their models'."""
    assert connections(small.DRAFTERS[name].make())
    assert not connections(small.drafter(name))


def connections(model: Any) -> list[str]:
    """Return the parameters that are named like hyper-connections."""
    return [path for path, _ in tree_flatten(model.parameters()) if re.search(r"hc[._]|_hc", path)]


def test_no_other_drafter_has_hyper_connections() -> None:
    """Read the sources of every drafter of the installed mlx-vlm."""
    (folder,) = import_module(PACKAGE).__path__
    names = {path.name for path in Path(folder).iterdir() if (path / "__init__.py").is_file()}
    assert set(OURS) | set(REFUSED) < names
    using = {
        name
        for name in names
        for file in (Path(folder) / name).glob("*.py")
        if WORDS.search(re.sub(r'""".*?"""|#.*', "", file.read_text(), flags=re.DOTALL))
    }
    assert using == set(OURS)
    known = {name.split(".")[-3] for name in models._MODELS if ".drafters." in name}
    assert known == set(OURS)
