"""Shard files: the same bytes as zarr-python, read back by both, whatever the kernel gives at once."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from cache_tools import shard_file
from cache_tools.commit import Commit, FileRecord
from cache_tools.layout import ArrayLayout, CacheCorrupt, CacheSpec, Paths, create_group, create_view_set
from cache_tools.shard_file import ShardFile, ShardFileWriter, ViewSetFiles, crc32c

SPEC = CacheSpec((5, 5, 3), num_crops=2, num_patches=3, embed_dim=8, codec="int8")
WHOLE = {"id", "img_crc", "crop"}


def random_values(array: ArrayLayout, rows: int) -> npt.NDArray[np.generic]:
    raw = np.random.default_rng([rows, array.row_bytes]).integers(0, 256, (rows, array.row_bytes), np.uint8)
    return raw.view(array.dtype).reshape(rows, *array.tail)


def write(path: Path, array: ArrayLayout, values: npt.NDArray[np.generic], capacity: int) -> FileRecord:
    writer = ShardFileWriter(path, array, capacity=capacity)
    rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    if array.name in WHOLE:
        writer.append_whole(rows)
    else:
        writer.append(rows[:2])
        writer.append(rows[2:])
    return writer.close()


@pytest.fixture
def patch_file(tmp_path: Path) -> tuple[Path, ArrayLayout, npt.NDArray[np.uint8], FileRecord]:
    array = SPEC.arrays()[0]
    values = random_values(array, 5)
    path = tmp_path / "c.0"
    record = write(path, array, values, 5)
    return path, array, values.reshape(5, -1).view(np.uint8), record


@pytest.mark.parametrize("name", ["patch", "scale", "cls", "id", "img_crc", "crop"])
@pytest.mark.parametrize("shard", [0, 2])
def test_files_are_byte_identical_to_those_of_zarr_python(tmp_path: Path, name: str, shard: int) -> None:
    create_group(tmp_path, {}, {})
    create_view_set(tmp_path, 0, SPEC)
    array = next(a for a in SPEC.arrays() if a.name == name)
    rows = SPEC.shard_rows[shard]
    values = random_values(array, rows)
    path = Paths(tmp_path).chunk(0, array, shard)
    zarr_array = zarr.open_array(Paths(tmp_path).view(0) / name, mode="r+", config={"write_empty_chunks": True})
    zarr_array[shard, :rows] = values
    by_zarr = path.read_bytes()
    path.unlink()
    record = write(path, array, values, SPEC.capacity)
    assert path.read_bytes() == by_zarr
    assert record.bytes == len(by_zarr) == array.file_bytes(rows, SPEC.capacity)
    assert np.array_equal(np.asarray(zarr_array[shard, :rows]).view(np.uint8), values.view(np.uint8))


def test_rows_are_read_in_any_order_into_any_slot(
    patch_file: tuple[Path, ArrayLayout, npt.NDArray[np.uint8], FileRecord],
) -> None:
    path, array, values, record = patch_file
    file = ShardFile(path, array, rows=5, capacity=5, record=record)
    out = np.zeros((9, array.row_bytes), np.uint8)
    rows, slots = np.array([4, 0, 1, 2, 2]), np.array([8, 3, 1, 0, 5])
    file.read(rows, out, slots, check=True)
    assert np.array_equal(out[slots], values[rows])
    assert not out[[2, 4, 6, 7]].any()


@pytest.mark.parametrize("most", [1, 7, 50, 61])
def test_short_reads_are_continued(
    patch_file: tuple[Path, ArrayLayout, npt.NDArray[np.uint8], FileRecord],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
) -> None:
    path, array, values, record = patch_file
    preadv = os.preadv

    def shortened(buffers: list[memoryview]) -> list[memoryview]:
        kept, left = [], most
        for buffer in buffers:
            kept.append(buffer[:left])
            left -= len(kept[-1])
        return [buffer for buffer in kept if len(buffer)]

    monkeypatch.setattr(shard_file.os, "preadv", lambda fd, b, offset: preadv(fd, shortened(b), offset))
    file = ShardFile(path, array, rows=5, capacity=5, record=record)
    out = np.zeros_like(values)
    file.read(np.arange(5), out, np.arange(5), check=True)
    assert np.array_equal(out, values)


def test_more_rows_than_the_kernel_takes_buffers_at_once(tmp_path: Path) -> None:
    array = ArrayLayout("scale", "float16", (3,), True)
    values = random_values(array, 1500)
    record = write(tmp_path / "c.0", array, values, 1500)
    file = ShardFile(tmp_path / "c.0", array, rows=1500, capacity=1500, record=record)
    out = np.zeros((1500, array.row_bytes), np.uint8)
    file.read(np.arange(1500), out, np.arange(1500), check=True)
    assert np.array_equal(out, values.view(np.uint8))
    assert file.read(np.arange(1500), out, np.arange(1500), check=False).tolist() == [crc32c(row) for row in out]
    file.check_content()


def test_checksum_of_the_content_tells_apart_files_that_a_plain_file_crc_cannot(tmp_path: Path) -> None:
    array = SPEC.arrays()[0]
    first, second = (random_values(array, 5), random_values(array, 5)[::-1])
    records = [write(tmp_path / f"c.{i}", array, values, 5) for i, values in enumerate((first, second))]
    files = [(tmp_path / f"c.{i}").read_bytes() for i in range(2)]
    # Data that carry their own CRC have a CRC that is the same for all data.
    assert files[0] != files[1] and crc32c(files[0]) == crc32c(files[1])
    assert records[0].sha256 != records[1].sha256


def test_file_of_another_shard_is_refused_at_its_first_row(
    tmp_path: Path, patch_file: tuple[Path, ArrayLayout, npt.NDArray[np.uint8], FileRecord]
) -> None:
    path, array, values, record = patch_file
    write(path, array, values[::-1], 5)
    with pytest.raises(CacheCorrupt, match=r"first row's checksum .* another shard"):
        ShardFile(path, array, rows=5, capacity=5, record=record)


def test_flipped_bit_names_file_and_row(
    patch_file: tuple[Path, ArrayLayout, npt.NDArray[np.uint8], FileRecord],
) -> None:
    path, array, values, record = patch_file
    data = bytearray(path.read_bytes())
    data[3 * (array.row_bytes + 4) + 17] ^= 4
    path.write_bytes(data)
    file = ShardFile(path, array, rows=5, capacity=5, record=record)
    out = np.zeros_like(values)
    file.read(np.array([2, 4]), out, np.array([0, 1]), check=True)
    with pytest.raises(CacheCorrupt, match=r"c\.0: row 3 has crc32c"):
        file.read(np.arange(5), out, np.arange(5), check=True)
    file.read(np.arange(5), out, np.arange(5), check=False)
    assert int(np.bitwise_count(out ^ values).sum()) == 1


def test_descriptors_stay_under_the_limit_and_all_close(tmp_path: Path) -> None:
    array, spec, paths = SPEC.arrays()[0], dataclasses.replace(SPEC, shard_rows=(5,) * 12), Paths(tmp_path)
    commits = {}
    for k in range(12):
        path = paths.chunk(0, array, k)
        path.parent.mkdir(parents=True, exist_ok=True)
        commits[k] = Commit(k, 5, "", {"patch": write(path, array, random_values(array, 5), 5)})
    files = ViewSetFiles(paths, 0, spec, commits, limit=3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for k in [*range(12), 0, 11]:
        files.open(array, k)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    files.open.cache_clear()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
