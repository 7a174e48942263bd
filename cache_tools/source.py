"""Where encoded rows come from: the shard files directly, or zarr-python for any other Zarr layout."""

from __future__ import annotations

import resource
import warnings
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cache_tools.commit import Commit
from cache_tools.errors import CacheCorrupt, CacheFallbackWarning
from cache_tools.format import UNCHANGEABLE_FIELDS, ArrayLayout, CacheSpec, Paths, foreign_fields, read_json
from cache_tools.shard_file import REPAIR, OpenFiles, ShardFile, read_whole

Bytes = npt.NDArray[np.uint8]
OPEN_FILES = 512


class RowSource(Protocol):
    """One view set's arrays."""

    def read_whole(self, array: ArrayLayout, shard: int) -> Bytes:
        """Return all rows of a tar shard, uint8 [rows, row_bytes]."""

    def read(
        self,
        array: ArrayLayout,
        shard: int,
        rows: npt.NDArray[np.int64],
        out: Bytes,
        slots: npt.NDArray[np.int64],
        *,
        check: bool,
    ) -> None:
        """Read `rows` of a tar shard into `out[slots]`, out being uint8 [*, row_bytes]."""

    def advise(self, array: ArrayLayout, shard: int, rows: npt.NDArray[np.int64]) -> None:
        """Announce that `rows` will be read soon."""

    def close(self) -> None:
        """Let go of open files."""


class DirectSource:
    """Shard files in exactly our layout, read with preadv into the caller's buffers."""

    def __init__(self, paths: Paths, view_set: int, spec: CacheSpec, commits: list[Commit]):
        self.paths = paths
        self.view_set = view_set
        self.spec = spec
        self.commits = commits
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._files = OpenFiles(max(4, min(OPEN_FILES, soft // 4)))

    def check_sizes(self) -> None:
        """Raise CacheCorrupt where a committed file is missing or has another size."""
        for commit in self.commits:
            for array in self.spec.arrays():
                path, record = self.paths.chunk(self.view_set, array, commit.shard), commit.files[array.name]
                expected = array.file_bytes(commit.rows, self.spec.capacity)
                try:
                    size = path.stat().st_size
                except FileNotFoundError as error:
                    raise CacheCorrupt(f"{path}: missing, though its shard was committed. {REPAIR}") from error
                if size != record.bytes or size != expected:
                    raise CacheCorrupt(f"{path}: {size} bytes, {record.bytes} were committed. {REPAIR}")

    def read_whole(self, array: ArrayLayout, shard: int) -> Bytes:
        """See `RowSource`."""
        return read_whole(
            self.paths.chunk(self.view_set, array, shard),
            array,
            rows=self.spec.shard_rows[shard],
            capacity=self.spec.capacity,
            record=self.commits[shard].files[array.name],
        )

    def read(
        self,
        array: ArrayLayout,
        shard: int,
        rows: npt.NDArray[np.int64],
        out: Bytes,
        slots: npt.NDArray[np.int64],
        *,
        check: bool,
    ) -> None:
        """See `RowSource`."""
        self.open(array, shard).read(rows, out, slots, check=check)

    def advise(self, array: ArrayLayout, shard: int, rows: npt.NDArray[np.int64]) -> None:
        """See `RowSource`."""
        self.open(array, shard).advise(rows)

    def close(self) -> None:
        """See `RowSource`."""
        self._files.close()

    def open(self, array: ArrayLayout, shard: int) -> ShardFile:
        """Return one array's open file, checked against its record."""
        return self._files.get(
            self.paths.chunk(self.view_set, array, shard),
            array,
            rows=self.spec.shard_rows[shard],
            capacity=self.spec.capacity,
            record=self.commits[shard].files[array.name],
        )


class ZarrSource:
    """Any Zarr layout, read by zarr-python: for caches that were rechunked or compressed after they were built."""

    def __init__(self, paths: Paths, view_set: int, spec: CacheSpec):
        import zarr

        self.paths = paths
        self.view_set = view_set
        self.spec = spec
        group = zarr.open_group(store=paths.view(view_set), mode="r")
        self._arrays: dict[str, Any] = {array.name: group[array.name] for array in spec.arrays()}

    def read_whole(self, array: ArrayLayout, shard: int) -> Bytes:
        """See `RowSource`."""
        rows = self.spec.shard_rows[shard]
        return self._bytes(array, shard, slice(0, rows)).reshape(rows, array.row_bytes)

    def read(
        self,
        array: ArrayLayout,
        shard: int,
        rows: npt.NDArray[np.int64],
        out: Bytes,
        slots: npt.NDArray[np.int64],
        *,
        check: bool,
    ) -> None:
        """See `RowSource`. zarr-python decides what is checked: `check` changes nothing."""
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            out[slot] = self._bytes(array, shard, row)
            # zarr-python gives zeros for a missing chunk, and no encoded row is all zeros.
            if not out[slot].any():
                raise CacheCorrupt(
                    f"{self.paths.view(self.view_set) / array.name}: row {row} of shard {shard} is missing, or "
                    "all zeros. Copy the cache again, or build it again."
                )

    def advise(self, array: ArrayLayout, shard: int, rows: npt.NDArray[np.int64]) -> None:
        """Does nothing: zarr-python has no such hint."""

    def close(self) -> None:
        """Does nothing: zarr-python keeps no file open."""

    def _bytes(self, array: ArrayLayout, shard: int, rows: int | slice) -> Bytes:
        try:
            values = np.asarray(self._arrays[array.name][shard, rows])
        except Exception as error:  # whatever codec the user chose raises its own kind
            raise CacheCorrupt(
                f"{self.paths.view(self.view_set) / array.name}: shard {shard}, row {rows}: zarr-python cannot "
                f"read it ({type(error).__name__}: {error}). Copy the cache again, or build it again."
            ) from error
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def open_source(
    paths: Paths, view_set: int, spec: CacheSpec, commits: list[Commit], *, check_sizes: bool = True
) -> RowSource:
    """Return the direct reader where every array has exactly our layout; else zarr-python, with a warning."""
    foreign: list[str] = []
    for array in spec.arrays():
        path = paths.view(view_set) / array.name
        fields = foreign_fields(path, array, spec)
        for field in set(fields) & set(UNCHANGEABLE_FIELDS):
            raise CacheCorrupt(
                f"{path / 'zarr.json'}: {field} is {read_json(path / 'zarr.json').get(field)!r}, which does not "
                "fit the cache's attributes. The metadata was altered. Copy the cache again, or build it again."
            )
        foreign += [f"{array.name}.{field}" for field in fields]
    if not foreign:
        source = DirectSource(paths, view_set, spec, commits)
        if check_sizes:
            source.check_sizes()
        return source
    warnings.warn(
        f"{paths.view(view_set)}: {', '.join(foreign)} differ from the layout that is read directly. Rows are "
        "read through zarr-python, several times slower. Build the cache again to have the direct reader.",
        CacheFallbackWarning,
        stacklevel=3,
    )
    return ZarrSource(paths, view_set, spec)
