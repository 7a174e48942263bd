"""The three backends make the same crops, over the whole chain, on natural-like images."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.augmentation import named_augmentation
from pipeline.cpu_crops import CpuCrops
from pipeline.cpu_crops import distort as cpu_distort
from pipeline.crops import BackendOptions, center_work, training_work
from pipeline.plan import CropPlan, crop_plan
from pipeline.torch_crops import chunks, cubic_taps, resample, taps_needed
from pipeline.torch_crops import distort as torch_distort
from shards.folder import ShardFolder

# Units of 1/255. Torch computes what DALI computes in another order of float32 sums: a sum that lies at a
# rounding edge differs by one, and each of the three later stages (colour gain up to 1.96, blur, solarize) can
# carry or add one; hence 4 at most. How often a sum lies that near an edge gives the mean.
TORCH_MEAN, TORCH_MAX = 0.02, 4
# Pillow and torch's uint8 code round to uint8 between their two passes: an error of about half a unit, which
# shows after the second rounding on a fifth of the pixels. They renormalise at the image's edge where DALI
# clamps, so no maximum is given for the whole chain.
CPU_MEAN = 0.25
# cv2 takes coefficients of 10 fractional bits: three errors of at most 255 / 2048, less than half a unit,
# so at most one rounding goes the other way, for a share of pixels of the order of the mean error.
COLOUR_MAX, COLOUR_SHARE = 1, 0.1
# One rounding of float32 sums in another order, for the share of sums that lie at a rounding edge: float32's
# relative error of 1e-7, times 255, times a few terms.
BLUR_MAX, BLUR_SHARE = 1, 1e-3

WHOLE_CHAIN = replace(named_augmentation("dino"), solarize_prob_global=(0.5, 0.5), blur_prob_global=(0.5, 0.5))


@pytest.fixture(scope="module")
def rows():
    return np.arange(24)


@pytest.fixture
def dali_crops(make_crops, rows):
    pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    work = training_work(WHOLE_CHAIN, teacher_crops=True)
    return make_crops("dali", rows, work, augmentation=WHOLE_CHAIN)


@pytest.mark.parametrize(("other", "mean", "most"), [("torch", TORCH_MEAN, TORCH_MAX), ("cpu", CPU_MEAN, 255)])
def test_backends_equal_dali_over_the_whole_chain(dali_crops, make_crops, rows, other, mean, most):
    crops = make_crops(other, rows, training_work(WHOLE_CHAIN, teacher_crops=True), augmentation=WHOLE_CHAIN)
    assert set(crops) == set(dali_crops) == {"global_crops", "local_crops", "clean_crops"}
    for name, ours in crops.items():
        theirs = dali_crops[name]
        assert ours.shape == theirs.shape
        assert theirs.std() > 20  # images, not blanks
        distance = np.abs(ours.astype(int) - theirs.astype(int))
        assert distance.mean() <= mean, name
        assert distance.max() <= most, name


def test_cpu_clean_crops_are_as_near_to_dalis_at_the_edge_as_inside(dali_crops, make_crops, rows):
    crops = make_crops("cpu", rows, training_work(WHOLE_CHAIN, teacher_crops=True), augmentation=WHOLE_CHAIN)
    distance = np.abs(crops["clean_crops"].astype(int) - dali_crops["clean_crops"].astype(int))
    # The kernel reads beyond the box: without that the ring is several times as far off as the rest.
    ring = np.ones(distance.shape[2:4], bool)
    ring[2:-2, 2:-2] = False
    assert distance[:, :, ring].mean() <= 1.5 * distance[:, :, ~ring].mean()


@pytest.mark.parametrize(("other", "mean"), [("torch", TORCH_MEAN), ("cpu", CPU_MEAN)])
def test_odd_images_are_cropped_as_dali_crops_them(odd_shards, make_crops, other, mean):
    pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    a = named_augmentation("dino")
    work = training_work(a, teacher_crops=True)
    with ShardFolder(odd_shards) as odd:
        rows = np.arange(len(odd))
        assert len(rows) == 10
        theirs = make_crops("dali", rows, work, augmentation=a, source=odd)
        ours = make_crops(other, rows, work, augmentation=a, source=odd)
        for name in ours:
            distance = np.abs(ours[name].astype(int) - theirs[name].astype(int)).reshape(10, -1)
            # One image's crops are few pixels of one kind: twice the mean over many. In an image of 2 x 3
            # pixels all is edge, where Pillow renormalises and DALI clamps: a mean of a unit or two.
            allowed = np.where((odd.sizes(rows) == (2, 3)).all(1) & (other == "cpu"), 2.0, 2 * mean)
            assert (distance.mean(1) <= allowed).all(), (name, distance.mean(1))


def test_torch_equals_the_cpu_backend_where_there_is_no_dali(make_crops, rows):
    work = training_work(WHOLE_CHAIN, teacher_crops=True)
    ours = make_crops("torch", rows[:12], work, augmentation=WHOLE_CHAIN)
    theirs = make_crops("cpu", rows[:12], work, augmentation=WHOLE_CHAIN)
    for name in ours:
        assert np.abs(ours[name].astype(int) - theirs[name].astype(int)).mean() <= CPU_MEAN


def _keys(x, a=-0.5):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def _reference_axis(image, start, end, size):
    """Resize the first axis pixel by pixel, in float64, as the kernel's definition says."""
    scale = (end - start) / size
    width = max(1.0, abs(scale))
    out = np.empty((size, *image.shape[1:]))
    for i in range(size):
        centre = start + (i + 0.5) * scale
        pixels = range(int(np.floor(centre - 2 * width)) - 1, int(np.ceil(centre + 2 * width)) + 2)
        weights = np.array([_keys((p + 0.5 - centre) / width) for p in pixels])
        inside = np.clip(pixels, 0, len(image) - 1)
        out[i] = np.tensordot(weights / weights.sum(), image[inside], 1)
    return out


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((37, 53), (3, 5, 30, 41)), ((37, 53), (0, 0, 37, 53)), ((9, 7), (2, 1, 4, 5)), ((1, 1), (0, 0, 1, 1)),
        ((120, 80), (100, 60, 20, 20)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flip", [False, True])
def test_torch_resize_equals_the_definition_of_the_kernel(shape, box, flip):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.float64)
    top, left, height, width = box
    ends = (left + width, left) if flip else (left, left + width)
    expected = _reference_axis(image, top, top + height, 16)
    expected = _reference_axis(expected.swapaxes(0, 1), *ends, 16).swapaxes(0, 1)
    taps = [
        cubic_taps(
            torch.tensor([float(start)]).double(), torch.tensor([float(end)]).double(), torch.tensor([length]), 16,
            taps_needed(abs(end - start), 16),
        )
        for start, end, length in [(top, top + height, shape[0]), (*ends, shape[1])]
    ]  # fmt: skip
    crop = resample(torch.from_numpy(image).float()[None], torch.zeros(1, dtype=torch.int64), *taps)[0].numpy()
    clamped = np.clip(expected, 0, 255)
    # Half a unit from rounding, and float32 sums of a few dozen terms up to 255.
    assert np.abs(crop - clamped).max() <= 0.5 + 1e-3


