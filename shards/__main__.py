"""The commands: `python -m shards pack|verify|inspect`."""

from __future__ import annotations

if __name__ == "__main__":
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError, run_command
from common.files import write_atomic
from shards.folder import ShardFolder
from shards.inspection import describe_folder, describe_row, find_row, write_sheet
from shards.manifest import load_manifest
from shards.pack import ROWS_PER_SHARD, pack
from shards.sources import SourceOptions
from shards.sources.labels import load_classes
from shards.verify import describe_faults, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for faults found, 2 for bad input, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    packing = command("pack", _pack, "pack images into shards, or continue")
    _flag(packing, "source", required=True, type=Path, help="class folders, images, ImageNet tar or parquet files")
    _flag(packing, "output", required=True, type=Path, help="folder for the shards; new, empty, or begun before")
    _flag(packing, "rows-per-shard", type=int, default=ROWS_PER_SHARD, help="images a shard (%(default)s)")
    _flag(packing, "seed", type=int, default=0, help="of the order of rows (%(default)s)")
    _flag(packing, "workers", type=int, help="processes (one a core)")
    _flag(packing, "labels", help="list of labels by file name; `none`; or `folders`: each folder is a class")
    _flag(packing, "classes", type=Path, help="JSON list of classes in label order, such as another classes.json")
    _flag(packing, "split", help="folder or set of files to take, such as train, where there are several")
    _flag(packing, "ignore", nargs="+", default=(), help="names or patterns of files and folders to pass over")
    _flag(packing, "image-column", default="image", help="of parquet files (%(default)s)")
    _flag(packing, "label-column", help="of parquet files, tables and samples (label)")
    _flag(packing, "keep-warned", action="store_true", help="pack JPEGs whose picture the decoder warns of, re-encoded")
    _flag(packing, "skip-unreadable", action="store_true", help="quarantine files that cannot be read")

    verifying = command("verify", _verify, "check a folder of shards to the byte")
    verifying.add_argument("shards", type=Path, help="folder of shards")
    _flag(verifying, "decode", type=float, default=0.01, help="share of images to decode, 0 to 1 (%(default)s)")
    _flag(verifying, "workers", type=int, help="processes (one a core)")

    inspecting = command("inspect", _inspect, "show a folder, a sample, a sheet")
    inspecting.add_argument("shards", type=Path, help="folder of shards")
    inspecting.add_argument("row", nargs="?", help="row number, key or original name; without it, a summary")
    _flag(inspecting, "output", type=Path, help="where to write the row's image (./KEY.jpg)")
    _flag(inspecting, "sheet", type=Path, help="write a contact sheet of rows, from the given one on, to this file")
    _flag(inspecting, "number", type=int, default=64, help="images on the sheet (%(default)s)")
    return parser


def _flag(parser: argparse.ArgumentParser, name: str, **settings: object) -> None:
    """Add a flag under its name with hyphens and with underscores."""
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
    parser.add_argument(*spellings, **settings)  # type: ignore[arg-type]


def _pack(options: argparse.Namespace) -> int:
    classes = load_classes(options.classes) if options.classes else None
    columns = (options.image_column, options.label_column, tuple(options.ignore))
    pack(
        options.source,
        options.output,
        rows_per_shard=options.rows_per_shard,
        seed=options.seed,
        workers=options.workers,
        options=SourceOptions(options.labels, classes, options.split, *columns),
        keep_warned=options.keep_warned,
        skip_unreadable=options.skip_unreadable,
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    faults = verify(options.shards, decode=options.decode, workers=options.workers)
    for fault in faults:
        print(fault)
    print(describe_faults(faults, options.shards, load_manifest(options.shards)))
    return 1 if faults else 0


def _inspect(options: argparse.Namespace) -> int:
    if options.number < 1:
        raise UserError(f"--number is {options.number}. It is a number of images: 1 or more.")
    folder = ShardFolder(options.shards)
    row = find_row(folder, options.row) if options.row else 0
    if options.sheet:
        rows = range(row, min(row + options.number, len(folder)))
        write_sheet(folder, options.sheet, rows)
        print(f"{options.sheet}: rows {rows.start} to {rows.stop - 1}")
    elif options.row:
        path = options.output or Path(f"{folder.key(row)}.jpg")
        write_atomic(path, folder.jpeg(row))
        print(f"{describe_row(folder, row)}\nimage: {path}")
    else:
        print(describe_folder(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
