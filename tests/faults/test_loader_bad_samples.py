"""Rows that cannot be decoded: named by shard, row and key in every backend; skipped only within a budget."""

import dataclasses
import hashlib
import io
import shutil

import google_crc32c
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.loader import open_loader
from pipeline.order import epoch_order
from pipeline.readers import read_center_crops, read_teacher_crops
from shards.folder import ShardFolder
from shards.manifest import INDEX_NAME, MANIFEST_NAME, load_index, load_manifest, write_index
from shards.pack import pack

ROWS = 24
BATCH = 4
SMALL = Augmentation(num_local_crops=1, global_crops_size=32, local_crops_size=16, patch_size=8, mask_patch_size=8)
NOT_A_JPEG = b"<html><body>404 Not Found</body></html>"


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    for i in range(ROWS):
        path = folder / "images" / f"class{i % 3}" / f"img{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((64, 48), Image.Resampling.BICUBIC).save(path, quality=90)
    pack(folder / "images", folder / "shards", rows_per_shard=10, workers=1, progress=False)
    return folder / "shards"


@pytest.fixture
def plant(good_shards, tmp_path):
    """Copy the shards, change some rows, and make index and manifest match what is there."""

    def change(*, jpegs=None, heights=None):
        folder = tmp_path / "shards"
        shutil.copytree(good_shards, folder)
        index, manifest = load_index(folder), load_manifest(folder)
        columns = {f.name: getattr(index, f.name).copy() for f in dataclasses.fields(index)}
        for row, make in (jpegs or {}).items():
            path = folder / manifest.shards[index.shard[row]].name
            offset, size = int(index.offset[row]), int(index.size[row])
            content = bytearray(path.read_bytes())
            changed = make(bytes(content[offset : offset + size]))[:size].ljust(size, b"\0")
            content[offset : offset + size] = changed
            path.write_bytes(bytes(content))
            columns["crc32c"][row] = google_crc32c.value(changed)
        for row, height in (heights or {}).items():
            columns["height"][row] = height
        stream = io.BytesIO()
        write_index(stream, columns.__getitem__)
        (folder / INDEX_NAME).write_bytes(stream.getvalue())
        hashed = [
            tuple(
                dataclasses.replace(
                    entry,
                    bytes=(folder / entry.name).stat().st_size,
                    sha256=hashlib.sha256((folder / entry.name).read_bytes()).hexdigest(),
                )
                for entry in entries
            )
            for entries in (manifest.shards, manifest.files)
        ]
        matching = dataclasses.replace(manifest, shards=hashed[0], files=hashed[1])
        (folder / MANIFEST_NAME).write_bytes(matching.to_json())
        return folder

    return change


def _garbage(_jpeg):
    return NOT_A_JPEG


