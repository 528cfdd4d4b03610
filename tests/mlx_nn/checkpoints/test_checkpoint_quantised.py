"""Quantised gates (Qwen4-Exp): loaded, dequantised where a model has none, saved again, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import Weights, folder, parameters, without
from mlx import nn

from mhc_backends.checkpoints.quantised import Packing, dequantised
from mhc_backends.mlx_common import to_host
from mhc_core.mlx import GatedConnection, GatedHead, load_hyper_connections

DIMS, N, RANK = 16, 4, 32
SITES = "attn_hyper_connection", "mlp_hyper_connection"
DOWN = f"layers.0.{SITES[0]}.input_mix_weight_down"
AFFINE = {"group_size": 32, "bits": 4}


def text(dtype: mx.Dtype = mx.float32, **packing: Any) -> nn.Module:
    """Return a model of gated residuals, quantised if a packing is given."""
    mx.random.seed(7)
    made, layer = nn.Module(), nn.Module()
    for site in SITES:
        layer[site] = GatedConnection(DIMS, N, RANK)
    made.layers = [layer]
    made.hyper_connection_mixer = GatedHead(DIMS, N, RANK)
    made.set_dtype(dtype)
    if packing:
        nn.quantize(made, **packing)
    return made


def weights(**packing: Any) -> Weights:
    return dict(parameters(text(mx.bfloat16, **packing)))


def modules(model: nn.Module) -> list[Any]:
    return [*(model.layers[0][site] for site in SITES), model.hyper_connection_mixer]


def results(modules: list[Any]) -> list[mx.array]:
    x = mx.random.normal((2, 3, N, DIMS), key=mx.random.key(1)).astype(mx.bfloat16)
    return [m(x) if isinstance(m, GatedHead) else m(x, mx.tanh) for m in modules]


def loaded_modules(found: Any) -> list[Any]:
    return [*found.layers[0], found.head]


PACKINGS = [Packing("affine", 32, bits) for bits in (4, 8)] + [
    Packing(mode, group, bits)
    for mode, group, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4))
]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_quantised_gates_are_loaded_and_saved_again(packing: Packing, tmp_path: Path) -> None:
    options = packing._asdict()
    stored = weights(**options)
    source = folder(tmp_path, stored, {"model_type": "qwen4_exp", "num_hidden_layers": 1})
    ours = loaded_modules(load_hyper_connections(source))
    wanted = modules(text(mx.bfloat16, **options))
    for one in ours:
        for layer in one.projections:
            assert type(layer) is nn.QuantizedLinear
            assert Packing(layer.mode, layer.group_size, layer.bits) == packing
    for got, want in zip(results(ours), results(wanted), strict=True):
        assert mx.array_equal(got, want)

    # saved under the names of the release, and into a model quantised in the same way
    again = text(mx.bfloat16, **options)
    for name, array in parameters(again).items():
        assert array.dtype == stored[name].dtype
    for one in modules(again):
        one.hc_norm.weight += 1
    for one, other in zip(modules(again), ours, strict=True):
        other.hc_norm.weight += 2
        one.update(other.parameters())
    target = text(mx.bfloat16, **options)
    assert len(parameters(target)) == len(stored)
    load_hyper_connections(parameters(again), target)
    for name, array in parameters(target).items():
        want = stored[name] + 2 if "norm" in name else stored[name]
        assert array.dtype == want.dtype
        assert mx.array_equal(array, want), name


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_a_model_of_plain_gates_gets_the_matrices(mode: str) -> None:
    target = text()
    stored = weights(group_size=16 if mode == "nvfp4" else 32, mode=mode)
    found = load_hyper_connections(stored, target)
    for key, array in parameters(target).items():
        stem, _, _ = key.rpartition(".")
        parts = [stored[f"{stem}.{part}"] for part in ("weight", "scales", "biases")
                 if f"{stem}.{part}" in stored]  # fmt: skip
        want = parts[0]
        if len(parts) > 1:
            bits = 8 if mode == "mxfp8" else 4
            group = 16 if mode == "nvfp4" else 32
            if mode == "affine":  # in bfloat16 MLX would round the product too
                parts = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]
            want = mx.dequantize(*parts, group_size=group, bits=bits, mode=mode)
        assert array.dtype == mx.bfloat16
        want = want.astype(mx.bfloat16)
        near = 2**-8 * mx.abs(want) if mode == "affine" else 0  # where the sum was near a half
        assert (mx.abs(array - want) <= near).all(), key
    assert type(found.layers[0].attn.input_mix_weight_up) is nn.Linear


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_elements_of_any_width_are_unpacked(bits: int) -> None:
    rng = np.random.default_rng(bits)
    elements = rng.integers(0, 2**bits, (3, 128), np.uint8)
    stream = (elements[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    weight = np.packbits(stream.reshape(3, -1), axis=-1, bitorder="little").view("<u4")
    scales, biases = rng.normal(size=(2, 3, 2)).astype(np.float32)
    got = dequantised(Packing("affine", 64, bits), weight, scales, biases)
    want = np.repeat(scales, 64, axis=1) * elements + np.repeat(biases, 64, axis=1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_elements_are_those_of_mlx(bits: int) -> None:
    matrix = mx.random.normal((3, 128), key=mx.random.key(bits))
    try:
        stored = mx.quantize(matrix, group_size=64, bits=bits)
    except ValueError as error:  # older releases have no width of 1
        if "bits 1 is not supported" not in str(error):
            raise
        pytest.skip(f"this MLX: {error}")
    got = dequantised(Packing("affine", 64, bits), *map(to_host, stored))
    want = mx.dequantize(*stored, group_size=64, bits=bits)
    assert mx.abs(mx.array(got) - want).max() <= 1e-6 * mx.abs(want).max()


def test_matrices_that_are_not_quantised_may_stand_beside_others() -> None:
    stored = weights(**AFFINE)
    mixed = {name: a for name, a in stored.items() if not name.startswith(f"{DOWN}.")}
    mixed[f"{DOWN}.weight"] = weights()[f"{DOWN}.weight"]
    attn = load_hyper_connections(mixed).layers[0].attn
    kinds = [type(layer) for layer in attn.projections]
    assert kinds == [nn.Linear, nn.QuantizedLinear, nn.QuantizedLinear]
    assert attn(mx.ones((2, N, DIMS), mx.bfloat16), mx.tanh).shape == (2, N, DIMS)


def changed(part: str, change: Callable[[mx.array], mx.array]) -> Callable[[Weights], Weights]:
    name = f"{DOWN}.{part}"
    return lambda stored: stored | {name: change(stored[name])}


FAULTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "no scales": (
        lambda stored: without(f"{DOWN}.scales")(without(f"{DOWN}.biases")(stored)),
        f"{DOWN}.weight has dtype uint32, of a quantised matrix, without its scales; needs "
        f"{DOWN}.scales",
    ),
    "biases alone": (
        without(f"{DOWN}.scales"),
        f"{DOWN}.scales is missing beside {DOWN}.biases",
    ),
    "no weight": (without(f"{DOWN}.weight"), f"{DOWN}.weight is missing in the mapping"),
    "no biases": (
        without(f"{DOWN}.biases"),
        f"{DOWN}.scales has dtype bfloat16; needs uint8, since it has no biases",
    ),
    "weight not packed": (
        changed("weight", lambda a: a.astype(mx.float32)),
        f"{DOWN}.weight has dtype float32; needs uint32, since it has scales",
    ),
    "other groups": (
        lambda stored: changed("biases", lambda a: a[:, :1])(
            changed("scales", lambda a: mx.concatenate([a, a, a, a], 1))(stored)
        ),
        f"{DOWN}.biases has shape (32, 1); needs that of {DOWN}.scales, (rows, groups)",
    ),
    "small groups": (
        lambda stored: changed("biases", lambda a: mx.concatenate([a, a], 1))(
            changed("scales", lambda a: mx.concatenate([a, a], 1))(stored)
        ),
        f"{DOWN}.weight has shape (32, 8) and {DOWN}.scales (32, 4); needs rows of 64 elements of "
        "1, 2, 3, 4, 5, 6, 8 bits, in groups of 32, 64, 128",
    ),
    "narrow weight": (
        changed("weight", lambda a: a[:, :7]),
        f"{DOWN}.weight has shape (32, 7) and {DOWN}.scales (32, 2); needs rows of 64 elements",
    ),
    "fewer rows": (changed("weight", lambda a: a[:31]), f"{DOWN}.weight has shape (31, 8)"),
    "dtypes": (
        changed("biases", lambda a: a.astype(mx.float32)),
        f"{DOWN}.biases has dtype float32; needs bfloat16, as {DOWN}.scales has",
    ),
    "NaN": (changed("scales", lambda a: a + mx.nan), f"{DOWN}.scales holds NaN or infinity"),
    "norm": (
        lambda stored: stored | {f"layers.0.{SITES[0]}.hc_norm.scales": mx.ones((1,))},
        f"layers.0.{SITES[0]}.hc_norm.scales in the mapping: named like hyper-connections",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_fit_are_named_and_change_nothing(fault: str) -> None:
    change, says = FAULTS[fault]
    for target in (text(), text(**AFFINE)):
        before = parameters(target)
        with pytest.raises((TypeError, ValueError)) as caught:
            load_hyper_connections(change(weights(**AFFINE)), target)
        assert says in str(caught.value)
        assert all(array is before[name] for name, array in parameters(target).items())


@pytest.mark.parametrize(
    ("stored", "model", "says"),
    [
        ({}, AFFINE, f"{DOWN}.scales is missing; the model needs it for {DOWN}.scales"),
        (AFFINE, {"group_size": 64, "bits": 4}, f"{DOWN}.scales has shape (32, 2); {DOWN}.scales"),
        (AFFINE, {"group_size": 32, "bits": 8}, f"{DOWN}.weight has shape (32, 8); {DOWN}.weight"),
        ({"mode": "mxfp4"}, AFFINE, f"{DOWN}.biases is missing; the model needs it"),
        (AFFINE, {"mode": "mxfp4"}, f"the model has no parameter for {DOWN}.biases"),
    ],
)
def test_a_model_quantised_in_another_way_is_refused(stored: Any, model: Any, says: str) -> None:
    def down_alone(path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and path.endswith("down")

    target = text(**model, class_predicate=down_alone)
    before = parameters(target)
    with pytest.raises(ValueError, match="load_hyper_connections: ") as caught:
        load_hyper_connections(weights(**stored), target)
    assert says in str(caught.value)
    assert all(array is before[name] for name, array in parameters(target).items())
