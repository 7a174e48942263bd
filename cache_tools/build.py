"""Building a cache, or continuing one: calibrate, lay out, run the teacher over the shards, commit."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cache_tools.codec import (
    Calibration,
    ChannelMoments,
    EncodedRows,
    calibration_sha256,
    encode,
    load_calibration,
    measure_codec,
)
from cache_tools.commit import committed_shards, keep_metadata_copy, remove_spent_locks, write_manifest
from cache_tools.fingerprint import Json, check_fingerprint
from cache_tools.layout import (
    FORMAT_VERSION,
    CacheMismatch,
    CacheSpec,
    Paths,
    create_group,
    create_view_set,
    read_attributes,
)
from cache_tools.write import ReadCrops, ViewSetBuild
from common.errors import UserError
from common.files import json_sha256
from distill.teacher import TeacherTargets
from pipeline.backend import choose_backend
from pipeline.batch import CropBatch
from pipeline.readers import in_batches

DEFAULT_CALIBRATION_ROWS = 2048
# Tokens on which the codec is measured: the matrix logarithm grows with the cube of a crop's tokens.
QUALITY_TOKENS = 32 * 196
WAIT_SECONDS = 3600.0
ENGINE = "-engine"  # in a decoder's name: the GPU's hardware decodes, of whose pixels CUDA's differ
# File system metadata, commit records and what else grows beside the data.
SPARE_BYTES = 64 << 20


class Teacher(Protocol):
    """The frozen teacher as the cache sees it; `distill.teacher.FrozenTeacher` is one."""

    embed_dim: int

    def num_patches(self) -> int:
        """Return the patch tokens of one crop."""

    def __call__(self, crops: Tensor, num_crops: int = 2) -> TeacherTargets:
        """Return image-major tokens of crop-major uint8 crops."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides its outputs."""


