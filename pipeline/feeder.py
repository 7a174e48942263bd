"""One thread that runs an iterator ahead of its consumer, and ends with it in every case."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# Longer than any disk or mount takes that still works.
STALL_SECONDS = 600.0
_JOIN_SECONDS = 60.0
_POLL_SECONDS = 0.5

_log = logging.getLogger("pipeline")


class _Shared(Generic[T]):
    """What the thread and its consumer share; the thread holds no reference to the `Feeder`."""

    def __init__(self, depth: int) -> None:
        self.changed = threading.Condition()  # guards all below; told at each item taken, given, and at the end
        self.items: deque[T] = deque()
        self.depth = depth
        self.stop = False
        self.ended = False
        self.error: BaseException | None = None
        self.process = os.getpid()


class Feeder(Generic[T]):
    """Iterates in a daemon thread, at most `depth` items ahead.

    The iterator is made, run and closed in that thread. An exception in it is raised by the `get` that would
    have given the next item. The thread ends when the iterator does, on `close`, when the feeder is garbage
    collected, and at the interpreter's exit.
    """

    def __init__(
        self, make_items: Callable[[], Iterator[T]], *, depth: int, name: str = "feeder"
    ) -> None:
        """Start the thread.

        Args:
            make_items: called once in the thread; must hold no reference to this object's owner.
            depth: items to keep ready.
            name: of the thread.
        """
        self._shared: _Shared[T] = _Shared(depth)
        self._thread = threading.Thread(target=_run, args=(self._shared, make_items), name=name, daemon=True)
        self._thread.start()
        self._close = weakref.finalize(self, _stop, self._shared, self._thread)

    def get(self) -> T:
        """The next item.

        Raises:
            StopIteration: the iterator has ended, or the feeder is closed.
            RuntimeError: this is a forked process, or the thread gave nothing for `STALL_SECONDS`.
            BaseException: whatever the iterator raised.
        """
        shared, start = self._shared, time.monotonic()
        if shared.process != os.getpid():
            # The lock must not be touched: the parent's thread may have held it at the fork.
            raise RuntimeError(
                f"data loader: opened in process {shared.process}, used in {os.getpid()}. A forked process has no "
                "threads of its parent, so no feeder. Open the loader in the process that uses it."
            )
        with shared.changed:
            while not shared.items:
                if shared.error is not None:
                    raise shared.error
                if shared.ended or shared.stop:
                    raise StopIteration
                waited = time.monotonic() - start
                if waited > STALL_SECONDS:
                    raise RuntimeError(
                        f"data loader: no batch for {waited:.0f} s. Reading or decoding hangs, which a dead "
                        "network mount does too. Check the storage of the shards, then resume."
                    )
                # In pieces, so that Ctrl-C is seen and a stall is noticed.
                shared.changed.wait(_POLL_SECONDS)
            item = shared.items.popleft()
            shared.changed.notify_all()
        return item

    def close(self) -> None:
        """Stop the thread and wait for it; a second call does nothing."""
        self._close()

    @property
    def ready(self) -> int:
        """Items that `get` would give at once."""
        return len(self._shared.items)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()


def _run(shared: _Shared[T], make_items: Callable[[], Iterator[T]]) -> None:
    try:
        items = make_items()
        try:
            while not shared.stop:
                try:
                    item = next(items)
                except StopIteration:
                    break
                with shared.changed:
                    # Full: waiting here, and not in the iterator, lets `close` end the thread at once.
                    shared.changed.wait_for(lambda: shared.stop or len(shared.items) < shared.depth)
                    if shared.stop:
                        break
                    shared.items.append(item)
                    del item
                    shared.changed.notify_all()
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
    except BaseException as error:  # handed to the consumer, which raises it
        with shared.changed:
            shared.error = error
    finally:
        with shared.changed:
            shared.ended = True
            shared.changed.notify_all()


def _stop(shared: _Shared[T], thread: threading.Thread) -> None:
    if shared.process != os.getpid():
        return  # a forked process has nothing to stop
    with shared.changed:
        shared.stop = True
        shared.items.clear()
        shared.changed.notify_all()
    if thread is not threading.current_thread():
        thread.join(_JOIN_SECONDS)
        if thread.is_alive():
            _log.warning("data loader: the feeder thread did not end within %.0f s; left behind", _JOIN_SECONDS)
