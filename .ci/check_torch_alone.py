"""Check that the wheels of mhc-core and mhc-torch work beside PyTorch, without MLX and JAX.

    python .ci/check_torch_alone.py FOLDER

FOLDER is that of build_release.py. The wheels are installed into a new environment, which sees the
other packages of this one but for MLX, JAX and this project's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HIDDEN = ("mlx", "jax", "mhc", "_mhc", "__editable__")  # how names begin that are not linked
OPS = """
import sys
sys.modules["mlx"] = sys.modules["jax"] = None  # an import of them fails
import torch, mhc_core as mhc

x = torch.randn(3, 4, 8, requires_grad=True)
phi, scale, bias = torch.randn(24, 32, requires_grad=True), torch.ones(3), torch.zeros(24)
h, h_post, h_res = mhc.pre(x, phi, scale, bias, mhc.DEEPSEEK_V4)
made = mhc.combine(x, h, h_post, h_res)
made.square().sum().backward()
assert made.shape == x.shape and x.grad.any() and phi.grad.any()
known = mhc.backends()
assert known["torch"].available
assert not any(known[name].available for name in ("jax", "mlx-compiled"))
"""


def main(folder: Path) -> None:
    """Fail unless an op, its gradient, the list of backends and the kit's first check work."""
    wheels = [next(folder.glob(f"{name}/*.whl")) for name in ("mhc-core", "mhc-torch")]
    with tempfile.TemporaryDirectory() as scratch:
        environment, others = Path(scratch, "venv"), Path(scratch, "others")
        venv.create(environment, with_pip=False)
        others.mkdir()
        folders = [Path(one) for one in sys.path if one.endswith("site-packages")]
        for item in (item for folder in folders for item in folder.iterdir()):
            hidden = item.name.lower().startswith(HIDDEN) or item.suffix == ".pth"
            if not hidden and not (others / item.name).exists():
                (others / item.name).symlink_to(item)
        python = environment / "bin" / "python"
        given = {**os.environ, "PYTHONPATH": str(others), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

        def run(*words: str | Path) -> None:
            subprocess.run([python, *words], check=True, env=given, cwd=scratch)

        run("-m", "pip", "install", "--quiet", "--no-deps", *wheels)
        run("-c", OPS)
        for words in (["backends"], ["conformance", "torch", "--quick"]):
            run(environment / "bin" / "mhc", *words)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).absolute())
