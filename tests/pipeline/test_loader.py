"""The stream of training batches: what is in a batch, order, ranks, resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.loader import open_loader
from pipeline.masks import block_masks
from pipeline.order import epoch_order
from pipeline.plan import crop_plan, global_crops_spec
from pipeline.readers import in_batches, read_center_crops, read_teacher_crops
from shards.manifest import load_index

ROWS = 48
SMALL = Augmentation(num_local_crops=2, global_crops_size=48, local_crops_size=24, patch_size=8, mask_patch_size=16)


def _open(shards, **changes):
    arguments = {
        "device": "cpu", "backend": "cpu", "global_batch_size": 8, "seed": 1, "augmentation": SMALL,
        "num_threads": 1,
    }  # fmt: skip
    return open_loader(shards, **(arguments | changes))


def _take(shards, count, **changes):
    with _open(shards, **changes) as loader:
        return [next(loader) for _ in range(count)]


def _assert_equal(a, b):
    for name in ("rows", "uids", "image_crcs", "global_crops_spec"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("global_crops", "local_crops", "teacher_crops", "masks", "masked_indices", "labels"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.epoch, a.view_set) == (b.epoch, b.view_set)


def _join(parts, name, views):
    """Crop-major tensors of ranks, joined to that of the global batch."""
    return torch.cat([getattr(p, name).unflatten(0, (views, -1)) for p in parts], 1).flatten(0, 1)


@pytest.mark.parametrize("size", [8, 4])  # 6 and 12 steps an epoch; 8 are planned at once
def test_a_batch_holds_what_plan_order_index_and_masks_say(shards, size):
    index = load_index(shards)
    batches = _take(shards, 2 * ROWS // size + 1, view_sets=2, global_batch_size=size)
    for number, batch in enumerate(batches):
        epoch, step = divmod(number, ROWS // size)
        order = epoch_order(ROWS, seed=1, epoch=epoch)
        rows = order[step * size : (step + 1) * size]
        assert np.array_equal(batch.rows, rows)
        assert np.array_equal(batch.uids, index.uid[rows])
        assert np.array_equal(batch.image_crcs, index.crc32c[rows])
        assert batch.labels.tolist() == index.label[rows].tolist()
        assert (batch.epoch, batch.view_set) == (epoch, epoch % 2)
        sizes = np.stack([index.height[rows], index.width[rows]], -1)
        plan = crop_plan(index.uid[rows], sizes, view_set=epoch % 2, epoch=epoch, seed=1, augmentation=SMALL)
        assert np.array_equal(batch.global_crops_spec, global_crops_spec(plan, sizes, 2))
        masks, indices = block_masks(index.uid[rows], epoch=epoch, seed=1, augmentation=SMALL)
        assert np.array_equal(batch.masks.numpy(), masks)
        assert np.array_equal(batch.masked_indices.numpy(), indices)
        assert batch.global_crops.shape == (2 * size, 48, 48, 3)
        assert batch.local_crops.shape == (2 * size, 24, 24, 3)
        assert batch.global_crops.dtype == torch.uint8
    seen = np.concatenate([b.rows for b in batches[: ROWS // size]])
    assert np.array_equal(np.sort(seen), np.arange(ROWS))


def test_without_view_sets_each_epoch_is_its_own(shards):
    batches = _take(shards, 13)
    assert [b.view_set for b in batches] == [b.epoch for b in batches] == [0] * 6 + [1] * 6 + [2]


def test_an_epoch_drops_the_rows_that_fill_no_batch(shards):
    with _open(shards, global_batch_size=10) as loader:
        assert loader.steps_per_epoch == 4
        batches = [next(loader) for _ in range(5)]
    seen = np.concatenate([b.rows for b in batches[:4]])
    assert len(np.unique(seen)) == 40
    assert [b.epoch for b in batches] == [0, 0, 0, 0, 1]


def test_a_subset_of_rows_is_trained_on_and_no_other(shards):
    chosen = np.arange(1, 40, 2)
    batches = _take(shards, 5, rows=chosen, global_batch_size=4)
    assert np.array_equal(np.sort(np.concatenate([b.rows for b in batches])), chosen)


def test_local_crops_may_be_absent(shards, backend):
    a = replace(SMALL, num_local_crops=0)
    (batch,) = _take(shards, 1, augmentation=a, backend=backend)
    assert batch.local_crops.shape == (0, 24, 24, 3)
    (full,) = _take(shards, 1, backend=backend)
    assert torch.equal(batch.global_crops, full.global_crops)


@pytest.mark.parametrize("photometric", [False, True])
def test_read_teacher_crops_equals_the_loaders_teacher_crops(shards, backend, photometric):
    a = Augmentation(num_local_crops=1, teacher_photometric=photometric)
    for batch in _take(shards, 7, augmentation=a, backend=backend, view_sets=2)[::6]:
        # Other company, other batch size, other threads.
        rows = np.concatenate([batch.rows, [0, 5]])
        read = list(
            read_teacher_crops(
                shards, in_batches(rows, 3), view_set=batch.view_set, seed=1, augmentation=a, backend=backend,
                num_threads=2,
            )
        )  # fmt: skip
        assert [len(r.rows) for r in read] == [3, 3, 3, 1]
        assert np.array_equal(np.concatenate([r.rows for r in read]), rows)
        crops = _join(read, "crops", 2).unflatten(0, (2, -1))[:, :8].flatten(0, 1)
        assert torch.equal(crops, batch.teacher_crops)
        assert torch.equal(batch.teacher_crops, batch.global_crops) == photometric
        assert np.array_equal(np.concatenate([r.global_crops_spec for r in read])[:8], batch.global_crops_spec)
        assert np.array_equal(np.concatenate([r.uids for r in read])[:8], batch.uids)
        assert np.array_equal(np.concatenate([r.image_crcs for r in read])[:8], batch.image_crcs)
        assert all(r.view_set == batch.view_set for r in read)


def test_without_teacher_crops_the_rest_stays_equal(shards, backend):
    (clean,) = _take(shards, 1, backend=backend)
    (bare,) = _take(shards, 1, backend=backend, teacher_crops=False)
    assert bare.teacher_crops is None
    assert torch.equal(clean.global_crops, bare.global_crops)
    assert torch.equal(clean.local_crops, bare.local_crops)


def test_centre_crops_follow_the_order_of_rows(shards, backend):
    rows = [7, 3, 40, 3, 11]
    index = load_index(shards)
    batches = list(read_center_crops(shards, rows, size=40, backend=backend, batch_size=2))
    assert [b.rows.tolist() for b in batches] == [[7, 3], [40, 3], [11]]
    assert torch.cat([b.labels for b in batches]).tolist() == index.label[rows].tolist()
    crops = torch.cat([b.crops for b in batches])
    assert crops.shape == (5, 40, 40, 3)
    assert torch.equal(crops[1], crops[3])
    assert not torch.equal(crops[0], crops[1])


def test_reading_no_rows_gives_no_batch(shards):
    assert list(read_center_crops(shards, [], size=32, backend="cpu")) == []


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_give_the_batch_of_one_process(shards, world_size):
    whole = _take(shards, 7)
    ranks = [_take(shards, 7, rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert np.array_equal(np.concatenate([p.rows for p in parts]), batch.rows)
        for name, views in [("global_crops", 2), ("teacher_crops", 2), ("local_crops", 2), ("masks", 2)]:
            assert torch.equal(_join(parts, name, views), getattr(batch, name)), name


@pytest.fixture(scope="module")
def unbroken(shards):
    return _take(shards, 15)


@given(stop=st.integers(0, 13), world_size=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=12)
def test_resume_equals_the_unbroken_stream(shards, unbroken, stop, world_size):
    with _open(shards) as loader:
        for _ in range(stop):
            next(loader)
        state = loader.state_dict()
    assert (state["epoch"], state["step"]) == divmod(stop, 6)
    parts = [_take(shards, 2, state=state, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(2):
        batch = unbroken[stop + step]
        assert np.array_equal(np.concatenate([p[step].rows for p in parts]), batch.rows)
        joined = _join([p[step] for p in parts], "global_crops", 2)
        assert torch.equal(joined, batch.global_crops)
    if world_size == 1:
        _assert_equal(parts[0][0], unbroken[stop])


def test_state_is_the_position_of_the_consumer_not_of_the_feeder(shards):
    with _open(shards) as loader:
        next(loader)
        while loader._feeder.ready < 2:  # the feeder is ahead
            pass
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (0, 1)
        assert (loader.epoch, loader.step) == (0, 1)


def test_state_is_plain_and_the_same_for_every_rank(shards):
    import json

    states = []
    for rank in range(2):
        with _open(shards, rank=rank, world_size=2) as loader:
            next(loader)
            states.append(loader.state_dict())
    assert states[0] == states[1] == json.loads(json.dumps(states[0]))


def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next(shards, unbroken):
    with _open(shards) as loader:
        state = loader.state_dict() | {"step": 6}
    (batch,) = _take(shards, 1, state=state)
    _assert_equal(batch, unbroken[6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, r"seed: 1 in the checkpoint, 2 now"),
        ({"global_batch_size": 4}, r"global_batch_size: 8 in the checkpoint, 4 now"),
        ({"augmentation": replace(SMALL, hue=0.0)}, r"augmentation: \w+ in the checkpoint"),
        ({"rows": range(40)}, r"num_rows: 48 in the checkpoint, 40 now"),
        ({"view_sets": 2}, r"view_sets: None in the checkpoint, 2 now"),
    ],
)
def test_a_state_of_another_stream_is_refused_with_the_difference(shards, change, message):
    with _open(shards) as loader:
        state = loader.state_dict()
    with pytest.raises(UserError, match=message):
        _open(shards, state=state, **change)


def test_a_state_of_another_version_is_refused(shards):
    with _open(shards) as loader:
        state = loader.state_dict()
    del state["plan_version"]
    with pytest.raises(UserError, match="lacks plan_version"):
        _open(shards, state=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 3}, "does not divide it"),
        ({"rank": 1}, "rank 1"),
        ({"global_batch_size": 64}, "48 rows, fewer than the global batch of 64"),
        ({"backend": "dalli"}, r"'dalli' is unknown. Did you mean 'dali'\?"),
        ({"device": "mps"}, "'mps' is not supported"),
        ({"rows": [0, 48]}, "rows from 0 to 48 asked for, there are 48"),
        ({"rows": [0, 0, 1]}, "3 rows with repetitions"),
        ({"view_sets": 0}, "view_sets is 0"),
        ({"on_bad_sample": "ignore"}, "'ignore' is unknown"),
        ({"skip_budget": 2.0}, r"skip budget 2\.0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_at_the_call(shards, change, message):
    with pytest.raises(UserError, match=message):
        _open(shards, **change)


def test_a_backend_setting_out_of_its_range_is_refused(shards):
    with pytest.raises(UserError, match="num_threads is 0"):
        _open(shards, num_threads=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused(shards):
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        _open(shards, device="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": [99]}, "rows from 99 to 99"), ({"batch_size": 0}, "batch_size is 0"), ({"crop_ratio": 0}, "crop_ratio")],
)
def test_a_reader_refuses_what_it_cannot_read_at_the_call(shards, change, message):
    arguments = {"rows": [1], "size": 32, "backend": "cpu"} | change
    with pytest.raises(UserError, match=message):
        read_center_crops(shards, arguments.pop("rows"), **arguments)


def test_data_wait_is_the_time_spent_in_next(shards):
    import time

    with _open(shards) as loader:
        next(loader)
        start = time.perf_counter()
        next(loader)
        assert 0 < loader.data_wait <= time.perf_counter() - start
