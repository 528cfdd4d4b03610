"""The originals beside their stand-ins: the same signatures, weights and numbers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from originals import Original

import mhc_mlx
import mlx_mhc

SIGNATURES = """
import inspect, json, sys, warnings
warnings.simplefilter("ignore")
module = __import__(sys.argv[1])
def of(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, repr(p.default)) for p in parameters]
found = {}
for name in module.__all__:
    thing = getattr(module, name)
    if inspect.isclass(thing):
        for key, value in vars(thing).items():
            if callable(getattr(thing, key)) and (key[0] != "_" or key in ("__init__", "__call__")):
                found[f"{name}.{key}"] = of(getattr(thing, key))
    elif callable(thing):
        found[name] = of(thing)
    else:
        found[name] = None
print(json.dumps(found))
"""


def signature(function: Any) -> list[list[str]]:
    parameters = inspect.signature(function).parameters.values()
    return [[p.name, p.kind.name, repr(p.default)] for p in parameters]


@pytest.mark.parametrize("name", ["mhc_mlx", "mlx_mhc"])
def test_every_name_is_there_and_is_called_alike(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    original: Original = request.getfixturevalue(f"{name}_original")
    theirs = json.loads(original.run(SIGNATURES, name, folder=tmp_path))
    assert len(theirs) >= 6
    for path, wanted in theirs.items():
        found: Any = {"mhc_mlx": mhc_mlx, "mlx_mhc": mlx_mhc}[name]
        for part in path.split("."):
            found = getattr(found, part)
        if wanted is None:
            assert isinstance(found, str), path
            continue
        ours = signature(found)
        # ours may take more, by keyword alone or after theirs, and whatever a layer takes
        kept = [p for p in ours if p[0] in {w[0] for w in wanted}]
        assert kept == wanted, path
        extra = [p for p in ours if p not in kept]
        assert all(p[1] in ("KEYWORD_ONLY", "VAR_POSITIONAL", "VAR_KEYWORD") for p in extra), path


THEIR_LAYERS = """
import sys, warnings
warnings.simplefilter("ignore")
import mlx.core as mx, mlx.nn as nn
from mhc_mlx import AutoPatcher, MHCLayer, MHCRewire

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64)
    def __call__(self, x):
        return self.linear(self.norm(x))

def quantized(bits):
    return nn.QuantizedLinear.from_linear(nn.Linear(64, 64), group_size=32, bits=bits)

cases = {
    "layer": (MHCLayer(4, 16, sinkhorn_iters=5, eps=0.01), (3, 4, 16)),
    "large": (MHCLayer(32, 8), (2, 32, 8)),
    "linear": (MHCRewire(nn.Linear(64, 64), 64, 4, sinkhorn_iters=3), (5, 64)),
    "four bits": (MHCRewire(quantized(4), 64, 8), (2, 3, 64)),
    "eight bits": (MHCRewire(quantized(8), 64, 32), (2, 3, 64)),
    "convolution": (MHCRewire(nn.Conv2d(64, 64, 3, padding=1), 64, 4), (2, 4, 5, 64)),
    "block": (MHCRewire(Block(), 64, 16), (2, 3, 64)),
}
folder = sys.argv[1]
mx.random.seed(0)
for name, (module, shape) in cases.items():
    layer = getattr(module, "mhc", module)
    for raw in ("H_pre_raw", "H_post_raw", "H_res_raw"):
        layer[raw] = mx.random.normal(layer[raw].shape)
    x = mx.random.normal(shape)
    module.save_weights(f"{folder}/{name}.safetensors")
    out = module(x)
    grads = mx.grad(lambda x, pre, post, res: (
        layer.update({"H_pre_raw": pre, "H_post_raw": post, "H_res_raw": res}),
        mx.sum(mx.sin(module(x))),
    )[1], argnums=(0, 1, 2, 3))(x, layer.H_pre_raw, layer.H_post_raw, layer.H_res_raw)
    mx.savez(f"{folder}/{name}.npz", x=x, out=out, dx=grads[0], pre=grads[1], post=grads[2],
             res=grads[3])
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(self.norm(x))


def quantized(bits: int) -> nn.QuantizedLinear:
    return nn.QuantizedLinear(64, 64, group_size=32, bits=bits)


