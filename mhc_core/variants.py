"""The published variants of mHC: one frozen set of constants each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from mhc_core import checks
from mhc_core._messages import nearest
from mhc_core.discovery import mixer_named
from mhc_core.mixer import Mixer

__all__ = [
    "DEEPSEEK_V4",
    "DEEPSEEK_V41",
    "GLM53_FLASH",
    "HY_V4",
    "LIGER",
    "PAPER",
    "XING40",
    "First",
    "Start",
    "Variant",
    "check_first",
]

First = Literal["columns", "rows"]
Start = Literal["softmax", "exp"]
check_first = checks.one_of(*get_args(First))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The constants in which published implementations of mHC differ.

    Attributes
    ----------
    norm_eps
        Added to the mean square of all ``n * C`` numbers of a token before the reciprocal root.
    norm_root_eps
        Added to that root, outside of it: what phi gives is divided by
        ``sqrt(mean + norm_eps) + norm_root_eps``. Kernels have none; with another value than 0 the
        mappings are computed by the formulas.
    pre_eps
        Added to ``sigmoid`` in H_pre (and in the head's weights).
    post_scale, post_eps
        H_post = ``post_scale * sigmoid + post_eps``.
    sinkhorn_iterations
        Pairs of normalisations, from 1 to 1000.
    sinkhorn_eps
        0 evaluates Sinkhorn in the log domain; above 0, it is added to every divisor and to the
        softmax that starts it.
    sinkhorn_first
        The lines of H_res that are normalised first: ``"columns"`` (each sums to 1) or ``"rows"``.
    sinkhorn_start
        The first normalisation: ``"softmax"``, to which ``sinkhorn_eps`` is added, or ``"exp"``,
        ``exp(logits - largest) / (sum + sinkhorn_eps)`` with a gradient through the largest logit
        of each line. They are the same where ``sinkhorn_eps`` is 0.
    sinkhorn_clamp
        The bounds of the logits of H_res, after scale and bias, or None. Logits beyond them have
        no gradient.
    res_transposed
        Whether the last ``n * n`` rows of phi and entries of bias are laid out as H_res
        transposed, as DeepSeek-V4's checkpoints have them. With another mixer than
        ``"sinkhorn"``, H_res is the transpose of what the mixer makes.
    mixer
        The name of the mixer that makes H_res of its logits: ``"sinkhorn"``, ``"identity"`` (the
        streams are not mixed, and H_res is None), or another of :func:`mhc_core.mixers`.
    mixer_options
        The mixer's options by name; those not given have the mixer's defaults. It is kept as a
        tuple of pairs. ``"sinkhorn"`` has the fields above instead.

    Raises
    ------
    TypeError, ValueError
        For a wrong field; the message names it, what was received and what is needed.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from mhc_core import PAPER
    >>> replace(PAPER, sinkhorn_iterations=3).sinkhorn_iterations
    3
    """

    norm_eps: float = 1e-20
    pre_eps: float = 0.0
    post_scale: float = 2.0
    post_eps: float = 0.0
    sinkhorn_iterations: int = 20
    sinkhorn_eps: float = 0.0
    sinkhorn_first: First = "columns"
    sinkhorn_start: Start = "softmax"
    sinkhorn_clamp: tuple[float, float] | None = None
    res_transposed: bool = False
    norm_root_eps: float = 0.0
    mixer: str = "sinkhorn"
    mixer_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        rules: dict[str, checks.Check] = {
            "norm_eps": checks.non_negative,
            "pre_eps": checks.non_negative,
            "post_scale": checks.non_negative,
            "post_eps": checks.non_negative,
            "sinkhorn_iterations": checks.iterations,
            "sinkhorn_eps": checks.non_negative,
            "sinkhorn_first": check_first,
            "sinkhorn_start": checks.one_of(*get_args(Start)),
            "sinkhorn_clamp": checks.bounds,
            "res_transposed": checks.boolean,
            "norm_root_eps": checks.non_negative,
        }
        plain = {name: check("Variant", name, getattr(self, name)) for name, check in rules.items()}
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        # Every dispatched call hashes its variant, so it is done once. Words and None are left out:
        # their hashes differ between processes and this attribute travels in pickles.
        same = (value for value in plain.values() if not isinstance(value, (str, type(None))))
        words = (self.sinkhorn_first == "rows", self.sinkhorn_start == "exp")
        object.__setattr__(self, "_hash", hash((*same, *words)))
        if self.mixer != "sinkhorn" or self.mixer_options:
            object.__setattr__(self, "mixer_options", self._checked_options())

    def _checked_options(self) -> tuple[tuple[str, Any], ...]:
        if not isinstance(self.mixer, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Variant: mixer is {self.mixer!r}; needs a name such as 'sinkhorn'")
        try:
            given = dict(self.mixer_options)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Variant: mixer_options is {self.mixer_options!r}; needs a mapping of names to "
                "values"
            ) from error
        try:
            known = self.made_by.options
        except ValueError as error:
            raise ValueError(f"Variant: {error}") from None
        for name in given:
            if name not in known:
                raise ValueError(
                    f"Variant: mixer_options has {name!r}{nearest(name, known)}; mixer "
                    f"{self.mixer!r} has {', '.join(known) or 'no options'}"
                )
        return tuple(
            (
                name,
                option.check(
                    "Variant", f"mixer_options[{name!r}]", given.get(name, option.default)
                ),
            )
            for name, option in known.items()
        )

    @property
    def made_by(self) -> Mixer:
        """Return the mixer that makes H_res."""
        return mixer_named(self.mixer)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that the mixer's functions take by keyword."""
        if self.mixer != "sinkhorn":
            return dict(self.mixer_options)
        return {
            "iterations": self.sinkhorn_iterations,
            "eps": self.sinkhorn_eps,
            "first": self.sinkhorn_first,
            "start": self.sinkhorn_start,
            "clamp": self.sinkhorn_clamp,
            "transposed": self.res_transposed,
        }

    @property
    def beyond(self) -> tuple[str, ...]:
        """Return the fields in use that only the formulas of ``mhc_core.math`` know."""
        return ("norm_root_eps",) if self.norm_root_eps else ()

    @property
    def mixes(self) -> bool:
        """Return whether H_res is a matrix; it is None where the streams are not mixed."""
        return self.made_by.forward is not None

    def logits(self, n: int) -> int:
        """Return the number of the mixer's logits for n streams."""
        count = self.made_by.logits(n, **self.options)
        if type(count) is not int or count < 0:
            raise TypeError(
                f"mixer {self.mixer!r} is broken: its logits gave {count!r} for n={n}; needs an "
                "integer of at least 0"
            )
        return count

    def columns(self, n: int) -> int:
        """Return m, the number of rows of phi and of entries of bias for n streams."""
        return 2 * n + self.logits(n)

    def parts(self, n: int) -> int:
        """Return the number of entries of scale: for pre, post and, where there are logits, res."""
        return 3 if self.logits(n) else 2

    def refuses(self, n: int) -> str | None:
        """Return why the mixer does not take n streams, or None."""
        reason = self.made_by.refuses(n, **self.options)
        return None if reason is None else f"mixer {self.mixer!r} {reason}, not n={n}"

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]


