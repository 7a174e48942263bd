"""Memory stays flat: listing, ordering and indexing as many rows as ImageNet has, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

IMAGENET_ROWS = 1_281_167
LIMIT = 1e9  # bytes, of the whole process with its libraries

# Of this program alone: getrusage would count what the process was before it became this program, too.
PEAK = """
peak = 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
"""

INDEX_PART = """
import json, sys
from pathlib import Path
import numpy as np
from shards.manifest import ShardEntry
from shards.manifest import COLUMN_DTYPES, write_index
from shards.shard_writer import ROW_COLUMNS, ShardRecord, merged_columns, read_record, write_record

folder, num_rows = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
num_shards = -(-num_rows // 2048)
for number in range(num_shards):
    rows = min(2048, num_rows - 2048 * number)
    columns = {name: rng.integers(0, 2**31, rows).astype(dtype) for name, dtype in ROW_COLUMNS.items()}
    entry = ShardEntry(f"shard-{number:06d}.tar", 1, "", rows)
    write_record(folder, number, ShardRecord(entry, columns, [], {}))
records = [read_record(folder, number) for number in range(num_shards)]
with (folder / "index.npz").open("wb") as file:
    write_index(file, lambda name: merged_columns(records, name))
with np.load(folder / "index.npz") as index:
    rows = {name: len(index[name]) for name in COLUMN_DTYPES}
    last = int(index["shard"][-1])
PEAK
print(json.dumps({"peak": peak, "rows": sorted(set(rows.values())), "last": last}))
"""

LISTING_PART = """
import json, sys
from pathlib import Path
from shards.listing import write_listing
from shards.sources.base import SourceItem

num_rows = int(sys.argv[2])
items = (
    SourceItem(name := f"n{row % 1000:08d}/n{row % 1000:08d}_{row}.JPEG", name, 0, 0, 110_000, 1, row % 1000)
    for row in range(num_rows)
)
listing = write_listing(Path(sys.argv[1]) / "listing", items, 0, "nowhere")
content = listing.content_hash()
middle = listing.item(num_rows // 2)
PEAK
print(json.dumps({"peak": peak, "rows": [len(listing)], "name": middle.name}))
"""


def measured(code: str, folder: Path, rows: int) -> dict[str, object]:
    command = [sys.executable, "-c", code.replace("PEAK", PEAK), str(folder), str(rows)]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


def test_the_index_of_imagenet_is_put_together_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    found = measured(INDEX_PART, tmp_path, IMAGENET_ROWS)
    assert found["rows"] == [IMAGENET_ROWS]
    assert found["last"] == 625
    assert int(str(found["peak"])) < LIMIT


@pytest.mark.parametrize("rows", [100_000, pytest.param(IMAGENET_ROWS, marks=pytest.mark.slow)])
def test_a_listing_is_written_and_ordered_in_less_than_a_gigabyte(tmp_path: Path, rows: int) -> None:
    found = measured(LISTING_PART, tmp_path, rows)
    assert found["rows"] == [rows]
    middle = rows // 2
    assert found["name"] == f"n{middle % 1000:08d}/n{middle % 1000:08d}_{middle}.JPEG"
    # What grows with the rows, arrays of 8 bytes each while ordering and mapped pages, is under 300 bytes a row.
    assert int(str(found["peak"])) < LIMIT * (0.3 + 0.7 * rows / IMAGENET_ROWS)
