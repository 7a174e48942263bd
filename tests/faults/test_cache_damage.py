"""Every kind of damage to a teacher cache is an error that names the file, and repair mends it to the byte."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache_tools.build import run_build
from cache_tools.layout import CacheCorrupt, CacheIncomplete, CacheMismatch, CodecName
from cache_tools.read import TeacherCache
from cache_tools.repair import repair_cache
from cache_tools.verify import verify_against_teacher, verify_cache
from common.errors import UserError
from tests.cache_tools.synthetic import SyntheticReader, SyntheticTeacher, synthetic_batch, synthetic_request

FILES = {
    "patch": "c.1.0.0.0.0",
    "scale": "c.1.0.0.0",
    "cls": "c.1.0.0.0",
    "id": "c.1.0.0",
    "img_crc": "c.1.0",
    "crop": "c.1.0.0.0",
}
ROW_ARRAYS = ("patch", "scale", "cls")


def build(root: Path, codec: CodecName = "int8", view_sets: int = 1, seed: int = 0) -> Path:
    request = synthetic_request(root, codec=codec, view_sets=view_sets, seed=seed)
    run_build(request, SyntheticTeacher(), SyntheticReader(seed=seed), progress=False)
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file's bytes but those that repair moved aside."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_relative_to(root / "damaged"))
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {codec: build(tmp_path_factory.mktemp(codec) / "cache", codec) for codec in ("int8", "fp16")}  # type: ignore[arg-type]


def read_everything(root: Path) -> None:
    with TeacherCache.open(root) as cache:
        cache.fetch(synthetic_batch(np.arange(18), 0))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(position: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 0x10
        path.write_bytes(data)

    return change


def zero_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def take_neighbours(path: Path) -> None:
    shutil.copyfile(path.with_name(path.name.replace("c.1", "c.0", 1)), path)


KINDS: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "emptied": lambda path: path.write_bytes(b"") and None,
    "truncated": truncate,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "zero tail": zero_tail,
    "bit flipped in the data": flip(9),
    "bit flipped in the index or checksum": flip(-3),
    "another shard's file": take_neighbours,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec, name", [("int8", name) for name in FILES] + [("fp16", "patch")])
def test_damaged_file_is_named_by_reader_and_verify_and_repaired_to_the_byte(
    pristine: dict[str, Path], tmp_path: Path, codec: CodecName, name: str, kind: str
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine[codec], root)
    before = snapshot(root)
    path = root / "data.zarr/v0" / name / FILES[name]
    KINDS[kind](path)
    with pytest.raises(CacheCorrupt, match=f"{name}/{FILES[name]}"):
        read_everything(root)
    report = verify_cache(root, deep=True)
    assert [(d.view_set, d.shard) for d in report.damages] == [(0, 1)]
    assert str(path) in report.damages[0].message
    if kind not in ("bit flipped in the data", "zero tail") or name not in ROW_ARRAYS:
        assert verify_cache(root).damages  # all but a row's own bytes is seen without reading every row
    assert repair_cache(root) == report.damages
    with pytest.raises(CacheIncomplete, match=r"view set 0 lacks 1 of 3 shards \(1\)"):
        TeacherCache.open(root)
    build(root, codec)
    assert snapshot(root) == before


def test_rows_of_another_build_with_the_same_first_row_are_found_by_a_deep_verify(
    pristine: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    path = root / "data.zarr/v0/patch" / FILES["patch"]
    row = 2 * 4 * 16 + 4
    data = path.read_bytes()
    path.write_bytes(data[:row] + data[2 * row : 3 * row] + data[row : 2 * row] + data[3 * row :])
    report = verify_cache(root, deep=True)
    assert len(report.damages) == 1 and "though each row fits its own checksum" in report.damages[0].message


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.unlink(), "lacks 1 of 3 shards"),
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "not JSON"),
        (lambda p: p.write_bytes(b"[]"), "holds a list"),
        (lambda p: p.write_bytes(b"{}"), "not a commit record"),
        (lambda p: shutil.copyfile(p.with_name("000000.json"), p), "shard is 0, this cache needs 1"),
        (lambda p: p.write_text(p.read_text().replace('"rows":7', '"rows":6')), "rows is 6, this cache needs 7"),
    ],
)
def test_damaged_commit_record_is_named(
    pristine: dict[str, Path], tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    before = snapshot(root)
    change(root / "commit/v0/000001.json")
    with pytest.raises((CacheCorrupt, CacheIncomplete), match=message):
        TeacherCache.open(root)
    repair_cache(root)
    build(root)
    assert snapshot(root) == before


def test_repair_touches_nothing_where_every_record_would_go(pristine: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    shutil.rmtree(root / "metadata_copy")  # as of a cache of an earlier version
    path = root / "data.zarr/zarr.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 8', 1))
    before = snapshot(root)
    with pytest.raises(UserError, match=r"all 3 records would go, so nothing was touched.*data\.zarr/zarr\.json"):
        repair_cache(root)
    assert snapshot(root) == before
    path.write_text(path.read_text().replace('"seed": 8', '"seed": 0', 1))
    read_everything(root)
    assert repair_cache(root) == () and snapshot(root) == snapshot(pristine["int8"])


def test_flipped_bits_of_metadata_are_errors_of_ours_and_repair_keeps_every_row(
    pristine: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    top, before = root / "data.zarr/zarr.json", snapshot(root)
    others = [p for p in sorted(root.rglob("*")) if p.is_file() and (p.suffix == ".json" or "codec" in p.parts)]
    draw, refused = random.Random(0), 0
    for i in range(450):
        path = top if i % 2 else draw.choice(others)
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        for read in (read_everything, verify_cache):
            try:  # a flip in a note or a space harms nothing
                read(root)
            except UserError:
                refused += 1
        if path == top or "codec" in path.parts or "metadata_copy" in path.parts:
            repair_cache(root)
        else:
            path.write_bytes(before[str(path.relative_to(root))])
        assert snapshot(root) == before
    assert refused > 300


def test_attributes_that_lack_a_key_are_named(pristine: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    path = root / "data.zarr/zarr.json"
    for key in ("spec", "fingerprint", "quality", "embed_dim", "codec"):
        whole = path.read_text()
        path.write_text(whole.replace(f'"{key}"', f'"{key[:-1]}_"', 1))
        for refuse in (TeacherCache.open, verify_cache):
            with pytest.raises(CacheCorrupt, match=rf"data.zarr/zarr.json: its attributes were altered .*{key}"):
                refuse(root)
        repair_cache(root)
        assert path.read_text() == whole


def test_commit_records_of_another_cache_are_refused(pristine: dict[str, Path], tmp_path: Path) -> None:
    root = build(tmp_path / "cache", seed=1)
    shutil.copyfile(pristine["int8"] / "commit/v0/000001.json", root / "commit/v0/000001.json")
    with pytest.raises(CacheCorrupt, match="fingerprint is"):
        TeacherCache.open(root)


@pytest.mark.parametrize(
    "path, change, error, message",
    [
        ("data.zarr/zarr.json", Path.unlink, CacheCorrupt, r"zarr\.json: missing. It holds what"),
        ("data.zarr/zarr.json", lambda p: p.write_text("{"), CacheCorrupt, "not JSON"),
        ("data.zarr/zarr.json", lambda p: p.write_text("{}"), CacheCorrupt, "no attribute 'teacher_cache'"),
        ("data.zarr/codec/mean/c/0", Path.unlink, CacheCorrupt, "mean and std have sha256"),
        ("data.zarr/codec/std/c/0", flip(3), CacheCorrupt, "mean and std cannot be read"),
        ("data.zarr/codec/std/zarr.json", Path.unlink, CacheCorrupt, "mean and std cannot be read"),
        ("data.zarr/v0/cls/zarr.json", Path.unlink, CacheCorrupt, "v0/cls/zarr.json: missing"),
    ],
)
def test_damaged_metadata_is_named(
    pristine: dict[str, Path], tmp_path: Path, path: str, change: Callable[[Path], None], error: type, message: str
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    change(root / path)
    with pytest.raises(error, match=message):
        TeacherCache.open(root)


@pytest.mark.parametrize(
    "path, change",
    [
        ("zarr.json", Path.unlink),
        ("cls/zarr.json", Path.unlink),
        ("patch/zarr.json", truncate),
        ("crop/zarr.json", lambda p: p.write_text(p.read_text().replace("int32", "int64"))),
    ],
)
def test_metadata_that_follows_from_the_attributes_is_restored_without_dropping_a_shard(
    pristine: dict[str, Path], tmp_path: Path, path: str, change: Callable[[Path], None]
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    before = snapshot(root)
    change(root / "data.zarr/v0" / path)
    damages = verify_cache(root).damages
    assert [(d.view_set, d.shard) for d in damages] == [(0, None)]
    assert str(root / "data.zarr/v0" / path) in damages[0].message
    assert repair_cache(root) == damages
    assert snapshot(root) == before


def test_metadata_of_another_shape_is_not_read_as_another_layout(pristine: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    path = root / "data.zarr/v0/patch/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["shape"][0] = 2
    path.write_text(json.dumps(metadata))
    with pytest.raises(CacheCorrupt, match=r"shape is \[2, 7, 2, 4, 16\]"):
        TeacherCache.open(root)


def test_cache_of_another_format_version_is_refused(pristine: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    path = root / "data.zarr/zarr.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(CacheMismatch, match="cache format 99, this code reads 1"):
        TeacherCache.open(root)


def test_half_built_view_sets_are_refused_and_counted(tmp_path: Path) -> None:
    root = build(tmp_path / "cache", view_sets=2)
    (root / "commit/v1/000000.json").unlink()
    (root / "commit/v1/000002.json").unlink()
    with pytest.raises(CacheIncomplete, match=r"view set 1 lacks 2 of 3 shards \(0, 2\)"):
        TeacherCache.open(root, view_sets=[0, 1])
    with TeacherCache.open(root) as cache:
        assert cache.view_sets == (0,)
    report = verify_cache(root, deep=True)
    assert (report.shards, report.rows, report.missing, report.damages) == (4, 25, {1: 2}, ())
    (root / "commit/v0/000001.json").unlink()
    with pytest.raises(CacheIncomplete, match=r"view set 0 lacks 1 of 3 shards \(1\)"):
        TeacherCache.open(root)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    class TwiceTheSame(SyntheticReader):
        def __call__(self, rows, view_set):  # type: ignore[no-untyped-def]
            for batch in super().__call__(rows, view_set):
                batch.uids[batch.rows == 9] = 5
                batch.uids[batch.rows == 4] = 5
                yield batch

    root = tmp_path / "cache"
    run_build(synthetic_request(root), SyntheticTeacher(), TwiceTheSame(), progress=False)
    with pytest.raises(CacheCorrupt, match="rows 4 and 9 both have id 0000000000000005"):
        TeacherCache.open(root)


@pytest.mark.parametrize(
    "other, field",
    [
        (lambda root: synthetic_request(root, teacher=SyntheticTeacher(1)), r"teacher\.seed: this run 1, the cache 0"),
        (lambda root: synthetic_request(root, seed=1), r"crops\.seed: this run 1, the cache 0"),
        (lambda root: synthetic_request(root, codec="fp16"), r"codec\.name: this run 'fp16', the cache 'int8'"),
        (lambda root: synthetic_request(root, shard_rows=(7, 4, 7)), r"data\.shards\.1: .*4', the cache .*7'"),
    ],
)
def test_build_into_a_cache_of_something_else_is_refused_and_changes_nothing(
    pristine: dict[str, Path], tmp_path: Path, other: Callable[[Path], object], field: str
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(pristine["int8"], root)
    before = snapshot(root)
    with pytest.raises(CacheMismatch, match=field):
        run_build(other(root), SyntheticTeacher(), SyntheticReader(), progress=False)  # type: ignore[arg-type]
    assert snapshot(root) == before


def test_verify_with_the_teacher_accepts_its_own_and_refuses_another(pristine: dict[str, Path]) -> None:
    import torch

    arguments = {"rows": 12, "seed": 0, "device": torch.device("cpu")}
    with TeacherCache.open(pristine["int8"]) as cache:
        agreement = verify_against_teacher(cache, SyntheticTeacher(), SyntheticReader(), **arguments)  # type: ignore[arg-type]
        assert agreement.share_within_bound == 1.0 and agreement.mean_cosine > 0.9999
        with pytest.raises(CacheCorrupt, match="gives other tokens: mean cosine"):
            verify_against_teacher(cache, SyntheticTeacher(1), SyntheticReader(), **arguments)  # type: ignore[arg-type]
