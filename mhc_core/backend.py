"""The contract of a backend.

A backend is a Python module with one function per op and a :class:`BackendSpec` that names it. The
functions receive checked arguments, as the backend's own arrays::

    def combine(x, y, h_post, h_res): ...                  # arrays in the order of the public op
    def sinkhorn(logits, *, iterations, eps, first): ...   # static arguments by keyword
    def vjp(op, primals, cotangents, **static): ...        # a tuple, one gradient per primal
    def from_host(array): ...                              # numpy.ndarray -> own array, same dtype
    def to_host(array): ...                                # own array -> numpy.ndarray, same dtype

and, for each transform in :data:`TRANSFORMS` that is not listed in ``BackendSpec.without``::

    def grad(function, argnums): ...    # gradients of a scalar function, as a tuple
    def compile(function): ...
    def vmap(function, in_axes): ...
    def checkpoint(function): ...

An op's function may have an attribute ``specialise(arrays, static)``, for libraries whose calls
take less time than a few dictionary lookups. It returns None, or two functions of arrays: whether
others are of the same kind as these, and the op for that kind. "The same kind" must mean the same
type, shape, dtype and device of every array, and whatever else ``BackendSpec.takes`` looks at:
dispatch then neither checks nor selects anything again. It is asked after the call was run.

A module may also have ``composed(function)``, which returns a function of many calls so that they
run as one program; the conformance kit uses it where each program takes seconds to compile. And it
may have ``hurried()``, a context manager in which this process and those that it starts compile
faster; the kit runs its grid inside it.

``"second"`` in ``without`` says that gradients cannot be differentiated again. Such a backend must
then raise an error that names the op and the remedy; the conformance kit checks this.

A library whose compiler traces Python code cannot trace the selection of a backend. The backend's
module tells the compiler, when it is imported, to keep each function of
:data:`mhc_core.dispatch.OPAQUE` as one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

__all__ = [
    "API_VERSION",
    "CAPABILITIES",
    "DTYPES",
    "TRACE_TIME_MARKS",
    "TRANSFORMS",
    "BackendSpec",
    "Proof",
    "Verdict",
]

API_VERSION = 1
"""The version of this contract; a spec made for another version is refused with a message."""

DTYPES = ("float32", "float16", "bfloat16", "float64")
TRANSFORMS = ("grad", "compile", "vmap", "checkpoint")
CAPABILITIES = (*TRANSFORMS, "second")
"""The names that a spec may list in ``without``: each transform, and second derivatives."""

TRACE_TIME_MARKS = ("_dynamo_marked_constant",)
"""The attributes by which tracing compilers know a function that they run instead of tracing it.

