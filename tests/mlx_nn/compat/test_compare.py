"""compare_models and GradientTracker, as users of mlx-mhc know them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import mlx.core as mx
import pytest

from mhc_backends.mlx_nn.compat import compare
from mhc_core.mlx import GradientTracker, ManifoldHyperConnection, compare_models

SIZES = {"dims": 16, "num_layers": 2, "num_steps": 3, "batch_size": 2, "seq_len": 4}

# What mlx-mhc 0.4.1 returned for SIZES on MLX 0.32.4's CPU; its seed is its own.
THEIRS = {
    "baseline": {
        "grad_mean": 1.618256164755506,
        "grad_std": 0.18451926836954777,
        "params": 6368,
        "final_loss": 1.9194740056991577,
    },
    "mhc": {
        "grad_mean": 0.7308395545700761,
        "grad_std": 0.06829825501537255,
        "params": 6416,
        "final_loss": 1.6348661184310913,
    },
    "param_overhead_pct": 0.7537688442211055,
}


def test_tracker_keeps_the_norm_of_all_gradients() -> None:
    tracker = GradientTracker()
    assert tracker.stats() == {"mean": 0.0, "std": 0.0}
    tracker.record({"a": mx.array([3.0]), "b": [{"c": mx.array([[4.0]])}, {}]})
    tracker.record(mx.full((4,), 0.5, dtype=mx.bfloat16))
    assert tracker.history == [5.0, 1.0]
    assert tracker.stats() == {"mean": 3.0, "std": 2.0}


def test_large_gradients_of_half_precision_do_not_overflow() -> None:
    tracker = GradientTracker()
    tracker.record([mx.full((2,), 60000.0, dtype=mx.float16)])
    assert math.isclose(tracker.history[0], 60000 * math.sqrt(2), rel_tol=1e-3)


def test_compare_models_gives_their_numbers() -> None:
    found = compare_models(**SIZES)
    assert found.keys() == THEIRS.keys()
    assert found["param_overhead_pct"] == pytest.approx(THEIRS["param_overhead_pct"])
    for name in ("baseline", "mhc"):
        assert found[name] == pytest.approx(THEIRS[name], rel=1e-4)


def test_compare_models_takes_their_arguments() -> None:
    parameters = inspect.signature(compare_models).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert list(defaults)[:5] == list(SIZES)
    assert {k: v for k, v in defaults.items() if k not in SIZES} == {
        "num_heads": 4,
        "expansion": 2,
        "lr": 1e-3,
    }


def test_compare_models_leaves_the_random_state_alone() -> None:
    mx.random.seed(11)
    wanted = mx.random.normal((3,))
    mx.random.seed(11)
    compare_models(**(SIZES | {"num_steps": 1}))
    assert mx.array_equal(mx.random.normal((3,)), wanted)


def test_without_steps_there_is_no_loss() -> None:
    found = compare_models(**(SIZES | {"num_steps": 0}))
    for name in ("baseline", "mhc"):
        one: dict[str, Any] = found[name]
        assert (one["final_loss"], one["grad_mean"], one["grad_std"]) == (0, 0, 0)


def test_a_training_step_changes_nothing() -> None:
    model = compare.create_mhc_model(16, 1, num_heads=2, expansion=4)
    connections = [m for m in model.modules() if isinstance(m, ManifoldHyperConnection)]
    assert [m.expansion for m in connections] == [4, 4]
    x, y = mx.random.normal((2, 3, 16)), mx.random.normal((2, 3, 16))
    before = model(x)
    loss, norm = compare.train_step(model, x, y)
    assert float(loss) == pytest.approx(float(mx.mean((before - y) ** 2)), rel=1e-5)
    assert norm > 0
    assert mx.array_equal(model(x), before)
