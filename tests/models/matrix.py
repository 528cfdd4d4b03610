"""Run every use of an accelerated model in every family, and print the table.

python tests/models/matrix.py [--families NAMES] [--uses NAMES]

A cell is "yes" if the use works and gives what the plain model gives, up to rounding. A cell that
cannot be has a reason, and its check passes only while the reason is true. Anything else raises.
Small models with random weights; nothing is left to the libraries.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import small
from mlx.utils import tree_flatten
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

from mhc_backends.mlx_nn.models import sublayers
from mhc_core.mlx import accelerate

CLOSE = 1e-4
MLX_LM = "mlx-lm V4.1"
CONFIGS: dict[str, dict[str, Any]] = {
    MLX_LM: {"model_type": "deepseek_v41", **small.V41},
    "mlx-vlm V4": {"model_type": "deepseek_v4", **small.V4},
    "mlx-vlm V4.1": {"model_type": "deepseek_v41", **small.VLM_V41},
    "GLM-5.3-Flash": {
        "model_type": "glm5_next",
        "text_config": small.GLM,
        "vision_config": small.GLM_VISION,
    },
    "HY-V4": {"model_type": "hy_v4", **small.HY},
    "Qwen4-Exp": {
        "model_type": "qwen4_exp",
        "text_config": small.QWEN4,
        "vision_config": {"model_type": "qwen4_exp", **small.QWEN4_VISION},
    },
    "Xing4.0": {"model_type": "xing4_0", **small.XING},
}
"""The contents of ``config.json`` for the small models."""

DRAFTERS = {
    "mlx-vlm V4": ("deepseek_v4_mtp", "deepseek_v4_dspark"),
    "GLM-5.3-Flash": ("glm5_next_mtp",),
    "HY-V4": ("hy_v4_mtp",),
    "Qwen4-Exp": ("qwen4_exp_mtp",),
}
WITHOUT = ("glm5_next_mtp", "hy_v4_mtp")  # drafters without hyper-connections


def pair(family: str) -> tuple[Any, Any]:
    """Return a plain model and an accelerated one with the same weights."""
    plain, fast = small.MAKE[family](), small.MAKE[family]()
    assert accelerate(fast).replaced
    return plain, fast


def close(a: Any, b: Any) -> None:
    """Check that two models give the same logits, for a prompt and with a cache."""
    ids = small.tokens(1, small.LONG)
    caches = cache_of(a), cache_of(b)
    for part in (ids[:, :12], ids[:, 12:13], ids[:, 13:]):
        got, expected = (small.logits(m, part, c) for m, c in zip((a, b), caches, strict=True))
        assert small.apart(got, expected) < CLOSE


def cache_of(model: Any) -> Any:
    """Return a new cache of a model of either package."""
    return getattr(model, "language_model", model).make_cache()


def write(folder: Path, family: str, model: Any, config: dict[str, Any]) -> None:
    """Save a model by its library's own function."""
    if family == MLX_LM:
        import_module("mlx_lm.utils").save_model(folder, model)
    else:
        import_module("mlx_vlm.utils").save_weights(folder, model)
    (folder / "config.json").write_text(json.dumps(config))


def read(folder: Path, family: str) -> Any:
    """Load a model by its library's own function."""
    if family == MLX_LM:
        return import_module("mlx_lm.utils").load_model(folder)[0].eval()
    return import_module("mlx_vlm.utils").load_model(folder).eval()


def save(family: str, folder: Path) -> None:
    """Check that the files of both models have the same tensors."""
    plain, fast = pair(family)
    for name, model in (("plain", plain), ("fast", fast)):
        write(folder / name, family, model, CONFIGS[family])
    files = [mx.load(str(folder / name / "model.safetensors")) for name in ("plain", "fast")]
    assert files[0].keys() == files[1].keys()
    assert all(small.equal(value, files[1][name]) for name, value in files[0].items())


def load(family: str, folder: Path) -> None:
    """Check that the plain library loads what an accelerated model saved."""
    plain, fast = pair(family)
    write(folder, family, fast, CONFIGS[family])
    loaded = read(folder, family)
    assert small.classes(loaded) == small.classes(plain)
    close(fast, loaded)


def convert(family: str, folder: Path) -> None:
    """Quantise, save and load by the functions of the library's convert command."""
    _, fast = pair(family)
    quantize_model = import_module("mlx_lm.utils").quantize_model
    predicate = getattr(getattr(fast, "language_model", fast), "quant_predicate", None)

    def chosen(path: str, module: Any) -> Any:
        fits = module.weight.shape[-1] % 32 == 0 and not path.startswith("vision")
        return fits and (predicate is None or predicate(path, module))

    fast, config = quantize_model(fast, CONFIGS[family], 32, 8, quant_predicate=chosen)
    assert "quantization" in config
    write(folder, family, fast, config)
    close(fast, read(folder, family))


def quantised(model: Any) -> Any:
    """Quantise in place what the library would."""
    root = getattr(model, "language_model", model)
    allowed = getattr(root, "quant_predicate", None) or (lambda *_: True)

    def chosen(path: str, module: Any) -> bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return bool(fits and allowed(path, module)) and "indexer" not in path

    nn.quantize(root, group_size=32, bits=8, class_predicate=chosen)
    return model


def quantised_before(family: str, _: Path) -> None:
    """Accelerate a quantised model."""
    plain, fast = quantised(small.MAKE[family]()), quantised(small.MAKE[family]())
    accelerate(fast)
    close(fast, plain)


def quantised_after(family: str, _: Path) -> None:
    """Quantise an accelerated model."""
    plain, fast = pair(family)
    close(quantised(fast), quantised(plain))