def test_taps_do_not_depend_on_how_many_there_are():
    rng = np.random.default_rng(4)
    start = torch.from_numpy(rng.uniform(0, 100, 200).round())
    end = start + torch.from_numpy(rng.integers(20, 400, 200).astype(float))
    length = torch.full((200,), 450)
    few = cubic_taps(start, end, length, 32, taps_needed(400, 32))
    many = cubic_taps(start, end, length, 32, taps_needed(1000, 32))
    k = few.weight.shape[-1]
    assert torch.equal(many.weight[..., :k], few.weight)
    assert torch.equal(many.index[..., :k], few.index)
    assert not many.weight[..., k:].any()
    assert torch.allclose(few.weight.sum(-1), torch.ones(()), atol=1e-6)


def test_images_are_padded_together_as_far_as_the_pixels_allow():
    sizes = np.array([[400, 500], [20_000, 20_000], [500, 400], [10, 10], [375, 500], [4000, 3000], [500, 375]])
    groups = chunks(sizes, 3, 1_000_000)
    assert sorted(np.concatenate(groups).tolist()) == list(range(7))
    for group in groups:
        padded = len(group) * sizes[group].max(0).prod()
        assert len(group) == 1 or (len(group) <= 3 and padded <= 1_000_000)
    assert [g.tolist() for g in groups] == [[3, 4, 6], [0, 2], [5], [1]]
    assert [len(g) for g in chunks(sizes, 1, 0)] == [1] * 7


def test_torch_crops_do_not_depend_on_how_images_are_padded_together(make_crops, rows, monkeypatch):
    work = training_work(WHOLE_CHAIN, teacher_crops=True)
    alone = make_crops("torch", rows[:8], work, augmentation=WHOLE_CHAIN)
    monkeypatch.setattr("pipeline.torch_crops.chunks", lambda sizes, *_: chunks(sizes, 4, 2 << 20))
    together = make_crops("torch", rows[:8], work, augmentation=WHOLE_CHAIN)
    for name, crops in alone.items():
        assert np.array_equal(crops, together[name]), name


def test_cpu_threads_use_one_torch_thread_each_and_leave_the_others_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        crops = CpuCrops(center_work(32), BackendOptions(torch.device("cpu"), 2, 4))
        assert {f.result() for f in [crops._pool.submit(torch.get_num_threads) for _ in range(20)]} == {1}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
        crops.close()
    finally:
        torch.set_num_threads(before)