def _cut(jpeg):
    return jpeg[: len(jpeg) * 2 // 3]


def _open(folder, backend="cpu", **changes):
    arguments = {
        "device": "cpu", "global_batch_size": BATCH, "seed": 1, "augmentation": SMALL, "num_threads": 1,
    }  # fmt: skip
    return open_loader(folder, backend=backend, **(arguments | changes))


def _take(folder, count, backend="cpu", **changes):
    with _open(folder, backend, **changes) as loader:
        return [next(loader) for _ in range(count)], loader


def _key(folder, row):
    with ShardFolder(folder) as source:
        return source.key(row)


def _due(row):
    """Epoch-0 step at which a row is read."""
    return int(np.flatnonzero(epoch_order(ROWS, seed=1, epoch=0) == row)[0]) // BATCH


@pytest.mark.parametrize("damage", [_garbage, _cut])
def test_policy_raise_names_shard_row_and_key_in_every_backend(plant, backend, damage):
    row = 13
    folder = plant(jpegs={row: damage})
    shard = load_manifest(folder).shards[load_index(folder).shard[row]].name
    with _open(folder, backend) as loader:
        for _ in range(_due(row)):
            next(loader)
        with pytest.raises(UserError, match="1 sample") as caught:
            next(loader)
        message = str(caught.value)
        assert f"{shard}: row {row} (key {_key(folder, row)}): " in message
        assert "Run `make verify-shards`" in message
        with pytest.raises(UserError, match="1 sample"):  # and again, not a hang
            next(loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_row_that_is_no_jpeg_is_named_and_replaced_too(plant, backend):
    # Only garbage: a GPU's decoder may make half an image of half a JPEG without a word. Packing is strict.
    row = 13
    folder = plant(jpegs={row: _garbage})
    with _open(folder, backend, device="cuda") as loader:
        for _ in range(_due(row)):
            next(loader)
        with pytest.raises(UserError, match=rf"row {row} \(key {_key(folder, row)}\): "):
            next(loader)
    skip = {"on_bad_sample": "skip", "skip_budget": 0.5}
    ours, _ = _take(folder, ROWS // BATCH, backend, device="cuda", **skip)
    theirs, _ = _take(folder, ROWS // BATCH, "cpu", **skip)
    assert [b.rows.tolist() for b in ours] == [b.rows.tolist() for b in theirs]


def test_several_bad_rows_of_a_batch_are_all_named(plant, backend):
    order = epoch_order(ROWS, seed=1, epoch=0)
    bad = sorted(order[[4, 6]].tolist())
    folder = plant(jpegs=dict.fromkeys(bad, _garbage))
    with _open(folder, backend) as loader:
        next(loader)
        with pytest.raises(UserError, match=r"2 sample\(s\)") as caught:
            next(loader)
    for row in bad:
        assert f"row {row} (key {_key(folder, row)})" in str(caught.value)


def test_an_image_of_another_size_than_the_index_says_is_bad(plant, backend):
    folder = plant(heights={5: 40})
    with (
        _open(folder, backend) as loader,
        pytest.raises(UserError, match=r"row 5 .*48 x 64 pixels, the index says 40 x 64"),
    ):
        for _ in range(ROWS // BATCH):
            next(loader)


def test_policy_skip_puts_the_row_half_an_epoch_away_in_its_place(plant, backend, good_shards, caplog):
    bad = 13
    folder = plant(jpegs={bad: _garbage})
    steps = ROWS // BATCH
    batches, loader = _take(folder, 2 * steps, backend, on_bad_sample="skip", skip_budget=0.5)
    good, _ = _take(good_shards, 2 * steps, backend)
    for epoch in range(2):
        order = epoch_order(ROWS, seed=1, epoch=epoch)
        place = int(np.flatnonzero(order == bad)[0])
        expected = order.copy()
        expected[place] = order[(place + ROWS // 2) % ROWS]
        rows = np.concatenate([b.rows for b in batches[epoch * steps : (epoch + 1) * steps]])
        assert np.array_equal(rows, expected)
    index = load_index(folder)
    for ours, theirs in zip(batches, good, strict=True):
        same = ours.rows == theirs.rows
        crops = [b.global_crops.unflatten(0, (2, BATCH)) for b in (ours, theirs)]
        assert torch.equal(crops[0][:, same], crops[1][:, same])
        assert np.array_equal(ours.uids, index.uid[ours.rows])
    assert list(loader.failures.reasons) == [bad]
    # The feeder may be ahead by some batches, of which one may hold the bad row again.
    assert loader.failures.num_replaced >= 2
    assert "1 distinct rows bad" in loader.failures.summary()
    assert f"row {bad} (key {_key(folder, bad)})" in caplog.text


def test_skipping_is_the_same_for_every_world_size_and_after_resume(plant):
    folder = plant(jpegs={2: _garbage, 13: _cut, 14: _garbage})
    skip = {"on_bad_sample": "skip", "skip_budget": 0.5}
    whole, _ = _take(folder, 8, **skip)
    halves = [_take(folder, 8, rank=r, world_size=2, **skip)[0] for r in range(2)]
    with _open(folder, **skip) as loader:
        for _ in range(4):
            next(loader)
        state = loader.state_dict()
    resumed, _ = _take(folder, 4, state=state, **skip)
    # The state says nothing of the bad rows, so each resumed rank meets them anew.
    quarters = [_take(folder, 4, state=state, rank=r, world_size=4, **skip)[0] for r in range(4)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([h[step].rows for h in halves]), batch.rows)
        if step >= 4:
            assert np.array_equal(resumed[step - 4].rows, batch.rows)
            assert np.array_equal(np.concatenate([q[step - 4].rows for q in quarters]), batch.rows)
            assert torch.equal(resumed[step - 4].global_crops, batch.global_crops)


def test_a_substitute_that_is_bad_too_is_passed_over(plant):
    order = epoch_order(ROWS, seed=1, epoch=0)
    first, second = int(order[1]), int(order[1 + ROWS // 2])
    folder = plant(jpegs={first: _garbage, second: _garbage})
    batches, _ = _take(folder, 1, on_bad_sample="skip", skip_budget=0.5)
    assert batches[0].rows.tolist() == [order[0], order[2 + ROWS // 2], order[2], order[3]]


def test_skipping_beyond_the_budget_stops_with_the_numbers(plant, monkeypatch):
    monkeypatch.setattr("pipeline.jobs.PROBATION", 10)
    folder = plant(jpegs=dict.fromkeys(range(6), _garbage))
    with (
        _open(folder, on_bad_sample="skip", skip_budget=0.1) as loader,
        pytest.raises(UserError, match=r"samples could not be decoded, the skip budget allows"),
    ):
        for _ in range(ROWS // BATCH):
            next(loader)


def test_probation_grants_the_budget_in_advance(plant, monkeypatch):
    order = epoch_order(ROWS, seed=1, epoch=0)
    monkeypatch.setattr("pipeline.jobs.PROBATION", 100)
    folder = plant(jpegs={int(order[0]): _garbage})
    batches, _ = _take(folder, 1, on_bad_sample="skip", skip_budget=0.01)
    assert len(batches) == 1
    monkeypatch.setattr("pipeline.jobs.PROBATION", 99)
    with (
        pytest.raises(UserError, match="1 of 4 samples"),
        _open(folder, on_bad_sample="skip", skip_budget=0.01) as loader,
    ):
        next(loader)


def test_all_rows_bad_is_an_error_under_skip(plant):
    folder = plant(jpegs=dict.fromkeys(range(ROWS), _garbage))
    with _open(folder, on_bad_sample="skip", skip_budget=1.0) as loader, pytest.raises(UserError, match="all 24 rows"):
        next(loader)


def test_readers_never_skip(plant, backend):
    folder = plant(jpegs={7: _garbage})
    crops = read_center_crops(folder, range(ROWS), size=32, backend=backend, batch_size=5)
    assert next(crops).rows.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"row 7 \(key "):
        next(crops)
    with pytest.raises(UserError, match=r"row 7 \(key "):
        list(read_teacher_crops(folder, [np.array([7])], view_set=0, seed=0, augmentation=SMALL, backend=backend))
