"""The declaration of a bug, and the right ops that the wrong ones are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray

from mhc_core.math import load
from mhc_core.signature import UNMIXED

__all__ = [
    "BUGS",
    "PREFIX",
    "Array",
    "Bug",
    "Op",
    "bug",
    "on_other_variant",
    "right",
    "right_vjp",
    "with_changed_gradients",
]

Array = NDArray[Any]
Op = Callable[..., Any]
Half = Literal["forward", "vjp"]
Wrong = TypeVar("Wrong", bound=Op)

PREFIX = "bug:"
CHECK_OF_HALF: dict[Half, str] = {"forward": "forward", "vjp": "gradient"}


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One wrong version of an op's forward or vjp.

    Attributes
    ----------
    name
        What people write after ``bug:``.
    what
        The bug in words; for a shipped bug, those of this project's list.
    op
        The op that is wrong.
    fails
        The checks that must fail; the first is the one that exists for this bug.
    says
        What the message of the first must contain: the array, and where it matters the case.
    forward
        The wrong forward; a class is instantiated for each run, for a forward with state.
    vjp
        The wrong vjp, called with the op's name, the primals and the cotangents.
    dtype
        The dtype of the check.
    library
        The otherwise right backend that the bug is put into.
    shipped
        Whether a released library had the bug; otherwise it was only thought of.
    note
        The other tests that look for the bug.
    """

    name: str
    what: str
    op: str
    fails: tuple[str, ...]
    says: str
    forward: Op | None = None
    vjp: Op | None = None
    dtype: str = "float32"
    library: str = "numpy"
    shipped: bool = True
    note: str = ""

    @property
    def backend(self) -> str:
        """Return the name of the backend that has the bug."""
        return PREFIX + self.name

    def functions(self) -> dict[str, Any]:
        """Return the functions that replace those of the right backend."""
        replaced: dict[str, Any] = {}
        if self.forward is not None:
            stateful = isinstance(self.forward, type)
            wrong = self.forward() if stateful else self.forward
            replaced[self.op] = self._where_mixed(wrong)
        if self.vjp is not None:
            replaced["vjp"] = self._vjp
        return replaced

    def _where_mixed(self, wrong: Op) -> Op:
        """Return the wrong op, right where streams are not mixed: a separate formula has no bug."""

        def op(*arrays: Any, **static: Any) -> Any:
            called = right(self.op) if unmixed(self.op, arrays, static) else wrong
            return called(*arrays, **static)

        return op

    def _vjp(self, op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
        assert self.vjp is not None
        mine = op == self.op and not unmixed(op, primals, static)
        wrong = self.vjp if mine else right_vjp
        return wrong(op, primals, cotangents, **static)


def unmixed(op: str, arrays: Any, static: Any) -> bool:
    """Return whether a call's streams are not mixed, before or after."""
    declared = load(op).OP
    there = declared.outputs_of(static)
    if any(out.mixed and name not in there for name, out in declared.outputs.items()):
        return True
    given = dict(zip(declared.arrays, arrays, strict=False))
    return UNMIXED in declared.optional and given.get(UNMIXED) is None


BUGS: dict[str, Bug] = {}
"""Every declared bug by name."""


def bug(
    name: str,
    what: str,
    *,
    op: str,
    says: str,
    half: Half = "forward",
    fails: tuple[str, ...] = (),
    dtype: str = "float32",
    library: str = "numpy",
    shipped: bool = True,
    note: str = "",
) -> Callable[[Wrong], Wrong]:
    """Declare the decorated function, or class with state, as the wrong half of an op.

    ``half`` is ``"forward"`` or ``"vjp"``; ``fails`` is by default that half's own check. The rest
    is described in :class:`Bug`.
    """

    def declare(wrong: Wrong) -> Wrong:
        assert name not in BUGS, f"two bugs are named {name}"
        BUGS[name] = Bug(
            name=name,
            what=what,
            op=op,
            fails=fails or (CHECK_OF_HALF[half],),
            says=says,
            forward=wrong if half == "forward" else None,
            vjp=wrong if half == "vjp" else None,
            dtype=dtype,
            library=library,
            shipped=shipped,
            note=note,
        )
        return wrong

    return declare


def right(op: str) -> Op:
    """Return the right forward of an op, on arrays of any library."""
    return load(op).forward


def right_vjp(op: str, primals: Any, cotangents: Any, **static: Any) -> tuple[Any, ...]:
    """Return an op's right gradients."""
    return load(op).vjp(primals, cotangents, **static)


def on_other_variant(op: str, **fields: Any) -> Op:
    """Return the right forward, called with some fields of the variant changed."""

    def wrong(*arrays: Array, variant: Any) -> Any:
        return right(op)(*arrays, variant=replace(variant, **fields))

    return wrong


def with_changed_gradients(change: Op) -> Op:
    """Return a vjp that applies ``change`` to the right gradients."""

    def wrong(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
        return change(*right_vjp(op, primals, cotangents, **static))

    return wrong
