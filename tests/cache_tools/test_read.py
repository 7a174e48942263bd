"""The reader: live = cached within the bound, joined by id, checked, safe over processes, without growth."""

import dataclasses
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from cache_tools.build import run_build
from cache_tools.codec import Calibration, decode_int8_numpy
from cache_tools.join import unpack_ids
from cache_tools.layout import CacheIncomplete, CacheMismatch, CacheStale
from cache_tools.read import TeacherCache
from cache_tools.repair import repair_cache
from cache_tools.verify import verify_cache
from common.errors import UserError
from distill.teacher import TeacherTargets
from tests.cache_tools.synthetic import (
    SyntheticReader,
    SyntheticTeacher,
    synthetic_batch,
    synthetic_request,
    synthetic_uids,
)

BuildSmall = Callable[..., Path]
ROWS = np.array([17, 3, 4, 5, 0, 13, 3])


def live(rows: np.ndarray = ROWS, view_set: int = 0) -> TeacherTargets:
    return SyntheticTeacher()(synthetic_batch(rows, view_set).crops)


@pytest.mark.parametrize("codec", ["int8", "fp16"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_cached_equals_live_within_the_stated_bound(
    build_small: BuildSmall, codec: str, dtype: torch.dtype | None
) -> None:
    with TeacherCache.open(build_small(codec=codec, view_sets=2)) as cache:
        batch = synthetic_batch(ROWS, 1)
        cached, expected = cache.fetch(batch, dtype=dtype), live(view_set=1)
        bound = cache.bound(batch, dtype=dtype or torch.float32)
        for name in ("cls", "patches"):
            ours, theirs, most = getattr(cached, name), getattr(expected, name), getattr(bound, name)
            assert ours.dtype == (dtype or torch.float32) and ours.shape == theirs.shape
            error = (ours.double() - theirs.double()).abs()
            assert bool((error <= most).all())
            assert float((error / most).max()) > 0.5  # the bound is not idle
        # At most half a step of 1/127 of the token's largest deviation, and the fp16 rounding of that step.
        std = torch.ones(16) if cache.calibration is None else torch.tensor(cache.calibration.std)
        assert float((bound.patches / std).max()) < 0.1


def test_zarr_python_and_numpy_read_back_the_same_values(build_small: BuildSmall) -> None:
    root = build_small()
    group = zarr.open_group(root / "data.zarr", mode="r")
    calibration = Calibration(np.asarray(group["codec/mean"][:]), np.asarray(group["codec/std"][:]))
    with TeacherCache.open(root) as cache:
        tokens = list(cache.tokens(0, batch_size=7))
        for shard, rows in enumerate((7, 7, 4)):
            codes, scale = (np.asarray(group[f"v0/{name}"][shard, :rows]) for name in ("patch", "scale"))
            decoded = decode_int8_numpy(codes, scale, calibration)
            assert np.array_equal(decoded, tokens[shard].patches.numpy())
            cls = np.asarray(group["v0/cls"][shard, :rows]).astype(np.float32)
            assert np.array_equal(cls, tokens[shard].cls.numpy())
            ids = unpack_ids(np.asarray(group["v0/id"][shard, :rows]))
            assert np.array_equal(ids, synthetic_uids(np.arange(shard * 7, shard * 7 + rows)))
            assert not np.asarray(group["v0/id"][shard, :, 8:]).any()
        batch = synthetic_batch(np.arange(18), 0)
        crcs, specs = np.asarray(group["v0/img_crc"][:]), np.asarray(group["v0/crop"][:])
        assert np.array_equal(np.concatenate([crcs[0], crcs[1], crcs[2, :4]]), batch.image_crcs)
        assert np.array_equal(np.concatenate([specs[0], specs[1], specs[2, :4]]), batch.global_crops_spec)


def test_join_is_by_id_whatever_the_row_numbers_say(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small()) as cache:
        batch = synthetic_batch(ROWS, 0)
        misordered = dataclasses.replace(batch, rows=batch.rows[::-1].copy())
        assert torch.equal(cache.fetch(misordered).patches, cache.fetch(batch).patches)


def test_changed_image_is_stale(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small()) as cache:
        batch = synthetic_batch(ROWS, 0)
        crcs = batch.image_crcs.copy()
        crcs[2] ^= 1
        with pytest.raises(CacheStale, match=r"row 4 of the shards .* its JPEG has crc32c"):
            cache.fetch(dataclasses.replace(batch, image_crcs=crcs))


@pytest.mark.parametrize("field, name", [(0, "top"), (1, "left"), (4, "flip"), (5, "image height")])
def test_crops_of_another_plan_are_stale(build_small: BuildSmall, field: int, name: str) -> None:
    with TeacherCache.open(build_small()) as cache:
        batch = synthetic_batch(ROWS, 0)
        specs = batch.global_crops_spec.copy()
        specs[1, 1, field] += 1
        with pytest.raises(CacheStale, match=f"row 3 of the shards .* {name}.* of global crop 1"):
            cache.fetch(dataclasses.replace(batch, global_crops_spec=specs))


def test_shifted_seed_is_stale(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small()) as cache, pytest.raises(CacheStale, match="Another seed, view set"):
        cache.fetch(synthetic_batch(ROWS, 0, seed=1))


def test_other_number_of_crops_is_stale(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small()) as cache:
        batch = synthetic_batch(ROWS, 0)
        with pytest.raises(CacheStale, match="rows hold 2 global crops, the batch has 1"):
            cache.fetch(dataclasses.replace(batch, global_crops_spec=batch.global_crops_spec[:, :1]))


def test_unknown_image_is_refused(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small()) as cache, pytest.raises(CacheStale, match=r"row 18 .* is not in the cache"):
        cache.fetch(synthetic_batch(np.array([1, 18]), 0))


def test_view_set_that_was_not_opened_is_named(build_small: BuildSmall) -> None:
    root = build_small(view_sets=2)
    with TeacherCache.open(root, view_sets=[1]) as cache:
        with pytest.raises(UserError, match=r"view set 0 is not open; \[1\] are"):
            cache.fetch(synthetic_batch(ROWS, 0))
        assert torch.equal(cache.fetch(synthetic_batch(ROWS, 1)).cls, live(view_set=1).cls.half().float())
    with pytest.raises(CacheIncomplete, match=r"has view sets \[0, 1\], not \[2\]"):
        TeacherCache.open(root, view_sets=[0, 2])


def test_tokens_stream_rows_in_the_order_asked(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small()) as cache:
        streamed = torch.cat([t.patches for t in cache.tokens(0, ROWS, batch_size=3)])
        assert torch.equal(streamed, cache.fetch(synthetic_batch(ROWS, 0)).patches)
        assert sum(len(t.cls) for t in cache.tokens(0, batch_size=5)) == cache.num_rows == 18
        with pytest.raises(UserError, match="rows 2 to 18 were asked for, it holds 0 to 17"):
            next(cache.tokens(0, [2, 18]))


def test_join_of_a_stream_reads_ahead_and_keeps_pairs(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small(view_sets=2)) as cache:
        batches = [synthetic_batch(ROWS + shift, shift % 2) for shift in (0, -0, 0)]
        pairs = list(cache.join(iter(batches)))
        assert [pair[0] for pair in pairs] == batches
        for batch, targets in pairs:
            assert torch.equal(targets.patches, cache.fetch(batch).patches)


def test_targets_outlive_the_buffers_they_were_read_through(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small(codec="fp16")) as cache:
        first = cache.fetch(synthetic_batch(ROWS, 0), dtype=torch.float16)
        kept = first.patches.clone()
        for shift in range(3):
            cache.fetch(synthetic_batch((ROWS + shift) % 18, 0), dtype=torch.float16)
        assert torch.equal(first.patches, kept)


def test_rows_are_checked_at_every_read_unless_that_is_off(build_small: BuildSmall) -> None:
    root = build_small()
    with TeacherCache.open(root) as checked, TeacherCache.open(root, verify=False) as unchecked:
        expected = checked.fetch(synthetic_batch(ROWS, 0)).patches
        path = root / "data.zarr/v0/patch/c.0.0.0.0.0"
        data = bytearray(path.read_bytes())
        data[3 * (2 * 4 * 16 + 4)] ^= 1  # row 3
        path.write_bytes(data)
        changed = unchecked.fetch(synthetic_batch(ROWS, 0)).patches
        assert int((changed != expected).any(-1).any(-1).any(-1).sum()) == 2  # ROWS holds row 3 twice
        with pytest.raises(UserError, match="row 3 has crc32c"):
            checked.fetch(synthetic_batch(ROWS, 0))


def test_expected_fingerprint_is_compared_field_by_field(build_small: BuildSmall) -> None:
    root = build_small()
    request = synthetic_request(root)
    TeacherCache.open(root, expect=request.fingerprint).close()
    for section, field, value in (
        ("teacher", "seed", 1),
        ("crops", "seed", 1),
        ("codec", "name", "fp16"),
        ("data", "rows", 19),
        ("teacher", "extra", None),
    ):
        other = request.fingerprint | {section: request.fingerprint[section] | {field: value}}
        with pytest.raises(CacheMismatch, match=rf"1 field\(s\) differ:\n  {section}\.{field}: this run {value!r}"):
            TeacherCache.open(root, expect=other)
    without = {key: value for key, value in request.fingerprint.items() if key != "codec"}
    TeacherCache.open(root, expect=without).close()


def test_mismatch_shows_eight_fields_and_counts_the_rest(tmp_path: Path, build_small: BuildSmall) -> None:
    root = build_small()
    request = synthetic_request(tmp_path / "other", shard_rows=(1,) * 30)
    with pytest.raises(CacheMismatch, match=r"31 field\(s\) differ") as caught:
        TeacherCache.open(root, expect=request.fingerprint)
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  data.rows: this run 30, the cache 18")
    assert lines[2].startswith("  data.shards.0: this run 'shard-000000.tar 1', the cache 'shard-000000.tar 7'")
    assert lines[9] == "  and 23 more"


def resident_bytes() -> int:
    """Memory in use now. The peak of a process would hide growth below what earlier tests took."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_and_descriptors_do_not_grow(build_small: BuildSmall) -> None:
    with TeacherCache.open(build_small()) as cache:
        batch = synthetic_batch(ROWS, 0)
        for _ in range(300):
            cache.fetch(batch)
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        before = resident_bytes()
        for _ in range(3000):
            cache.fetch(batch)
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
        # A leak of one row (784 bytes) a fetch would be 16 MB over 3000 fetches of 7 rows.
        assert resident_bytes() - before < 4 << 20


def test_a_rechunked_cache_is_refused_and_told_what_reads_it(build_small: BuildSmall) -> None:
    root = build_small()
    values = np.asarray(zarr.open_array(root / "data.zarr/v0/patch", mode="r")[:])
    zarr.create_array(root / "data.zarr/v0/patch", data=values, chunks=(1, 3, 2, 4, 16), overwrite=True)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    for refuse in (TeacherCache.open, verify_cache, repair_cache):
        with pytest.raises(CacheMismatch, match=r"patch/zarr\.json: .*codecs.* was rechunked .* zarr-python reads it"):
            refuse(root)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_view_set_added_later_leaves_the_others_untouched(build_small: BuildSmall) -> None:
    root = build_small(view_sets=1)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("v0/**/*") if p.is_file()}
    assert len(before) == 3 + 6 * 4 + 1  # records, six arrays of three files and metadata, the group's metadata
    run_build(synthetic_request(root, view_sets=3), SyntheticTeacher(), SyntheticReader(), progress=False)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("v0/**/*") if p.is_file()} == before
    with TeacherCache.open(root) as cache:
        assert cache.view_sets == (0, 1, 2)
        assert torch.equal(cache.fetch(synthetic_batch(ROWS, 2)).cls, live(view_set=2).cls.half().float())