def check_variant(owner: str, name: str, value: Any) -> Variant:
    """Return ``value``, which must be a Variant."""
    if not isinstance(value, Variant):
        raise TypeError(
            f"{owner}: {name} is {value!r}; needs a mhc_core.Variant, such as PAPER or DEEPSEEK_V4"
        )
    return value


PAPER = Variant()
"""The constants of arXiv:2512.24880, eqs. 7-9 and 14-19."""

DEEPSEEK_V4 = Variant(norm_eps=1e-6, pre_eps=1e-6, sinkhorn_eps=1e-6, res_transposed=True)
"""The constants of DeepSeek-V4; its ``comb`` is H_res transposed, normalised rows first."""

DEEPSEEK_V41 = replace(DEEPSEEK_V4, norm_eps=1e-20)
"""The constants of DeepSeek-V4.1: V4's but for norm_eps."""

GLM53_FLASH = replace(DEEPSEEK_V4, norm_eps=1e-5)
"""The constants of GLM-5.3-Flash: V4's but for norm_eps. Its head is the mean of the streams."""

HY_V4 = Variant(norm_eps=1e-5, pre_eps=1e-6, post_eps=1e-6, mixer="identity")
"""The constants of Hunyuan HY-V4, which does not mix its streams."""

LIGER = Variant(norm_eps=1e-6, sinkhorn_eps=1e-6, sinkhorn_first="rows")
"""The constants of Liger-Kernel's mHC."""

XING40 = replace(LIGER, sinkhorn_start="exp", sinkhorn_clamp=(-30.0, 30.0))
"""The constants of Xing4.0 (TeleChat4). Its head is the mean of the streams."""
