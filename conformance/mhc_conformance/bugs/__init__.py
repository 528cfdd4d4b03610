"""Every bug that shipped in this field, and others, each with the check and case that detect it.

``@bug(...)`` decorates the wrong code. Each bug is put into an otherwise right backend, and the kit
must fail that backend in the checks that the bug names and in no other. ``mhc conformance
--mutations`` prints the table, and ``mhc conformance bug:NAME`` runs the kit on one of these
backends, like on any other.
"""

from mhc_conformance.bugs import kernels, mappings, memory, sinkhorn, streams, transforms
from mhc_conformance.bugs.declaration import BUGS, Bug, bug, right, right_vjp
from mhc_conformance.bugs.run import Outcome, present, run_bug

__all__ = ["BUGS", "SUBJECTS", "Bug", "Outcome", "bug", "present", "right", "right_vjp", "run_bug"]

SUBJECTS = (mappings, sinkhorn, kernels, streams, memory, transforms)
"""The modules that declare the bugs; importing them fills ``BUGS``."""
