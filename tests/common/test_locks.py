"""Locks: one holder among processes, freed by its death, refused where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.locks import file_lock

ROOT = Path(__file__).parents[2]
HOLDER = "import sys, time; from pathlib import Path; from common.locks import file_lock\n"
HOLDER += "with file_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(3600)"


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "lock"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_holder_is_refused_until_the_first_is_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with file_lock(tmp_path / "lock", timeout=0) as held:
        assert not held
    holder.send_signal(signal.SIGKILL)
    with file_lock(tmp_path / "lock") as held:
        assert held


def test_a_lock_file_removed_by_its_holder_is_not_held(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (tmp_path / "lock").unlink()
    with file_lock(tmp_path / "lock", timeout=0) as held:
        assert held
        with file_lock(tmp_path / "lock", timeout=0) as twice:
            assert not twice


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with (
        pytest.raises(UserError, match=r"lock: this file system has no file locks \(not here\)"),
        file_lock(tmp_path / "lock"),
    ):
        pass
