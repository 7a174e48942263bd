"""Builds that are killed, refused by the disk, or run beside each other leave a cache that the next one finishes."""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cache_tools import build as build_module
from cache_tools.build import BuildRequest, check_disk, run_build
from cache_tools.commit import shard_lock
from cache_tools.layout import CacheIncomplete, Paths, partial_path
from cache_tools.read import TeacherCache
from cache_tools.verify import verify_cache
from common.errors import UserError
from distill.teacher import TeacherTargets
from pipeline.batch import CropBatch
from tests.cache_tools.synthetic import SyntheticReader, SyntheticTeacher, synthetic_batch, synthetic_request
from tests.faults.forks import FORKS

SHARD_ROWS = (9, 9, 8, 9, 5, 9, 9, 9, 9, 3, 9, 9)


class SlowReader(SyntheticReader):
    """Leaves time to be killed in."""

    def __call__(self, batches: Sequence[npt.NDArray[np.int64]], view_set: int) -> Iterator[CropBatch]:
        for batch in super().__call__(batches, view_set):
            time.sleep(0.002)
            yield batch


def request_for(root: Path) -> BuildRequest:
    return synthetic_request(root, shard_rows=SHARD_ROWS, view_sets=2)


def build_rank(root: Path, rank: int, world_size: int) -> None:
    run_build(request_for(root), SyntheticTeacher(), SlowReader(), rank=rank, world_size=world_size, progress=False)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("seed, least_kills", [(0, 14), *(pytest.param(s, 60, marks=pytest.mark.slow) for s in (1, 2))])
