"""The errors that the simulator reports. Every class derives from :class:`SimulatorError`."""

from __future__ import annotations

__all__ = [
    "CompileError",
    "KernelFaultError",
    "LaunchError",
    "SimulatorError",
    "SimulatorUnavailableError",
    "TracedCallError",
]


class SimulatorError(RuntimeError):
    """A kernel or launch that the simulator refuses, or a fault that it found."""


class SimulatorUnavailableError(SimulatorError):
    """The machine lacks something that the simulator needs. The message says what to install."""


class CompileError(SimulatorError):
    """The kernel's text does not compile. The message is clang's, with the lines of MLX's text."""


class LaunchError(SimulatorError, ValueError):
    """A launch that Metal or MLX would refuse: too many threads, too much threadgroup memory."""


class TracedCallError(SimulatorError, ValueError):
    """The kernel was called under a transformation in which arrays have no values."""


class KernelFaultError(SimulatorError):
    """A thread did something whose outcome a GPU leaves undefined.

    Attributes
    ----------
    kind
        ``"out-of-bounds"``, ``"misaligned"``, ``"race"``, ``"unwritten-read"``, ``"divergence"``,
        ``"wild-access"``, ``"index"``, ``"division"``, ``"input-written"``, ``"missing-lane"``,
        ``"unwritten-output"`` or ``"order-dependent"``.
    kernel
        The kernel's name.
    array
        The buffer or threadgroup array concerned, where there is one.
    offset
        The offset in it, in bytes.
    line
        The line of the text that MLX generates, if it is known.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        kernel: str,
        array: str | None = None,
        offset: int | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.kernel = kernel
        self.array = array
        self.offset = offset
        self.line = line
