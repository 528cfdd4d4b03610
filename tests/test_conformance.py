"""The suite on the built-in backends, by the same lines that anyone writes for their own.

``mhc conformance`` runs the whole grid. Where functions are compiled, which is most of its time,
the suite has a few ops here, to which dispatch, transforms and dtypes are the same as to all.
"""

from mhc_conformance import BackendConformance

FEW = ("combine", "head", "rms_norm", "sinkhorn")


class TestNumpy(BackendConformance):
    backend = "numpy"


class TestJax(BackendConformance):
    backend = "jax"
    ops = FEW


class TestMlxCompiled(BackendConformance):
    backend = "mlx-compiled"
    ops = FEW
