"""Variants, and numbers, as constants of compiled code.

``torch.compile`` turns a float that differs between two calls of one function into an input of the
graph, and so the fields of a module's variant once two modules have different ones. A string it
never does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import cast

import torch

from mhc_core.variants import Variant

__all__ = ["key_of", "made", "number_of", "variant_of"]


def key_of(variant: Variant) -> str:
    """Return a string that stands for a variant, also in another process."""
    return json.dumps(dataclasses.asdict(variant))


@functools.cache
def made(key: str) -> Variant:
    """Return the variant that a string stands for, in code that no compiler traces."""
    return Variant(**json.loads(key))


def _variant_of(key: str) -> Variant:
    """Return the variant that a string stands for."""
    return made(key)


variant_of = cast("Callable[[str], Variant]", torch.compiler.assume_constant_result(_variant_of))


def _number_of(text: str) -> float:
    """Return the number that a string stands for."""
    return float(text)


number_of = cast("Callable[[str], float]", torch.compiler.assume_constant_result(_number_of))
