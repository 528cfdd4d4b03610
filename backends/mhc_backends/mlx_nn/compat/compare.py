"""mlx-mhc's comparison of plain residuals with its connections, on a small transformer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
from mlx import nn, optimizers
from mlx.utils import tree_flatten  # pyright: ignore[reportUnknownVariableType]

from mhc_backends.mlx_nn.compat.manifold import ManifoldHyperConnection

__all__ = [
    "BaselineBlock",
    "BaselineModel",
    "GradientTracker",
    "MHCBlock",
    "MHCModel",
    "compare_models",
    "count_params",
    "create_baseline_model",
    "create_mhc_model",
    "train_model",
    "train_step",
]

SEED = 42  # as in mlx-mhc


class GradientTracker:
    """The norm of the gradients of every step.

    Attributes
    ----------
    history
        One norm per step: the 2-norm of all its gradients together.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mhc_core.mlx import GradientTracker
    >>> tracker = GradientTracker()
    >>> tracker.record({"weight": mx.array([3.0, 4.0])})
    >>> tracker.stats()
    {'mean': 5.0, 'std': 0.0}
    """

    def __init__(self) -> None:
        self.history: list[float] = []

    def record(self, grads: Any) -> None:
        """Record a step's gradients, arrays in nested dicts and lists."""
        self.history.append(_norm(grads))

    def stats(self) -> dict[str, float]:
        """Return the ``mean`` and the ``std`` of the norms; both are 0 before the first step."""
        norms = self.history or [0.0]
        return {"mean": statistics.fmean(norms), "std": statistics.pstdev(norms)}


class BaselineBlock(nn.Module):
    """A transformer block with plain residuals: attention and an MLP, RMS norms before them."""

    def __init__(self, dims: int, num_heads: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dims)
        self.norm2 = nn.RMSNorm(dims)
        self.attn: Any = nn.MultiHeadAttention(dims, num_heads)
        hidden = 4 * dims
        self.mlp: Any = nn.Sequential(nn.Linear(dims, hidden), nn.GELU(), nn.Linear(hidden, dims))

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the block to ``[B, S, dims]``."""
        h = self.norm1(x)
        x = x + self.attn(h, h, h)
        return x + self.mlp(self.norm2(x))


class MHCBlock(BaselineBlock):
    """The block with two-stage connections; as in mlx-mhc, their residual is the normed input."""

    def __init__(self, dims: int, num_heads: int = 4, expansion: int = 2) -> None:
        super().__init__(dims, num_heads)
        self.mhc_attn = ManifoldHyperConnection(dims, expansion)
        self.mhc_mlp = ManifoldHyperConnection(dims, expansion)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the block to ``[B, S, dims]``."""
        x = self.norm1(x)
        h = self.mhc_attn.pre_scale(x)
        x = self.norm2(self.mhc_attn.post_combine(x, self.attn(h, h, h)))
        return self.mhc_mlp.post_combine(x, self.mlp(self.mhc_mlp.pre_scale(x)))


class _Model(nn.Module):
    """A stack of blocks."""

    def __init__(self, blocks: list[BaselineBlock]) -> None:
        super().__init__()
        self.layers = blocks

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the blocks in turn to ``[B, S, dims]``."""
        for layer in self.layers:
            x = layer(x)
        return x


class BaselineModel(_Model):
    """Blocks with plain residuals."""

    def __init__(self, dims: int, num_layers: int, num_heads: int = 4) -> None:
        super().__init__([BaselineBlock(dims, num_heads) for _ in range(num_layers)])


class MHCModel(_Model):
    """Blocks with connections."""

    def __init__(self, dims: int, num_layers: int, num_heads: int = 4, expansion: int = 2) -> None:
        super().__init__([MHCBlock(dims, num_heads, expansion) for _ in range(num_layers)])


def create_baseline_model(dims: int, num_layers: int, num_heads: int = 4) -> BaselineModel:
    """Return a new :class:`BaselineModel`."""
    return BaselineModel(dims, num_layers, num_heads)


def create_mhc_model(
    dims: int, num_layers: int, num_heads: int = 4, expansion: int = 2
) -> MHCModel:
    """Return a new :class:`MHCModel`."""
    return MHCModel(dims, num_layers, num_heads, expansion)


def count_params(model: nn.Module) -> int:
    """Return the number of elements in a model's parameters."""
    return sum(array.size for array in _arrays(model.parameters()))


