"""Natural-like images, packed by the project's own packer, shared by the pipeline's tests."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.synthetic import natural_image, write_images
from pipeline.augmentation import Augmentation
from pipeline.backend import open_backend
from pipeline.crops import BackendOptions, CropRequest
from pipeline.plan import crop_plan
from shards.folder import ShardFolder
from shards.pack import pack

# Height and width: landscape, portrait, square, thin, large, and smaller than a crop.
SIZES = [
    (375, 500), (500, 375), (333, 500), (480, 640), (300, 300), (256, 341),
    (500, 334), (120, 400), (90, 70), (48, 128), (700, 900), (224, 224),
]  # fmt: skip
NUM_IMAGES = 48


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of 48 packed images in shards of 20."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_images(folder / "images", SIZES, NUM_IMAGES)
    pack(folder / "images", folder / "shards", rows_per_shard=20, workers=1, progress=False)
    return folder / "shards"


@pytest.fixture
def source(shards):
    with ShardFolder(shards) as opened:
        yield opened


@pytest.fixture(scope="session")
def small():
    """An augmentation with few and small crops, for tests of everything but pixels."""
    return Augmentation(num_local_crops=2, global_crops_size=48, local_crops_size=24, patch_size=8, mask_patch_size=16)


@pytest.fixture
def make_crops(source):
    """Crop rows with a backend, in batches, and return what it made sample by sample."""

    def crop(backend, rows, work, *, augmentation=None, plan=None, threads=1, batch_size=16, seed=3, source=source):
        rows = np.asarray(rows)
        options = BackendOptions(torch.device("cpu"), threads, batch_size)
        opened = open_backend(backend, work, options)
        made = {"global_crops": [], "local_crops": [], "clean_crops": []}
        try:
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                sizes = source.sizes(part)
                drawn = (
                    plan[start : start + len(part)]
                    if plan
                    else crop_plan(
                        source.index.uid[part], sizes, view_set=1, epoch=2, seed=seed, augmentation=augmentation
                    )
                )
                opened.submit(CropRequest(source.jpegs(part), sizes, drawn))
                crops = opened.collect()
                for name, parts in made.items():
                    tensor = getattr(crops, name)
                    if tensor is not None and len(tensor):
                        parts.append(tensor.unflatten(0, (-1, len(part))).transpose(0, 1))
        finally:
            opened.close()
        return {name: torch.cat(parts).numpy() for name, parts in made.items() if parts}

    return crop


@pytest.fixture(scope="session")
def odd_shards(tmp_path_factory):
    """Images of one pixel, one line, one column, gray, progressive, 4:4:4, and of 2600 pixels a side."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "images" / "odd").mkdir(parents=True)
    kinds = [
        ((1, 1), {}), ((1, 60), {}), ((60, 1), {}), ((2, 3), {}), ((9, 300), {}), ((200, 300), {"mode": "L"}),
        ((200, 300), {"progressive": True}), ((150, 100), {"subsampling": "4:4:4"}), ((150, 101), {"quality": 30}),
        ((2600, 1900), {}),
    ]  # fmt: skip
    for i, ((height, width), how) in enumerate(kinds):
        mode = how.pop("mode", "RGB")
        whole = Image.fromarray(natural_image(max(height, 64), max(width, 64), i))
        image = whole.crop((0, 0, width, height)).convert(mode)
        image.save(folder / "images" / "odd" / f"img{i}.jpg", "JPEG", **({"quality": 90} | how))
    pack(folder / "images", folder / "shards", workers=1, progress=False)
    return folder / "shards"
