"""All texts of the Metal kernels, traced once for all workers of a run."""

from __future__ import annotations

import fcntl
import functools
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_metal_simulator.texts import DTYPES, STREAMS, Text, texts


@functools.cache
def all_texts() -> tuple[Text, ...]:
    """Return a text for every kernel, number of streams and dtype."""
    # beside what the workers of a run share: see conftest.py
    file = Path(os.environ["MHC_SIMULATOR_CACHE"]).parent / "texts.json"
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            made = [asdict(text) for text in texts(every=False)]
            file.write_text(json.dumps(made), encoding="utf-8")
    return tuple(Text(**fields) for fields in json.loads(file.read_text(encoding="utf-8")))


def chosen(kernel: str, dtype: str | None = None) -> Text:
    """Return one text of a kernel; dtypes and numbers of streams alternate among the kernels."""
    names = sorted({text.kernel for text in all_texts()})
    turn = names.index(kernel)
    wanted = dtype or DTYPES[turn % len(DTYPES)]
    mine = [t for t in all_texts() if t.kernel == kernel]
    mine = [t for t in mine if t.dtype == wanted] or mine
    shift = turn + DTYPES.index(wanted)
    order = [*STREAMS[shift % len(STREAMS) :], *STREAMS]
    return min(mine, key=lambda t: order.index(t.n))
