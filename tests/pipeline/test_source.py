"""Reading by row: with few descriptors, where disks fail, with advice ahead."""

import os

import numpy as np
import pytest

from common.errors import UserError
from pipeline.jobs import Readahead
from shards.folder import ShardFolder

ROWS = 48


def test_every_row_is_the_packed_jpeg(shards):
    with ShardFolder(shards) as source:
        assert len(source) == ROWS
        for row in range(ROWS):
            tar = shards / source.manifest.shards[source.index.shard[row]].name
            offset, size = int(source.index.offset[row]), int(source.index.size[row])
            (jpeg,) = source.jpegs([row])
            assert jpeg.tobytes() == source.jpeg(row) == tar.read_bytes()[offset : offset + size]
            assert not jpeg.flags.writeable
            assert jpeg[:2].tobytes() == b"\xff\xd8"


def test_keys_are_the_names_in_the_tar(shards, source):
    import tarfile

    names = []
    for shard in source.manifest.shards:
        with tarfile.open(shards / shard.name) as tar:
            names += [n.removesuffix(".jpg") for n in tar.getnames() if n.endswith(".jpg")]
    assert [source.key(row) for row in range(ROWS)] == names
    assert source.describe(25) == f"{shards}/shard-000001.tar: row 25 (key {names[25]})"


def test_sizes_are_height_and_width(source):
    rows = np.array([5, 0, 47])
    expected = np.stack([source.index.height[rows], source.index.width[rows]], -1)
    assert np.array_equal(source.sizes(rows), expected)
    assert source.sizes(rows).dtype == np.int64


def test_descriptors_stay_within_the_limit_and_are_closed(shards):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    source = ShardFolder(shards)
    source._max_open = 2
    for row in np.random.default_rng(0).permutation(ROWS):
        source.jpeg(int(row))
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # noqa: PTH208
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_tar_cut_while_it_is_read_is_named(shards, monkeypatch):
    real = os.pread
    with ShardFolder(shards) as source:
        monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: real(descriptor, size, offset)[:-1])
        with pytest.raises(UserError, match=r"shard-000000\.tar: \d+ bytes at offset \d+, the index says"):
            source.jpeg(0)


def test_a_shard_that_went_away_after_opening_is_named(shards, monkeypatch):
    with ShardFolder(shards) as source:
        monkeypatch.setattr(os, "open", _failing(116, "Stale file handle"))
        with pytest.raises(UserError, match=r"shard-000001\.tar: cannot be opened any more \(Stale file handle\)"):
            source.jpeg(25)


def test_a_read_that_fails_is_named(shards, monkeypatch):
    with ShardFolder(shards) as source:
        monkeypatch.setattr(os, "pread", _failing(5, "Input/output error"))
        with pytest.raises(UserError, match=r"shard-000000\.tar: \d+ bytes at offset \d+ cannot be read \(Input"):
            source.jpeg(0)


def _failing(number, text):
    def fail(*_arguments):
        raise OSError(number, text)

    return fail


@pytest.fixture
def advised(monkeypatch):
    """What the kernel was asked for: (path, offset, size) in order."""
    calls = []

    def note(descriptor, offset, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), offset, size))

    monkeypatch.setattr(os, "posix_fadvise", note)
    return calls


def test_advice_is_given_for_the_bytes_of_each_row(source, advised):
    source.advise(np.array([3, 25, 4]))
    index = source.index
    expected = {
        (str((source.path / f"shard-{index.shard[r]:06d}.tar").resolve()), index.offset[r], index.size[r])
        for r in (3, 4, 25)
    }
    assert set(advised) == expected
    assert len(advised) == 3


def test_neighbours_in_a_shard_are_asked_for_at_once(source, advised):
    index, rows = source.index, np.arange(len(source.index))
    first = np.flatnonzero(np.diff(index.shard, prepend=-1))  # the first row of each shard
    last = np.append(first[1:], len(rows)) - 1
    assert len(first) > 1
    source.advise(rows)
    assert [(offset, size) for _, offset, size in advised] == [
        (index.offset[a], index.offset[b] + index.size[b] - index.offset[a]) for a, b in zip(first, last, strict=True)
    ]
    advised.clear()
    source.advise(rows[:0])
    assert advised == []


def test_advice_that_is_refused_changes_nothing(source, monkeypatch):
    def refuse(*_arguments):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    source.advise(np.array([0, 1]))
    assert source.jpeg(0)[:2] == b"\xff\xd8"


class _Recorder:
    def __init__(self):
        self.rows = []

    def advise(self, rows):
        self.rows += rows.tolist()


@pytest.mark.parametrize("window", [8, 20, 100])
def test_readahead_asks_for_every_row_once_before_it_is_read(window):
    order = np.random.default_rng(0).permutation(60)
    recorder, batch = _Recorder(), 4
    ahead = Readahead(recorder, order, window)
    for step in range(15):
        ahead.step(step * batch, batch)
        asked = recorder.rows
        # Up to a window ahead, and within a window in the order of the disk.
        assert len(asked) <= step * batch + window
        caught_up = 4 * batch * (step + 1) >= min(60, step * batch + window)
        if caught_up:
            assert set(order[: (step + 1) * batch]) <= set(asked)
    assert sorted(recorder.rows) == list(range(60))
    for start in range(0, 60, window):
        part = recorder.rows[start : start + window]
        assert part == sorted(order[start : start + window].tolist())


def test_readahead_catches_up_in_pieces_of_a_few_batches():
    recorder = _Recorder()
    ahead = Readahead(recorder, np.arange(1000), 500)
    ahead.step(0, 10)
    assert len(recorder.rows) == 40
    ahead.step(10, 10)
    assert len(recorder.rows) == 80


def test_a_loader_asks_for_rows_ahead(shards, advised, small):
    from pipeline.loader import open_loader

    with open_loader(
        shards, device="cpu", backend="cpu", global_batch_size=8, seed=0, augmentation=small, num_threads=1
    ) as loader:
        batch = next(loader)
    with ShardFolder(shards) as source:
        index = source.index
        for row in batch.rows:
            path = str((source.path / source.manifest.shards[index.shard[row]].name).resolve())
            assert any(
                path == asked and start <= index.offset[row] and index.offset[row] + index.size[row] <= start + size
                for asked, start, size in advised
            )
