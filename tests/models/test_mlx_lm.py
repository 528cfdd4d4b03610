"""accelerate on mlx-lm's DeepSeek-V4.1: its generation, its tuner, its parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import small
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import deepseek_v41 as v41
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import mhc_core as mhc
from mhc_core.mlx import accelerate


def pair() -> tuple[Any, Any]:
    """Return a plain model and an accelerated one with the same weights."""
    plain, fast = small.mlx_lm_v41(), small.mlx_lm_v41()
    accelerate(fast)
    return plain, fast


def test_generate_step_gives_the_same_64_tokens() -> None:
    """Check with the rounding to fp8 and fp4, which keeps last-bit differences from adding up."""
    plain, fast = pair()
    prompt = small.tokens(33)
    expected = [token for token, _ in generate_step(prompt, plain, max_tokens=64)]
    with mhc.no_grad():
        got = [token for token, _ in generate_step(prompt, fast, max_tokens=64)]
    assert got == expected
    assert len(set(expected)) > 10


def test_a_compiled_model_gives_the_same() -> None:
    """Check one iteration without indexer: on a CPU, MLX runs a C++ compiler for what it fuses."""
    config = {"num_hidden_layers": 2, "compress_ratios": [0, 0], "hc_sinkhorn_iters": 1}
    fast = small.mlx_lm_v41(**config, kv_source_layer_ids=[], index_source_layer_ids=[])
    expected = fast(ids := small.tokens(1, small.LONG))
    accelerate(fast)
    assert small.apart(mx.compile(lambda ids: fast(ids))(ids), expected) < 1e-4


def test_a_connection_called_by_itself_gives_what_the_library_gives() -> None:
    plain, fast = pair()
    streams = mx.random.normal((2, 3, 4, 64))
    mixes = plain.layers[2].ffn_hc(streams)
    for got, expected in zip(fast.layers[2].ffn_hc(streams), mixes, strict=True):
        assert small.apart(got, expected) < 1e-5


def test_streams_are_passed_on_between_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check for one combine_pre per sublayer but the first, and one combine after the last."""
    _, fast = pair()
    calls: list[str] = []
    for name in ("mappings", "aggregate", "pre", "combine", "combine_pre"):
        monkeypatch.setattr(mhc, name, counted(name, getattr(mhc, name), calls))
    mx.eval(fast(small.tokens(1, 3)))
    assert calls == ["mappings", "aggregate", *["combine_pre"] * 9, "combine"]


