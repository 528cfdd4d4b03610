"""accelerate on mlx-vlm's drafters: those with hyper-connections, and why others are left."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import mlx.core as mx
import mlx.nn as nn
import small
from mlx.utils import tree_flatten

import mhc_core as mhc
from mhc_backends.mlx_nn import models
from mhc_core.mlx import accelerate, restore

OURS = ("deepseek_v4_mtp", "deepseek_v4_dspark", "qwen4_exp_mtp")
PACKAGE = "mlx_vlm.speculative.drafters"
NAMES = re.compile(r"hc[._]|_hc|hyper_connection")


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


def hidden(drafter: Any, name: str, target: Any) -> mx.array:
    """Return what a drafter makes of a model's hidden states, before its logits."""
    width = 4 * 64 if name == "qwen4_exp_mtp" else 64
    states, ids = mx.random.normal((1, 5, width), key=mx.random.key(2)), small.tokens(1, 5)
    cache = drafter.reset(target)
    if name == "deepseek_v4_dspark":
        return drafter._hidden(ids, mx.concatenate([states, states], -1), cache)
    if name == "deepseek_v4_mtp":
        states = mx.broadcast_to(states[:, :, None], (1, 5, 4, 64))
    return drafter._forward_hidden(drafter._input_embed(ids), states, ids, cache)[0]


def quantised(drafter: Any) -> Any:
    """Quantise what fits, but no hyper-connection."""

    def chosen(path: str, module: Any) -> bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return fits and not path.startswith("_") and not path.endswith("gate")

    nn.quantize(drafter, group_size=32, bits=8, class_predicate=chosen)
    return drafter


@pytest.mark.parametrize("name", OURS)
def test_a_drafter_by_itself(name: str) -> None:
    """Compare what it makes of hidden states, quantised too, and train its connections."""
    plain, fast = small.drafter(name), small.drafter(name)
    accelerate(fast, trainable=True)
    target = small.DRAFTERS[name].make()
    expected = hidden(plain, name, target)
    assert small.apart(hidden(fast, name, target), expected) < 1e-5
    assert expected.std().item() > 0.1

    def loss() -> mx.array:
        return mx.square(hidden(fast, name, target) - expected + 1).mean()

    gradient = nn.value_and_grad(fast.train(), loss)()[1]
    flat = {path: g for path, g in tree_flatten(gradient) if NAMES.search(path)}
    assert len(flat) >= 6
    assert all(mx.abs(g).max().item() > 0 for g in flat.values())
    got, expected = (hidden(quantised(one), name, target) for one in (fast.eval(), plain))
    assert small.apart(got, expected) < 1e-4


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
    return [path for path, _ in tree_flatten(model.parameters()) if NAMES.search(path)]


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
