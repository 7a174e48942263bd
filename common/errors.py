"""The error that a user can act on, and how a command prints it: one line, and an exit status."""

from __future__ import annotations

import difflib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from common.interrupt import INTERRUPTED, raise_at_interrupt


class UserError(ValueError):
    """Bad input or a damaged file. The message says what is wrong, where, the value seen and what to do.

    Commands print the message alone, without a traceback, and exit with status 2.
    """


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that is none of `known`, with the closest of them as a hint."""
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"{what}: {name!r} is unknown.{hint} There are: {', '.join(choices)}.")


def run_command(work: Callable[[], object]) -> int:
    """Do a command's work and return its exit status: an int that it returns, else 0; 2 for bad input, 130 if
    interrupted."""
    raise_at_interrupt()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  (for as long as the process lives)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a name may hold what the output cannot
    try:
        result = work()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and _output_is_closed():
            if not isinstance(error, BrokenPipeError):
                print(f"error: the output cannot be written ({error.strerror}).", file=sys.stderr)
            return 128 + signal.SIGPIPE
        told = _told(error)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # for `distill.launch`, which repeats it last
            fault = f"error: {type(error).__name__}: {error}. This is a fault of the program: see its traceback above."
            record = {"message": told or fault, "timestamp": 0 if told else time.time()}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(record))
        if told is None:
            raise
        print(told, file=sys.stderr)
        return 2


def _output_is_closed() -> bool:
    """Tell whether nobody takes what this process prints, as after `| head`; let what is left of it go nowhere."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _told(error: Exception) -> str | None:
    """Return the line for an error that the user can act on, None for a fault of our own."""
    if isinstance(error, UserError):
        return f"error: {error}"
    # An OSError that names a file is of the user's files; one that does not may be our own fault.
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}. Check the path and its permissions."
    return None
