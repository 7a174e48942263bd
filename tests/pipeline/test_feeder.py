"""The feeder thread: order, errors, and an end in every case."""

import gc
import itertools
import threading
import time

import pytest

from pipeline.feeder import Feeder, _stop

PATIENCE = 1000.0  # seconds until a test that hangs gives up


def _feeder(make, *, depth=2):
    return Feeder(make, depth=depth)


def _wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_come_in_order_and_then_the_end():
    feeder = _feeder(lambda: iter(range(100)))
    assert [feeder.get() for _ in range(100)] == list(range(100))
    for _ in range(2):
        with pytest.raises(StopIteration):
            feeder.get()
    _wait_until(lambda: not feeder.alive)


def test_at_most_depth_items_are_kept_ready():
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    feeder = _feeder(items, depth=3)
    assert feeder.get() == 0
    _wait_until(lambda: len(made) == 5)  # one taken, three ready, one in hand
    time.sleep(0.05)
    assert len(made) == 5
    feeder.close()


def test_an_error_comes_after_the_items_before_it_and_again_on_every_get():
    def items():
        yield 1
        raise ValueError("broken")

    feeder = _feeder(items)
    assert feeder.get() == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            feeder.get()


def test_an_error_in_making_the_iterator_is_raised():
    def make():
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        _feeder(make).get()


def test_even_a_system_exit_in_the_thread_reaches_the_consumer():
    def items():
        yield 1
        raise SystemExit(3)

    feeder = _feeder(items)
    feeder.get()
    with pytest.raises(SystemExit):
        feeder.get()


def test_close_ends_the_thread_and_closes_the_iterator_in_it():
    where = []

    def items():
        try:
            yield from itertools.count()
        finally:
            where.append(threading.current_thread())

    feeder = _feeder(items)
    feeder.get()
    feeder.close()
    assert not feeder.alive
    assert where == [feeder._thread]
    feeder.close()
    with pytest.raises(StopIteration):
        feeder.get()


def test_dropping_the_feeder_ends_its_thread():
    feeder = _feeder(lambda: itertools.count())
    feeder.get()
    thread = feeder._thread
    del feeder
    gc.collect()
    assert not thread.is_alive()


def test_an_iterator_that_hangs_is_an_error_after_the_stall_time(monkeypatch):
    monkeypatch.setattr("pipeline.feeder.STALL_SECONDS", 0.2)
    hang = threading.Event()

    def items():
        hang.wait(PATIENCE)
        yield 1

    feeder = _feeder(items)
    with pytest.raises(RuntimeError, match="data loader: no batch for"):
        feeder.get()
    hang.set()
    feeder.close()


def test_another_process_is_told_and_touches_no_lock(monkeypatch):
    feeder = _feeder(lambda: itertools.count())
    feeder.get()
    shared = feeder._shared
    with monkeypatch.context() as patch:
        patch.setattr(shared, "changed", None)  # a forked child may find it locked for ever
        patch.setattr(shared, "process", shared.process + 1)
        with pytest.raises(RuntimeError, match=rf"opened in process {shared.process}, used in \d+"):
            feeder.get()
        _stop(shared, feeder._thread)
    assert feeder.alive
    feeder.close()
    assert not feeder.alive


def test_the_feeder_fills_up_while_the_main_thread_is_busy_in_python():
    feeder = _feeder(lambda: (sum(range(1000)) for _ in itertools.count()), depth=5)
    deadline = time.monotonic() + PATIENCE
    busy = 0
    while feeder.ready < 5:
        busy += 1  # pure Python: the interpreter lock is only given up when it is asked for
        assert time.monotonic() < deadline
    feeder.close()
