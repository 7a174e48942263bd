"""The commands' flags, and what they make: the teacher, the crops, the device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cache_tools.build import (
    DEFAULT_CALIBRATION_ROWS,
    ENGINE,
    BuildReport,
    BuildRequest,
    Teacher,
    check_disk,
    decoder_name,
    run_build,
)
from cache_tools.fingerprint import cache_fingerprint, flatten
from cache_tools.layout import CacheSpec, CodecName
from cache_tools.write import ReadCrops
from common.errors import UserError
from distill.config import DEFAULT_TEACHER, TeacherConfig
from distill.teacher import FrozenTeacher, load_teacher
from pipeline.augmentation import CropOptions
from pipeline.backend import choose_backend
from pipeline.crops import ReadOptions
from pipeline.readers import read_teacher_crops
from shards.manifest import load_manifest

PRESETS = ("dino", "dinov2_released")
CachePath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(CropOptions, ReadOptions):
    """The teacher and the crops it sees; the same flags and defaults as train.py. Of the crops, only what decides the
    global ones matters."""

    shards: Path
    """Folder of packed shards."""
    teacher_arch: str = DEFAULT_TEACHER
    """A timm ViT by name, or local-dir:FOLDER, or hf-hub:NAME."""
    teacher_pretrained_weights: str | None = None
    """A local file: Meta's .pth or timm's .safetensors. None downloads the weights that teacher_arch names."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    batch_size: int = 64
    """Images that the teacher sees at once."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the teacher; auto does so on a GPU."""

    def teacher(self, device: torch.device) -> FrozenTeacher:
        """Load the frozen teacher."""
        config = TeacherConfig(
            teacher_arch=self.teacher_arch, teacher_pretrained_weights=self.teacher_pretrained_weights
        )
        teacher = load_teacher(config, img_size=self.global_crops_size, device=device)
        if self.compile == "on" or (self.compile == "auto" and device.type == "cuda"):
            teacher.compile()
        return teacher

    def read_crops(self, device: torch.device) -> ReadCrops:
        """Return a reader of the clean crops of batches of rows."""
        common = {"seed": self.data_seed, "augmentation": self.teacher_crops(), "device": device, **self.reading()}
        # Resolved now, so that an unknown or absent backend is refused before the teacher runs.
        common["backend"] = choose_backend(self.backend, device)[0]
        return lambda batches, view_set: read_teacher_crops(self.shards, batches, view_set=view_set, **common)


@dataclass(frozen=True)
class Build:
    """Write the teacher's outputs; the same command continues a build that was stopped. Under torchrun, each rank
    writes its share of the shards."""

    teacher: Annotated[TeacherOptions, tyro.conf.OmitArgPrefixes]
    cache: Path
    """Folder of the cache, new or begun before."""
    view_sets: int = 1
    """Crop pairs an image, K: epoch e of training uses e mod K. May grow later."""
    codec: CodecName = "int8"
    """int8, or fp16 of twice the size."""
    calibration_rows: int = DEFAULT_CALIBRATION_ROWS
    """First rows from which the int8 codec is calibrated."""

    def run(
        self, teacher: Teacher, device: torch.device, *, rank: int = 0, world_size: int = 1, progress: bool = True
    ) -> BuildReport:
        """Build what is not yet there, as one of `world_size` ranks; see `run_build`."""
        options, augmentation = self.teacher, self.teacher.teacher_crops()
        manifest = load_manifest(options.shards)
        backend, reason = choose_backend(options.backend, device)
        spec = CacheSpec(
            shard_rows=tuple(shard.rows for shard in manifest.shards),
            num_crops=augmentation.num_global_crops,
            num_patches=teacher.num_patches(),
            embed_dim=teacher.embed_dim,
            codec=self.codec,
        )
        fingerprint = cache_fingerprint(
            manifest=manifest,
            augmentation=augmentation,
            seed=options.data_seed,
            teacher=teacher.fingerprint(),
            decoder=decoder_name(backend, device, hw_decoder=options.hw_decoder),
            codec=self.codec,
            calibration_rows=min(self.calibration_rows, manifest.num_rows),
        )
        request = BuildRequest(
            self.cache, spec, fingerprint, self.view_sets, options.batch_size, device, self.calibration_rows
        )
        if progress and rank == 0:
            cost = check_disk(request.root, spec, self.view_sets).describe(self.view_sets, spec.num_rows)
            print(f"{self.cache}: {cost}. Crops by {backend}: {reason}", file=sys.stderr)
        crops = options.read_crops(device)
        return run_build(request, teacher, crops, rank=rank, world_size=world_size, progress=progress)


