"""What a cache was made from, as one dictionary, and what to say when a run needs another."""

from __future__ import annotations

from typing import Any

from cache_tools.layout import CacheMismatch, CodecName
from pipeline.augmentation import Augmentation
from pipeline.plan import PLAN_VERSION, box_test_vector
from shards.manifest import Manifest

Json = dict[str, Any]
SHOWN_FIELDS = 8
SHOWN_CHARACTERS = 160
# The build measures the calibration, so no run knows it beforehand; a trainer does not care from how many rows.
LEFT_TO_THE_BUILD = ("codec.calibration", "codec.calibration_rows")


def cache_fingerprint(
    *,
    manifest: Manifest,
    augmentation: Augmentation,
    seed: int,
    teacher: Json | None = None,
    decoder: str | None = None,
    codec: CodecName | None = None,
    calibration_rows: int | None = None,
) -> Json:
    """Return the canonical dictionary of what a run with these settings would cache, or expects of a cache.

    Sections given as None are left out, and what an expectation leaves out is not compared: a trainer need not load
    the teacher, and may take the decoder and codec that it finds.

    Args:
        manifest: of the shards; every tar counts with its hash.
        augmentation: its geometry counts; local crops, masks and the student's photometrics do not.
        seed: seed of the crop plan.
        teacher: the frozen teacher's fingerprint.
        decoder: what turned JPEG bytes into crops, see `cache_tools.build.decoder_name`.
        codec: "int8" or "fp16".
        calibration_rows: rows from which an int8 codec is calibrated.
    """
    fingerprint: Json = {
        "crops": {
            "plan_version": PLAN_VERSION,
            "seed": seed,
            "geometry": augmentation.geometry_fingerprint(),
            "box_test_vector": box_test_vector(seed, augmentation),
        },
        "data": {
            "rows": manifest.num_rows,
            "shards": [f"{s.name} {s.rows} rows {s.bytes} bytes sha256 {s.sha256}" for s in manifest.shards],
        },
    }
    if teacher is not None:
        fingerprint["teacher"] = teacher
    if decoder is not None:
        fingerprint["decoder"] = decoder
    if codec is not None:
        fingerprint["codec"] = {"name": codec}
        if calibration_rows is not None and codec == "int8":
            fingerprint["codec"]["calibration_rows"] = calibration_rows
    return fingerprint


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dictionaries and lists by dotted path; a list of numbers is one leaf."""
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (str, dict)) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix: list(value) if isinstance(value, tuple) else value}
    leaves: dict[str, object] = {}
    for key, item in items:
        leaves |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return leaves


def differences(expected: Json, found: Json) -> list[str]:
    """Return a line for each field that differs, with both values.

    A whole section that `expected` leaves out is not compared; a field within a section that is on one side
    only differs. The measured calibration is not compared here: the cache checks it against its own arrays.
    """
    absent = "(absent)"
    lines = []
    for section in expected:
        ours = flatten({section: expected[section]})
        theirs = flatten({section: found.get(section, absent)})
        for name in sorted(ours.keys() | theirs.keys(), key=_natural):
            left, right = ours.get(name, absent), theirs.get(name, absent)
            if name in LEFT_TO_THE_BUILD and left == absent:
                continue
            if left != right:
                lines.append(f"  {name}: this run {_shown(left)}, the cache {_shown(right)}")
    return lines


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def check_fingerprint(expected: Json, found: Json, *, where: str) -> None:
    """Raise CacheMismatch, naming each differing field with both values."""
    lines = differences(expected, found)
    if lines:
        more = f"\n  and {len(lines) - SHOWN_FIELDS} more" if len(lines) > SHOWN_FIELDS else ""
        raise CacheMismatch(
            f"{where}: this cache was made from something else. {len(lines)} field(s) differ:\n"
            + "\n".join(lines[:SHOWN_FIELDS])
            + more
            + "\nGive this run the cache's settings, or build another cache in an empty folder."
        )
