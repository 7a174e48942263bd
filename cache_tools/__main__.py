"""The commands: `python -m cache_tools build|verify|stats|inspect|repair|calibrate|bench`."""

from __future__ import annotations

if __name__ == "__main__":
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from cache_tools.build import decoder_name
from cache_tools.calibrate import measure_features
from cache_tools.fingerprint import cache_fingerprint
from cache_tools.layout import CacheSpec, read_attributes
from cache_tools.options import Bench, Build, Calibrate, Inspect, Repair, Stats, Verify
from cache_tools.read import TeacherCache
from cache_tools.repair import repair_cache
from cache_tools.verify import (
    Damage,
    describe_cache,
    describe_row,
    measure_reading,
    token_stats,
    verify_against_teacher,
    verify_cache,
)
from common.device import pick_device
from common.errors import UserError, run_command
from pipeline.readers import in_batches
from shards.manifest import load_index, load_manifest

Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Repair, tyro.conf.subcommand("repair")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for damage found, 2 for bad input, 130 if interrupted."""
    command = tyro.cli(
        Command,
        args=arguments,
        prog="python -m cache_tools",
        description="Teacher outputs in Zarr: build once, train many times.",
        use_underscores=True,
    )
    return run_command(lambda: _run(command))


def _run(command: object) -> int:
    match command:
        case Build():
            return _build(command)
        case Verify():
            return _verify(command)
        case Stats():
            with TeacherCache.open(command.cache) as cache:
                _print([token_stats(cache, k, rows=command.rows) for k in cache.view_sets])
        case Inspect():
            _print(describe_cache(command.cache))
            if command.row is not None:
                with TeacherCache.open(command.cache, view_sets=[command.view_set]) as cache:
                    _print(describe_row(cache, command.view_set, command.row))
        case Repair():
            repair_cache(command.cache, agreed=partial(_agreed, command))
        case Calibrate():
            return _calibrate(command)
        case Bench():
            for speed in measure_reading(
                command.cache, batch_size=command.batch_size, batches=command.batches, threads=command.threads
            ):
                checked = "checked" if speed.verify else "unchecked"
                print(
                    f"{speed.order:10} {checked:10} {speed.images_per_second:10,.0f} images/s "
                    f"{speed.bytes_per_second / 1e6:10,.0f} MB/s"
                )
    return 0


def _print(value: object) -> None:
    print(json.dumps(value, indent=2))


def _build(command: Build) -> int:
    device = pick_device(command.teacher.device)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    report = command.run(command.teacher.teacher(device), device, rank=rank, world_size=world_size)
    speed = report.rows_written / max(report.seconds, 1e-9)
    done = "complete: " + ", ".join(f"v{k}" for k in report.finished) if report.finished else "other ranks still write"
    print(f"{command.cache}: {report.rows_written:,} rows in {report.seconds:.1f} s ({speed:,.0f} images/s); {done}")
    return 0


def _verify(command: Verify) -> int:
    attributes = read_attributes(command.cache)
    spec = CacheSpec.from_json(attributes["spec"])
    index = None if command.shards is None else load_index(command.shards)
    with tqdm(desc="verify", unit="images", disable=not sys.stderr.isatty()) as bar:
        report = verify_cache(command.cache, deep=command.deep, index=index, looked_at=bar.update)
    for damage in report.damages:
        place = "metadata" if damage.shard is None else f"shard {damage.shard}"
        print(f"view set {damage.view_set}, {place}: {damage.message}")
    for view_set, missing in report.missing.items():
        print(f"view set {view_set}: {missing} of {spec.num_shards} shards are not built yet; run build again")
    print(
        f"{command.cache}: {report.shards} shards, {report.rows:,} rows, "
        f"{'every byte read' if command.deep else 'sizes, indices and first rows'}: {len(report.damages)} damaged"
    )
    if report.damages or report.missing:
        return 1
    return _verify_teacher(command) if command.teacher else 0


def _verify_teacher(command: Verify) -> int:
    options = command.teacher_options(read_attributes(command.cache)["fingerprint"])
    device = pick_device(options.device)
    teacher = options.teacher(device)
    expect = cache_fingerprint(
        manifest=load_manifest(options.shards),
        augmentation=options.teacher_crops(),
        seed=options.data_seed,
        teacher=teacher.fingerprint(),
        decoder=decoder_name(options.backend, device, hw_decoder=options.hw_decoder),
    )
    with TeacherCache.open(command.cache, expect=expect) as cache:
        agreement = verify_against_teacher(
            cache,
            teacher,
            options.read_crops(device),
            rows=command.teacher,
            seed=0,
            device=device,
            batch_size=options.batch_size,
        )
    print(
        f"teacher run again on {agreement.rows} images: mean cosine {agreement.mean_cosine:.6f}, 1st percentile "
        f"{agreement.cosine_p1:.6f}, {agreement.share_within_bound:.4%} of the values within the codec's bound"
    )
    return 0


def _agreed(command: Repair, damages: Sequence[Damage], plan: str) -> bool:
    """Print what is to be done and ask; UserError where there is nobody to ask."""
    for damage in damages:
        what = "restore metadata" if damage.shard is None else f"move shard {damage.shard} aside"
        print(f"view set {damage.view_set}: {what}: {damage.message}")
    print(plan, flush=True)
    if command.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{command.cache}: nothing was touched, since nobody can be asked here. Pass --yes.")
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _calibrate(command: Calibrate) -> int:
    options = command.teacher
    device = pick_device(options.device)
    rows = np.arange(min(command.rows, load_manifest(options.shards).num_rows), dtype=np.int64)
    report = measure_features(
        options.teacher(device),
        options.read_crops(device)(in_batches(rows, options.batch_size), 0),
        num_crops=options.teacher_crops().num_global_crops,
        device=device,
    )
    print(report.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