@dataclass(frozen=True)
class Verify:
    """Check every committed shard. Exit status 1 where something is damaged or missing."""

    cache: CachePath
    deep: bool = False
    """Read every byte; else sizes, indices, first rows, ids and crops."""
    shards: Path | None = None
    """Folder of the shards, to compare ids and image checksums with."""
    teacher: int = 0
    """Run the teacher again on so many images and compare; needs --shards."""
    teacher_arch: str | None = None
    """The teacher; None: the architecture that the cache names."""
    teacher_pretrained_weights: str | None = None
    """Its weights, as for build."""
    backend: Literal["auto", "dali", "cpu", "torch"] = "auto"
    """Who decodes and crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    batch_size: int = 64
    """Images that the teacher sees at once."""

    def teacher_options(self, fingerprint: dict[str, Any]) -> TeacherOptions:
        """Return the options that a cache of this fingerprint was built with."""
        if self.shards is None:
            raise UserError("--teacher: the shards are needed to show the teacher its images. Pass --shards FOLDER.")
        crops = fingerprint["crops"]
        geometry = crops["geometry"]
        for name in PRESETS:
            options = TeacherOptions(
                shards=self.shards,
                teacher_arch=self.teacher_arch or fingerprint["teacher"]["architecture"],
                teacher_pretrained_weights=self.teacher_pretrained_weights,
                augmentation=name,
                global_crops_scale=tuple(geometry["global_crops_scale"]),
                global_crops_size=geometry["global_crops_size"],
                flip_prob=geometry["flip_prob"],
                teacher_photometric=geometry["teacher_photometric"],
                data_seed=crops["seed"],
                backend=self.backend,
                hw_decoder=fingerprint.get("decoder", "").endswith(ENGINE),
                device=self.device,
                batch_size=self.batch_size,
            )
            if flatten(options.teacher_crops().geometry_fingerprint()) == flatten(geometry):
                return options
        raise UserError(
            f"{self.cache}: built with an augmentation that is none of {', '.join(PRESETS)} with other sizes and "
            "scales. Compare with `cache_tools.verify.verify_against_teacher` from Python."
        )


@dataclass(frozen=True)
class Inspect:
    """Print what the cache was made from and how far it is built."""

    cache: CachePath
    row: int | None = None
    """Also print this row's identity, crops and token norms."""
    view_set: int = 0
    """View set of the row."""


@dataclass(frozen=True)
class Stats:
    """Print figures of the tokens from a sample of rows."""

    cache: CachePath
    rows: int = 512
    """Rows drawn from each view set."""


@dataclass(frozen=True)
class Repair:
    """Move damaged shards aside, to CACHE/damaged; a build then writes them again."""

    cache: CachePath
    yes: bool = False
    """Go on without asking."""


@dataclass(frozen=True)
class Calibrate:
    """Measure each codec on the teacher's features of these images and recommend one. Writes nothing."""

    teacher: Annotated[TeacherOptions, tyro.conf.OmitArgPrefixes]
    rows: int = 2048
    """First rows of the shards."""


@dataclass(frozen=True)
class Bench:
    """Measure how fast this machine reads this cache."""

    cache: CachePath
    batch_size: int = 64
    """Images a batch."""
    batches: int = 16
    """Batches a measurement."""
    threads: int = 2
    """Reading threads."""
