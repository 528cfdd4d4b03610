"""Bugs as replacements of the oracle's functions, by which :mod:`mhc_conformance.naming` names one.

A replacement is written in the operations of the oracle's tape, so that its gradients follow;
those of gradients alone are declared ``"backward"``. A file per subject, as in
:mod:`mhc_conformance.bugs`, whose bugs are code on NumPy arrays with vjps of their own.
"""

from mhc_conformance.patches import mappings, norms, projection, roundings, sinkhorn, streams
from mhc_conformance.patches.declaration import PATCHES, Patch, reaches

__all__ = ["PATCHES", "SUBJECTS", "Patch", "reaches"]

SUBJECTS = (sinkhorn, projection, mappings, streams, norms, roundings)
"""The modules that declare the patches; importing them fills ``PATCHES``."""
