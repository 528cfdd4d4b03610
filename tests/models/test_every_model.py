"""accelerate on every model that it knows, with the real packages."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import small
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mhc_backends.mlx_nn import models
from mhc_core.mlx import accelerate, restore


@pytest.fixture(params=list(small.FAMILIES))
def family(request: pytest.FixtureRequest) -> small.Family:
    """Return each kind of model whose library is installed."""
    family = small.FAMILIES[request.param]
    pytest.importorskip(family.package.replace("-", "_"), reason=f"{family.package} is missing")
    return family


def pair(family: small.Family, **config: Any) -> tuple[Any, Any]:
    """Return a plain model and an accelerated one with the same weights."""
    plain, fast = family.make(**config), family.make(**config)
    accelerate(fast)
    return plain, fast


def unrounded(family: small.Family, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a configuration without rounding, so that no rounded value can flip."""
    if family.package == "mlx-vlm":
        fakequant = import_module("mlx_vlm.models.deepseek_v41.fakequant")
        monkeypatch.setattr(fakequant, "DISABLE", True)
        return {}
    return small.UNROUNDED


# ------------------------------------------------------------------------------ the same model


@pytest.mark.parametrize("length", [1, small.LONG])
def test_logits_are_those_of_the_model(family: small.Family, length: int) -> None:
    plain, fast = pair(family)
    ids = small.tokens(2, length)
    expected = small.logits(plain, ids)
    assert small.apart(small.logits(fast, ids), expected) < 1e-4
    assert expected.std().item() > 0.5  # else any model would do


