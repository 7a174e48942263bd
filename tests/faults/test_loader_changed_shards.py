"""Shards that changed since packing are refused, before or when the changed row is read."""

import shutil

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.loader import open_loader
from shards.folder import ShardFolder
from shards.manifest import INDEX_NAME, MANIFEST_NAME
from shards.pack import pack

ROWS = 10
SMALL = Augmentation(num_local_crops=0, global_crops_size=32, local_crops_size=16, patch_size=8, mask_patch_size=8)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(1)
    for i in range(ROWS):
        path = folder / "images" / "one" / f"img{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    pack(folder / "images", folder / "shards", rows_per_shard=5, workers=1, progress=False)
    return folder / "shards"


@pytest.fixture
def shards(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "shards")


def test_a_cut_tar_is_refused_at_the_call(shards):
    tar = shards / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"shard-000001\.tar: \d+ bytes, the manifest says \d+"):
        ShardFolder(shards)


def test_a_missing_tar_is_refused_at_the_call(shards):
    (shards / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar: missing"):
        ShardFolder(shards)


def test_a_tar_that_grew_after_opening_is_refused_when_it_is_read(shards):
    with ShardFolder(shards) as source:
        with (shards / "shard-000000.tar").open("ab") as tar:
            tar.write(b"\0" * 512)
        with pytest.raises(UserError, match=r"shard-000000\.tar: .* The shard was changed since packing"):
            source.jpeg(0)


def test_a_changed_byte_is_found_when_its_row_is_first_read(shards):
    with ShardFolder(shards) as source:
        key, offset = source.key(7), int(source.index.offset[7])
    tar = shards / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[offset + 100] ^= 1
    tar.write_bytes(bytes(content))
    with ShardFolder(shards) as source:
        source.jpeg(6)
        with pytest.raises(UserError, match=rf"row 7 \(key {key}\): the JPEG's crc32c is"):
            source.jpeg(7)


def test_a_changed_shard_is_refused_even_where_bad_samples_are_skipped(shards):
    with ShardFolder(shards) as source:
        offset = int(source.index.offset[3])
    tar = shards / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[offset + 50] ^= 255
    tar.write_bytes(bytes(content))
    loader = open_loader(
        shards, device="cpu", backend="cpu", global_batch_size=5, seed=0, augmentation=SMALL, on_bad_sample="skip",
        skip_budget=1.0,
    )  # fmt: skip
    with loader, pytest.raises(UserError, match=r"row 3 .*crc32c"):
        for _ in range(2):
            next(loader)


def test_a_changed_index_is_refused(shards):
    path = shards / INDEX_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"index\.npz: sha256"):
        ShardFolder(shards)


def test_a_folder_without_a_manifest_is_refused(shards):
    (shards / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match=r"manifest\.json"):
        ShardFolder(shards)


def test_a_resumed_run_refuses_shards_that_were_packed_anew(shards, packed, tmp_path):
    arguments = {
        "device": "cpu", "backend": "cpu", "global_batch_size": 5, "seed": 0, "augmentation": SMALL,
    }  # fmt: skip
    with open_loader(shards, **arguments) as loader:
        state = loader.state_dict()
    pack(packed.parent / "images", tmp_path / "anew", rows_per_shard=5, seed=1, workers=1, progress=False)
    with pytest.raises(UserError, match=r"shards: \w+ in the checkpoint, \w+ now"):
        open_loader(tmp_path / "anew", state=state, **arguments)
