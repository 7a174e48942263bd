"""Ctrl-C before a command has begun: what it imports takes seconds, and would answer with a traceback."""

from __future__ import annotations

import os
import signal

INTERRUPTED = "Interrupted. What is finished is kept; the same command continues from here."


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process with a line and status 130 until `raise_at_interrupt`; call it before imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    # No exception: a module that is being imported may catch it, or turn it into another.
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)