def _both_distorted(source, a):
    """The same 40 random textures on a slope, distorted by cv2 and by torch with one plan; int arrays."""
    uids = source.index.uid[:40]
    plan = crop_plan(uids, source.sizes(np.arange(40)), view_set=0, epoch=0, seed=5, augmentation=a)
    crops = np.random.default_rng(1).integers(0, 64, (40, 32, 32, 3)) + np.linspace(20, 180, 32)[:, None]
    crops = crops.astype(np.uint8)
    parameters = [torch.from_numpy(p[:, 0].copy()) for p in (plan.colour, plan.blur_sigma, plan.solarize)]
    theirs = torch_distort(torch.from_numpy(crops), *parameters).numpy()
    ours = np.stack(
        [
            cpu_distort(crop, plan.colour[i, 0], float(plan.blur_sigma[i, 0]), bool(plan.solarize[i, 0]))
            for i, crop in enumerate(crops)
        ]
    )
    assert not np.array_equal(ours, crops)
    return ours.astype(int), theirs.astype(int)


def _only(**changes):
    off = replace(
        WHOLE_CHAIN, num_local_crops=0, jitter_prob=0.0, gray_prob=0.0, blur_prob_global=(0.0, 0.0),
        solarize_prob_global=(0.0, 0.0),
    )  # fmt: skip
    return replace(off, **changes)


def test_cpu_colour_equals_torchs_within_a_rounding(source):
    ours, theirs = _both_distorted(source, _only(jitter_prob=1.0, gray_prob=0.2))
    assert np.abs(ours - theirs).max() <= COLOUR_MAX
    assert (ours != theirs).mean() < COLOUR_SHARE


def test_cpu_blur_equals_torchs_within_a_rounding(source):
    ours, theirs = _both_distorted(source, _only(blur_prob_global=(1.0, 1.0)))
    assert np.abs(ours - theirs).max() <= BLUR_MAX
    assert (ours != theirs).mean() < BLUR_SHARE


def test_cpu_solarize_equals_torchs(source):
    ours, theirs = _both_distorted(source, _only(solarize_prob_global=(1.0, 1.0)))
    assert np.array_equal(ours, theirs)
    assert ours.max() == 127


def _whole_image_plan(sizes, *, flip=False):
    n = len(sizes)
    boxes = np.concatenate([np.zeros((n, 2)), sizes], 1).astype(np.int32)[:, None]
    colour = np.tile(np.eye(3, 4, dtype=np.float32), (n, 1, 1, 1))
    return CropPlan(boxes, np.full((n, 1), flip), colour, np.zeros((n, 1), np.float32), np.zeros((n, 1), bool))


def test_a_crop_of_the_whole_image_at_its_size_is_the_image(source, backend, make_crops):
    simplejpeg = pytest.importorskip("simplejpeg")
    rows = np.flatnonzero((source.index.height == 224) & (source.index.width == 224))
    assert len(rows) > 2
    a = replace(
        named_augmentation("dino"),
        num_global_crops=1,
        num_local_crops=0,
        blur_prob_global=(1.0,),
        solarize_prob_global=(1.0,),
    )
    work = training_work(a, teacher_crops=True)
    plan = _whole_image_plan(source.sizes(rows))
    mirrored = _whole_image_plan(source.sizes(rows), flip=True)
    crops = make_crops(backend, rows, work, plan=plan)
    flipped = make_crops(backend, rows, work, plan=mirrored)
    for i, row in enumerate(rows):
        image = simplejpeg.decode_jpeg(source.jpeg(int(row)))
        for name in ("clean_crops", "global_crops"):
            assert np.array_equal(crops[name][i, 0], image)
            assert np.array_equal(flipped[name][i, 0], image[:, ::-1])


def test_crops_do_not_depend_on_order_batch_size_threads_or_a_partial_batch(backend, make_crops):
    a = named_augmentation("dino")
    work = training_work(a, teacher_crops=True)
    rows = np.arange(18)
    order = np.random.default_rng(0).permutation(18)
    base = make_crops(backend, rows, work, augmentation=a, batch_size=18)
    other = make_crops(backend, rows[order], work, augmentation=a, batch_size=7, threads=2)
    for name, crops in base.items():
        assert np.array_equal(crops[order], other[name]), name


def test_clean_crops_are_the_global_crops_before_photometrics(backend, make_crops):
    plain = replace(
        named_augmentation("dino"),
        jitter_prob=0.0,
        gray_prob=0.0,
        blur_prob_global=(0.0, 0.0),
        solarize_prob_global=(0.0, 0.0),
    )
    crops = make_crops(backend, np.arange(6), training_work(plain, teacher_crops=True), augmentation=plain)
    assert np.array_equal(crops["clean_crops"], crops["global_crops"])
    a = named_augmentation("dino")
    distorted = make_crops(backend, np.arange(6), training_work(a, teacher_crops=True), augmentation=a)
    assert np.array_equal(distorted["clean_crops"], crops["clean_crops"])
    assert not np.array_equal(distorted["clean_crops"], distorted["global_crops"])
