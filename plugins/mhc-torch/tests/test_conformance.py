"""The backend, held by mhc-core's own conformance kit."""

from mhc_conformance import BackendConformance


class TestTorch(BackendConformance):
    backend = "torch"