def convolution() -> nn.Conv2d:
    return nn.Conv2d(64, 64, 3, padding=1)


OURS: dict[str, Any] = {
    "layer": lambda: mhc_mlx.MHCLayer(4, 16, sinkhorn_iters=5, eps=0.01),
    "large": lambda: mhc_mlx.MHCLayer(32, 8),
    "linear": lambda: mhc_mlx.MHCRewire(nn.Linear(64, 64), 64, 4, sinkhorn_iters=3),
    "four bits": lambda: mhc_mlx.MHCRewire(quantized(4), 64, 8),
    "eight bits": lambda: mhc_mlx.MHCRewire(quantized(8), 64, 32),
    "convolution": lambda: mhc_mlx.MHCRewire(convolution(), 64, 4),
    "block": lambda: mhc_mlx.MHCRewire(Block(), 64, 16),
}


def near(found: mx.array, wanted: mx.array, tolerance: float = 2e-5) -> bool:
    scale = float(mx.abs(wanted).max())
    return found.shape == wanted.shape and float(mx.abs(found - wanted).max()) <= tolerance * scale


@pytest.fixture(scope="module")
def their_layers(mhc_mlx_original: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    mhc_mlx_original.run(THEIR_LAYERS, folder, folder=folder)
    return folder


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", OURS)
def test_weights_that_mhc_mlx_saved_give_its_numbers(
    name: str, training: bool, their_layers: Path
) -> None:
    module = OURS[name]().load_weights(str(their_layers / f"{name}.safetensors")).train(training)
    theirs: Any = mx.load(str(their_layers / f"{name}.npz"))
    layer = getattr(module, "mhc", module)
    assert near(module(theirs["x"]), theirs["out"])

    def loss(x: mx.array, pre: mx.array, post: mx.array, res: mx.array) -> mx.array:
        layer.update({"H_pre_raw": pre, "H_post_raw": post, "H_res_raw": res})
        return mx.sum(mx.sin(module(x)))

    raw = layer.H_pre_raw, layer.H_post_raw, layer.H_res_raw
    grads = mx.grad(loss, argnums=(0, 1, 2, 3))(theirs["x"], *raw)
    for key, found in zip(("dx", "pre", "post", "res"), grads, strict=True):
        assert near(found, theirs[key], 1e-4), key


THEIR_CONNECTIONS = """
import json, sys
import mlx.core as mx
import mlx_mhc as mhc

folder = sys.argv[1]
mx.random.seed(0)
arrays = {}
for n, iterations in ((2, 20), (4, 3)):
    connection = mhc.ManifoldHyperConnection(24, n, iterations)
    for name, value in connection.parameters().items():
        connection[name] = mx.random.normal(value.shape)
    connection.save_weights(f"{folder}/{n}.safetensors")
    x, y = mx.random.normal((2, 3, 24)), mx.random.normal((2, 3, 24))
    arrays |= {f"x{n}": x, f"y{n}": y, f"pre{n}": connection.pre_scale(x),
               f"out{n}": connection(x, y), f"post{n}": connection.post_combine(x, y)}
    def loss(c):
        return mx.sum(mx.sin(c.post_combine(x, mx.tanh(c.pre_scale(x)))))
    grads = mx.grad(loss)(connection)
    arrays |= {f"d{n}{name}": grad for name, grad in grads.items()}
for log_space in (0, 1):
    matrix = mx.random.normal((5, 5))
    arrays |= {f"matrix{log_space}": matrix,
               f"few{log_space}": mhc.sinkhorn_knopp(matrix, 3, log_space=bool(log_space)),
               f"many{log_space}": mhc.sinkhorn_knopp(matrix, log_space=bool(log_space)),
               f"loose{log_space}": mhc.sinkhorn_knopp(matrix, 100, 0.01, bool(log_space))}
mx.savez(f"{folder}/arrays.npz", **arrays)
print(json.dumps(mhc.compare_models(16, 2, 3, 2, 4, num_heads=2, expansion=4, lr=0.01)))
"""


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_weights_that_mlx_mhc_saved_give_its_numbers(
    training: bool, mlx_mhc_original: Original, tmp_path: Path
) -> None:
    compared = json.loads(mlx_mhc_original.run(THEIR_CONNECTIONS, tmp_path, folder=tmp_path))
    theirs: Any = mx.load(str(tmp_path / "arrays.npz"))
    for n, iterations in ((2, 20), (4, 3)):
        module = mlx_mhc.ManifoldHyperConnection(24, n, iterations)
        module.load_weights(str(tmp_path / f"{n}.safetensors")).train(training)
        x, y = theirs[f"x{n}"], theirs[f"y{n}"]
        assert near(module.pre_scale(x), theirs[f"pre{n}"])
        assert near(module(x, y), theirs[f"out{n}"])
        assert near(module.post_combine(x, y), theirs[f"post{n}"])

        def loss(c: Any, x: mx.array = x) -> mx.array:
            return mx.sum(mx.sin(c.post_combine(x, mx.tanh(c.pre_scale(x)))))

        grads: Any = mx.grad(loss)(module)
        assert len(grads) == 5
        for name, grad in grads.items():
            assert near(grad, theirs[f"d{n}{name}"], 1e-4), name
    for log_space in (0, 1):
        matrix, space = theirs[f"matrix{log_space}"], bool(log_space)
        assert near(mlx_mhc.sinkhorn_knopp(matrix, 3, log_space=space), theirs[f"few{log_space}"])
        assert near(mlx_mhc.sinkhorn_knopp(matrix, log_space=space), theirs[f"many{log_space}"])
        loose = mlx_mhc.sinkhorn_knopp(matrix, 100, 0.01, space)
        assert near(loose, theirs[f"loose{log_space}"])
    ours = mlx_mhc.compare_models(16, 2, 3, 2, 4, num_heads=2, expansion=4, lr=0.01)
    assert ours["mhc"] == pytest.approx(compared["mhc"], rel=1e-4)
    assert ours["baseline"] == pytest.approx(compared["baseline"], rel=1e-4)


FAULTS_OF_MHC_MLX = """
import warnings
warnings.simplefilter("ignore")
import mlx.core as mx, mlx.nn as nn
from mhc_mlx import AutoPatcher, MHCRewire

x = mx.random.normal((4, 64))
left = MHCRewire(nn.Linear(64, 64, bias=False), 64, 4)(x)
assert mx.linalg.norm(left) / mx.linalg.norm(x) < 1e-9
assert MHCRewire(nn.Linear(64, 64), 64, 4)(x.astype(mx.bfloat16)).dtype == mx.float32

model = nn.Module()
model.linear, model.pair, model.lm_head = nn.Linear(64, 64), (nn.Linear(64, 64),), nn.Linear(64, 64)
assert AutoPatcher.patch(model, 4, verbose=False) is None
assert type(model.pair[0]) is nn.Linear
assert type(model.lm_head) is MHCRewire
AutoPatcher.patch(model, 4, verbose=False)
assert type(model.linear.inner) is MHCRewire
"""

FAULTS_OF_MLX_MHC = """
import mlx.core as mx
import mlx_mhc as mhc

batch = mx.random.normal((3, 4, 4))
assert mx.abs(mhc.sinkhorn_knopp(batch).sum(-1) - 1).max() > 0.1
try:
    mx.eval(mx.compile(mhc.sinkhorn_knopp)(batch[0]))
    raise AssertionError("it can be compiled")
except (RuntimeError, ValueError):
    pass

connection = mhc.ManifoldHyperConnection(8, 2)
connection.eval()
x = mx.random.normal((1, 2, 8))
before = connection(x, x)
connection.update({"h_res_raw": mx.array([[0.0, 9.0], [9.0, 0.0]])})
assert mx.array_equal(connection(x, x), before)
assert any(name.startswith("_cached") for name in connection.state)
"""


def test_the_faults_of_mhc_mlx_are_still_there(mhc_mlx_original: Original, tmp_path: Path) -> None:
    """Check the faults that docs/migrating.md lists; the modules' tests show that ours has none."""
    mhc_mlx_original.run(FAULTS_OF_MHC_MLX, folder=tmp_path)


def test_the_faults_of_mlx_mhc_are_still_there(mlx_mhc_original: Original, tmp_path: Path) -> None:
    mlx_mhc_original.run(FAULTS_OF_MLX_MHC, folder=tmp_path)
