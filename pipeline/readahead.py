"""Asks the kernel for the rows of the order's next window, a piece a step, sorted as they lie on disk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shards.folder import ShardFolder

# Pieces of a step: catching up after a start must not hold up the first batches.
_CATCH_UP = 4


class Readahead:
    """Stays up to one window of a rank's rows ahead of what it reads."""

    def __init__(self, folder: ShardFolder, rows: npt.NDArray[np.int64], window: int) -> None:
        """Plan the advice of one epoch.

        Args:
            folder: where advice goes.
            rows: what this rank will read, in that order.
            window: rows to stay ahead; within a window they are asked for in the order of the disk.
        """
        self._folder = folder
        self._window = max(1, window)
        pieces = [np.sort(rows[i : i + self._window]) for i in range(0, len(rows), self._window)]
        self._rows = np.concatenate(pieces) if pieces else rows
        self._position = 0

    def step(self, consumed: int, batch: int) -> None:
        """Advise on some more rows.

        Args:
            consumed: rows read so far.
            batch: rows of a step.
        """
        start = max(self._position, consumed)
        end = min(consumed + self._window, start + _CATCH_UP * batch, len(self._rows))
        if end > start:
            self._folder.advise(self._rows[start:end])
            self._position = end
