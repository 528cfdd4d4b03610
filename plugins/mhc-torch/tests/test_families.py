"""accelerate, and load_hyper_connections, on the other families of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from quantisers import check_quantised
from test_models import check_hooks, close, norms_inside
from torch import nn

import mhc_core as mhc
import mhc_torch

transformers = pytest.importorskip("transformers", "5.23", reason="needs transformers>=5.23")

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    "rms_norm_eps": 1e-2,
    "hc_eps": 1e-2,
    "hc_mult": 3,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 63,
}
GLM = COMMON | {
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 8,
    "layer_types": ["linear_attention", "deepseek_sparse_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "index_kpool": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "hc_sinkhorn_iters": 3,
}
HY = COMMON | {"qk_rope_head_dim": 6, "qk_nope_head_dim": 4, "hc_magnitude": 1.5}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
QWEN4: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "indexed_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 8,
    "moe_intermediate_size": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "hc_count": 3,
    "hc_lowrank": 5,
    "rms_norm_eps": 1e-2,
    "pad_token_id": 0,
    "eos_token_id": 63,
}
MAKE: dict[str, Callable[[], Any]] = {
    "glm5_next": lambda: transformers.Glm5NextTextModel(transformers.Glm5NextTextConfig(**GLM)),
    "hy_v4": lambda: transformers.HYV4ForCausalLM(transformers.HYV4Config(**HY)),
    "hy_v4_vl": lambda: transformers.HYV4VLTextModel(
        transformers.HYV4VLTextConfig(**HY, rope_parameters=MROPE)
    ),
    "qwen4_exp": lambda: transformers.Qwen4ExpForCausalLM(transformers.Qwen4ExpTextConfig(**QWEN4)),
}
LAYER = ("pre", "combine_pre", "combine")
OPS = {
    "glm5_next": LAYER * 2,
    "hy_v4": (*LAYER * 2, "head"),
    "hy_v4_vl": (*LAYER * 2, "head"),
    "qwen4_exp": (*("gated_pre", "combine") * 4, "gated_head"),
}
SITES = dict.fromkeys(MAKE, ("attn_hc", "ffn_hc"))
SITES["qwen4_exp"] = ("attn_hyper_connection", "mlp_hyper_connection")


@pytest.fixture(scope="module", params=list(MAKE))
def name(request: pytest.FixtureRequest) -> str:
    """Return each family that the installed transformers has."""
    home = f"transformers.models.{request.param}.modeling_{request.param}"
    pytest.importorskip(home, reason=f"needs a transformers with {request.param}")
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    """Return a model, its connections far from the start. Tests change only copies of it."""
    torch.manual_seed(0)
    made = MAKE[name]()
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if "hc" in path or "hyper_connection" in path:
                parameter += 0.3 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 60, (1, 9))


def output(out: Any) -> torch.Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def step(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, the streams between the layers, and the gradients of a loss."""
    model.zero_grad()
    out = model(tokens, output_hidden_states=True)
    last = output(out)
    (last.float() * torch.cos(torch.arange(last.numel()).reshape(last.shape))).sum().backward()
    states = {f"state {k}": state for k, state in enumerate(out.hidden_states)}
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(own) > 20
    return {"output": last, **states, **own}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Compare steps; what is a millionth of the largest gradient is rounding.

    The first connection sees equal streams, so its H_pre changes little and its H_res nothing.
    """
    assert got.keys() == want.keys()
    floor = 1e-7 * max(one.abs().max() for one in want.values())
    for name, one in got.items():
        error = (one - want[name]).abs().max()
        assert error <= 1e-4 * want[name].abs().max() + floor, (name, error)


def test_outputs_and_gradients_are_the_models_own(
    name: str, model: Any, tokens: torch.Tensor
) -> None:
    want = step(model.train(), tokens)
    other, ops = copy.deepcopy(model), []
    report = mhc_torch.accelerate(other, everywhere=True)
    assert not report.left
    with pytest.MonkeyPatch.context() as patch:
        for op in dict.fromkeys((*OPS[name], "pre", "gated_pre", "mappings")):
            own = getattr(mhc, op)
            patch.setattr(mhc, op, lambda *a, own=own, op=op: (ops.append(op), own(*a))[1])
        same(step(other, tokens), want)
    assert tuple(ops) == OPS[name]
    if name != "qwen4_exp":  # which has no norm there
        with norms_inside(other) as called:
            same(step(other, tokens), want)
        assert not called
    assert list(other.state_dict()) == list(model.state_dict())
    if name != "hy_v4_vl":  # whose layers differ from hy_v4's in their names alone
        old = other.gradient_checkpointing_enable  # its name before transformers 5.24
        getattr(other, "activation_checkpointing_enable", old)()
        same(step(other, tokens), want)
    restored = mhc_torch.restore(other)
    assert len(restored.replaced) == len(report.replaced)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


def test_in_bfloat16_and_on_the_cpu(name: str, model: Any, tokens: torch.Tensor) -> None:
    if name == "hy_v4_vl":
        pytest.skip("as hy_v4")
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = output(model(tokens))
        mhc_torch.accelerate(other)
        assert torch.equal(output(other(tokens)), want)  # the model's own code
        mhc_torch.accelerate(other.bfloat16(), everywhere=True)
        plain = copy.deepcopy(model).bfloat16()
        errors = [(output(m(tokens)).float() - want).abs().mean() for m in (other, plain)]
        assert output(other(tokens)).dtype == torch.bfloat16
    assert errors[0] <= 1.5 * errors[1]


def test_generation(name: str, model: Any, tokens: torch.Tensor) -> None:
    if not hasattr(model, "generate") or "CausalLM" not in type(model).__name__:
        pytest.skip("this model alone does not generate")
    other = copy.deepcopy(model)
    mhc_torch.accelerate(other, everywhere=True)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(other.generate(tokens, **options), model.generate(tokens, **options))


def streams(x: torch.Tensor, name: str) -> torch.Tensor:
    return x.flatten(-2) if name == "qwen4_exp" else x


def test_what_transformers_saves_is_what_it_computes(name: str, model: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    other = MAKE[name]()
    for original in (True, False):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        loaded = mhc_torch.load_hyper_connections(folder, other)
        _check_loaded(name, model, loaded)
    wanted, filled = dict(model.named_parameters()), 0
    for path, parameter in other.named_parameters():
        if "hc" in path or "hyper_connection" in path:
            assert torch.equal(parameter, wanted[path]), path
            filled += 1
    assert filled >= 12


def _check_loaded(name: str, model: Any, loaded: Any) -> None:
    own = getattr(model, "model", model)
    x = torch.randn(1, 3, 3, 16)
    with torch.no_grad():
        for layer, theirs in zip(loaded.layers, own.layers, strict=True):
            for ours, site in zip(layer, SITES[name], strict=True):
                found = getattr(theirs, site)(streams(x, name))
                h, h_post, h_res = ours.pre(x)
                at_h, at_post = {"glm5_next": (2, 0), "qwen4_exp": (0, 2)}.get(name, (1, 0))
                got, want = {"h": h, "post": h_post}, {"h": found[at_h], "post": found[at_post]}
                assert (h_res is None) == (name != "glm5_next")
                if h_res is not None:
                    got, want = got | {"res": h_res.mT}, want | {"res": found[1]}
                close(got, want, 1e-5)
        head = getattr(own, "hyper_connection_mixer", getattr(own, "hc_head", None))
        collapsed = loaded.head or (lambda x: mhc.contract(x, "mean"))
        close({"head": collapsed(x)}, {"head": head(streams(x, name))}, 1e-5)


def test_what_a_release_computes_otherwise_is_left(
    name: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "hy_v4_vl":
        pytest.skip("as hy_v4")
    cls = type(next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")))
    forward = cls.forward

    def another(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (1.01 * out[0], *out[1:]) if isinstance(out, tuple) else 1.01 * out

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", another)
        report = mhc_torch.accelerate(copy.deepcopy(model), everywhere=True)
        assert {note.class_name for note in report.left} == {cls.__name__}
        assert "computes something else" in str(report)
        patch.setattr(cls, "forward", lambda self, x: x)
        report = mhc_torch.accelerate(copy.deepcopy(model), everywhere=True)
        assert "its forward is not the one that is known: TypeError" in str(report)
    connection = type(getattr(model.get_submodule(_first_layer(model)), SITES[name][0]))
    other = connection.forward
    monkeypatch.setattr(connection, "forward", lambda *a: tuple(1.01 * one for one in other(*a)))
    with pytest.raises(RuntimeError, match="computes something else than mhc-core"):
        mhc_torch.accelerate(copy.deepcopy(model))


def _first_layer(model: Any) -> str:
    return next(path for path, m in model.named_modules() if path.endswith("layers.0"))


def test_a_projection_with_an_adapter_runs_itself(tokens: torch.Tensor) -> None:
    pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp", reason="this family")
    model = MAKE["qwen4_exp"]()
    other = copy.deepcopy(model)
    mhc_torch.accelerate(other, everywhere=True)
    connection = other.model.layers[0].mlp_hyper_connection
    connection.input_mix_weight_up = nn.Sequential(connection.input_mix_weight_up)
    ops = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(mhc, "gated_pre", lambda *a, own=mhc.gated_pre: (ops.append(1), own(*a))[1])
        close({"": output(other(tokens))}, {"": output(model(tokens))}, 1e-4)
    assert len(ops) == 3


def test_hooks_on_connections_and_their_parts_see_every_call(
    name: str, model: Any, tokens: torch.Tensor
) -> None:
    """Hook one module at a time, as calibration and pruning do, by each kind of hook."""
    if name == "hy_v4_vl":
        pytest.skip("as hy_v4")
    check_hooks(model, lambda one: output(one(tokens)))


def test_quantised_before_and_after(name: str, model: Any, tokens: torch.Tensor) -> None:
    if name == "hy_v4_vl":
        pytest.skip("as hy_v4")
    ops, own = list[int](), mhc.combine

    def run(one: Any) -> torch.Tensor:
        ops.clear()
        return output(one(tokens))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mhc, "combine", lambda *a: (ops.append(1), own(*a))[1])
        check_quantised(model, run)
    assert bool(ops) is (name != "qwen4_exp")  # whose gates run themselves, and so its layers


def test_the_installed_transformers_has_no_xing() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("transformers.models.xing4_0")
