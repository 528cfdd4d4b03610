"""The conformance kit: shows that a backend of mhc-core computes the right forwards and gradients.

From pytest, two lines make the suite of a backend::

    from mhc_conformance import BackendConformance

    class TestMine(BackendConformance):
        backend = "mine"

From a shell, ``mhc conformance mine``, with ``--report mine.html`` for a page to show.

Every check has been seen to fail: :mod:`mhc_conformance.bugs` has every bug known to have shipped
in this field, and ``mhc conformance --mutations`` shows the check that fails for each.
"""

from typing import TYPE_CHECKING, Any

from mhc_conformance.checks import CHECKS, applies, check, grid, skips
from mhc_conformance.mixers import check_mixer
from mhc_conformance.records import Record, Skip
from mhc_conformance.subject import Subject

if TYPE_CHECKING:
    from mhc_conformance.suite import BackendConformance, MixerConformance

__all__ = [
    "CHECKS",
    "BackendConformance",
    "MixerConformance",
    "Record",
    "Skip",
    "Subject",
    "applies",
    "check",
    "check_mixer",
    "grid",
    "skips",
]


def __getattr__(name: str) -> Any:
    if name in ("BackendConformance", "MixerConformance"):  # need pytest; the command does not
        from mhc_conformance import suite

        return getattr(suite, name)
    raise AttributeError(name)
