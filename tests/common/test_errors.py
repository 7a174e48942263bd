"""How a command ends: what it prints and its status, and Ctrl-C while it still imports, by a real signal."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError, run_command, unknown_name
from common.interrupt import INTERRUPTED

ROOT = Path(__file__).parents[2]


def refuse() -> None:
    raise UserError("a.tar: cut short. Pack again.")


def interrupt() -> None:
    raise KeyboardInterrupt


def read_what_is_not_there() -> None:
    Path("/no/such/file").read_bytes()


@pytest.mark.parametrize(
    ("work", "status", "printed"),
    [
        (lambda: None, 0, ""),
        (lambda: "a result", 0, ""),
        (lambda: 1, 1, ""),
        (refuse, 2, "error: a.tar: cut short. Pack again.\n"),
        (read_what_is_not_there, 2, "error: /no/such/file: No such file or directory. Check the path"),
        (interrupt, 130, "Interrupted. What is finished is kept; the same command continues from here.\n"),
    ],
)
def test_statuses_and_messages(
    work: Callable[[], object], status: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(work) == status
    errors = capsys.readouterr().err
    assert errors.startswith(printed) and bool(errors) == bool(printed)


def test_our_own_faults_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="no name"):
        run_command(lambda: (_ for _ in ()).throw(OSError("no name")))


def test_a_name_close_to_a_known_one_is_offered() -> None:
    assert str(unknown_name("preset", "dine", ["dino", "other"])) == (
        "preset: 'dine' is unknown. Did you mean 'dino'? There are: dino, other."
    )
    assert "Did you mean" not in str(unknown_name("preset", "xyz", ["dino"]))


EARLY, COMMANDS = "common.interrupt", "train.py probe.py shards cache_tools demo distill.export distill.launch".split()
LATER = [("train.py", "numpy"), ("train.py", "torch"), ("probe.py", "timm"), ("shards", "numpy")]


@pytest.mark.parametrize(("command", "imported"), [*((command, EARLY) for command in COMMANDS), *LATER])
def test_an_interrupt_among_the_imports_ends_a_command_with_one_line(command: str, imported: str) -> None:
    # Python says what it has imported as it goes: a clock that runs as fast as the machine.
    words = [sys.executable, "-X", "importtime", *([] if command.endswith(".py") else ["-m"]), command]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(re.search(rf"\| +{re.escape(imported)}$", line) for line in process.stderr), "it was not imported"
    next(process.stderr)  # the first import after it: the call after the import of common.interrupt is done
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert process.returncode == 130, errors
    assert (printed, [x for x in errors.splitlines() if not x.startswith("import time:")]) == ("", [INTERRUPTED])
