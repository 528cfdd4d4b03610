"""FlashInfer's trace definitions of its mHC kernels, with references made from a variant.

The format is that of ``docs/fi_trace.rst`` in flashinfer-ai/flashinfer (commit fb28d72): an
operation with its axes, inputs and outputs, and a ``reference`` in PyTorch that defines ``run``.
The names of axes, inputs and outputs are those of ``flashinfer/trace/templates/mhc.py`` there;
those templates have no reference. Its kernels take 4 streams in bfloat16, and ``comb``, which is
H_res transposed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhc_core import Variant

__all__ = ["definitions", "write"]

STREAMS = 4  # the number that FlashInfer's kernels take

_POST = '''import torch


@torch.no_grad()
def run(x, residual, post_layer_mix, comb_res_mix):
    """x'_j = post_j y + sum_i comb_ij x_i, in float32, rounded once."""
    post = post_layer_mix.float().reshape(*residual.shape[:-1], 1)
    mixed = comb_res_mix.float().transpose(-1, -2) @ residual.float()
    return (post * x.float().unsqueeze(-2) + mixed).to(residual.dtype)
'''

_PRE = '''import torch


@torch.no_grad()
def run(
    dot_mix,
    residual,
    mhc_scale,
    mhc_base,
    rms_eps={norm_eps!r},
    mhc_pre_eps={pre_eps!r},
    mhc_sinkhorn_eps={sinkhorn_eps!r},
    mhc_post_mult_value={post_scale!r},
    sinkhorn_repeat={sinkhorn_iterations!r},
    block_size=None,
):
    """The mappings of dot_mix = vec(x) @ phi.T, and the streams collapsed by H_pre."""
    n = residual.shape[-2]
    square = residual.float().square().mean(dim=(-1, -2)).unsqueeze(-1)
    mixes = dot_mix.float() * torch.rsqrt(square + rms_eps)
    groups = zip(mixes.split([n, n, n * n], -1), mhc_scale, mhc_base.split([n, n, n * n]))
    pre, post, logits = (mix * scale + base for mix, scale, base in groups)
    pre = torch.sigmoid(pre) + mhc_pre_eps
    post = torch.sigmoid(post) * mhc_post_mult_value
    comb = logits.unflatten(-1, (n, n)).softmax(-1) + mhc_sinkhorn_eps
    comb = comb / (comb.sum(-2, keepdim=True) + mhc_sinkhorn_eps)
    for _ in range(sinkhorn_repeat - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + mhc_sinkhorn_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + mhc_sinkhorn_eps)
    collapsed = (pre.unsqueeze(-1) * residual.float()).sum(-2)
    return post.unsqueeze(-1), comb, collapsed.to(residual.dtype)
'''

_SCALARS = {
    "rms_eps": "float32",
    "mhc_pre_eps": "float32",
    "mhc_sinkhorn_eps": "float32",
    "mhc_post_mult_value": "float32",
    "sinkhorn_repeat": "int32",
    "block_size": "int32",
}


def _tensor(shape: str, dtype: str) -> dict[str, Any]:
    return {"shape": shape.split(), "dtype": dtype}


def _axes(C: int, more: bool) -> dict[str, Any]:
    axes: dict[str, Any] = {
        "num_tokens": {"type": "var", "description": "Flattened outer token count."},
        "hc": {"type": "const", "value": STREAMS, "description": "mHC residual channel count."},
        "hidden_size": {"type": "const", "value": C, "description": "Hidden size."},
    }
    if more:
        mixes = STREAMS * (STREAMS + 2)
        width = {"type": "const", "value": mixes, "description": "mHC mix vector width."}
        axes["mhc_mix"] = width
        axes["scale_size"] = {
            "type": "const",
            "value": 3,
            "description": "mHC scale vector length.",
        }
        axes["one"] = {"type": "var", "description": "Placeholder for shape [1] output tensors."}
    return axes


def definitions(variant: Variant, n: int, C: int) -> dict[str, dict[str, Any]]:
    """Return the definitions by name; none where FlashInfer's kernels do not compute the variant.

    Examples
    --------
    >>> from mhc_core import DEEPSEEK_V4
    >>> list(definitions(DEEPSEEK_V4, 4, 7168))
    ['mhc_post_hc4_h7168', 'mhc_pre_big_fuse_with_prenorm_hc4_h7168_mix24']
    """
    if n != STREAMS or not _computed(variant):
        return {}
    post = {
        "name": f"mhc_post_hc{n}_h{C}",
        "description": "mHC post mapping for HC=4.",
        "op_type": "mhc_post",
        "tags": ["fi_api:flashinfer.mhc.mhc_post", "fused"],
        "axes": _axes(C, more=False),
        "inputs": {
            "x": _tensor("num_tokens hidden_size", "bfloat16"),
            "residual": _tensor("num_tokens hc hidden_size", "bfloat16"),
            "post_layer_mix": _tensor("num_tokens hc", "float32"),
            "comb_res_mix": _tensor("num_tokens hc hc", "float32"),
        },
        "outputs": {"out": _tensor("num_tokens hc hidden_size", "bfloat16")},
        "reference": _POST,
    }
    scalars = {
        name: {"shape": None, "dtype": dtype, "optional": True} for name, dtype in _SCALARS.items()
    }
    constants = ("norm_eps", "pre_eps", "sinkhorn_eps", "post_scale", "sinkhorn_iterations")
    pre = {
        "name": f"mhc_pre_big_fuse_with_prenorm_hc{n}_h{C}_mix{n * (n + 2)}",
        "description": "mHC pre-map big-fuse that computes RMS sqrsum from residual.",
        "op_type": "mhc_pre_big_fuse",
        "tags": ["fi_api:flashinfer.mhc.mhc_pre_big_fuse_with_prenorm", "fused", "prenorm"],
        "axes": _axes(C, more=True),
        "inputs": {
            "dot_mix": _tensor("num_tokens mhc_mix", "float32"),
            "residual": _tensor("num_tokens hc hidden_size", "bfloat16"),
            "mhc_scale": _tensor("scale_size", "float32"),
            "mhc_base": _tensor("mhc_mix", "float32"),
            **scalars,
        },
        "outputs": {
            "post_mix": _tensor("num_tokens hc one", "float32"),
            "comb_mix": _tensor("num_tokens hc hc", "float32"),
            "layer_input": _tensor("num_tokens hidden_size", "bfloat16"),
        },
        "reference": _PRE.format(**{name: getattr(variant, name) for name in constants}),
    }
    return {str(one["name"]): one for one in (post, pre)}


def _computed(variant: Variant) -> bool:
    """Return whether FlashInfer's kernels have a variant's form: DeepSeek-V4's."""
    form = (
        variant.mixer,
        variant.res_transposed,
        variant.sinkhorn_first,
        variant.sinkhorn_start,
        variant.sinkhorn_clamp,
        variant.post_eps,
        variant.norm_root_eps,
    )
    return form == ("sinkhorn", True, "columns", "softmax", None, 0.0, 0.0)


def write(folder: Path, variant: Variant, n: int, C: int) -> list[str]:
    """Write the definitions into ``flashinfer/`` below a folder; return their names."""
    found = definitions(variant, n, C)
    if found:
        (folder / "flashinfer").mkdir(parents=True, exist_ok=True)
    for name, one in found.items():
        file = folder / "flashinfer" / f"{name}.json"
        file.write_text(json.dumps(one, indent=2) + "\n", encoding="utf-8")
    return list(found)