@dataclass(frozen=True)
class BuildRequest:
    """A cache to build.

    Attributes:
        root: its folder.
        spec: its shapes, shards and codec.
        fingerprint: what it is made from, without the measured calibration.
        view_sets: number K of view sets.
        batch_size: images the teacher sees at once.
        device: of the teacher.
        calibration_rows: first rows from which an int8 codec is calibrated.
    """

    root: Path
    spec: CacheSpec
    fingerprint: Json
    view_sets: int
    batch_size: int
    device: torch.device
    calibration_rows: int = DEFAULT_CALIBRATION_ROWS


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        rows_written: by this rank, over all view sets.
        seconds: spent.
        finished: view sets that are complete on disk.
    """

    rows_written: int
    seconds: float
    finished: tuple[int, ...]


@dataclass(frozen=True)
class CacheCost:
    """Bytes a cache takes.

    Attributes:
        bytes_per_image: of one view set.
        total: of all view sets.
        remaining: still to be written.
        free: on the disk.
    """

    bytes_per_image: float
    total: int
    remaining: int
    free: int

    def describe(self, view_sets: int, rows: int) -> str:
        """Return one line for the user."""
        return (
            f"{rows:,} images x {view_sets} view set(s) x {self.bytes_per_image / 1e3:.1f} kB = "
            f"{self.total / 1e9:.3f} GB; {self.remaining / 1e9:.3f} GB to write, {self.free / 1e9:.1f} GB free"
        )


def check_disk(root: Path, spec: CacheSpec, view_sets: int) -> CacheCost:
    """Return what a cache takes, what of it is not yet committed, and the free space where it will lie.

    Raises:
        UserError: the disk is too small for what is left to write.
    """
    place = root
    while not place.exists():
        place = place.parent
    done = sum(
        array.file_bytes(spec.shard_rows[shard], spec.capacity)
        for k in range(view_sets)
        for shard in committed_shards(Paths(root), k, spec)
        for array in spec.arrays()
    )
    total, free = spec.view_set_bytes() * view_sets, shutil.disk_usage(place).free
    cost = CacheCost(spec.view_set_bytes() / spec.num_rows, total, total - done, free)
    if cost.remaining and cost.remaining + SPARE_BYTES > free:
        raise UserError(
            f"{root}: the disk is too small. {cost.describe(view_sets, spec.num_rows)}. Free "
            f"{(cost.remaining + SPARE_BYTES - free) / 1e9:.2f} GB, choose another folder, or build fewer view sets."
        )
    return cost


def run_build(
    request: BuildRequest,
    teacher: Teacher,
    read_crops: ReadCrops,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> BuildReport:
    """Build what is not yet there.

    Every finished tar shard survives whatever stops a build; the same call again continues. Ranks share no state but
    the folder. The bytes depend on the request and the teacher alone, not on ranks nor on interruptions: batches are
    cut at tar shards, so even a teacher whose last bits depend on the batch sees the same ones.

    Raises:
        CacheMismatch: the folder holds a cache of something else.
        UserError: the disk is too small, a token cannot be stored, a file cannot be written.
    """
    began = time.perf_counter()
    if request.view_sets < 1:
        raise UserError(f"view_sets={request.view_sets}: a cache has at least one. Pass --view_sets 1 or more.")
    check_disk(request.root, request.spec, request.view_sets)
    paths = Paths(request.root)
    attributes = _laid_out(request, teacher, read_crops, rank=rank, progress=progress)
    fingerprint = attributes["fingerprint"]
    calibration = load_calibration(request.root, request.spec, fingerprint)
    keep_metadata_copy(request.root)
    encoder = _Encoder(teacher, request, calibration)
    rows = 0
    for k in range(request.view_sets):
        create_view_set(request.root, k, request.spec)
        paths.commits(k).mkdir(parents=True, exist_ok=True)
        left = request.spec.num_rows - sum(
            request.spec.shard_rows[shard] for shard in committed_shards(paths, k, request.spec)
        )
        share = -(-left // world_size)
        with _progress_bar(f"view set {k}", share, shown=progress and rank == 0 and left > 0) as bar:
            rows += ViewSetBuild(
                paths=paths,
                spec=request.spec,
                view_set=k,
                fingerprint=json_sha256(fingerprint),
                read_crops=read_crops,
                encode=encoder,
                batch_size=request.batch_size,
                written=bar.update,
            ).run(rank=rank, world_size=world_size)
    remove_spent_locks(paths)
    finished = write_manifest(paths, request.spec, fingerprint)
    return BuildReport(rows, time.perf_counter() - began, tuple(finished))


class _Encoder:
    """Teacher and codec in one call."""

    def __init__(self, teacher: Teacher, request: BuildRequest, calibration: Calibration | None):
        self.teacher = teacher
        self.request = request
        self.calibration = None if calibration is None else calibration.tensors(request.device)

    @torch.no_grad()
    def __call__(self, batch: CropBatch) -> EncodedRows:
        spec = self.request.spec
        targets = self.teacher(batch.crops.to(self.request.device), num_crops=spec.num_crops)
        return encode(targets, codec=spec.codec, calibration=self.calibration)


def _laid_out(request: BuildRequest, teacher: Teacher, read_crops: ReadCrops, *, rank: int, progress: bool) -> Json:
    """Return the attributes of the cache, which the first rank lays out if it is not there."""
    path = Paths(request.root).data
    if not path.exists():
        if rank == 0:
            _lay_out(request, teacher, read_crops, progress=progress)
        else:
            _wait_for(path)
    attributes = read_attributes(request.root)
    check_fingerprint(request.fingerprint, attributes["fingerprint"], where=str(request.root))
    spec = CacheSpec.from_json(attributes["spec"])
    if spec != request.spec:
        raise CacheMismatch(
            f"{request.root}: laid out for {spec.num_shards} shards, {spec.num_crops} crops of "
            f"{spec.num_patches} x {spec.embed_dim} tokens as {spec.codec}; this build needs "
            f"{request.spec.num_shards} shards, {request.spec.num_crops} crops of {request.spec.num_patches} x "
            f"{request.spec.embed_dim} as {request.spec.codec}. Build in an empty folder."
        )
    now = soft_fingerprint(request.device)
    soft = attributes["soft"].items()
    changed = [f"{name} {old} -> {now.get(name, 'absent')}" for name, old in soft if now.get(name) != old]
    if changed and rank == 0:
        print(f"{request.root}: continued with another set-up: {', '.join(changed)}", file=sys.stderr)
    return attributes


@torch.no_grad()
def _lay_out(request: BuildRequest, teacher: Teacher, read_crops: ReadCrops, *, progress: bool) -> None:
    """Calibrate the codec, measure it, and write the group."""
    spec = request.spec
    wanted = min(request.calibration_rows, spec.num_rows) if spec.codec == "int8" else 1
    moments = ChannelMoments()
    sample: TeacherTargets | None = None
    with _progress_bar("calibration", wanted, shown=progress and spec.codec == "int8") as bar:
        for batch in read_crops(in_batches(np.arange(wanted), request.batch_size), 0):
            sample = teacher(batch.crops.to(request.device), num_crops=spec.num_crops)
            moments.add(sample.patches)
            bar.update(len(batch.rows))
    assert sample is not None
    calibration = moments.calibration() if spec.codec == "int8" else None
    fingerprint = dict(request.fingerprint)
    if calibration is not None:
        digest = calibration_sha256(calibration)
        fingerprint["codec"] = fingerprint["codec"] | {"calibration": digest}
    few = sample.patches.flatten(0, 1)[: max(2, QUALITY_TOKENS // spec.num_patches)].float().cpu()
    attributes = {
        "format_version": FORMAT_VERSION,
        "spec": spec.to_json(),
        "fingerprint": fingerprint,
        "soft": soft_fingerprint(request.device),
        "quality": measure_codec(few, spec.codec, calibration).to_json(),
    }
    arrays = {} if calibration is None else {"mean": calibration.mean, "std": calibration.std}
    create_group(request.root, attributes, arrays)


def soft_fingerprint(device: torch.device) -> dict[str, str]:
    """Return what may change a teacher's last bits without making a cache wrong."""
    import timm
    import zarr

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    try:
        dali = {"dali": importlib.metadata.version("nvidia-dali-cuda130")}
    except importlib.metadata.PackageNotFoundError:
        dali = {}
    return {
        **dali,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "zarr": zarr.__version__,
        "numpy": np.__version__,
        "device": name,
    }


def _wait_for(path: Path) -> None:
    """Wait until the first rank has laid out the cache."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: not there after {WAIT_SECONDS:.0f} s. The first rank calibrates and writes it; look at its "
                "output, and make sure that all ranks see one file system."
            )
        time.sleep(0.1)


@contextmanager
def _progress_bar(name: str, rows: int, *, shown: bool) -> Iterator[Any]:
    """Images per second on a terminal; a line every half minute elsewhere."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=rows, desc=name, unit="images", disable=not shown, mininterval=interval) as bar:
        yield bar


def decoder_name(backend: str, device: torch.device, *, hw_decoder: bool = False) -> str:
    """Return what turns JPEG bytes into crops, as the fingerprint has it: the backend taken, where it runs, and
    whether the hardware engine decodes."""
    name = f"{choose_backend(backend, device)[0]}-{device.type}"
    return name + ENGINE if hw_decoder and name == "dali-cuda" else name
