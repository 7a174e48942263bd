"""Pack a source into a folder of shards: list, pack in parallel, and publish the manifest last."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import (
    canonical_json,
    explain_disk_errors,
    file_sha256,
    json_sha256,
    remove_temporaries,
    size_text,
    sync_folder,
    write_atomic,
)
from shards.listing import Listing, describe_plan, write_listing
from shards.manifest import (
    CLASSES_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    SOURCE_NAME,
    WORK_FOLDER,
    FileEntry,
    Manifest,
    check_files,
    load_manifest,
    write_index,
)
from shards.sanitize import policy_fields
from shards.shard_writer import WARNED_COUNT, ShardJob, ShardSettings, finish_shard, merged_columns, read_record
from shards.sources import SourceOptions, recognise
from shards.sources.base import Source, confirmed_files, describe_files, is_system_folder
from shards.sources.folders import describe_ignored
from shards.workers import only_packer, run_jobs

ROWS_PER_SHARD = 2048
# In the working folder.
_LISTING_FOLDER, _NEW_LISTING_FOLDER, _RECORDS_FOLDER, _STAGE_FOLDER = "listing", "listing.new", "records", "stage"
_REQUEST_FILE = "request.json"
_TAR_BYTES_A_ROW = 3584  # three headers, padding, label and description


def pack(
    source: str | Path,
    output: str | Path,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    seed: int = 0,
    workers: int | None = None,
    options: SourceOptions = SourceOptions(),  # noqa: B008  (frozen)
    keep_warned: bool = False,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Manifest:
    """Pack images into shards, or continue where an earlier call with the same arguments stopped.

    The result depends on the source's names, labels and bytes, `seed`, `rows_per_shard` and the policy, to
    the byte; not on `workers`, nor on interruptions.

    Args:
        source: class folders, a folder of images, an ImageNet tar, or a folder of parquet files.
        output: folder to make; empty, absent, or one that this function began.
        rows_per_shard: images planned a shard.
        seed: seed of the order of rows.
        workers: processes; by default one a core that this process may use.
        options: labels, classes and split of the source, where it does not tell them itself.
        keep_warned: re-encode JPEGs that the decoder warns of instead of quarantining them.
        skip_unreadable: quarantine files that cannot be read instead of stopping.
        progress: print what was found and done, with a bar.

    Returns:
        The manifest of the finished folder.

    Raises:
        UserError: anything about the source, the output or the disk that the user can act on.
    """
    if rows_per_shard < 1:
        raise UserError(f"rows_per_shard is {rows_per_shard}. It is a number of images: 1 or more.")
    if not -(1 << 63) <= seed < 1 << 63:
        raise UserError(f"seed is {seed}. It is an integer of 64 bits: give one below 2^63.")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}. It is a number of processes: 1 or more, or leave it out.")
    source, output = Path(source), Path(output)
    workers = workers or len(os.sched_getaffinity(0))
    _check_places(source, output)
    with explain_disk_errors(output):
        found = recognise(source, options)
    if progress:
        print(f"{source}: {found.kind}")
    with explain_disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        with only_packer(output / WORK_FOLDER):
            began = time.monotonic()
            settings = ShardSettings(found.class_names, rows_per_shard, keep_warned, skip_unreadable)
            run = _Run(source, output, found, options, settings, seed, progress)
            finished = (output / MANIFEST_NAME).exists()
            manifest = run.continue_to_end(workers)
    if progress and finished:
        print(
            f"{output}: already finished, nothing to do ({manifest.num_rows} images in {len(manifest.shards)} shards)."
        )
    elif progress:
        print(summary(manifest, output, time.monotonic() - began))
    return manifest


def _check_places(source: Path, output: Path) -> None:
    if not source.exists():
        raise UserError(f"{source}: no such file or folder. Give the path of the images as DATA or --source.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file. Give a folder for the shards.")
    inside = source.resolve()
    if inside.is_dir() and inside in (output.resolve(), *output.resolve().parents):
        raise UserError(f"{output}: lies inside the source {source}. Choose a folder outside it.")
    ours = (output / MANIFEST_NAME).exists() or (output / WORK_FOLDER).is_dir()
    strange = sorted(path.name for path in output.iterdir()) if output.is_dir() and not ours else []
    if strange := [name for name in strange if not is_system_folder(name)]:
        raise UserError(
            f"{output}: holds other files ({', '.join(strange[:3])}, {len(strange)} in all) and no shards. "
            "Choose an empty or a new folder."
        )


@dataclass
class _Run:
    """One call of `pack`, under the lock."""

    source_path: Path
    output: Path
    source: Source
    options: SourceOptions
    settings: ShardSettings
    seed: int
    progress: bool

    @property
    def work(self) -> Path:
        return self.output / WORK_FOLDER

    def continue_to_end(self, workers: int) -> Manifest:
        """Pack what is not packed yet, publish, and remove the working folder."""
        if (self.output / MANIFEST_NAME).exists():
            manifest = self._check_published()
        else:
            self._stage()
            listing = self._list()
            self._check_free_disk(listing.total_bytes + len(listing) * _TAR_BYTES_A_ROW)
            manifest = self._pack(listing, workers)
        shutil.rmtree(self.work)
        sync_folder(self.output)
        return manifest

    def _stage(self) -> None:
        """Have a source that cannot be read image by image write itself out so that it can."""
        if self.source.stage is None:
            return
        total = sum(container.size for container in self.source.containers)
        self._check_free_disk(2 * total)
        self.source = self.source.stage(self.work / _STAGE_FOLDER, self.progress)
        self.settings = replace(self.settings, class_names=self.source.class_names)

    def _list(self) -> Listing:
        """List the source; where packing was begun before, what was listed then must be the same."""
        (self.work / _RECORDS_FOLDER).mkdir(exist_ok=True)
        for place in (self.output, self.work, self.work / _RECORDS_FOLDER):
            remove_temporaries(place)
        folder, request_path = self.work / _LISTING_FOLDER, self.work / _REQUEST_FILE
        listing, request = self._write_listing(), self._request()
        if request_path.exists():
            before = json.loads(request_path.read_bytes())
            if other := _difference(before, {name: value for name, value in request.items() if name in before}):
                raise UserError(
                    f"{self.output}: packing was begun with {other[0]} = {other[1]}, now it is {other[2]}. "
                    "Give the same arguments, or delete the folder to begin anew."
                )
            difference = listing.first_difference(Listing(folder))
            if difference is not None:
                raise UserError(
                    f"{self.source_path}: changed since this packing began: {difference}. "
                    f"Restore it, or delete {self.output} to begin anew."
                )
        else:
            shutil.rmtree(folder, ignore_errors=True)
            (self.work / _NEW_LISTING_FOLDER).rename(folder)
            # Only now: a request on disk says that the listing beside it is whole.
            write_atomic(request_path, canonical_json(request))
        return Listing(folder)

    def _write_listing(self) -> Listing:
        items = tqdm(self.source.items(), desc="listing", unit=" images", disable=not self.progress, mininterval=0.5)
        listing = write_listing(self.work / _NEW_LISTING_FOLDER, items, self.seed, str(self.source_path))
        if self.progress:
            print("\n".join([*self.source.notes, *describe_plan(listing, self.source.class_names)]))
            if self.source.ignored:
                print(describe_ignored(self.source.ignored).strip())
        return listing

    def _request(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "rows_per_shard": self.settings.rows_per_shard,
            "class_names": list(self.settings.class_names),
            **policy_fields(keep_warned=self.settings.keep_warned),
            "kind of source": self.source.kind,
            **self._asked(),
        }

    def _asked(self) -> dict[str, Any]:
        """Return the options of the source; a list of labels by its content, since its path says little."""
        labels = self.options.labels
        if labels is not None and Path(labels).is_file():
            labels = f"sha256 {file_sha256(Path(labels))}"
        names = ("split", "image_column", "label_column")
        options = {name: getattr(self.options, name) for name in names}
        classes = json_sha256(list(self.options.classes)) if self.options.classes else None
        return {"labels": labels, "ignore": list(self.options.ignore), "classes": classes, **options}

    def _check_published(self) -> Manifest:
        """Check that the finished folder is what this call would make, as far as its manifest tells."""
        manifest = load_manifest(self.output)
        held = {
            "seed": manifest.seed,
            "rows_per_shard": manifest.rows_per_shard,
            "class_names": list(manifest.class_names),
            "content": manifest.source["content_sha256"],
            "kind of source": manifest.source["kind"],
            **manifest.policy,
        }
        wanted = self._request()
        if self.source.stage is None:
            listing = self._write_listing()
            wanted |= {"content": listing.content_hash(), "times of files": listing.content_hash("mtime_ns")}
        else:  # staging again would cost as much as packing
            del wanted["class_names"]
        recorded = _recorded(self.output)
        if recorded is not None:
            held |= recorded["asked"] | {"times of files": recorded["times_sha256"]}
            wanted["files"] = describe_files(self.source.containers)
            held["files"] = confirmed_files(recorded["files"], wanted["files"], self.source.containers)
        else:  # packed by an earlier version, or copied without it
            wanted = {name: value for name, value in wanted.items() if name in held}
        if other := _difference(held, wanted):
            shutil.rmtree(self.work)
            raise UserError(
                f"{self.output}: already holds other shards ({manifest.num_rows} rows; {other[0]} is {other[1]}, this "
                f"call has {other[2]}). Choose another folder, or delete this one."
            )
        check_files(self.output, manifest)
        return manifest

    def _check_free_disk(self, needed: int) -> None:
        there = sum(path.stat().st_size for path in self.output.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.output).free
        if free + there < needed:
            raise UserError(
                f"{self.output}: about {size_text(needed)} are needed, {size_text(free + there)} are free "
                "there. Make room, or choose a folder on a larger disk."
            )

    def _pack(self, listing: Listing, workers: int) -> Manifest:
        num_shards = -(-len(listing) // self.settings.rows_per_shard)
        quarantined = 0
        jobs = (self._job(listing, number) for number in range(num_shards))
        with tqdm(total=len(listing), desc="packing", unit=" images", disable=not self.progress) as bar:

            def report(finished: tuple[int, int]) -> None:
                nonlocal quarantined
                quarantined += finished[1]
                bar.set_postfix(quarantined=quarantined, refresh=False)
                bar.update(finished[0])

            run_jobs(finish_shard, jobs, min(workers, num_shards), report, packed_in=self.work)
        return self._publish(listing, num_shards)

    def _job(self, listing: Listing, number: int) -> ShardJob:
        start = number * self.settings.rows_per_shard
        positions = listing.order[start : start + self.settings.rows_per_shard].tolist()
        rows = [(item := listing.item(position), *listing.key(position, item.name)) for position in positions]
        records = self.work / _RECORDS_FOLDER
        return ShardJob(number, self.output, records, self.source.containers, self.settings, rows)

    def _publish(self, listing: Listing, num_shards: int) -> Manifest:
        """Write index, classes, quarantine list and, last of all, the manifest."""
        found = [read_record(self.work / _RECORDS_FOLDER, number) for number in range(num_shards)]
        records = [record for record in found if record is not None]
        assert len(records) == num_shards
        filled = tuple(record.entry for record in records if record.entry.rows)
        if not filled:
            reason = records[0].quarantined[0]
            raise UserError(
                f"{self.source_path}: none of its {len(listing)} images can be packed. "
                f"The first: {reason['name']}: {reason['reason']}. Check that these are images."
            )
        quarantined = [entry for record in records for entry in record.quarantined]
        index, classes, quarantine = (self.output / name for name in (INDEX_NAME, CLASSES_NAME, QUARANTINE_NAME))
        write_atomic(index, lambda file: write_index(file, lambda name: merged_columns(records, name)))
        write_atomic(classes, json.dumps(self.settings.class_names, indent=0).encode() + b"\n")
        write_atomic(quarantine, b"".join(canonical_json(entry) + b"\n" for entry in quarantined))
        counts: Counter[str] = Counter(quarantined=len(quarantined))
        for record in records:
            counts.update(record.counts)
        described = {
            "asked": self._asked(),
            "files": describe_files(self.source.origins or self.source.containers),
            "times_sha256": listing.content_hash("mtime_ns"),
        }
        write_atomic(self.output / SOURCE_NAME, canonical_json(described))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            rows_per_shard=self.settings.rows_per_shard,
            seed=self.seed,
            class_names=self.settings.class_names,
            policy=policy_fields(keep_warned=self.settings.keep_warned),
            source={
                "kind": self.source.kind,
                "images": len(listing),
                "bytes": listing.total_bytes,
                "content_sha256": listing.content_hash(),
            },
            counts=dict(sorted(counts.items())),
            shards=filled,
            files=tuple(
                FileEntry(path.name, path.stat().st_size, file_sha256(path)) for path in (index, classes, quarantine)
            ),
        )
        write_atomic(self.output / MANIFEST_NAME, manifest.to_json())
        return manifest


def _recorded(output: Path) -> dict[str, Any] | None:
    """Return what is recorded of the source of a finished folder; None where nothing is."""
    try:
        record: dict[str, Any] = json.loads((output / SOURCE_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and {"asked", "files", "times_sha256"} <= record.keys() else None


def _difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return the name of the first value that is not the one before, with both in short; None where all are."""
    for name, value in now.items():
        if before.get(name) != value:
            return name, _short(before.get(name)), _short(value)
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def summary(manifest: Manifest, output: Path, seconds: float) -> str:
    """Return the closing lines of a packing: what was packed, changed and left out."""
    total = sum(shard.bytes for shard in manifest.shards)
    warned = manifest.counts.get(WARNED_COUNT, 0)
    lines = [
        f"{output}: {manifest.num_rows} images of {manifest.num_classes} classes in {len(manifest.shards)} "
        f"shards, {size_text(total)}, in {seconds:.0f} s ({manifest.counts_text()})"
    ]
    if manifest.counts["quarantined"]:
        lines.append(f"Left out, with reasons: {output / QUARANTINE_NAME}")
    if warned:
        lines.append(
            f"Of these, {warned} are JPEGs that Pillow reads without a word, some whole, some smeared or half. "
            "To have them all the same, pack into a new folder with --keep-warned."
        )
    return "\n".join(lines)
