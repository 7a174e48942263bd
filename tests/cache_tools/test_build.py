"""The builder: groups cut at shards, ranks that wait, set-ups that change, file systems without locks."""

import dataclasses
import errno
import fcntl
import json
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_tools import build as build_module
from cache_tools.build import decoder_name, run_build
from cache_tools.codec import encode
from cache_tools.fingerprint import differences, flatten
from cache_tools.layout import CacheMismatch, CacheSpec
from cache_tools.read import TeacherCache
from common.errors import UserError
from pipeline.batch import CropBatch
from tests.cache_tools.synthetic import SyntheticReader, SyntheticTeacher, synthetic_batch, synthetic_request

BuildSmall = Callable[..., Path]
Batches = Sequence[npt.NDArray[np.int64]]


def test_the_engine_of_a_gpu_is_a_decoder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    names = [
        decoder_name(backend, device, hw_decoder=engine)
        for backend, device in (("dali", cuda), ("torch", cuda), ("dali", cpu)) for engine in (False, True)
    ]  # fmt: skip
    assert names == ["dali-cuda", "dali-cuda-engine", "torch-cuda", "torch-cuda", "dali-cpu", "dali-cpu"]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 7))
def test_the_teacher_sees_batches_that_are_cut_at_shards(shard_rows: list[int], batch_size: int) -> None:
    seen: list[list[int]] = []

    class Watching(SyntheticReader):
        def __call__(self, batches: Batches, view_set: int) -> Iterator[CropBatch]:
            seen.extend(rows.tolist() for rows in batches)
            return super().__call__(batches, view_set)

    with tempfile.TemporaryDirectory() as folder:
        request = synthetic_request(Path(folder) / "cache", shard_rows=tuple(shard_rows), batch_size=batch_size)
        run_build(request, SyntheticTeacher(), Watching(), progress=False)
        with TeacherCache.open(request.root) as cache:
            assert cache.num_rows == sum(shard_rows)
    seen = seen[-(-min(6, sum(shard_rows)) // batch_size) :]  # the first were the calibration's
    starts = np.cumsum([0, *shard_rows])
    assert [row for rows in seen for row in rows] == list(range(sum(shard_rows)))
    assert max(map(len, seen)) <= batch_size
    assert len(seen) == sum(-(-rows // batch_size) for rows in shard_rows)
    assert all(np.searchsorted(starts, rows[0], "right") == np.searchsorted(starts, rows[-1], "right") for rows in seen)


def test_a_shard_without_rows_is_built_and_read(tmp_path: Path) -> None:
    request = synthetic_request(tmp_path / "cache", shard_rows=(7, 0, 11))
    run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    with TeacherCache.open(request.root) as cache:
        batch = synthetic_batch(np.array([6, 7, 17]), 0)
        error = (cache.fetch(batch).patches - SyntheticTeacher()(batch.crops).patches).abs()
        assert bool((error <= cache.bound(batch).patches).all())


def test_crops_are_let_go_of_once_the_teacher_has_seen_them(tmp_path: Path) -> None:
    pixels: list[weakref.ref[npt.NDArray[np.uint8]]] = []
    most = 0

    class Watched(SyntheticReader):
        def __call__(self, batches: Batches, view_set: int) -> Iterator[CropBatch]:
            nonlocal most
            for batch in super().__call__(batches, view_set):
                memory = batch.crops.numpy().copy()
                batch = dataclasses.replace(batch, crops=torch.from_numpy(memory))  # lives as long as its storage
                pixels.append(weakref.ref(memory))
                del memory
                most = max(most, sum(reference() is not None for reference in pixels))
                yield batch

    request = synthetic_request(tmp_path / "cache", shard_rows=(120,), batch_size=4)
    run_build(request, SyntheticTeacher(), Watched(), progress=False)
    assert len(pixels) > 30 and most <= 3


def test_stored_codes_are_those_of_the_codec(tmp_path: Path) -> None:
    request = synthetic_request(tmp_path / "cache")
    run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    with TeacherCache.open(request.root) as cache:
        assert cache.calibration is not None
        targets = SyntheticTeacher()(synthetic_batch(np.arange(7), 0).crops)
        encoded = encode(targets, codec="int8", calibration=cache.calibration.tensors())
        stored = (request.root / "data.zarr/v0/patch/c.0.0.0.0.0").read_bytes()
        row = 2 * 4 * 16
        assert b"".join(stored[i * (row + 4) :][:row] for i in range(7)) == encoded.patch.numpy().tobytes()


def test_calibration_comes_from_the_first_rows_of_the_first_view_set(tmp_path: Path) -> None:
    request = dataclasses.replace(synthetic_request(tmp_path / "cache"), calibration_rows=6)
    run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    tokens = SyntheticTeacher()(synthetic_batch(np.arange(6), 0).crops).patches.double().flatten(0, 2).numpy()
    with TeacherCache.open(request.root) as cache:
        assert cache.calibration is not None
        np.testing.assert_allclose(cache.calibration.mean, tokens.mean(0), rtol=1e-6)
        np.testing.assert_allclose(cache.calibration.std, tokens.std(0), rtol=1e-6)


def test_no_view_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="view_sets=0: a cache has at least one"):
        run_build(synthetic_request(tmp_path / "c", view_sets=0), SyntheticTeacher(), SyntheticReader(), progress=False)


def test_layout_of_other_tokens_is_refused(build_small: BuildSmall) -> None:
    request = synthetic_request(build_small())
    wider = dataclasses.replace(request, spec=dataclasses.replace(request.spec, embed_dim=32))
    with pytest.raises(CacheMismatch, match=r"2 crops of 4 x 16 tokens as int8; this build needs .* 4 x 32 as int8"):
        run_build(wider, SyntheticTeacher(), SyntheticReader(), progress=False)


def test_rank_that_waits_in_vain_says_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "WAIT_SECONDS", 0.0)
    request = synthetic_request(tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.zarr: not there after 0 s. The first rank calibrates"):
        run_build(request, SyntheticTeacher(), SyntheticReader(), rank=1, world_size=2, progress=False)


def test_build_continued_with_other_versions_says_so(
    build_small: BuildSmall, capsys: pytest.CaptureFixture[str]
) -> None:
    root = build_small()
    path = root / "data.zarr/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["teacher_cache"]["soft"]["torch"] = "0.0.1"
    path.write_text(json.dumps(metadata))
    run_build(synthetic_request(root, view_sets=2), SyntheticTeacher(), SyntheticReader(), progress=False)
    assert f"continued with another set-up: torch 0.0.1 -> {torch.__version__}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".lock", ".lock.000000"])
def test_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    flock = fcntl.flock

    def no_flock(fd: int, operation: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name == name:
            raise OSError(errno.ENOLCK, "No locks available")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(UserError, match="has no file locks"):
        run_build(synthetic_request(tmp_path / "cache"), SyntheticTeacher(), SyntheticReader(), progress=False)


def test_full_disk_at_the_commit_record_commits_nothing(tmp_path: Path, build_small: BuildSmall) -> None:
    root = build_small()
    record = root / "commit/v0/000001.json"
    before = record.read_bytes()
    record.unlink()
    record.with_name(f".{record.name}.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"000001\.json: the disk is full .* what is finished is kept"):
        run_build(synthetic_request(root), SyntheticTeacher(), SyntheticReader(), progress=False)
    assert not record.exists() and list(root.rglob("*.partial")) == []
    run_build(synthetic_request(root), SyntheticTeacher(), SyntheticReader(), progress=False)
    assert record.read_bytes() == before


def test_reader_that_stops_early_is_our_bug_and_commits_nothing(tmp_path: Path) -> None:
    class Skipping(SyntheticReader):
        def __call__(self, batches: Batches, view_set: int) -> Iterator[CropBatch]:
            return super().__call__([rows[rows != 9] for rows in batches], view_set)

    with pytest.raises(AssertionError):
        run_build(synthetic_request(tmp_path / "cache"), SyntheticTeacher(), Skipping(), progress=False)
    assert [p.name for p in tmp_path.glob("cache/commit/v0/*.json")] == ["000000.json"]


def test_size_of_a_vit_large_cache_is_as_documented() -> None:
    int8 = CacheSpec((2048,), num_crops=2, num_patches=196, embed_dim=1024, codec="int8")
    fp16 = dataclasses.replace(int8, codec="fp16")
    # per row: codes, scales, cls, each with a crc32c and 16 bytes of index; id, image crc, crops
    assert int8.view_set_bytes() / 2048 == pytest.approx(
        2 * 196 * 1024 + 2 * 196 * 2 + 2 * 1024 * 2 + 3 * 20 + 16 + 4 + 48, abs=0.02
    )
    assert round(int8.view_set_bytes() / 2048 / 1e3) == 406 and round(fp16.view_set_bytes() / 2048 / 1e3) == 807


def test_differences_name_leaves_in_natural_order_and_skip_what_is_left_out() -> None:
    found = {"a": {"x": 1, "list": [1.0, 2.0]}, "data": {"shards": [f"s{k}" for k in range(12)]}, "more": 1}
    expected = {"a": {"x": 2, "list": (1.0, 2.0)}, "data": {"shards": [f"s{k}" for k in range(10)] + ["t", "s11"]}}
    assert differences(expected, found) == [
        "  a.x: this run 2, the cache 1",
        "  data.shards.10: this run 't', the cache 's10'",
    ]
    assert differences({"b": 1}, found) == ["  b: this run 1, the cache '(absent)'"]
    assert flatten({"long": "y" * 500})["long"] == "y" * 500
    assert len(differences({"long": "y" * 500}, {"long": "z" * 500})[0]) < 400
