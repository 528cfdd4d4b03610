"""The backend, checked by mhc-core's own conformance kit."""

from mhc_conformance import BackendConformance, Subject


class TestTorch(BackendConformance):
    backend = "torch"

    def test_second_derivatives_are_not_left_out(self) -> None:
        assert "second" not in Subject(self.backend).spec.without
