"""Checkpoints of the full training state: written atomically by a thread, listed by hash, newest valid resumes."""

from __future__ import annotations

import json
import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import file_sha256, remove_temporaries, write_atomic
from distill.config import RuntimeConfig, load_config
from distill.models import create_student

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{9})\.json")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk whose record exists.

    Attributes:
        path: the tensors' file.
        step: optimizer steps taken.
        sha256: of the file, as its record states.
    """

    path: Path
    step: int
    sha256: str


class CheckpointWriter:
    """Writes checkpoints of one run from a background thread, one at a time.

    `save` copies every tensor to the host and returns; the thread writes the file, and after it the record that
    makes the checkpoint exist, each whole or not at all. Once one could not be written, `failed` is true and no
    other is begun, and `wait` raises.
    """

    def __init__(self, run_dir: Path, config: RuntimeConfig, *, is_main: bool = True) -> None:
        self.folder = run_dir / "checkpoints"
        self._config = config
        self._is_main = is_main
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.folder)
        self._stage = HostStage()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint of this rank could not be written."""
        return self._error is not None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Stage `state` on the host and write it as the checkpoint of `step`; the main rank's alone is written."""
        if not self._is_main:
            return
        self._join()
        if self.failed:
            return
        staged = self._stage.copy(state)
        self._thread = threading.Thread(target=self._write, args=(step, staged), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: one could not be written (disk full, say).
        """
        self._join()
        if self.failed:
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({self._error}). Earlier checkpoints are intact. "
                "Mend the cause and run the same command again: it resumes from the newest."
            ) from self._error

    def _join(self) -> None:
        # One write at a time: the host copy that the thread reads is used again.
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            path = self.folder / f"step_{step:09d}.pt"
            write_atomic(path, lambda file: torch.save(state, file))
            record = {"step": step, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            write_atomic(path.with_suffix(".json"), json.dumps(record).encode())
            self._remove_old()
        except BaseException as error:  # whatever ends this thread must end the run, not only the thread
            self._error = error

    def _remove_old(self) -> None:
        for saved in list_checkpoints(self.folder.parent)[: -self._config.keep_checkpoints]:
            if self._config.keep_every and saved.step % self._config.keep_every == 0:
                continue
            saved.path.with_suffix(".json").unlink()
            saved.path.unlink(missing_ok=True)


def list_checkpoints(run_dir: Path) -> list[Saved]:
    """Return the recorded checkpoints of a run, oldest first."""
    found = []
    for record in sorted((run_dir / "checkpoints").glob("step_*.json")):
        if _NAME.fullmatch(record.name):
            fields = json.loads(record.read_text())
            found.append(Saved(record.with_suffix(".pt"), fields["step"], fields["sha256"]))
    return found


def load_newest(run_dir: Path) -> tuple[int, dict[str, Any]] | None:
    """Return step and state of the newest checkpoint whose bytes match its record, None where there is none.

    A damaged one is named in the log and passed over.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    saved = list_checkpoints(run_dir)
    for checkpoint in reversed(saved):
        if checkpoint.path.is_file() and file_sha256(checkpoint.path) == checkpoint.sha256:
            state = torch.load(checkpoint.path, map_location="cpu", weights_only=True)
            return checkpoint.step, state
        log.warning("%s: missing or not the bytes that were written; taking the one before it.", checkpoint.path)
    if saved:
        raise UserError(
            f"{run_dir / 'checkpoints'}: none of {len(saved)} checkpoints is intact. "
            "Restore one from a backup, or start anew with another --output_dir."
        )
    return None


def load_student(run_dir: str | Path, *, use_ema: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """Load the student of a run's newest valid checkpoint.

    Args:
        run_dir: the run's folder (`--output_dir`).
        use_ema: the EMA where the run keeps one, else the trained weights.

    Returns:
        The timm model in eval mode on the CPU, and {"step", "config": TrainConfig, "ema": bool}.

    Raises:
        UserError: the folder is no run, or has no checkpoint.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir)
    newest = load_newest(run_dir)
    if newest is None:
        raise UserError(f"{run_dir}: no checkpoint yet. Train until the first one is written.")
    step, state = newest
    ema = use_ema and state["ema"] is not None
    model = create_student(config.student, seed=config.runtime.seed)
    prefix = "student."
    weights = (
        state["ema"]
        if ema
        else {name.removeprefix(prefix): value for name, value in state["model"].items() if name.startswith(prefix)}
    )
    model.load_state_dict(weights, strict=True)
    return model.eval(), {"step": step, "config": config, "ema": ema}


class HostStage:
    """Copies a state to the host, into pinned buffers that are kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `state` on the host that later steps do not change."""
        staged: dict[str, Any] = self._copy(state, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the next step changes what the copies still read
        return staged

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor) and value.is_cuda:
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = self._buffers[name] = torch.empty_like(value, device="cpu", pin_memory=True)
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {key: self._copy(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return value
