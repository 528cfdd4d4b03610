"""Files of a peer that are read without the package around them."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["checkout", "load_file"]


def checkout() -> Path:
    """Return the folder of the checkout that a person named for this process."""
    return Path(os.environ["MHC_PEERS_CHECKOUT"])


@functools.cache
def load_file(relative: str) -> Any:
    """Return the module in a file below a folder of ``sys.path``, without its package."""
    for folder in sys.path:
        file = Path(folder) / relative
        if file.is_file():
            name = f"mhc_peers_file_{file.stem}"
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
    raise FileNotFoundError(f"{relative} is in no folder of sys.path")