def train_step(model: nn.Module, x: mx.array, y: mx.array) -> tuple[mx.array, float]:
    """Return the mean squared error of ``model(x)`` and its gradients' norm, without an update."""
    loss, grads = _value_and_grad(model)(x, y)
    return loss, _norm(grads)


def train_model(
    model: nn.Module,
    num_steps: int,
    batch_size: int,
    seq_len: int,
    dims: int,
    lr: float = 1e-3,
) -> tuple[list[float], GradientTracker]:
    """Train on random inputs and targets by plain gradient descent.

    Returns
    -------
    losses, tracker
        The mean squared error of every step, and its gradients' norms.
    """
    optimizer = optimizers.SGD(learning_rate=lr)
    step = _value_and_grad(model)
    losses: list[float] = []
    tracker = GradientTracker()
    for _ in range(num_steps):
        x = mx.random.normal((batch_size, seq_len, dims))
        y = mx.random.normal((batch_size, seq_len, dims))
        loss, grads = step(x, y)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), loss)
        losses.append(float(loss))
        tracker.record(grads)
    return losses, tracker


def compare_models(
    dims: int,
    num_layers: int,
    num_steps: int,
    batch_size: int,
    seq_len: int,
    num_heads: int = 4,
    expansion: int = 2,
    lr: float = 1e-3,
) -> dict[str, Any]:
    """Train a transformer with plain residuals and one with connections on the same noise.

    Parameters
    ----------
    dims, num_layers, num_heads, expansion
        Sizes of the transformers.
    num_steps, batch_size, seq_len, lr
        Settings of the training, which is plain gradient descent.

    Returns
    -------
    dict
        Under ``"baseline"`` and ``"mhc"`` each ``grad_mean`` and ``grad_std`` of the gradients'
        norms, ``params`` and ``final_loss``; and ``param_overhead_pct``.

    Notes
    -----
    ``compare_models`` of mlx-mhc 0.4.1, with its seed and its numbers. Unlike mlx-mhc's, it
    restores MLX's random state.

    Examples
    --------
    >>> from mhc_core.mlx import compare_models
    >>> found = compare_models(dims=8, num_layers=1, num_steps=1, batch_size=1, seq_len=2)
    >>> found["mhc"]["params"] - found["baseline"]["params"]
    24
    """

    def trained(make: Callable[[], nn.Module]) -> dict[str, Any]:
        mx.random.seed(SEED)
        model = make()
        losses, tracker = train_model(model, num_steps, batch_size, seq_len, dims, lr)
        stats = tracker.stats()
        return {
            "grad_mean": stats["mean"],
            "grad_std": stats["std"],
            "params": count_params(model),
            "final_loss": losses[-1] if losses else 0,
        }

    with _restored_random_state():
        baseline = trained(lambda: create_baseline_model(dims, num_layers, num_heads))
        mhc = trained(lambda: create_mhc_model(dims, num_layers, num_heads, expansion))
    more = (mhc["params"] - baseline["params"]) / baseline["params"] * 100
    return {"baseline": baseline, "mhc": mhc, "param_overhead_pct": more}


def _value_and_grad(model: nn.Module) -> Callable[[mx.array, mx.array], tuple[mx.array, Any]]:
    def error(x: mx.array, y: mx.array) -> mx.array:
        return mx.mean((cast("Any", model)(x) - y) ** 2)

    return cast("Any", nn).value_and_grad(model, error)


def _norm(grads: Any) -> float:
    squares = [mx.sum(mx.square(g.astype(mx.float32))) for g in _arrays(grads)]
    return float(mx.sqrt(sum(squares, mx.array(0.0))))


def _arrays(tree: Any) -> list[mx.array]:
    return [array for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(tree))]


@contextmanager
def _restored_random_state() -> Generator[None]:
    state: Any = mx.random.state
    before = mx.array(state[0])
    try:
        yield
    finally:
        state[0][:] = before  # the list does not accept another array; write into its own
