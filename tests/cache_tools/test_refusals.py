"""Refusals that no other test provokes: each names the place and what to do."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache_tools import layout
from cache_tools.build import run_build
from cache_tools.commit import shard_lock
from cache_tools.layout import CacheCorrupt, Paths
from cache_tools.options import Verify
from cache_tools.read import TeacherCache
from cache_tools.repair import repair_cache
from cache_tools.verify import verify_cache
from common.errors import UserError
from pipeline.augmentation import named_augmentation
from shards.manifest import ShardIndex
from tests.cache_tools.synthetic import SyntheticReader, SyntheticTeacher, synthetic_batch, synthetic_request

BuildSmall = Callable[..., Path]
PATCH_FILE = "data.zarr/v0/patch/c.1.0.0.0.0"


def index_of(rows: int) -> ShardIndex:
    batch = synthetic_batch(np.arange(rows), 0)
    zeros = np.zeros(rows)
    columns = dict.fromkeys(("shard", "offset", "size", "height", "width", "label", "flags"), zeros)
    return ShardIndex(uid=batch.uids, crc32c=batch.image_crcs, **columns)  # type: ignore[arg-type]


def test_file_that_is_cut_after_it_was_opened_is_corrupt(build_small: BuildSmall) -> None:
    root = build_small()
    with TeacherCache.open(root) as cache:
        cache.fetch(synthetic_batch(np.array([7]), 0))
        with (root / PATCH_FILE).open("r+b") as file:
            file.truncate(3 * (2 * 4 * 16 + 4) + 1)
        with pytest.raises(CacheCorrupt, match=r"c\.1\.0\.0\.0\.0: ends within row 3"):
            cache.fetch(synthetic_batch(np.array([7, 10]), 0))


def test_verify_against_an_index_of_other_length_says_so(build_small: BuildSmall) -> None:
    root = build_small()
    assert verify_cache(root, index=index_of(18)).damages == ()
    damages = verify_cache(root, index=index_of(17)).damages
    assert len(damages) == 3 and "18 rows, the shards hold 17" in damages[0].message


def test_repair_leaves_a_shard_that_is_being_written_alone(build_small: BuildSmall) -> None:
    root = build_small()
    (root / PATCH_FILE).unlink()
    with shard_lock(Paths(root), 0, 1), pytest.raises(UserError, match="shard 1 of view set 0 is being written"):
        repair_cache(root)
    assert (root / "commit/v0/000001.json").exists()


def test_repair_removes_files_of_shards_without_a_record(build_small: BuildSmall) -> None:
    root = build_small()
    (root / "commit/v0/000001.json").unlink()
    partial = root / "data.zarr/v0/cls/.c.1.0.0.0.partial"
    partial.write_bytes(b"half")
    assert repair_cache(root) == ()
    assert not partial.exists() and not (root / PATCH_FILE).exists()
    assert (root / PATCH_FILE.replace("c.1", "c.0")).exists()


def test_zarr_version_with_another_layout_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "differing_fields", lambda path, array, spec: ["codecs"])
    with pytest.raises(UserError, match=r"patch: zarr .* writes codecs in another way"):
        run_build(synthetic_request(tmp_path / "cache"), SyntheticTeacher(), SyntheticReader(), progress=False)
    assert not (tmp_path / "cache/data.zarr/v0").exists()


def test_unknown_codec_is_refused(build_small: BuildSmall) -> None:
    root = build_small()
    path = root / "data.zarr/zarr.json"
    path.write_text(path.read_text().replace('"codec": "int8"', '"codec": "int3"'))
    with pytest.raises(UserError, match="codec 'int3' is unknown to this version; it knows int8, fp16"):
        TeacherCache.open(root)


def test_teacher_check_of_an_augmentation_that_flags_cannot_give_is_refused(tmp_path: Path) -> None:
    odd = dataclasses.replace(named_augmentation("dino"), aspect_ratio=(0.5, 2.0)).geometry_fingerprint()
    fingerprint = {"crops": {"geometry": json.loads(json.dumps(odd)), "seed": 3}, "teacher": {"architecture": "x"}}
    with pytest.raises(UserError, match="an augmentation that is none of dino, dinov2_released"):
        Verify(tmp_path, shards=tmp_path).teacher_options(fingerprint)
    for name in ("dino", "dinov2_released"):
        geometry = json.loads(
            json.dumps(dataclasses.replace(named_augmentation(name), teacher_photometric=True).geometry_fingerprint())
        )
        fingerprint["crops"] = {"geometry": geometry, "seed": 3}
        options = Verify(tmp_path, shards=tmp_path).teacher_options(fingerprint)
        assert (options.augmentation, options.data_seed, options.teacher_arch) == (name, 3, "x")
        assert json.loads(json.dumps(options.teacher_crops().geometry_fingerprint())) == geometry
