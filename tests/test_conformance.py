"""The built-in backends, tested by the same lines that anyone writes for their own."""

from mhc_conformance import BackendConformance


class TestNumpy(BackendConformance):
    backend = "numpy"


class TestJax(BackendConformance):
    backend = "jax"


class TestMlxCompiled(BackendConformance):
    backend = "mlx-compiled"
