"""torch: the neutral maths on PyTorch tensors, with the hand-written vjps behind autograd."""

from importlib.util import find_spec

from mhc_core import math
from mhc_core.backend import DTYPES, BackendSpec
from mhc_core.hookspecs import hookimpl


def _missing() -> str | None:
    return None if find_spec("torch") else "PyTorch is not installed: pip install torch"


SPEC = BackendSpec(
    name="torch",
    module="mhc_torch.ops",
    array_types=("torch.Tensor",),
    ops=math.OPS,
    dtypes=DTYPES,
    missing=_missing,
    api_version=1,
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the spec of the backend."""
    return [SPEC]