One per compiler. The function that imports a backend's module has them all, since the first call of
a process may be traced, before any backend could say so (:mod:`mhc_core.dispatch`). This one is
what PyTorch's ``torch._dynamo.assume_constant_result`` sets.
"""


UNFUSED = "where no backend is named, one that runs the formulas is chosen"
"""The remedy for a call that a backend has no code for."""


def _always_there() -> str | None:
    return None


class Verdict(NamedTuple):
    """The outcome of a proof for one kind of call: ``reason`` is None where the proof passed."""

    op: str
    dtypes: tuple[str, ...]
    n: int | None
    reason: str | None


@runtime_checkable
class Proof(Protocol):
    """The proof that a backend is right on the machine on which it is about to run.

    It is for backends that cannot be tested on every machine in advance, such as kernels that the
    machine's own compiler builds. A kind of call is an op, the dtypes of its arrays and of its
    outputs' cotangents, in order, and the number of streams n (None for an op without streams).
    """

    def verdict(self, op: str, dtypes: tuple[str, ...], n: int | None) -> str | None:
        """Return None where the backend is right for this kind of call, else why it is not trusted.

        Called before the backend first runs a kind of call in a process, also while that call is
        being traced. It may be slow, so it must cache its verdicts, and it must survive any
        failure: whatever could end a process must run in a separate process.
        """
        ...

    def verdicts(self) -> Sequence[Verdict]:
        """Return the verdicts cached on this machine; this must start nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """A backend's declaration: dispatch, errors, skips and tables all come from it.

    Attributes
    ----------
    name
        The name to write in ``MHC_BACKEND`` and ``backend=``.
    module
        The dotted module with the functions; imported at the first call, not before.
    array_types
        Dotted names of the array classes, such as ``"jax.Array"``. They are looked up among the
        modules already imported; nothing is imported to find them.
    ops
        The names of the ops that the module has.
    dtypes
        The dtypes that it accepts, for any array and cotangent, out of :data:`DTYPES`.
    mixers
        The names of the mixers whose variants its functions take, or None for all of them: then
        they run the mixer's own forward and vjp (:class:`mhc_core.mixer.Mixer`) where they have no
        code for it, and know every field of a Variant. Calls with another mixer are refused. With
        ``"identity"`` among them, its functions take None for h_res, and return it.
    sizes
        The smallest and the largest number of streams ``n``; ``None`` stands for no bound.
    neutral
        True for a backend that runs the formulas of ``mhc_core.math`` on its library's arrays, with
        no code of its own for some sizes or constants. Where a library compiles, the kit then deals
        its sizes and constants out among the ops, and tries all of them with every op if asked for
        ``--full``.
    priority
        Among several backends for one array library, the highest is chosen.
    automatic
        False for a backend that is only ever chosen by name.
    without
        The :data:`CAPABILITIES` that it lacks, each with the reason.
    missing
        Called once: ``None``, or the reason why the backend cannot run here.
    protocol
        The name of a method that turns objects that are not arrays into the backend's own, such as
        ``"__jax_array__"`` (``flax.nnx.Param`` has it); None for none.
    takes
        Called at every call with its arrays, or a vjp's primals: None, or why the backend does not
        take them, for what a spec cannot say in advance, such as the device of the arrays. The call
        then goes to the next backend, or raises if this one was chosen by name. It must be quick,
        and may see NumPy arrays beside its own. None for a backend that takes all arrays of its
        types.
    proof
        Called once per kind of call before the backend runs it (:class:`Proof`), or None for a
        backend that needs no proof. If it fails, calls go to the next backend with a warning, and a
        backend that was chosen by name raises; ``mhc conformance``, ``mhc bench`` and
        ``MHC_TRUST=<name>`` run it nevertheless.
    device
        Called for reports: returns the device that the library computes on, in words, and may
        import the library. None where the arrays themselves say it (``array.device``).
    channels
        The library whose devices its functions sum over C across, inside ``channels_over``
        (:mod:`mhc_core.sharding`), such as ``"jax"``; None for a backend that takes whole tokens
        alone, which is refused there.
    disabled_by
        The name of an environment variable that disables the backend while it is ``1``; it is read
        at every call. None for none.
    note
        What people must know before they rely on the backend, in words; ``mhc info`` shows it.
    api_version
        The :data:`API_VERSION` that it was written for. A third-party plugin should pass the number
        itself: the default is that of the installed mhc-core.

    Raises
    ------
    TypeError
        For a wrong field; the message names it, what was received and what is needed.
    """

    name: str
    module: str
    array_types: tuple[str, ...]
    ops: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)
    sizes: tuple[int, int | None] = (1, None)
    mixers: tuple[str, ...] | None = ("sinkhorn",)
    neutral: bool = False
    priority: int = 0
    automatic: bool = True
    without: Mapping[str, str] = field(default_factory=dict[str, str])
    missing: Callable[[], str | None] = _always_there
    protocol: str | None = None
    takes: Callable[[Sequence[Any]], str | None] | None = None
    proof: Proof | None = None
    device: Callable[[], str] | None = None
    channels: str | None = None
    disabled_by: str | None = None
    note: str | None = None
    api_version: int = API_VERSION

    def __post_init__(self) -> None:
        for name in ("name", "module"):
            self._require(name, _is_word(getattr(self, name)), "a word, not empty")
        for name in ("array_types", "ops", "dtypes"):
            value = getattr(self, name)
            good = isinstance(value, tuple) and all(map(_is_word, value))  # pyright: ignore[reportUnknownArgumentType]
            self._require(name, good, "a tuple of words")
        good = self.mixers is None or (
            isinstance(self.mixers, tuple) and all(map(_is_word, self.mixers))  # pyright: ignore[reportUnnecessaryIsInstance]
        )
        self._require("mixers", good, "a tuple of words, or None")
        dotted = all("." in name for name in self.array_types)
        self._require("array_types", dotted, "dotted names, such as 'jax.Array'")
        self._require("dtypes", set(self.dtypes) <= set(DTYPES), f"names out of {DTYPES}")
        self._require("sizes", _is_range(self.sizes), "(smallest, largest or None), from 1 on")
        self._require("priority", type(self.priority) is int, "an integer")
        self._require("neutral", type(self.neutral) is bool, "True or False")
        self._require("automatic", type(self.automatic) is bool, "True or False")
        self._require("missing", callable(self.missing), "a function of no arguments")
        good = self.protocol is None or _is_word(self.protocol)
        self._require("protocol", good, "the name of a method, or None")
        good = self.takes is None or callable(self.takes)
        self._require("takes", good, "a function of a call's arrays, or None")
        good = self.proof is None or isinstance(self.proof, Proof)  # pyright: ignore[reportUnnecessaryIsInstance]
        self._require("proof", good, "None, or methods verdict(op, dtypes, n) and verdicts()")
        good = self.device is None or callable(self.device)
        self._require("device", good, "None, or a function of no arguments")
        good = self.channels is None or _is_word(self.channels)
        self._require("channels", good, "the name of a library, or None")
        good = self.disabled_by is None or _is_word(self.disabled_by)
        self._require("disabled_by", good, "the name of an environment variable, or None")
        good = self.note is None or _is_word(self.note)
        self._require("note", good, "words, or None")
        good = (
            isinstance(self.without, Mapping)  # pyright: ignore[reportUnnecessaryIsInstance]
            and set(self.without) <= set(CAPABILITIES)
            and all(map(_is_word, self.without.values()))
        )
        self._require("without", good, f"a mapping of names out of {CAPABILITIES} to reasons")

    def _require(self, name: str, good: bool, need: str) -> None:
        if not good:
            value = getattr(self, name)
            raise TypeError(f"BackendSpec: {name} is {value!r}; needs {need}")

    def __hash__(self) -> int:
        return hash((self.name, self.module))

    def refuses(
        self,
        op: str,
        dtypes: tuple[str, ...],
        n: int | None,
        mixers: tuple[str, ...] = (),
        fields: tuple[str, ...] = (),
        channels: str | None = None,
    ) -> str | None:
        """Return why it does not accept this op, these dtypes, n streams, ..., or None.

        ``fields`` are those of a variant that only a backend knows that takes all mixers;
        ``channels`` is the library whose devices share the channels, where any do.

        ``n`` is None for an op without streams, such as rms_norm.
        """
        smallest, largest = self.sizes
        if op not in self.ops:
            return f"has no op {op!r}"
        for dtype in dtypes:
            if dtype not in self.dtypes:
                return f"has no {dtype} (it takes {', '.join(self.dtypes)})"
        for mixer in mixers:
            if self.mixers is not None and mixer not in self.mixers:
                known = ", ".join(self.mixers) or "none"
                return f"has no mixer {mixer!r} (it takes {known}); {UNFUSED}"
        if self.mixers is not None and fields:
            return f"does not know a variant's {fields[0]}; {UNFUSED}"
        if channels is not None and channels != self.channels:
            return f"takes whole tokens, not their parts on devices of {channels}"
        if n is not None and not smallest <= n <= (largest or n):
            upwards = f"to {largest}" if largest else "on"
            return f"takes n from {smallest} {upwards}, not {n}"
        return None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_range(value: Any) -> bool:
    if not (isinstance(value, tuple) and len(value) == 2):  # pyright: ignore[reportUnknownArgumentType]
        return False
    smallest, largest = value  # pyright: ignore[reportUnknownVariableType]
    return (
        type(smallest) is int  # pyright: ignore[reportUnknownArgumentType]
        and smallest >= 1
        and (largest is None or (type(largest) is int and largest >= smallest))  # pyright: ignore[reportUnknownArgumentType]
    )