def counted(name: str, function: Any, calls: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return call


def test_launches_of_the_metal_kernels() -> None:
    """Check for 2 launches between sublayers; the library needs more, even with Sinkhorn as one."""
    simulator = pytest.importorskip("mhc_metal_simulator", reason="the simulator is not installed")
    plain, fast = pair()
    ids = small.tokens(1, 4)
    sublayers = 2 * len(fast.layers)
    with simulator.record() as launches, mhc.use_backend("mlx-metal-simulator"):
        got = fast(ids)
        mx.eval(got)
    mappings, aggregate, combine_pre, combine = 2, 1, 2, 1
    assert len(launches) == mappings + aggregate + (sublayers - 1) * combine_pre + combine
    assert small.apart(got, plain(ids)) < 1e-4
    connection = small.mlx_lm_v41(hc_sinkhorn_iters=1).layers[0].attn_hc
    x, y = mx.random.normal((1, 4, 4, 64)), mx.random.normal((1, 4, 64))
    h_pre, h_post, h_res = mx.ones((1, 4, 4)), mx.ones((1, 4, 4)), mx.ones((1, 4, 4, 4))
    mx.eval(x, y, h_pre, h_post, h_res)
    x = v41._expand(y, x, h_post, h_res)
    assert small.nodes(x, v41._collapse(x, h_pre), *connection(x)) > 10 * combine_pre


def lora(model: Any) -> Any:
    """Adapt all layers."""
    model.freeze()
    linear_to_lora_layers(model, 5, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    return model


def test_lora_trains_what_the_plain_model_cannot() -> None:
    ids = small.tokens(2, small.LONG)
    with pytest.raises(ValueError, match="VJP with respect to indices"):
        small.gradients(lora(small.mlx_lm_v41()), ids)
    before, after = small.mlx_lm_v41(), small.mlx_lm_v41()
    accelerate(before, trainable=True)
    lora(before)
    lora(after)
    assert accelerate(after, trainable=True).replaced
    for model in (before, after):
        _, gradient = small.gradients(model, ids)
        flat = dict(tree_flatten(gradient))
        assert flat
        assert all(path.endswith(("lora_a", "lora_b")) for path in flat)
        # lora_b starts at zero, so only its own gradient is not
        moving = {p for p, g in flat.items() if p.endswith("lora_b") and mx.abs(g).max().item()}
        assert {p for p in flat if p.endswith("lora_b") and ".indexer." not in p} == moving


def test_mlx_lms_own_trainer_lowers_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train uncompiled, since a compiled step takes a minute of C++ compiler on a CPU."""
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    model = small.mlx_lm_v41()
    accelerate(model, trainable=True)
    lora(model).train()
    rows = [(small.tokens(small.LONG, seed=i).tolist(), 0) for i in range(2)]
    ids = mx.array([row for row, _ in rows])
    before = small.loss(model, ids).item()
    args = TrainingArgs(
        batch_size=2, iters=6, val_batches=0, adapter_file=str(tmp_path / "adapters.safetensors")
    )
    train(model, optim.Adam(3e-3), rows, args=args)
    assert small.loss(model, ids).item() < 0.9 * before
    assert (tmp_path / "adapters.safetensors").exists()
    capsys.readouterr()


def test_lora_on_a_quantised_model() -> None:
    model = small.mlx_lm_v41()
    nn.quantize(model, group_size=32, bits=4)
    accelerate(model, trainable=True)
    lora(model)
    _, gradient = small.gradients(model, small.tokens(2, small.LONG))
    assert any(mx.abs(g).max().item() > 0 for _, g in tree_flatten(gradient))


# --------------------------------------------------------------------------------- parallelism


class Group:
    """One process's place in a group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("accelerated_first", [False, True])
def test_two_pipeline_stages(monkeypatch: pytest.MonkeyPatch, accelerated_first: bool) -> None:
    """Run both stages in one process: a list holds what one sends until the next receives it."""
    sent: list[mx.array] = []

    def send(message: mx.array, _: int) -> mx.array:
        sent.append(message)
        return message

    monkeypatch.setattr(mx.distributed, "send", send)
    monkeypatch.setattr(mx.distributed, "recv", lambda *_: sent.pop())
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x: x)
    stages = [small.mlx_lm_v41(), small.mlx_lm_v41()]
    for rank, model in enumerate(stages):
        if accelerated_first:
            accelerate(model)
        model.model.pipeline(Group(rank, 2))
        accelerate(model)
    last, first = stages
    ids = small.tokens(2, small.LONG)
    mx.eval(first(ids))
    assert len(sent) == 1
    assert small.apart(last(ids), small.mlx_lm_v41()(ids)) < 1e-4


@pytest.mark.parametrize("accelerated_first", [False, True])
def test_a_sharded_model(accelerated_first: bool) -> None:
    """Check a group of one: tensor parallelism replaces only layers that accelerate keeps."""
    plain, fast = small.mlx_lm_v41(), small.mlx_lm_v41()
    if accelerated_first:
        accelerate(fast, trainable=True)
    plain.shard()
    fast.shard()
    accelerate(fast, trainable=True)
    assert fast.layers[0].mlp.sharding_group is not None
    ids = small.tokens(2, small.LONG)
    assert small.apart(fast(ids), plain(ids)) < 1e-4


def test_the_classes_are_subclasses_of_the_librarys() -> None:
    _, fast = pair()
    assert all(isinstance(layer, v41.DecoderLayer) for layer in fast.layers)
    assert all(isinstance(layer.ffn_hc, v41.HyperConnection) for layer in fast.layers)
