"""The declarations of an adapter: where an implementation is, what it computes, and what it cannot.

An adapter is read in two processes. The one that compares reads its declarations and has none of
the peer's libraries; the one that runs it has those, and no mhc-core. So an adapter imports nothing
at its top but this module, and this module imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

__all__ = ["Op", "Peer", "Sizes"]

Library = Literal["torch", "mlx", "jax"]
Sizes = Callable[[int, int], "str | None"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op of a peer, in mhc-core's conventions.

    Attributes
    ----------
    function
        Takes the op's arrays by name, in the peer's array library, and its static arguments; a
        variant is an object with the fields of ``mhc_core.Variant``. Returns the op's outputs. What
        the peer lays out differently is transposed here, by operations that its autodiff knows.
    released
        The name of the published variant that the peer computes, such as ``"DEEPSEEK_V4"``.
    fixed
        Static arguments, or fields of the variant, that the peer has as constants of its own.
    free
        The fields that the peer takes as arguments. A tuple of names is one argument of the peer
        that stands for all of them.
    dtypes
        The dtypes of streams that the peer takes; None for those of the peer.
    gradient
        False where the peer has no gradient, with the reason in ``note``.
    note
        What to know of the comparison, for the table.
    """

    function: Callable[..., Any]
    released: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    free: tuple[str | tuple[str, ...], ...] = ()
    dtypes: tuple[str, ...] | None = None
    gradient: bool = True
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another project's implementation of mHC.

    Attributes
    ----------
    name
        What people write after ``--peers``.
    project
        The project, which counts once however many families it has.
    where
        The file, module or class with the implementation.
    library
        The array library, which makes the arrays and differentiates.
    pins
        Distributions with versions, which are put into a folder of their own without what they
        require; ``module==version`` of the array library too where the peer needs one.
    versions
        The distributions whose versions are printed.
    needs
        Import names that must be there, with the distribution to install.
    checkout
        The name under which a person gives the folder of a checkout, for a peer not on PyPI.
    reads
        The file of the checkout that is read, by which a folder is known for one.
    python
        The Python that it needs, such as ``"3.12"``, or "" for the one that runs.
    triton
        The Triton of its kernels, such as ``"triton==3.9.0"``, or "". On a GPU it is the one of the
        environment; without a GPU that version's interpreter runs them on the CPU.
    environment
        Environment variables of its process.
    dtypes
        The dtypes of streams that it takes.
    sizes
        A function of n and C to the reason why the peer does not take them, or None.
    cannot
        Ops of mHC that the peer has in a form that is not comparable, each with the reason.
    """

    name: str
    project: str
    where: str
    library: Library
    pins: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict[str, str])
    checkout: str = ""
    reads: str = ""
    python: str = ""
    triton: str = ""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    sizes: Sizes = lambda n, C: None
    cannot: Mapping[str, str] = field(default_factory=dict[str, str])
    ops: dict[str, Op] = field(default_factory=dict[str, Op])

    def op(self, name: str, **declared: Any) -> Callable[[Function], Function]:
        """Declare the decorated function as the peer's op of that name."""

        def declare(function: Function) -> Function:
            self.ops[name] = Op(function=function, **declared)
            return function

        return declare
