"""The same suite on a CUDA device, where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mhc_conformance import BackendConformance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class TestTorchOnCuda(BackendConformance):
    backend = "torch"

    @pytest.fixture(autouse=True, params=["highest", "high"])
    def _on_cuda(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Put host arrays on the GPU; "high" allows TF32, which must change nothing."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(request.param)
        with torch.device("cuda"):
            yield
        torch.set_float32_matmul_precision(before)
