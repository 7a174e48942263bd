"""The commands: `python -m shards pack|verify|inspect`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError
from shards.pack import ROWS_PER_SHARD, pack
from shards.sources.labels import load_classes
from shards.sources.recognise import SourceOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for faults found, 2 for bad input, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from here.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pack(commands.add_parser("pack", help="pack images into shards, or continue", allow_abbrev=False))
    return parser


def _flag(parser: argparse.ArgumentParser, name: str, **settings: object) -> None:
    """Add a flag under its name with hyphens and with underscores."""
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
    parser.add_argument(*spellings, **settings)  # type: ignore[arg-type]


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_pack)
    _flag(parser, "source", required=True, type=Path, help="class folders, images, ImageNet tar or parquet files")
    _flag(parser, "output", required=True, type=Path, help="folder for the shards; new, empty, or begun before")
    _flag(parser, "rows-per-shard", type=int, default=ROWS_PER_SHARD, help="images a shard (%(default)s)")
    _flag(parser, "seed", type=int, default=0, help="of the order of rows (%(default)s)")
    _flag(parser, "workers", type=int, help="processes (one a core)")
    _flag(parser, "labels", help="list of labels for images without class folders, or `none`")
    _flag(parser, "classes", type=Path, help="JSON list of classes in label order, such as another classes.json")
    _flag(parser, "split", help="split of a folder of parquet files")
    _flag(parser, "image-column", default="image", help="of parquet files (%(default)s)")
    _flag(parser, "label-column", default="label", help="of parquet files (%(default)s)")
    _flag(parser, "keep-warned", action="store_true", help="re-encode JPEGs that decode with a warning")
    _flag(parser, "skip-unreadable", action="store_true", help="quarantine files that cannot be read")


def _pack(options: argparse.Namespace) -> int:
    pack(
        options.source,
        options.output,
        rows_per_shard=options.rows_per_shard,
        seed=options.seed,
        workers=options.workers,
        options=SourceOptions(
            labels=options.labels,
            classes=load_classes(options.classes) if options.classes else None,
            split=options.split,
            image_column=options.image_column,
            label_column=options.label_column,
        ),
        keep_warned=options.keep_warned,
        skip_unreadable=options.skip_unreadable,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
