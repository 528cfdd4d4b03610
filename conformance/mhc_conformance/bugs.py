"""Every bug that shipped in this field, by name, with the check and the case that see it.

Each bug is put into a backend that is right otherwise, and the kit must fail that backend in the
checks named here and in no other. ``mhc conformance --mutations`` prints the table, and ``mhc
conformance bug:NAME`` runs the kit on one of these backends, like on any other.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

import mhc_core
from mhc_conformance import mutants
from mhc_conformance.checks import check, grid
from mhc_conformance.mutants import on_other_variant, with_changed_gradients
from mhc_conformance.records import Record
from mhc_conformance.subject import Subject
from mhc_core.discovery import backend_module
from mhc_core.selection import registered

__all__ = ["BUGS", "Bug", "Outcome", "hunt", "present"]

PREFIX = "bug:"
Op = Callable[..., Any]

# Checks of structure that compare values too, in the most ordinary case: they fail along with
# forward or gradient where that case shows the bug.
ALONG = {"strided", "repeated", "host", "updated"}


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One wrong version of an op's forward or vjp.

    Attributes
    ----------
    name
        What people write after ``bug:``.
    what
        The bug in words; of those that shipped, this project's list of them.
    op
        The op that is wrong.
    fails
        The checks that must fail; the first is the one that is there for this bug.
    says
        What must stand in the message of the first: the array, and the case where it takes one.
    forward
        The wrong forward, or a function without arguments that makes one, where it keeps state.
    vjp
        The wrong vjp.
    dtype
        The dtype of the check.
    library
        The backend that is right otherwise.
    shipped
        Whether it was found in a released library, or only thought of.
    note
        Where the bug is looked for beside the kit.
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
        given: dict[str, Any] = {}
        if self.forward is not None:
            stateful = isinstance(self.forward, type)
            given[self.op] = self.forward() if stateful else self.forward
        if self.vjp is not None:
            given["vjp"] = self._vjp
        return given

    def _vjp(self, op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
        assert self.vjp is not None
        wrong = self.vjp if op == self.op else mutants.right_vjp
        return wrong(op, primals, cotangents, **static)


def _of_sinkhorn(name: str, what: str, fails: tuple[str, ...], says: str, **rest: Any) -> Bug:
    return Bug(name=name, what=what, op="sinkhorn", fails=fails, says=says, **rest)


SHIPPED: tuple[Bug, ...] = (
    # the mappings
    Bug(
        name="rms-over-c",
        what="RMS over C instead of nC",
        op="mappings",
        fails=("forward",),
        says="h_",
        forward=mutants.over_channels,
    ),
    Bug(
        name="phi-columns",
        what="columns of phi in the wrong order",
        op="mappings",
        fails=("forward",),
        says="h_",
        forward=mutants.other_columns,
    ),
    Bug(
        name="comb-not-transposed",
        what="missing transpose of comb",
        op="mappings",
        fails=("forward",),
        says="h_res",
        forward=on_other_variant("mappings", res_transposed=False),
    ),
    Bug(
        name="no-pre-eps",
        what="eps missing on H_pre",
        op="mappings",
        fails=("forward",),
        says="h_pre of large",
        forward=on_other_variant("mappings", pre_eps=0.0),
    ),
    Bug(
        name="overflow-at-real-gradients",
        what="inf or NaN gradient at real gradient scale, not at random init",
        op="pre",
        fails=("gradient",),
        says="of large gradients",
        vjp=mutants.overflowing,
    ),
    Bug(
        name="stale-cache",
        what="stale cache after loading weights",
        op="static_mappings",
        fails=("updated",),
        says="second values",
        forward=mutants.Remembering,
        note="a cache of a module's own is for that module's tests",
    ),
    # Sinkhorn
    _of_sinkhorn(
        "exp-for-softmax",
        "exp where softmax + eps belongs",
        ("forward",),
        "eps",
        forward=mutants.exp_for_softmax,
    ),
    _of_sinkhorn(
        "other-eps-backward",
        "eps differing between forward and backward",
        ("gradient",),
        "eps=0.1",
        vjp=mutants.other_eps,
    ),
    _of_sinkhorn(
        "no-max-shift",
        "no max shift: overflow above 88",
        ("forward",),
        "beyond exp's range",
        forward=mutants.unshifted,
    ),
    _of_sinkhorn(
        "sinkhorn-in-bfloat16",
        "Sinkhorn run in bfloat16",
        ("forward",),
        "h_res",
        forward=mutants.sinkhorn_in(ml_dtypes.bfloat16),
    ),
    _of_sinkhorn(
        "sinkhorn-in-float16",
        "Sinkhorn run in float16",
        ("forward",),
        "h_res",
        forward=mutants.sinkhorn_in(np.float16),
    ),
    _of_sinkhorn(
        "extra-pass",
        "an extra normalising pass",
        ("forward",),
        "h_res",
        forward=mutants.extra_pass,
    ),
    _of_sinkhorn(
        "wrong-axes",
        "batched matrices normalised on the wrong axes",
        ("forward",),
        "h_res",
        forward=mutants.on_leading_axes,
    ),
    _of_sinkhorn(
        "zero-gradient-at-init",
        "zero gradient of H_res at a common init",
        ("gradient",),
        "d logits of all logits equal",
        vjp=mutants.masked_where_zero,
    ),
    _of_sinkhorn(
        "final-matrix-backward",
        "a Sinkhorn backward that uses the final matrix for every iteration",
        ("gradient",),
        "d logits of",
        vjp=mutants.final_matrix_backward,
    ),
    _of_sinkhorn(
        "unshifted-exp-backward",
        "division gradients overflowing on unshifted exp",
        ("gradient",),
        "beyond exp's range",
        vjp=mutants.unshifted_backward,
    ),
    # kernels
    Bug(
        name="one-c-only",
        what="fused kernel right only for one C",
        op="combine",
        fails=("forward",),
        says="x of",
        forward=mutants.for_eight_channels,
    ),
    Bug(
        name="dead-tail",
        what="a tail that is dead code",
        op="combine",
        fails=("forward",),
        says="x of",
        forward=mutants.without_tail,
    ),
    Bug(
        name="carry-over",
        what="carry-over between rows: odd tokens wrong from T=1024 on",
        op="combine",
        fails=("forward",),
        says="leading (1031,)",
        forward=mutants.carrying_over,
    ),
    Bug(
        name="no-tokens",
        what="T=0 launch",
        op="combine",
        fails=("forward",),
        says="raised RuntimeError: invalid grid",
        forward=mutants.without_empty_launch,
    ),
    Bug(
        name="unsupported-n",
        what="unsupported n silently wrong",
        op="aggregate",
        fails=("forward",),
        says="h of",
        forward=mutants.for_eight_streams,
    ),
    Bug(
        name="unrolled-past-n",
        what="an unrolled loop reading past n, where n is no multiple of 8",
        op="aggregate",
        fails=("forward",),
        says="h of",
        forward=mutants.past_the_last_stream,
        note="the read itself, whatever it finds: mhc-metal-simulator",
    ),
    Bug(
        name="whole-tiles-only",
        what="tiles assuming C divisible by the threadgroup",
        op="aggregate",
        fails=("forward",),
        says="C=257",
        forward=mutants.in_whole_tiles,
    ),
    Bug(
        name="tree-double-count",
        what="a tree reduction that double-counts when the threadgroup is no power of two",
        op="rms_norm",
        fails=("forward",),
        says="y of",
        forward=mutants.adding_the_middle_twice,
    ),
    Bug(
        name="float4-through-half",
        what="a float4 load through a half pointer",
        op="aggregate",
        fails=("forward",),
        says="h of",
        forward=mutants.float4_through_half,
        dtype="float16",
    ),
    Bug(
        name="no-barrier",
        what="shared memory reused without a barrier",
        op="rms_norm",
        fails=("repeated", "forward"),
        says="differs between two runs on the same input",
        forward=mutants.Racing,
        note="where a race is won every time: mhc-metal-simulator, which finds the race itself",
    ),
    Bug(
        name="threadgroup-memory",
        what="more than 32 KiB of threadgroup memory at n=64",
        op="combine",
        fails=("forward",),
        says="n=64",
        forward=mutants.needing_too_much_memory,
    ),
    Bug(
        name="tail-under-if",
        what="a tail under #if on a template argument",
        op="combine",
        fails=("gradient",),
        says="d x of",
        vjp=with_changed_gradients(mutants.gradients_without_tail),
    ),
    # transforms
    Bug(
        name="weight-without-grad",
        what="a norm weight ignored under no-grad",
        op="rms_norm",
        fails=("forward", "checkpoint"),
        says="y of",
        forward=mutants.weightless_unless_traced,
        library="mlx-compiled",
    ),
    Bug(
        name="float-inside-compile",
        what="float() on arrays inside compile",
        op="sinkhorn_knopp",
        fails=("compile", "vmap"),
        says="raised ValueError",
        forward=mutants.looking_at_values,
        library="mlx-compiled",
    ),
    Bug(
        name="captured-arrays",
        what="gradients dropped for captured arrays",
        op="rms_norm",
        fails=("grad", "compile", "checkpoint", "second"),
        says="d weight of",
        forward=mutants.capturing,
        library="mlx-compiled",
    ),
    Bug(
        name="nan-through-where",
        what="NaN gradients from where(s > eps, 1/s, ...) at s = 0",
        op="rms_norm",
        fails=("gradient",),
        says="d x of a token of zeros",
        vjp=mutants.through_where,
        library="mlx-compiled",
    ),
)

THOUGHT_OF: tuple[Bug, ...] = tuple(
    replace(bug, shipped=False)
    for bug in (
        # gradients
        Bug(
            name="wrong-sign",
            what="a gradient with the wrong sign",
            op="combine",
            fails=("gradient",),
            says="d h_post of",
            vjp=with_changed_gradients(mutants.one_sign_wrong),
        ),
        Bug(
            name="token-off",
            what="gradients off by one token",
            op="aggregate",
            fails=("gradient",),
            says="d x of",
            vjp=with_changed_gradients(mutants.one_token_off),
        ),
        Bug(
            name="zero-gradient",
            what="a gradient of zeros",
            op="mappings",
            fails=("gradient",),
            says="d phi of",
            vjp=with_changed_gradients(mutants.zero_for_phi),
        ),
        Bug(
            name="gradient-missing",
            what="a gradient too few",
            op="aggregate",
            fails=("gradient",),
            says="has 1 arrays; needs 2",
            vjp=with_changed_gradients(mutants.only_the_first),
        ),
        Bug(
            name="gradient-in-float64",
            what="a gradient in another dtype than its primal",
            op="rms_norm",
            fails=("gradient",),
            says="is float64",
            vjp=with_changed_gradients(mutants.weight_in_float64),
        ),
        _of_sinkhorn(
            "iteration-less-backward",
            "one iteration less in the backward",
            ("gradient",),
            "d logits of",
            vjp=mutants.iteration_less,
        ),
        Bug(
            name="saved-cotangents-dropped",
            what="the cotangents of saved outputs dropped: second derivatives wrong",
            op="pre",
            fails=("second",),
            says="d phi of second derivatives",
            forward=mutants.dropping_saved,
            library="mlx-compiled",
        ),
        # Sinkhorn
        _of_sinkhorn(
            "narrow-logits",
            "Sinkhorn of bfloat16 logits in bfloat16",
            ("forward",),
            "h_res",
            forward=mutants.sinkhorn_in(ml_dtypes.bfloat16),
            dtype="bfloat16",
        ),
        _of_sinkhorn(
            "rows-first",
            "rows before columns",
            ("forward",),
            "h_res of",
            forward=mutants.rows_first,
        ),
        Bug(
            name="knopp-transposed",
            what="columns before rows in sinkhorn_knopp",
            op="sinkhorn_knopp",
            fails=("forward",),
            says="h_res",
            forward=mutants.knopp_of_transpose,
        ),
        # mappings
        Bug(
            name="mappings-rounded",
            what="mappings rounded to the streams' dtype",
            op="mappings",
            fails=("forward",),
            says="h_",
            forward=mutants.rounded_mappings(keep=True),
            dtype="bfloat16",
        ),
        Bug(
            name="mappings-narrow",
            what="mappings in the streams' dtype",
            op="mappings",
            fails=("forward",),
            says="is float16",
            forward=mutants.rounded_mappings(keep=False),
            dtype="float16",
        ),
        Bug(
            name="h-pre-ignored",
            what="the given h_pre of a single-pass mHC ignored",
            op="combine_pre",
            fails=("forward",),
            says="h of NaN in some tokens",
            forward=mutants.ignoring_h_pre,
        ),
        # streams
        Bug(
            name="h-res-transposed",
            what="H_res transposed",
            op="combine",
            fails=("forward",),
            says="x of",
            forward=mutants.transposed_h_res,
        ),
        Bug(
            name="first-token-for-all",
            what="mappings of the first token for all",
            op="combine",
            fails=("forward",),
            says="x of",
            forward=mutants.first_token_for_all,
        ),
        Bug(
            name="summed-in-bfloat16",
            what="a sum in the streams' dtype",
            op="contract",
            fails=("forward",),
            says="h of",
            forward=mutants.summed_in_bfloat16,
            dtype="bfloat16",
        ),
        # memory
        Bug(
            name="inputs-written-over",
            what="inputs written over",
            op="aggregate",
            fails=("forward", "strided", "repeated", "host", "updated"),
            says="raised ValueError",
            forward=mutants.writing_over_input,
        ),
        Bug(
            name="shared-memory",
            what="an output that shares its memory with an input",
            op="expand",
            fails=("updated",),
            says="changed when the inputs were written over",
            forward=mutants.view_of_input,
        ),
        Bug(
            name="one-array-twice",
            what="one array given for two gradients",
            op="residual_add_aggregate",
            fails=("updated",),
            says="changed when another result was written over",
            vjp=with_changed_gradients(mutants.one_for_two),
        ),
        Bug(
            name="strides-ignored",
            what="strides ignored",
            op="aggregate",
            fails=("strided",),
            says="h of",
            forward=mutants.strideless,
        ),
        Bug(
            name="unsteady",
            what="not twice the same",
            op="aggregate",
            fails=("repeated",),
            says="differs between two runs on the same input",
            forward=mutants.Unsteady,
        ),
    )
)

BUGS: Mapping[str, Bug] = {bug.name: bug for bug in (*SHIPPED, *THOUGHT_OF)}


# --- running the kit on them ----------------------------------------------------------------------


@contextlib.contextmanager
def present(*backends: str | Bug) -> Generator[None]:
    """Register bugs, and those of the named backends that are ``bug:...``, within a ``with`` block.

    Raises
    ------
    UnknownBackendError
        With the nearest name, where no bug is called so.
    BackendUnavailableError
        Where the library that a bug is in is not installed.
    """
    with contextlib.ExitStack() as stack:
        for one in backends:
            if isinstance(one, Bug):
                stack.enter_context(_one_present(one))
            elif one.startswith(PREFIX) and one not in mhc_core.backends():
                stack.enter_context(_one_present(_named(one)))
        yield


def _named(backend: str) -> Bug:
    name = backend.removeprefix(PREFIX)
    if name not in BUGS:
        from mhc_conformance import generated  # made of what is here

        if bug := generated.named(name):
            return bug
        near = get_close_matches(name, (*BUGS, *generated.MUTANTS), n=1)
        nearest = f"; the nearest is {PREFIX}{near[0]}" if near else ""
        raise mhc_core.UnknownBackendError(
            f"no bug is named {name!r}{nearest}; mhc conformance --mutations lists them all"
        )
    return BUGS[name]


@contextlib.contextmanager
def _one_present(bug: Bug) -> Generator[None]:
    base = mhc_core.backends()[bug.library]
    if base.spec is None or base.reason is not None:
        raise mhc_core.BackendUnavailableError(f"{bug.backend} is in {bug.library}: {base.reason}")
    wrong = _Wrong(f"mhc_conformance.bugs.{bug.name}", bug, backend_module(base.spec))
    spec = replace(
        base.spec,
        name=bug.backend,
        module=wrong.__name__,
        dtypes=tuple({"float32": None, bug.dtype: None}),  # in which it is exactly that bug
        automatic=False,
    )
    sys.modules[wrong.__name__] = wrong
    try:
        # what overflows or divides by zero here does so on purpose
        with registered(spec), np.errstate(all="ignore"):
            yield
    finally:
        del sys.modules[wrong.__name__]


class _Wrong(ModuleType):
    """A backend's module, but for a few functions."""

    def __init__(self, name: str, bug: Bug, base: Any) -> None:
        super().__init__(name, bug.what)
        self._base = base
        vars(self).update(bug.functions())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


