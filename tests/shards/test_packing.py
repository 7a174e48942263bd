"""What a packed folder holds, that it is reproducible to the byte, and that others' readers read it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import simplejpeg

from common.errors import UserError
from shards.manifest import (
    Manifest,
    RowFlag,
    ShardIndex,
    add_sample,
    is_key,
    load_index,
    load_manifest,
    name_uid,
    open_tar,
    plain_key,
)
from shards.pack import pack, summary
from shards.sources import SourceOptions
from shards.verify import verify

MakeFolders = Callable[[Path, int, int], dict[str, bytes]]
NUM_IMAGES, ROWS_PER_SHARD = 42, 8


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, make_class_folders: MakeFolders) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("packed")
    files = make_class_folders(root / "train", 3, NUM_IMAGES // 3)
    pack(root / "train", root / "shards", rows_per_shard=ROWS_PER_SHARD, seed=5, workers=1, progress=False)
    return root / "shards", files


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_image_is_stored_once_byte_for_byte_where_the_index_says(packed: tuple[Path, dict[str, bytes]]) -> None:
    folder, files = packed
    manifest, index = load_manifest(folder), load_index(folder)
    assert len(index) == manifest.num_rows == NUM_IMAGES
    assert [shard.rows for shard in manifest.shards] == [8, 8, 8, 8, 8, 2]
    classes = sorted({name.split("/")[0] for name in files})
    assert list(manifest.class_names) == json.loads((folder / "classes.json").read_text()) == classes
    names = {name_uid(name): name for name in files}
    assert sorted(index.uid.tolist()) == sorted(names)
    for row in range(len(index)):
        name = names[int(index.uid[row])]
        tar = (folder / manifest.shards[index.shard[row]].name).read_bytes()
        stored = tar[index.offset[row] : index.offset[row] + index.size[row]]
        assert stored == files[name]
        assert google_crc32c.value(stored) == index.crc32c[row]
        assert simplejpeg.decode_jpeg(stored).shape[:2] == (index.height[row], index.width[row])
        assert manifest.class_names[index.label[row]] == name.split("/")[0]
        header = tar[index.offset[row] - 512 : index.offset[row]]
        assert header[:100].rstrip(b"\0").decode() == plain_key(name)[0] + ".jpg"


def test_rows_are_in_the_documented_order(packed: tuple[Path, dict[str, bytes]]) -> None:
    folder, files = packed
    seed = (5).to_bytes(8, "little")
    keyed = sorted(files, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8, key=seed).digest()[::-1])
    assert load_index(folder).uid.tolist() == [name_uid(name) for name in keyed]


def test_every_shard_mixes_classes(packed: tuple[Path, dict[str, bytes]]) -> None:
    index = load_index(packed[0])
    for shard in range(5):
        assert len(np.unique(index.label[index.shard == shard])) == 3


def test_tars_are_what_webdatasets_own_writer_writes(packed: tuple[Path, dict[str, bytes]]) -> None:
    from webdataset.writer import TarWriter

    folder, _ = packed
    for shard in load_manifest(folder).shards:
        samples: dict[str, dict[str, Any]] = {}
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                content = tar.extractfile(member)
                assert content is not None and is_key(key)
                samples.setdefault(key, {"__key__": key})[extension] = content.read()
        buffer = io.BytesIO()
        with TarWriter(buffer, encoder=False, mtime=0) as writer:
            for sample in samples.values():
                writer.write(sample)
        assert (folder / shard.name).read_bytes() == buffer.getvalue()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 20_000])
def test_any_size_of_sample_is_written_as_webdataset_writes_it(size: int) -> None:
    from webdataset.writer import TarWriter

    samples = [{"cls": b"12", "jpg": bytes([7]) * size, "json": b"{}" * (size % 700)} for _ in range(3)]
    ours, theirs = io.BytesIO(), io.BytesIO()
    with open_tar(ours) as tar:
        offsets = [add_sample(tar, f"key-{i}", **sample) for i, sample in enumerate(samples)]
    with TarWriter(theirs, encoder=False, mtime=0) as reference:
        for i, sample in enumerate(samples):
            reference.write({"__key__": f"key-{i}", **sample})
    assert ours.getvalue() == theirs.getvalue()
    assert all(ours.getvalue()[offset : offset + size] == bytes([7]) * size for offset in offsets)


# webdataset leaves the tars that it has read for the garbage collector to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_every_byte(packed: tuple[Path, dict[str, bytes]]) -> None:
    import webdataset

    folder, files = packed
    shards = [str(folder / shard.name) for shard in load_manifest(folder).shards]
    uids = load_index(folder).uid.tolist()
    row = 0
    for row, sample in enumerate(webdataset.WebDataset(shards, shardshuffle=False)):
        about = json.loads(sample["json"])
        assert name_uid(about["name"]) == uids[row]
        assert sample["jpg"] == files[about["name"]]
        assert sample["__key__"] == plain_key(about["name"])[0]
        assert about["wnid"] == sorted({name.split("/")[0] for name in files})[int(sample["cls"])]
        assert (about["height"], about["width"]) == simplejpeg.decode_jpeg(sample["jpg"]).shape[:2]
    assert row + 1 == NUM_IMAGES


def test_the_dali_reader_reads_every_byte(packed: tuple[Path, dict[str, bytes]]) -> None:
    dali = pytest.importorskip("nvidia.dali")
    folder, files = packed
    shards = [str(folder / shard.name) for shard in load_manifest(folder).shards]

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> Any:
        return tuple(dali.fn.readers.webdataset(paths=shards, ext=["jpg", "cls", "json"]))

    pipeline = read()
    pipeline.build()
    index = load_index(folder)
    for row in range(NUM_IMAGES):
        jpg, cls, about = (bytes(np.asarray(out.at(0))) for out in pipeline.run())
        description = json.loads(about)
        assert name_uid(description["name"]) == index.uid[row]
        assert jpg == files[description["name"]]
        assert int(cls) == index.label[row]


def test_the_same_source_gives_the_same_bytes_whatever_the_number_of_workers(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, _ = packed
    source = folder.parent / "train"
    for workers in (2, 3):
        output = tmp_path / str(workers)
        pack(source, output, rows_per_shard=ROWS_PER_SHARD, seed=5, workers=workers, progress=False)
        assert folder_bytes(output) == folder_bytes(folder)


def test_another_seed_gives_another_order_of_the_same_images(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, _ = packed
    pack(folder.parent / "train", tmp_path / "s", rows_per_shard=8, seed=6, workers=1, progress=False)
    one, other = load_index(folder).uid, load_index(tmp_path / "s").uid
    assert sorted(one) == sorted(other)
    assert one.tolist() != other.tolist()


def test_packing_again_into_a_finished_folder_changes_nothing(packed: tuple[Path, dict[str, bytes]]) -> None:
    folder, _ = packed
    before = folder_bytes(folder)
    again = pack(folder.parent / "train", folder, rows_per_shard=8, seed=5, workers=1, progress=False)
    assert again == load_manifest(folder)
    assert folder_bytes(folder) == before
    with pytest.raises(UserError, match=r"already holds other shards .* seed is 5, this call has 6"):
        pack(folder.parent / "train", folder, rows_per_shard=8, seed=6, workers=1, progress=False)
    assert folder_bytes(folder) == before


def test_a_finished_folder_takes_no_other_split_label_option_or_data(
    tmp_path: Path, make_class_folders: MakeFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    files = make_class_folders(source / "train", 2, 3)
    shutil.copytree(source / "train", source / "val")  # shutil keeps times: the two hold the same data

    def again(path: Path = source, **options: Any) -> None:
        pack(path, output, workers=1, options=SourceOptions(**({"split": "train"} | options)))

    again()
    capsys.readouterr()
    before = folder_bytes(output)
    again()
    assert capsys.readouterr().out.endswith(f"{output}: already finished, nothing to do (6 images in 1 shards).\n")
    refusals: list[tuple[str, dict[str, Any]]] = [
        ("split is 'train', this call has 'val'", {"split": "val"}),
        (r"class_names is \['n01440764', 'n01440801'\], this call has \[\]", {"labels": "none"}),
        (
            r"kind of source is 'class folders \(2 classes\)', this call has 'a tar of class",
            {"path": tmp_path / "x.tar"},
        ),
        ("labels is None, this call has 'folders'", {"labels": "folders"}),
        (r"ignore is \[\], this call has \['x'\]", {"ignore": ("x",)}),
    ]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(source, "in")
    for message, options in refusals:
        with pytest.raises(UserError, match=message):
            again(**options)
    name = next(iter(files))
    edited = source / "train" / name
    edited.write_bytes(edited.read_bytes())  # the same size, another time
    with pytest.raises(UserError, match=r"times of files is '\w+.*, this call has '\w+"):
        again()
    edited.write_bytes(edited.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"content is '\w+.*, this call has '\w+"):
        again()
    assert folder_bytes(output) == before
    assert b"/" not in (output / "source.json").read_bytes()


def test_finished_shards_of_parquet_are_compared_by_hash(tmp_path: Path, make_jpeg: Any, make_photo: Any) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = make_jpeg(make_photo(9, 9))
    source, output = tmp_path / "x.parquet", tmp_path / "out"

    def again(labels: list[int]) -> Manifest:
        parquet.write_table(pyarrow.table({"image": [image, image], "label": labels}), source)
        return pack(source, output, workers=1, progress=False)

    manifest = again([0, 1])
    assert again([0, 1]) == manifest  # another time, the same bytes
    with pytest.raises(UserError, match=r"already holds other shards .* files is .*, this call has "):
        again([1, 0])


def test_names_and_keys_met_twice_or_against_the_rule_are_renamed_and_recorded(
    tmp_path: Path, make_jpeg: Callable[..., bytes], make_photo: Callable[..., Any]
) -> None:
    names = ["cat/a.b.jpg", "cat/a_b.jpg", "cat/ünï cødé.jpg", "cat/" + "x" * 90 + "1.jpg", "cat/" + "x" * 90 + "2.jpg"]
    (tmp_path / "in/cat").mkdir(parents=True)
    for seed, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(make_jpeg(make_photo(9, 9, seed)))
    manifest = pack(tmp_path / "in", tmp_path / "out", workers=1, progress=False)
    index = load_index(tmp_path / "out")
    tar = tarfile.open(tmp_path / "out" / manifest.shards[0].name)  # noqa: SIM115
    keys = [member.name.removesuffix(".jpg") for member in tar if member.name.endswith(".jpg")]
    tar.close()
    by_name = {name: keys[index.uid.tolist().index(name_uid(name))] for name in names}
    assert len(set(keys)) == 5 and all(is_key(key) for key in keys)
    assert by_name["cat/a.b.jpg"] == f"cat-a_b-{name_uid('cat/a.b.jpg'):016x}"
    assert by_name["cat/ünï cødé.jpg"] == "cat-_n__c_d_"
    assert max(len(key) for key in keys) == 64 + 17
    assert manifest.counts["renamed"] == 5
    assert all(RowFlag.RENAMED in RowFlag(int(flags)) for flags in index.flags)


def test_quarantined_images_leave_their_shard_short_and_are_listed_with_reasons(
    tmp_path: Path, make_class_folders: MakeFolders
) -> None:
    files = make_class_folders(tmp_path / "in", 2, 8)
    bad = sorted(files)[::5]
    for name in bad:
        (tmp_path / "in" / name).write_bytes(b"<html>")
    manifest = pack(tmp_path / "in", tmp_path / "out", rows_per_shard=1, workers=1, progress=False)
    listed = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert sorted(entry["name"] for entry in listed) == bad
    assert {entry["reason"] for entry in listed} == {"no image: begins with b'<html>'"}
    assert manifest.counts == {"quarantined": 4, "verbatim": 12}
    # With one image a shard, a shard of a bad image would be empty: it does not exist.
    assert len(manifest.shards) == 12 == len(list((tmp_path / "out").glob("*.tar")))
    index: ShardIndex = load_index(tmp_path / "out")
    assert index.shard.tolist() == list(range(12))
    assert not set(index.uid.tolist()) & {name_uid(name) for name in bad}


def test_the_odd_files_are_packed_as_the_corpus_states_and_the_folder_is_whole(
    odd_files: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "in/odd").mkdir(parents=True)
    for name, odd in odd_files.items():
        (tmp_path / "in/odd" / f"{name}.JPEG").write_bytes(odd.data)
    manifest = pack(tmp_path / "in", tmp_path / "out", workers=2, rows_per_shard=16, progress=False)
    outcomes = [odd.outcome for odd in odd_files.values()]
    assert manifest.counts["verbatim"] == outcomes.count("verbatim")
    assert manifest.counts["quarantined"] == outcomes.count("rejected")
    reencoded = {name: count for name, count in manifest.counts.items() if name.startswith("re-encoded: ")}
    assert sum(reencoded.values()) == outcomes.count("re-encoded")
    # Bit rot, half a file filled up, a scan that goes on, one that lacks a block, and two whole pictures.
    assert manifest.counts["quarantined for a warning"] == 6
    assert "Of these, 6 are JPEGs that Pillow reads without a word" in summary(manifest, tmp_path / "out", 1.0)
    assert set(reencoded) == {f"re-encoded: {o.detail}" for o in odd_files.values() if o.outcome == "re-encoded"}
    listed = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["name"][len("odd/") : -len(".JPEG")]: entry["reason"] for entry in listed}
    for name, odd in odd_files.items():
        assert (odd.outcome == "rejected") == (name in reasons), name
        assert odd.detail in reasons.get(name, odd.detail), name
    assert verify(tmp_path / "out", decode=1.0, workers=1, progress=False) == []


def test_a_source_without_a_single_good_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/x.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its 1 images can be packed. The first: a/x.jpg: empty file"):
        pack(tmp_path / "in", tmp_path / "out", workers=1, progress=False)


def test_a_changed_manifest_or_index_is_refused_by_name(packed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    for name, content in folder_bytes(packed[0]).items():
        (tmp_path / name).write_bytes(content)
    manifest = tmp_path / "manifest.json"
    original = manifest.read_text()
    manifest.write_text(original.replace('"seed": 5', '"seed": 7'))
    with pytest.raises(UserError, match=r"manifest.json: its content hashes to"):
        load_index(tmp_path)
    manifest.write_text(original.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        load_index(tmp_path)
    manifest.write_text(original[:-30])
    with pytest.raises(UserError, match="not valid JSON"):
        load_index(tmp_path)
    manifest.write_text(original)
    index = bytearray((tmp_path / "index.npz").read_bytes())
    index[700] ^= 1
    (tmp_path / "index.npz").write_bytes(index)
    with pytest.raises(UserError, match=r"index.npz: sha256 .*, the manifest says"):
        load_index(tmp_path)
    (tmp_path / "shard-000003.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000003.tar: missing, though the manifest lists it"):
        load_index(tmp_path)
    manifest.unlink()
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        load_manifest(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_manifest(tmp_path / "nowhere")