@pytest.mark.parametrize(
    "config",
    [
        {"hc_mult": 2, "hc_sinkhorn_iters": 3, "hc_eps": 1e-2, "rms_norm_eps": 1e-1},
        {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0},
    ],
    ids=["other constants", "one layer"],
)
def test_every_configuration(
    family: small.Family, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    config = {**unrounded(family, monkeypatch), **family.known(config)}
    plain, fast = pair(family, **config)
    ids = small.tokens(2, small.LONG)
    assert small.apart(small.logits(fast, ids), small.logits(plain, ids)) < 1e-5


def test_64_greedy_tokens_are_those_of_the_model(
    family: small.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = pair(family, **unrounded(family, monkeypatch))
    prompts = small.tokens(3, small.LONG)
    expected = small.greedy(plain, prompts)
    assert small.greedy(fast, prompts) == expected
    assert all(len(set(row)) > 10 for row in expected)


def bfloat16(model: Any) -> Any:
    """Make a bfloat16 model; of its experts, MLX's CPU runs only quantised ones in bfloat16."""
    keep = getattr(model, "cast_predicate", lambda path: ".hc_" not in path)

    def cast(path: str, value: Any) -> mx.array:
        return value.astype(mx.bfloat16) if keep(path) and value.dtype == mx.float32 else value

    model.update(tree_map_with_path(cast, quantized(model).parameters()))
    return model


def quantized(model: Any) -> Any:
    """Quantise the experts, in place."""
    nn.quantize(
        model, group_size=32, bits=8, class_predicate=lambda path, _: path.endswith(EXPERTS)
    )
    return model


EXPERTS = (*(f"switch_mlp.{name}_proj" for name in ("gate", "up", "down")), "o_a_proj")


def test_bfloat16_is_as_close_as_its_rounding_allows(
    family: small.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**unrounded(family, monkeypatch), **small.SMOOTH}
    plain, fast = bfloat16(family.make(**config)), bfloat16(family.make(**config))
    accelerate(fast)
    ids = small.tokens(2, small.LONG)
    exact = small.logits(quantized(family.make(**config)), ids)
    theirs, mine = small.logits(plain, ids), small.logits(fast, ids)
    rounding = small.apart(theirs, exact)
    assert mine.dtype == theirs.dtype
    assert small.apart(mine, theirs) < 0.5 * rounding
    assert small.apart(mine, exact) < 1.25 * rounding
    assert rounding < 0.2


# -------------------------------------------------------------------------------- what is left


def test_the_report_names_what_was_replaced_and_what_was_not(family: small.Family) -> None:
    model = family.make()
    before = small.classes(model)
    report = accelerate(model)
    after = small.classes(model)
    changed = {path for path in after if after[path] is not before[path]}
    assert {note.path for note in report.replaced} == changed
    assert {f"{family.layers}.{i}" for i in range(5)} <= changed
    assert all(before[note.path].__name__ == note.class_name for note in report.replaced)
    assert all(issubclass(after[path], before[path]) for path in changed)
    assert {note.path for note in report.left}.isdisjoint(changed)
    assert "trainable=True" in str(report)
    assert f"5 {before[f'{family.layers}.0'].__name__}, {family.layers}.0 ...: " in str(report)


def test_a_second_call_does_nothing_more(family: small.Family) -> None:
    model = family.make()
    accelerate(model)
    before = small.classes(model)
    assert accelerate(model).replaced == ()
    assert small.classes(model) == before
    accelerate(model, trainable=True)
    before = small.classes(model)
    report = accelerate(model, trainable=True)
    assert report.replaced == ()
    assert accelerate(model) == report
    assert small.classes(model) == before


@pytest.mark.parametrize("trainable", [False, True])
def test_restore_gives_every_module_its_class_again(family: small.Family, trainable: bool) -> None:
    model = family.make()
    before, ids = small.classes(model), small.tokens(1, small.LONG)
    free = [name for name, _ in tree_flatten(model.trainable_parameters())]
    want = small.logits(model, ids)
    replaced = accelerate(model, trainable=trainable).replaced
    report = restore(model)
    assert [note.path for note in report.replaced] == [note.path for note in replaced]
    assert small.classes(model) == before
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == free
    assert small.equal(small.logits(model, ids), want)
    assert restore(model).replaced == ()


def test_nothing_but_the_given_model_changes(family: small.Family) -> None:
    module: Any = import_module(family.module)
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    other, model = family.make(), family.make()
    ids = small.tokens(1, small.LONG)
    expected, before = small.logits(other, ids), small.classes(other)
    scopes = [dict(vars(module)), *[dict(vars(kind)) for kind in kinds]]
    accelerate(model, trainable=True)
    mx.eval(small.logits(model, ids))
    assert [dict(vars(module)), *[dict(vars(kind)) for kind in kinds]] == scopes
    assert small.classes(other) == before == small.classes(family.make())
    assert small.equal(small.logits(other, ids), expected)


def test_parameters_keep_their_names_and_load_either_way(
    family: small.Family, tmp_path: Path
) -> None:
    plain, fast = pair(family)
    assert accelerate(fast, trainable=True).replaced
    assert [k for k, _ in tree_flatten(fast.parameters())] == [
        k for k, _ in tree_flatten(plain.parameters())
    ]
    ids = small.tokens(1, small.LONG)
    path = str(tmp_path / "weights.safetensors")
    other = family.make(seed=1)
    other.save_weights(path)
    fast.load_weights(path)
    assert small.apart(small.logits(fast, ids), small.logits(other, ids)) < 1e-4
    family.make(seed=2).load_weights(path)
    fast.save_weights(path)
    plain.load_weights(path)
    assert small.equal(small.logits(plain, ids), small.logits(other, ids))


def test_quantised_models_and_models_quantised_later(family: small.Family) -> None:
    before, after = family.make(), family.make()
    expected = small.logits(quantized(family.make()), ids := small.tokens(1, small.LONG))
    accelerate(quantized(before))
    accelerate(after)
    quantized(after)
    assert small.apart(small.logits(before, ids), expected) < 1e-4
    assert small.equal(small.logits(before, ids), small.logits(after, ids))


def test_train_and_eval_reach_every_module(family: small.Family) -> None:
    plain, fast = pair(family)
    ids = small.tokens(1, small.LONG)
    for model in (plain, fast):
        model.train()
        assert all(module.training for _, module in model.named_modules())
    assert small.apart(small.logits(fast, ids), small.logits(plain, ids)) < 1e-4


# ------------------------------------------------------------------------------------ training


def trainable(family: small.Family, **config: Any) -> tuple[Any, models.AccelerationReport]:
    """Return an accelerated model that can be trained."""
    model = family.make(**config)
    return model, accelerate(model, trainable=True)


def test_the_plain_model_has_no_gradient(family: small.Family) -> None:
    with pytest.raises(ValueError, match=r"VJP with respect to indices|Not implemented for"):
        small.gradients(family.make(), small.tokens(2, small.LONG))


def test_trainable_leaves_the_accelerated_forward_bit_equal(family: small.Family) -> None:
    fast = family.make()
    accelerate(fast)
    model, _ = trainable(family)
    ids = small.tokens(2, small.LONG)
    assert small.equal(small.logits(model, ids), small.logits(fast, ids))
    fast, model = bfloat16(fast), bfloat16(model)
    assert small.equal(small.logits(model, ids), small.logits(fast, ids))
    caches = fast.make_cache(), model.make_cache()
    for part in (ids[:1, :11], ids[:1, 11:14], ids[:1, 14:15]):
        expected, got = (
            small.logits(m, part, c) for m, c in zip((fast, model), caches, strict=True)
        )
        assert small.equal(got, expected)


def test_every_gradient_flows_but_those_that_the_report_names(family: small.Family) -> None:
    model, report = trainable(family)
    _, gradient = small.gradients(model, small.tokens(2, small.LONG))
    zero = {path for path, g in tree_flatten(gradient) if not mx.abs(g).max().item()}
    assert all(mx.isfinite(g).all().item() for _, g in tree_flatten(gradient))
    named = {note.path for note in report.left}
    silent = {path for path in zero if not path.startswith(NOT_RUN)}
    # 20 tokens do not fill a group of 128
    silent = {path for path in silent if f"{family.layers}.3.attn.compressor" not in path}
    assert silent, "the model chooses nothing"
    assert all(any(path.startswith(f"{name}.") for name in named) for path in silent), silent
    indexers = {note.path for note in report.left if note.class_name == "Indexer"}
    assert all(any(path.startswith(f"{name}.") for path in zero) for name in indexers)
    biases = ("e_score_correction_bias", "gate.bias", "gate.bias_vl")
    assert all(".indexer." in path or path.endswith(biases) for path in silent)


NOT_RUN = ("vision", "aligner", "image_")  # the prompts have no images


def slope(model: Any, ids: mx.array, at: dict[str, mx.array], along: dict[str, mx.array]) -> float:
    """Return the derivative of the loss along a direction of length 1, by a difference."""
    step, values = 5e-3, list[float]()
    for sign in (1, -1):
        model.update(tree_unflatten([(k, at[k] + sign * step * along[k]) for k in along]))
        values.append(small.loss(model, ids).item())
    model.update(tree_unflatten([(k, at[k]) for k in along]))
    return (values[0] - values[1]) / (2 * step)


def test_gradients_are_the_slopes_of_the_loss(
    family: small.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check along each kind of parameter's own gradient, and along two random directions of all."""
    config = {**unrounded(family, monkeypatch), **small.SMOOTH}
    model, _ = trainable(family, **config)
    ids = small.tokens(2, small.LONG)
    gradient = dict(tree_flatten(small.gradients(model, ids)[1]))
    at = dict(tree_flatten(model.trainable_parameters()))
    kinds: dict[str, list[str]] = {}
    for path in gradient:
        kinds.setdefault(".".join(p for p in path.split(".") if not p.isdigit()), []).append(path)
    directions = [{path: gradient[path] for path in paths} for paths in kinds.values()]
    mx.random.seed(1)
    for _ in range(2):
        directions.append({path: mx.random.normal(g.shape) for path, g in gradient.items()})
    checked = 0
    for along in directions:
        norm = sum(mx.square(d).sum() for d in along.values()).item() ** 0.5
        if norm == 0:
            continue
        along = {path: d / norm for path, d in along.items()}
        expected = sum((gradient[path] * d).sum() for path, d in along.items()).item()
        assert slope(model, ids, at, along) == pytest.approx(expected, rel=1e-2, abs=3e-4), along
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("low_rank", [False, True], ids=["all weights", "LoRA"])
def test_training_lowers_the_loss(family: small.Family, low_rank: bool) -> None:
    """Check with all the rounding and the choices that the model makes."""
    model, _ = trainable(family)
    before = dict(tree_flatten(model.parameters()))
    if low_rank:
        add_lora(model)
    trained = {path for path, _ in tree_flatten(model.trainable_parameters())}
    model.train()
    ids = small.tokens(4, small.LONG)
    optimizer = optim.Adam(learning_rate=3e-3)
    losses: list[float] = []
    for _ in range(6):
        value, gradient = small.gradients(model, ids)
        optimizer.update(model, gradient)
        mx.eval(model.parameters())
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert losses == sorted(losses, reverse=True)
    if low_rank:
        assert all("lora" in path for path in trained)
        after = dict(tree_flatten(model.parameters()))
        kept = [path for path in before if path in after]
        assert kept
        assert all(small.equal(before[path], after[path]) for path in kept)


def add_lora(model: Any) -> None:
    """Adapt every linear layer by mlx-lm's own function, which knows the right class for each."""
    tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="mlx-lm is not installed")
    model.freeze()
    tuner.linear_to_lora_layers(model, 5, {"rank": 4, "scale": 10.0, "dropout": 0.0})


# -------------------------------------------------------------------------------------- errors


def refused(model: Any, error: type[Exception], match: str) -> None:
    """Check that a call raises and leaves the model as it was."""
    before = small.classes(model)
    frozen = [path for path, _ in tree_flatten(model.trainable_parameters())]
    with pytest.raises(error, match=match):
        accelerate(model, trainable=True)
    assert small.classes(model) == before
    assert [path for path, _ in tree_flatten(model.trainable_parameters())] == frozen


def test_a_version_that_was_not_tested_is_refused(
    family: small.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.make()
    monkeypatch.setattr(models, "version", {family.package: "9.9.9"}.__getitem__)
    known = {"mlx-lm": "0.32.2", "mlx-vlm": "0.7.10"}[family.package]
    refused(model, RuntimeError, f"{family.package} 9.9.9 is installed; .*{known}.*pip install")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "version", missing)
    refused(model, RuntimeError, f"{family.package} of unknown version is installed; .*{known}")


def test_a_model_of_another_class_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    refused(model, TypeError, r"model is a mlx.nn.*Sequential; needs mlx_lm.*deepseek_v41.Model or")


def test_a_wrong_shape_is_named_and_changes_nothing(family: small.Family) -> None:
    model = family.make()
    path = f"{family.layers}.4.{family.phi}"
    model.update(tree_unflatten([(path, mx.zeros((23, 256)))]))
    refused(model, ValueError, rf"{path} has shape \(23, 256\); needs \(24, 256\) for 4 streams")


def test_a_class_that_cannot_be_changed_changes_nothing(
    family: small.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.make()
    known = models._family(model)
    indexer = next(cls for cls in known.trainable if cls.__name__ == "Indexer")
    wrong = known.trainable[indexer]._replace(cls=int)
    monkeypatch.setitem(known.trainable, indexer, wrong)  # the first is in layer 1
    refused(model, TypeError, "__class__")


def test_layers_removed_later_are_an_error_until_called_again(family: small.Family) -> None:
    plain, fast = pair(family)
    for model in (plain, fast):
        owner, _, name = family.layers.rpartition(".")
        owner = next(module for path, module in model.named_modules() if path == owner)
        setattr(owner, name, getattr(owner, name)[:1])
    ids = small.tokens(1, 3)
    with pytest.raises(RuntimeError, match=r"call accelerate\(model\) again"):
        small.logits(fast, ids)
    assert [note.path for note in accelerate(fast).replaced] == [f"{family.layers}.0"]
    assert small.apart(small.logits(fast, ids), small.logits(plain, ids)) < 1e-4
