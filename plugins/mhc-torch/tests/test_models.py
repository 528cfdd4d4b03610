"""accelerate: transformers' deepseek_v4 computes the same on the uniform ops."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from quantisers import check_quantised
from torch import nn
from torch.nn.utils import prune

import mhc_core as mhc
import mhc_torch
from mhc_torch.models import deepseek_v4, family, sublayers

transformers = pytest.importorskip("transformers", "5.17", reason="needs transformers>=5.17")
v4 = pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="its DeepSeek-V4"
)

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 8,
    "o_groups": 1,
    "o_lora_rank": 8,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 3,
    "hc_eps": 1e-3,
    "rms_norm_eps": 1e-4,
    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Return a model, its connections far from the start. Tests change only copies of it."""
    torch.manual_seed(0)
    made = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**SIZES))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "hc" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 32, (2, 10))


def accelerated(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    report = mhc_torch.accelerate(other, everywhere=True)
    assert not report.left
    return other


def step(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the logits, the streams between the layers, and the gradients of the loss."""
    model.zero_grad()
    out = model(tokens, labels=tokens, output_hidden_states=True)
    out.loss.backward()
    states = {f"state {k}": state for k, state in enumerate(out.hidden_states)}
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits, **states, **own}


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, one in got.items():
        error = (one - want[name]).abs().max()
        assert error <= tolerance * want[name].abs().max() + 1e-9, (name, error)


@contextlib.contextmanager
def norms_inside(model: nn.Module) -> Generator[list[str]]:
    """Do with the formulas what kernels do; yield the layers' norms that are called."""
    ends = ("input_layernorm", "post_attention_layernorm")
    norms = {id(m): path for path, m in model.named_modules() if path.endswith(ends)}
    called: list[str] = []

    def record(module: nn.Module, *_: Any) -> None:
        called.extend([norms[id(module)]] if id(module) in norms else [])

    with pytest.MonkeyPatch.context() as patch:
        for module in (deepseek_v4, sublayers):
            patch.setattr(module, "kernels_run", lambda _: True)
        handle = nn.modules.module.register_module_forward_hook(record)
        yield called
        handle.remove()


def check_hooks(model: nn.Module, run: Callable[[Any], torch.Tensor]) -> None:
    """Check that a hook on a connection, a head or a part of one is called as in the model.

    One layer and the head stand for the rest.
    """
    words = "layers.1.attn_h", "hc_head", "hyper_connection_mixer"
    counts: dict[tuple[str, str], tuple[list[str], torch.Tensor]] = {}
    other = copy.deepcopy(model)
    mhc_torch.accelerate(other, everywhere=True)
    for one in (model, other):
        for path, module in one.named_modules():
            if not any(word in path for word in words):
                continue
            for kind in ("forward_pre_hook", "forward_hook", "full_backward_hook", "forward"):
                called: list[str] = []

                def note(*_: Any, called: list[str] = called, path: str = path) -> None:
                    called.append(path)

                def forward(*a: Any, note: Any = note, module: Any = module) -> Any:
                    note()
                    return type(module).forward(module, *a)

                if kind == "forward":
                    module.forward = forward
                else:
                    handle = getattr(module, f"register_{kind}")(note)
                out = run(one)
                if kind == "full_backward_hook":
                    out.float().sum().backward()
                    handle.remove()
                elif kind == "forward":
                    del module.forward
                else:
                    handle.remove()
                want, expected = counts.setdefault((path, kind), (called, out.detach()))
                assert called == want, (path, kind)
                assert want, (path, kind)
                close({path: out.detach()}, {path: expected}, 1e-4)
    assert counts


def test_hooks_on_connections_and_their_parts_see_every_call(
    model: Any, tokens: torch.Tensor
) -> None:
    check_hooks(model, lambda one: one(tokens).logits)


def test_accelerate_calls_no_hook_and_takes_a_pruned_connection(
    model: Any, tokens: torch.Tensor
) -> None:
    pruned, called = copy.deepcopy(model), list[int]()
    connection = pruned.model.layers[0].attn_hc
    prune.l1_unstructured(connection, "fn", 0.5)
    with torch.no_grad():
        connection.fn_orig.mul_(2)
        want = pruned(tokens).logits
        connection.input_norm.register_forward_hook(lambda *_: called.append(1))
        assert not mhc_torch.accelerate(pruned, everywhere=True).left
        assert not called
        close({"": pruned(tokens).logits}, {"": want}, 1e-4)
    assert called == [1]


def test_a_norm_that_must_be_called_is(model: Any, tokens: torch.Tensor) -> None:
    other = accelerated(model)
    want = other(tokens).logits
    first, second = (layer.post_attention_layernorm for layer in other.model.layers)
    first.register_forward_hook(lambda *_: None)
    second.forward = type(second).forward.__get__(second)
    with norms_inside(other) as called:
        close({"logits": other(tokens).logits}, {"logits": want}, 1e-5)
    assert called == [f"model.layers.{k}.post_attention_layernorm" for k in (0, 1)]


def test_quantised_before_and_after(model: Any, tokens: torch.Tensor) -> None:
    check_quantised(model, lambda one: one(tokens).logits)


def test_outputs_and_gradients_are_the_models_own(model: Any, tokens: torch.Tensor) -> None:
    want = step(model, tokens)
    other = accelerated(model)
    ops = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pre", "combine_pre", "combine", "head"):
            op = getattr(mhc, name)
            patch.setattr(mhc, name, lambda *a, op=op, name=name: (ops.append(name), op(*a))[1])
        close(step(other, tokens), want, 1e-4)
    assert ops == ["pre", "combine_pre", "combine"] * 2 + ["head"]
    with norms_inside(other) as called:
        close(step(other, tokens), want, 1e-4)
    assert not called
    old = other.gradient_checkpointing_enable  # its name before transformers 5.24
    getattr(other, "activation_checkpointing_enable", old)()
    close(step(other.train(), tokens), step(model.train(), tokens), 1e-4)


def test_generation_files_and_names_stay(model: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    other = accelerated(model)
    assert list(other.state_dict()) == list(model.state_dict())
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    options |= {"pad_token_id": 0, "eos_token_id": 31}
    want = model.generate(tokens, **options)
    assert torch.equal(other.generate(tokens, **options), want)
    other.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded.model.layers[0]) is v4.DeepseekV4DecoderLayer
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    connections = mhc_torch.load_hyper_connections(tmp_path)
    assert torch.equal(connections.layers[1].ffn.fn, model.model.layers[1].ffn_hc.fn)
    restored = mhc_torch.restore(other)
    assert len(restored.replaced) == 7
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert not any(family.EVERYWHERE in vars(m) for m in other.modules())


def test_bfloat16(model: Any, tokens: torch.Tensor) -> None:
    plain = copy.deepcopy(model).bfloat16()
    want = copy.deepcopy(plain).float()(tokens).logits
    other = accelerated(plain)
    errors = [(m(tokens).logits.float() - want).abs().mean() for m in (other, plain)]
    assert other(tokens).logits.dtype == torch.bfloat16
    assert errors[0] <= 1.5 * errors[1]


def test_on_the_cpu_the_models_own_code_runs(
    model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(model)
    report = mhc_torch.accelerate(other)
    assert "4 DeepseekV4HyperConnection, model.layers.0.attn_hc ..." in str(report)
    with torch.no_grad():
        want = model(tokens).logits
        for name in ("pre", "combine_pre", "combine", "head"):
            monkeypatch.setattr(mhc, name, None)
        assert torch.equal(other(tokens).logits, want)
    assert not mhc_torch.accelerate(other, everywhere=True).replaced
    with pytest.raises(TypeError):
        other(tokens)


def test_a_connection_with_a_hook_is_called(model: Any, tokens: torch.Tensor) -> None:
    other, called = accelerated(model), []
    other.model.layers[0].ffn_hc.register_forward_pre_hook(lambda *_: called.append(1))
    with torch.no_grad():
        close({"": other(tokens).logits}, {"": model(tokens).logits}, 1e-4)
    assert called == [1]


def test_what_is_not_known_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="model is a Linear, without hyper-connections of a known"):
        mhc_torch.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a int; needs a"):
        mhc_torch.accelerate(3)
    later = ModuleType("transformers.models.later.modeling_later")
    later.LaterHyperConnection = type("LaterHyperConnection", (nn.Module,), {})
    later.LaterHyperConnection.__module__ = later.__name__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, later.__name__, later)
        with pytest.raises(TypeError, match=r"hyper-connections of later, which are not known yet"):
            mhc_torch.accelerate(nn.Sequential(later.LaterHyperConnection()))
    kimi = nn.Linear(2, 2)
    kimi.config = SimpleNamespace(model_type="kimi_k3")
    with pytest.raises(TypeError, match="whose attention residuals are not hyper-connections"):
        mhc_torch.accelerate(kimi)
    other = copy.deepcopy(model)
    del other.model.layers[0].attn_hc.hc_eps
    with pytest.raises(RuntimeError, match=r"attn_hc, a DeepseekV4HyperConnection .* no hc_eps"):
        mhc_torch.accelerate(other)
    with pytest.raises(RuntimeError, match="has no Another; look for a newer"):
        family.classes_of(v4.__name__, ("DeepseekV4Model", "Another"))


def test_another_release_that_computes_something_else(
    model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = v4.DeepseekV4DecoderLayer.forward
    with monkeypatch.context() as patch:
        patch.setattr(v4.DeepseekV4DecoderLayer, "forward", lambda *a, **k: 1.01 * forward(*a, **k))
        other = copy.deepcopy(model)
        report = mhc_torch.accelerate(other, everywhere=True)
        assert {note.class_name for note in report.left} == {"DeepseekV4DecoderLayer"}
        assert "computes something else (off by 9.9e-03)" in str(report)
        with torch.no_grad():
            close({"": other(tokens).logits}, {"": model(tokens).logits}, 1e-4)
    mapped = v4.DeepseekV4HyperConnection.forward
    monkeypatch.setattr(
        v4.DeepseekV4HyperConnection,
        "forward",
        lambda *a: (mapped(*a)[0], mapped(*a)[1].mT, mapped(*a)[2]),
    )
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="computes something else"):
        mhc_torch.accelerate(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
