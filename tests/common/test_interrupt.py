"""Ctrl-C while a command still imports, by a real signal to a real process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.interrupt import INTERRUPTED

ROOT = Path(__file__).parents[2]
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
