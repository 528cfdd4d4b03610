"""From kernels to ops in MLX, for any launcher: ``mx.fast.metal_kernel``, ``mx.fast.cuda_kernel``,
or one that simulates them.

:class:`Kernels` launches a kernel by name. :class:`Ops` makes, of the modules in
``mhc_backends.kernels.ops``, the functions of a backend.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mhc_backends._mlx import as_tuple, distinct, placed
from mhc_backends.kernels import bounds, declarations, function, header, ops, source
from mhc_backends.kernels.launch import ACCESS_BYTES, launch, occupancy, shares
from mhc_backends.kernels.shorten import shorten
from mhc_core import _gradients
from mhc_core import math as neutral_math

__all__ = ["Kernels", "Ops", "Out", "Sizes", "Stage", "dtype_name", "tokens"]

Launcher = Callable[..., Any]  # MLX's stubs say object
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Sizes(NamedTuple):
    """T tokens of n streams of C channels."""

    T: int
    n: int
    C: int

    @classmethod
    def of(cls, x: mx.array) -> Sizes:
        """Read the sizes off streams x[..., n, C]."""
        *leading, n, C = x.shape
        return cls(math.prod(leading), n, C)


class Out(NamedTuple):
    """The shape and dtype of an output."""

    shape: Sequence[int]
    dtype: mx.Dtype

    @classmethod
    def like(cls, array: mx.array) -> Out:
        """Ask for an output like an array."""
        return cls(array.shape, array.dtype)


class Stage(NamedTuple):
    """The threadgroup memory of a kernel whose size the launch determines.

    It holds the number of blocks' factors, the bytes of each, and the bytes of rows that are in
    flight.
    """

    blocks: int
    each: int
    rows: int


def tokens(array: mx.array, last: int) -> mx.array:
    """Flatten all but the last ``last`` axes into one; a shared array gets one row."""
    split = array.ndim - last
    return array.reshape(math.prod(array.shape[:split]), *array.shape[split:])


# ---- launching -----------------------------------------------------------------------------------


class Kernels:
    """The kernels in one dialect, launched by one launcher.

    Parameters
    ----------
    launcher
        ``mx.fast.metal_kernel`` or a function with its signature.
    dialect
        ``"metal"`` or ``"cuda"``.
    memory
        Bytes of threadgroup memory available to the factors of a product.
    """

    def __init__(self, launcher: Launcher, dialect: str, memory: int = 16384) -> None:
        self.launcher = launcher
        self.dialect = dialect
        self.memory = memory
        self._made: dict[Any, Callable[..., Sequence[mx.array]]] = {}

    def __call__(
        self,
        name: str,
        inputs: Mapping[str, mx.array],
        outputs: Mapping[str, Out],
        sizes: Sizes,
        numbers: Mapping[str, Sequence[float]] | None = None,
        stage: Stage | None = None,
        /,
        **constants: int,
    ) -> list[mx.array]:
        """Launch a kernel and return its outputs; without tokens, nothing is launched.

        Inputs are read in row-major order: MLX copies those that are strided. ``numbers`` become
        arrays of floats in the kernel's text, ``stage`` is the threadgroup memory whose size the
        launch determines, and ``constants`` are template arguments in addition to N and those of
        the launch. Each new value of these compiles the kernel again, so values that vary are
        passed as inputs; an input costs a launch 1 us in MLX's CUDA build, and an output 2.

        Optional inputs and outputs of a body may be left out.
        """
        shapes = [tuple(out.shape) for out in outputs.values()]
        dtypes = [out.dtype for out in outputs.values()]
        if sizes.T == 0:
            return [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        arrays = list(inputs.values())
        dtype = dtype_name(arrays[0].dtype)
        shape = launch(name, *sizes, dtype, self.dialect)
        words = {
            "N": sizes.n,
            "W": shape.elements,
            "TOKENS": shape.tokens,
            "HELD": shape.held,
            "REST": int(shape.rest),
            **constants,
        }
        memory = 0
        if stage is not None:
            words["STAGE"] = stage.blocks
            memory = stage.blocks * stage.each + stage.rows
            if self.dialect == "metal":  # where the text says how much it takes
                words["SLOTS"] = stage.rows // ACCESS_BYTES
        before = declarations(name, {*inputs, *outputs}, numbers or {})
        texts = shorten(header(self.dialect), function(name), before + source(name, self.dialect))
        if self.dialect == "cuda":  # else it may need more registers than its threads have
            texts = texts[0] + bounds(*occupancy(name, dtype)), texts[1]
        template = [(word, words[word]) for word in words if word in _words(texts[1])]
        called = f"{name}_{zlib.crc32(before.encode()):x}" if before else name
        kernel = self._kernel(called, texts, tuple(inputs), tuple(outputs), arrays, dtypes, memory)
        return list(
            kernel(
                inputs=arrays,
                template=template,
                grid=shape.grid,
                threadgroup=shape.threadgroup,
                output_shapes=shapes,
                output_dtypes=dtypes,
            )
        )

    def _kernel(
        self,
        name: str,
        texts: tuple[str, str],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        arrays: Sequence[mx.array],
        dtypes: Sequence[mx.Dtype],
        memory: int,
    ) -> Callable[..., Sequence[mx.array]]:
        """Return MLX's object for a kernel, under a separate name for each generated text.

        The text depends on the dtypes, and in Metal on which inputs are in constant memory. MLX
        releases that look for a compiled kernel by its name alone must not find another's.
        """
        words = [f"{dtype_name(a.dtype)}{'c' if a.size < 8 else ''}" for a in arrays]
        full = "_".join(["mhc", name, *words, *map(dtype_name, dtypes)])
        made = self._made.get((full, texts, memory))
        if made is None:
            dynamic = {"shared_memory": memory} if self.dialect == "cuda" and memory else {}
            made = self._made[full, texts, memory] = self.launcher(
                name=full,
                input_names=list(inputs),
                output_names=list(outputs),
                source=texts[1],
                header=texts[0],
                **dynamic,
            )
        return made

    def sum_to(self, gradient: mx.array, like: mx.array, last: int) -> mx.array:
        """Sum a gradient per token as its primal needs.

        Parameters
        ----------
        gradient
            float32, one row per token.
        like
            The primal: one per token, or one for all, whose gradients are summed.
        last
            The number of the primal's axes, without leading ones.
        """
        if like.ndim == last:
            gradient = self.sum_rows(gradient.reshape(gradient.shape[0], like.size))
        return gradient.reshape(like.shape).astype(like.dtype)

    def sum_rows(self, a: mx.array) -> mx.array:
        """Sum [R, K] to [1, K], some rows at a time, in a fixed order."""
        while a.shape[0] != 1:
            rows, columns = a.shape
            sizes = Sizes(rows, 1, columns)
            count = 1 if rows == 0 else shares("sum_rows", *sizes, self.dialect)
            (a,) = self("sum_rows", {"a": a}, {"out": Out((count, columns), mx.float32)}, sizes)
        return a


@functools.cache
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


def dtype_name(dtype: mx.Dtype) -> str:
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("mlx.core.")


# ---- ops -----------------------------------------------------------------------------------------


class Ops:
    """The functions of a backend: an op per attribute, and ``vjp``.

    An op consists of its forward kernels and its vjp kernels, joined by ``mx.custom_function`` with
    every array as an argument: captured arrays would get zero gradients. ``compiled`` is
    ``mx.compile``, which spares MLX building a kernel's text again at every call, or None where
    kernels cannot be traced.
    """

    def __init__(self, kernels: Kernels, compiled: Compile | None = None) -> None:
        self._kernels = kernels
        self._compiled: Compile = compiled or (lambda function: function)
        self._forward = functools.cache(self._make_forward)
        self._inference = functools.cache(self._make_inference)
        self._vjp = functools.cache(self._make_vjp)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ops.OPS:
            raise AttributeError(name)

        def op(*arrays: mx.array, **static: Any) -> Any:
            function = self._forward if _gradients.wanted() else self._inference
            outputs = function(name, tuple(static.items()))(*arrays)
            count = ops.outputs(name)
            return outputs[0] if count == 1 else tuple(outputs[:count])

        return op

    def vjp(
        self, op: str, primals: Sequence[mx.array], cotangents: Sequence[mx.array], **static: Any
    ) -> tuple[mx.array, ...]:
        """Pull cotangents back by an op's vjp kernels."""
        return tuple(self._vjp(op, tuple(static.items()))(tuple(primals), tuple(cotangents)))

    def _make_forward(self, op: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        """Return a function from the op's arrays to one tuple: outputs, then what its vjp saves."""
        module, options, count = ops.load(op), dict(static), ops.outputs(op)
        places: tuple[int, ...] = ()  # of what is saved, among the outputs and what follows them

        # Without stop_gradient mx.jvp asks the kernels for their derivatives before our rule.

        def forward(*primals: mx.array) -> tuple[mx.array, ...]:
            nonlocal places
            stopped = map(mx.stop_gradient, primals)
            if not hasattr(module, "forward_with_saved"):
                return as_tuple(module.forward(self._kernels, *stopped, **options))
            outputs, saved = module.forward_with_saved(self._kernels, *stopped, **options)
            places, every = placed(as_tuple(outputs), saved)
            return every

        def back(primals: Any, cotangents: Any, outputs: Any) -> Any:
            saved = tuple(as_tuple(outputs)[k] for k in places)
            return pulled(as_tuple(primals), as_tuple(cotangents)[:count], saved)

        def launches(primals: Any, cotangents: Any, saved: Any) -> Any:
            given = [tuple(map(mx.stop_gradient, a)) for a in (primals, cotangents, saved)]
            return tuple(module.vjp(self._kernels, *given[:2], given[2] or None, **options))

        pulled = mx.custom_function(launches)
        pulled.vjp(functools.partial(_second, op, options))
        pulled.jvp(functools.partial(_no_forward_mode, op))
        differentiable = mx.custom_function(forward)
        differentiable.vjp(back)
        differentiable.jvp(functools.partial(_no_forward_mode, op))
        return self._compiled(differentiable)

    def _make_inference(self, op: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        """Return the same without a vjp: in MLX a custom function costs 2 us for each output."""
        function = functools.partial(ops.load(op).forward, self._kernels, **dict(static))
        return self._compiled(lambda *primals: as_tuple(function(*primals)))

    def _make_vjp(self, op: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        function = functools.partial(ops.load(op).vjp, self._kernels, **dict(static))
        return self._compiled(function)


def _second(op: str, options: dict[str, Any], given: Any, cotangents: Any, _: Any) -> Any:
    """Differentiate a vjp through the neutral maths, since kernels have no derivatives.

    It starts from the primals alone, so saved arrays get zero gradients.
    """
    primals, pulled, saved = map(as_tuple, given)
    count, neutral = len(primals), neutral_math.load(op).vjp

    def again(*arrays: mx.array) -> Any:
        return distinct(neutral(arrays[:count], arrays[count:], **options))

    _, gradients = mx.vjp(again, [*primals, *pulled], list(as_tuple(cotangents)))
    return gradients[:count], gradients[count:], [mx.zeros_like(array) for array in saved]


def _no_forward_mode(op: str, *_: Any) -> Any:
    raise NotImplementedError(
        f"{op}: kernels have no forward-mode derivatives (mx.jvp); pass backend='mlx-compiled', "
        "which has them, or take gradients of gradients by mx.grad"
    )
