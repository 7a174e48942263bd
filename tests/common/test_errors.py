"""The wrapper of a command: what it prints and the status that it ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError, run_command, unknown_name


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