def test_killed_builds_of_changing_rank_numbers_end_as_an_unbroken_one(
    tmp_path: Path, seed: int, least_kills: int
) -> None:
    unbroken = tmp_path / "unbroken"
    build_rank(unbroken, 0, 1)
    root = tmp_path / "stormy"
    generator = np.random.default_rng(seed)
    kills, commits_seen = 0, set()
    for storm in range(1000):
        world_size = 1 + storm % 3
        ranks = [FORKS.Process(target=build_rank, args=(root, rank, world_size)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        # By progress, not by the clock: after up to two commits, or at once.
        wanted = len(list(root.glob("commit/v*/*.json"))) + int(generator.integers(0, 3))
        while len(list(root.glob("commit/v*/*.json"))) < wanted and any(p.is_alive() for p in ranks):
            time.sleep(0.001)
        time.sleep(float(generator.uniform(0, 0.02)))
        for process in generator.permutation(np.array(ranks, dtype=object)):
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        for process in ranks:
            process.join()
        commits_seen.add(len(list(root.glob("commit/v*/*.json"))))
        if kills >= least_kills and len(commits_seen) > 3:
            break
    assert kills >= least_kills
    assert len(commits_seen) > 3  # the storm hit builds that were under way
    ranks = [FORKS.Process(target=build_rank, args=(root, rank, 2)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert snapshot(root) == snapshot(unbroken)
    assert verify_cache(root, deep=True).damages == ()


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_together_write_the_same_bytes_as_one(tmp_path: Path, world_size: int) -> None:
    root, alone = tmp_path / "together", tmp_path / "alone"
    build_rank(alone, 0, 1)
    ranks = [FORKS.Process(target=build_rank, args=(root, rank, world_size)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert snapshot(root) == snapshot(alone)


def test_shard_that_another_process_writes_is_left_to_it(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with pytest.raises(UserError):  # lays out the cache, then finds no crops to read
        run_build(synthetic_request(root), SyntheticTeacher(), StoppingReader(6), progress=False)
    paths = Paths(root)
    with shard_lock(paths, 0, 1) as ours:
        assert ours
        with shard_lock(paths, 0, 1) as twice:
            assert not twice
        report = run_build(synthetic_request(root), SyntheticTeacher(), SyntheticReader(), progress=False)
        assert (report.rows_written, report.finished) == (11, ())
    report = run_build(synthetic_request(root), SyntheticTeacher(), SyntheticReader(), progress=False)
    assert (report.rows_written, report.finished) == (7, (0,))
    with TeacherCache.open(root) as cache:
        assert np.array_equal(cache.table(0).uids, synthetic_batch(np.arange(18), 0).uids)


class StoppingReader(SyntheticReader):
    """Fails after some rows, as a loader does at an image that is damaged."""

    def __init__(self, rows: int):
        super().__init__()
        self.left = rows

    def __call__(self, batches: Sequence[npt.NDArray[np.int64]], view_set: int) -> Iterator[CropBatch]:
        for batch in super().__call__(batches, view_set):
            self.left -= len(batch.rows)
            if self.left < 0:
                raise UserError("row 13 does not decode")
            yield batch


def test_lock_file_that_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    run_build(synthetic_request(root), SyntheticTeacher(), SyntheticReader(), progress=False)
    before = snapshot(root)
    (root / "commit/v0/.lock.000001").touch()
    run_build(synthetic_request(root), SyntheticTeacher(), SyntheticReader(), progress=False)
    assert snapshot(root) == before


def test_failing_reader_keeps_finished_shards_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with pytest.raises(UserError, match="row 13 does not decode"):
        run_build(synthetic_request(root), SyntheticTeacher(), StoppingReader(6 + 12), progress=False)
    assert [p.name for p in sorted(root.glob("commit/v0/*.json"))] == ["000000.json"]
    assert list(root.rglob("*.partial")) == []
    with pytest.raises(CacheIncomplete, match="lacks 2 of 3 shards"):
        TeacherCache.open(root)


@pytest.mark.parametrize("name", ["patch", "crop"])
def test_full_disk_commits_nothing_and_the_same_build_continues(tmp_path: Path, name: str) -> None:
    root, request = tmp_path / "cache", synthetic_request(tmp_path / "cache")
    whole = tmp_path / "whole"
    run_build(synthetic_request(whole), SyntheticTeacher(), SyntheticReader(), progress=False)
    shutil.copytree(whole, root)
    array = next(a for a in request.spec.arrays() if a.name == name)
    (root / "commit/v0/000001.json").unlink()
    chunk = Paths(root).chunk(0, array, 1)
    partial_path(chunk).symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(UserError, match=rf"{name}/c\.1.*the disk is full"):
        run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    assert sorted(p.name for p in root.glob("commit/v0/*.json")) == ["000000.json", "000002.json"]
    assert list(root.rglob("*.partial")) == []
    run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    assert snapshot(root) == snapshot(whole)


def test_disk_that_is_too_small_is_refused_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = synthetic_request(tmp_path / "new" / "cache", view_sets=2)
    usage = shutil.disk_usage(tmp_path)._replace(free=request.spec.view_set_bytes())
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the disk is too small. 18 images x 2 view set\(s\)"):
        run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    assert not (tmp_path / "new").exists()


def test_cost_is_the_size_on_disk_and_falls_as_shards_are_committed(tmp_path: Path) -> None:
    request = synthetic_request(tmp_path / "cache", view_sets=2)
    before = check_disk(request.root, request.spec, 2)
    assert before.remaining == before.total
    run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    sizes = [p.stat().st_size for p in request.root.glob("data.zarr/v*/*/c.*")]
    assert sum(sizes) == before.total == round(before.bytes_per_image * 18) * 2
    assert check_disk(request.root, request.spec, 3).remaining == before.total // 2


@pytest.mark.parametrize("token", ["patches", "cls"])
def test_teacher_overflow_names_the_image_and_commits_nothing_of_its_shard(tmp_path: Path, token: str) -> None:
    class Overflowing(SyntheticTeacher):
        def __call__(self, crops, num_crops=2):  # type: ignore[no-untyped-def]
            targets = super().__call__(crops, num_crops)
            bright = synthetic_batch(np.array([9]), 0).crops[0].float().mean()
            found = (crops.float().mean((1, 2, 3)) - bright).abs().unflatten(0, (num_crops, -1))[0] < 1e-4
            values: TeacherTargets = getattr(targets, token)
            values[found] = 1e12
            return targets

    root = tmp_path / "cache"
    with pytest.raises(UserError, match=rf"row 9 of the shards .*{token[:3]}.*: largest magnitude 1e\+12"):
        run_build(synthetic_request(root), Overflowing(), SyntheticReader(), progress=False)
    assert [p.name for p in root.glob("commit/v0/*.json")] == ["000000.json"]


def test_other_token_shape_than_the_layout_is_refused(tmp_path: Path) -> None:
    class Narrower(SyntheticTeacher):
        def __call__(self, crops, num_crops=2):  # type: ignore[no-untyped-def]
            targets = super().__call__(crops, num_crops)
            return TeacherTargets(cls=targets.cls, patches=targets.patches[:, :, :3])

    with pytest.raises(UserError, match=r"patches and cls of shape .*3, 16.* laid out for"):
        run_build(synthetic_request(tmp_path / "cache"), Narrower(), SyntheticReader(), progress=False)