def prompt_cache(family: str, _: Path) -> None:
    """Continue a copied cache, in the model that filled it and in the plain one."""
    plain, fast = pair(family)
    prompt, ids = small.tokens(1, small.LONG), small.tokens(1, 1, seed=8)
    filled, theirs = cache_of(fast), cache_of(plain)
    mx.eval(small.logits(fast, prompt, filled), small.logits(plain, prompt, theirs))
    expected = small.logits(plain, ids, theirs)
    for model in (fast, plain):
        assert small.apart(small.logits(model, ids, copy.deepcopy(filled)), expected) < CLOSE


def drafting(family: str, _: Path) -> str | None:
    """Draft with every drafter of the family, or check that it has none."""
    if family == MLX_LM:
        assert not can_trim_prompt_cache(cache_of(small.MAKE[family]()))
        return "mlx-lm needs caches that can be trimmed; this model's cannot"
    if family not in DRAFTERS:
        (folder,) = import_module("mlx_vlm.speculative.drafters").__path__
        kind = CONFIGS[family]["model_type"]
        assert not [p for p in Path(folder).iterdir() if p.name.startswith(kind)]
        return "mlx-vlm has no drafter for it"
    plain, fast = pair(family)
    for name in DRAFTERS[family]:
        want = small.drafted(plain, name, small.drafter(name), 8)
        drafter = small.drafter(name)
        if name not in WITHOUT:
            accelerate(drafter)
        assert small.drafted(fast, name, drafter, 8) == want
    return None


def batch(family: str, _: Path) -> None:
    """Generate for three prompts at once, with the model's cache."""
    plain, fast = pair(family)
    prompts = small.tokens(3, small.LONG)
    assert small.greedy(fast, prompts, 8) == small.greedy(plain, prompts, 8)


def adapted(family: str) -> Any:
    """Return an accelerated model with adapters, in training mode."""
    model = small.MAKE[family]()
    accelerate(model, trainable=True)
    model.freeze()
    mx.random.seed(3)
    config = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), config)
    return model.train()


def steps(model: Any, count: int = 4) -> list[float]:
    """Train some steps; return the losses."""
    ids, optimizer, losses = small.tokens(2, small.LONG), optim.Adam(3e-3), list[float]()
    for _ in range(count):
        value, gradient = small.gradients(model, ids)
        optimizer.update(model, gradient)
        mx.eval(model.parameters())
        losses.append(value.item())
    return losses


def lora(family: str, _: Path) -> None:
    """Train adapters: the loss falls, and nothing else moves."""
    model = adapted(family)
    free = {name for name, _ in tree_flatten(model.trainable_parameters())}
    before = dict(tree_flatten(model.parameters()))
    losses = steps(model)
    assert losses == sorted(losses, reverse=True)
    moved = {p for p, v in tree_flatten(model.parameters()) if not small.equal(v, before[p])}
    assert moved
    assert moved <= free
    assert all("lora" in path for path in free)


@contextmanager
def checkpointed(model: Any) -> Generator[None]:
    """Apply mlx-lm's grad_checkpoint, which changes the layers' class, for a while."""
    kinds = {type(layer) for layer in model.layers}
    kinds -= {kind for kind in kinds if any(kind is not k and issubclass(kind, k) for k in kinds)}
    kept = {kind: vars(kind).get("__call__") for kind in kinds}
    try:
        for kind in kinds:
            grad_checkpoint(next(layer for layer in model.layers if type(layer) is kind))
        yield
    finally:
        for kind, call in kept.items():
            if call is None:
                del kind.__call__
            else:
                kind.__call__ = call


def lora_checkpointed(family: str, _: Path) -> str | None:
    """Compare training with grad_checkpoint to training without."""
    want, model = steps(adapted(family), 2), adapted(family)
    with checkpointed(model):
        if family == MLX_LM:
            with pytest.raises(ValueError, match="VJP with respect to indices"):
                steps(model, 2)
            return "its layers write to what they share, which recomputing would write twice"
        got = steps(model, 2)
        if family == "mlx-vlm V4.1":
            assert not losses_equal(got, want)
            return "its layers write to caches, which recomputing would write twice"
    assert losses_equal(got, want)
    return None


def losses_equal(got: list[float], want: list[float]) -> bool:
    """Return whether two trainings went alike."""
    return all(abs(a - b) < CLOSE for a, b in zip(got, want, strict=True))


Use = Callable[[str, Path], "str | None"]
USES: dict[str, Use] = {
    "save": save,
    "load in the plain library": load,
    "convert": convert,
    "quantised before": quantised_before,
    "quantised after": quantised_after,
    "prompt cache": prompt_cache,
    "speculative decoding": drafting,
    "batch": batch,
    "LoRA": lora,
    "LoRA, grad_checkpoint": lora_checkpointed,
}


def cell(family: str, use: str) -> str | None:
    """Run a cell; return None, or the reason why it cannot be, which was checked."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # quantisers print
        return USES[use](family, Path(folder))


def main() -> None:
    """Print the table and the reasons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=";".join(small.MAKE), help="separated by ;")
    parser.add_argument("--uses", default=";".join(USES), help="separated by ;")
    args = parser.parse_args()
    uses = args.uses.split(";")
    sublayers.FEW = 0
    reasons: list[str] = []
    print("| family | " + " | ".join(uses) + " |")
    print("|---" * (len(uses) + 1) + "|")
    for family in args.families.split(";"):
        row: list[str] = []
        for use in uses:
            reason = cell(family, use)
            if reason and reason not in reasons:
                reasons.append(reason)
            row.append(f"no ({reasons.index(reason) + 1})" if reason else "yes")
        print(f"| {family} | " + " | ".join(row) + " |", flush=True)
    print()
    for number, reason in enumerate(reasons, 1):
        print(f"{number}. {reason}")


if __name__ == "__main__":
    main()