@dataclass(frozen=True)
class Outcome:
    """The kit's result on one bug."""

    bug: Bug
    records: tuple[Record, ...] = ()
    reason: str = ""  # why the bug cannot be tried here

    @property
    def failed(self) -> tuple[Record, ...]:
        """Return the checks that fail, the one that is there for this bug first."""
        first = self.bug.fails[0]
        failed = [record for record in self.records if not record.passed]
        return tuple(sorted(failed, key=lambda record: record.kind != first))

    @property
    def message(self) -> str:
        """Return the kit's message about the bug."""
        return self.failed[0].detail if self.failed else ""

    @property
    def problem(self) -> str:
        """Return how the kit failed to catch the bug as it should, or "" if it did not fail."""
        if self.reason:
            return ""
        failed, named = {record.kind for record in self.failed}, set(self.bug.fails)
        along = ALONG if named & {"forward", "gradient"} else set[str]()
        if not named <= failed <= named | along:
            return f"fails {_list(failed)}; should fail {_list(self.bug.fails)}"
        if self.bug.says not in self.message:
            return f"does not say {self.bug.says!r}: {self.message}"
        return ""


def _list(kinds: Any) -> str:
    return ", ".join(sorted(kinds)) or "nothing"


def hunt(bug: Bug, seed: int = 0) -> Outcome:
    """Run every check of the wrong op, in the bug's dtype, on a backend with that bug."""
    try:
        with present(bug.backend):
            subject = Subject(bug.backend)
            return Outcome(bug, tuple(_checked(subject, bug, seed)))
    except mhc_core.BackendUnavailableError as error:
        return Outcome(bug, reason=str(error))


def _checked(subject: Subject, bug: Bug, seed: int) -> Iterator[Record]:
    for op, dtype, kind in grid(subject):
        # properties draw many inputs, and what they say of a bug depends on their luck
        if (op, dtype) == (bug.op, bug.dtype) and kind != "properties":
            yield check(subject, op, dtype, kind, seed)
