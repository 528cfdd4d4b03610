"""The command ``mhc-mlx-info``."""

from mhc_core.mlx import diagnostics

__all__ = ["diagnostics", "main"]


def main() -> None:
    """Run ``mhc info``."""
    diagnostics()


if __name__ == "__main__":
    main()
