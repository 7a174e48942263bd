"""Hundreds of batches of images of many sizes leave the memory where it was."""

from pathlib import Path

import pytest

from benchmarks.synthetic import write_images
from pipeline.augmentation import Augmentation
from pipeline.loader import open_loader
from shards.pack import pack

# What allocators keep back and hand out again moves by some MiB; one leaked batch of crops is 1.3 MiB, so a leak
# of every batch would be 400 MiB here.
ALLOWED_MIB = 60
BATCHES = 300
AUGMENTATION = Augmentation(num_local_crops=2)


def _resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "torch", "dali"])
def test_memory_does_not_grow(tmp_path, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    sizes = [(200, 300), (300, 200), (90, 70), (600, 800), (120, 400)]
    write_images(tmp_path / "images", sizes, 20)
    pack(tmp_path / "images", tmp_path / "shards", workers=1, progress=False)
    with open_loader(
        tmp_path / "shards", device="cpu", backend=backend, global_batch_size=4, seed=0,
        augmentation=AUGMENTATION, num_threads=2,
    ) as loader:  # fmt: skip
        for _ in range(100):
            next(loader)
        before = _resident_mib()
        for _ in range(BATCHES):
            next(loader)
        assert _resident_mib() - before <= ALLOWED_MIB
