"""From images to targets: real packer, real loader, a small real ViT, the commands, and live = cached."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cache_tools.__main__ import main
from cache_tools.fingerprint import cache_fingerprint
from cache_tools.layout import CacheMismatch, CacheStale
from cache_tools.options import Build, TeacherOptions
from cache_tools.read import TeacherCache
from distill.config import TeacherConfig
from distill.export import Card, export_model
from distill.models import create_backbone
from distill.teacher import FrozenTeacher, TeacherTargets, load_teacher
from pipeline.batch import MultiCropBatch
from pipeline.loader import open_loader
from shards.manifest import load_index, load_manifest
from shards.pack import pack

SIZE, PATCH, DIM = 32, 8, 64
NUM_IMAGES, ROWS_PER_SHARD = 14, 5
CPU = torch.device("cpu")
# The same image in a batch of another shape: fp32 sums of 64 to 256 products in another order, two blocks deep, on
# tokens of the final norm (of order 1). 2^-24 * sqrt(256) * about 20 operations.
TEACHER_NOISE = 2e-5



def write_images(folder: Path, *, changed: int | None = None) -> Path:
    for i in range(NUM_IMAGES):
        generator = np.random.default_rng([i, i == changed])
        height, width = 40 + 3 * i, 64 - 2 * i
        coarse = generator.integers(0, 256, (5, 6, 3), np.uint8)
        target = folder / f"class{i % 2}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height)).save(target / f"image{i:02d}.jpg", quality=90)
    return folder


def write_teacher(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    args = {"embed_dim": DIM, "depth": 2, "num_heads": 2, "img_size": SIZE, "init_values": 0.5}
    model = create_backbone("vit_small", patch_size=PATCH, model_args=args)
    card = Card(
        name="tiny", student_arch="vit_small", teacher_arch="none", licence="MIT", step=0, ema=False,
        img_size=SIZE, probe=None,
    )  # fmt: skip
    export_model(model, folder, card=card)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("world")
    pack(write_images(root / "images"), root / "shards", rows_per_shard=ROWS_PER_SHARD, workers=1, progress=False)
    write_teacher(root / "teacher", 0)
    flags = [
        *("--shards", str(root / "shards"), "--teacher_arch", f"local-dir:{root / 'teacher'}"),
        *("--global_crops_size", str(SIZE), "--global_crops_scale", "0.3", "1.0", "--batch_size", "4"),
        *("--backend", "cpu", "--device", "cpu", "--num_threads", "1", "--data_seed", "5"),
    ]
    build = ["build", "--cache", str(root / "cache"), "--view_sets", "2", "--calibration_rows", "8", *flags]
    assert main(build) == 0
    options = TeacherOptions(
        shards=root / "shards", global_crops_size=SIZE, global_crops_scale=(0.3, 1.0), data_seed=5, backend="cpu"
    )
    teacher = load_teacher(TeacherConfig(teacher_arch=f"local-dir:{root / 'teacher'}"), img_size=SIZE, device=CPU)
    yield SimpleNamespace(
        root=root,
        shards=root / "shards",
        cache=root / "cache",
        flags=flags,
        build=build,
        options=options,
        teacher=teacher,
    )


def expected_fingerprint(world: SimpleNamespace, **changes: object) -> dict[str, object]:
    arguments = {
        "manifest": load_manifest(world.shards),
        "augmentation": world.options.teacher_crops(),
        "seed": 5,
        "teacher": world.teacher.fingerprint(),
        "decoder": "cpu-cpu",
    }
    return cache_fingerprint(**(arguments | changes))  # type: ignore[arg-type]


def assert_within_bound(cached: TeacherTargets, live: TeacherTargets, bound: TeacherTargets) -> None:
    for name in ("cls", "patches"):
        error = (getattr(cached, name).double() - getattr(live, name).double()).abs()
        assert bool((error <= getattr(bound, name) + TEACHER_NOISE).all())
        assert float(error.max()) > 0  # two sources, not one compared with itself


def open_batches(
    world: SimpleNamespace, shards: Path, *, backend: str = "cpu", view_sets: int = 2
) -> Iterator[MultiCropBatch]:
    loader = open_loader(
        shards, backend=backend, device="cpu", global_batch_size=4, rank=0, world_size=1, seed=5,
        augmentation=world.options.teacher_crops(), view_sets=view_sets, teacher_crops=True, num_threads=1,
    )  # fmt: skip
    with loader:
        for _, batch in zip(range(2 * loader.steps_per_epoch), loader, strict=False):
            yield batch


def test_cached_targets_of_the_training_loader_equal_the_live_teacher_within_the_bound(world: SimpleNamespace) -> None:
    with TeacherCache.open(world.cache, expect=expected_fingerprint(world)) as cache:
        seen = set()
        for batch, cached in cache.join(open_batches(world, world.shards)):
            live = world.teacher(batch.teacher_crops)
            assert_within_bound(cached, live, cache.bound(batch))
            seen |= {(batch.view_set, int(row)) for row in batch.rows}
        assert {view_set for view_set, _ in seen} == {0, 1} and len(seen) == 2 * 12  # drop-last of 14


def build(world: SimpleNamespace, cache: Path, *, options: dict[str, str] | None = None, view_sets: int = 1) -> Build:
    teacher = replace(world.options, batch_size=4, num_threads=1, **(options or {}))
    return Build(teacher, cache, view_sets=view_sets, calibration_rows=8)


def test_cached_equals_live_with_the_dali_backend_too(world: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="needs the nvidia-dali package")
    build(world, tmp_path, options={"backend": "dali"}).run(world.teacher, CPU, progress=False)
    expect = expected_fingerprint(world, decoder="dali-cpu")
    with TeacherCache.open(tmp_path, expect=expect) as cache:
        for batch in open_batches(world, world.shards, backend="dali", view_sets=1):
            assert_within_bound(cache.fetch(batch), world.teacher(batch.teacher_crops), cache.bound(batch))
    with pytest.raises(CacheMismatch, match="decoder: this run 'cpu-cpu', the cache 'dali-cpu'"):
        TeacherCache.open(tmp_path, expect=expected_fingerprint(world))


def test_cache_holds_every_row_of_the_index_in_its_order(world: SimpleNamespace) -> None:
    index = load_index(world.shards)
    with TeacherCache.open(world.cache) as cache:
        for k in (0, 1):
            assert np.array_equal(cache.table(k).uids, index.uid)
            assert np.array_equal(cache.table(k).image_crcs, index.crc32c)


def test_shards_packed_in_another_order_are_joined_by_id(world: SimpleNamespace, tmp_path: Path) -> None:
    pack(world.root / "images", tmp_path, rows_per_shard=4, seed=9, workers=1, progress=False)
    assert not np.array_equal(load_index(tmp_path).uid, load_index(world.shards).uid)
    with TeacherCache.open(world.cache) as cache:
        for batch in open_batches(world, tmp_path):
            assert_within_bound(cache.fetch(batch), world.teacher(batch.teacher_crops), cache.bound(batch))
    with pytest.raises(CacheMismatch, match=r"data\.shards\.0: this run 'shard-000000\.tar 4 rows"):
        TeacherCache.open(world.cache, expect=expected_fingerprint(world, manifest=load_manifest(tmp_path)))


def test_changed_jpeg_is_stale(world: SimpleNamespace, tmp_path: Path) -> None:
    write_images(tmp_path / "images", changed=3)
    pack(tmp_path / "images", tmp_path / "shards", rows_per_shard=ROWS_PER_SHARD, workers=1, progress=False)
    with TeacherCache.open(world.cache) as cache, pytest.raises(CacheStale, match="its JPEG has crc32c"):
        for batch in open_batches(world, tmp_path / "shards"):
            cache.fetch(batch)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"seed": 6}, "crops.box_test_vector"),
        ({"decoder": "dali-cuda"}, "decoder: this run 'dali-cuda', the cache 'cpu-cpu'"),
        ({"teacher": {"architecture": "other"}}, "teacher.state_dict_sha256: this run '(absent)'"),
        ({"codec": "fp16"}, "codec.name: this run 'fp16', the cache 'int8'"),
    ],
)
def test_each_hard_field_of_a_real_fingerprint_is_compared(
    world: SimpleNamespace, change: dict[str, object], field: str
) -> None:
    with pytest.raises(CacheMismatch) as caught:
        TeacherCache.open(world.cache, expect=expected_fingerprint(world, **change))
    assert field in str(caught.value)


def test_what_does_not_touch_the_teacher_may_change_under_a_cache(world: SimpleNamespace) -> None:
    other = replace(
        world.options.teacher_crops(), patch_size=PATCH, mask_patch_size=16, mask_ratio=0.3, num_local_crops=4,
        local_crops_size=16, gray_prob=0.9, brightness=0.1,
    )  # fmt: skip
    TeacherCache.open(world.cache, expect=expected_fingerprint(world, augmentation=other)).close()


def test_same_build_again_writes_nothing_and_grows_by_view_sets(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in world.cache.rglob("v[01]/**/*") if p.is_file()}
    assert main(world.build) == 0
    assert "0 rows in" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in world.cache.rglob("v[01]/**/*") if p.is_file()} == before


def test_two_ranks_of_the_real_builder_write_the_bytes_of_one(world: SimpleNamespace, tmp_path: Path) -> None:
    for rank in (0, 1):
        command = build(world, tmp_path / "cache", view_sets=2)
        command.run(world.teacher, CPU, rank=rank, world_size=2, progress=False)
    for path in sorted(world.cache.rglob("*")):
        if path.is_file():
            assert (tmp_path / "cache" / path.relative_to(world.cache)).read_bytes() == path.read_bytes(), path


@pytest.mark.slow  # three processes import torch
def test_torchrun_with_two_ranks_writes_the_bytes_of_one(world: SimpleNamespace, tmp_path: Path) -> None:
    build = [str(tmp_path / "cache") if word == str(world.cache) else word for word in world.build]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    repository = Path(__file__).parents[2]
    done = subprocess.run([*torchrun, "-m", "cache_tools", *build], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in sorted(world.cache.rglob("*")):
        if path.is_file():
            assert (tmp_path / "cache" / path.relative_to(world.cache)).read_bytes() == path.read_bytes(), path


def test_verify_command_runs_the_teacher_again(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--deep", "--shards", str(world.shards), "--teacher", "6", "--backend", "cpu", "--device", "cpu"]
    teacher = ["--teacher_arch", f"local-dir:{world.root / 'teacher'}"]
    assert main(["verify", str(world.cache), *arguments, *teacher]) == 0
    output = capsys.readouterr().out
    assert "6 shards, 28 rows, every byte read: 0 damaged" in output
    assert "teacher run again on 6 images: mean cosine 0.999" in output
    other = write_teacher(tmp_path / "teacher", 1)
    assert main(["verify", str(world.cache), *arguments, "--teacher_arch", f"local-dir:{other}"]) == 2
    assert "teacher.state_dict_sha256" in capsys.readouterr().err


def test_verify_command_compares_ids_with_other_shards(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(world.root / "images", tmp_path, rows_per_shard=5, seed=9, workers=1, progress=False)
    assert main(["verify", str(world.cache), "--shards", str(tmp_path)]) == 1
    assert "the shards say" in capsys.readouterr().out


def test_inspect_stats_and_bench_commands_report_the_cache(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(world.cache)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["codec"], report["rows"], report["tokens"]) == ("int8", 14, "2 crops x 16 patches x 64")
    assert report["view_sets"]["v0"] == "3 of 3 shards"
    assert report["fingerprint"]["crops"]["seed"] == 5 and report["quality"]["log_gram"] < 0.015
    assert main(["stats", str(world.cache), "--rows", "9"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert [s["rows"] for s in stats] == [9, 9]
    with TeacherCache.open(world.cache) as cache:
        norms = torch.cat([t.patches.norm(dim=-1).flatten() for t in cache.tokens(0)])
    assert float(norms.min()) <= stats[0]["patch_norm"]["median"] <= float(norms.max())
    assert main(["bench", str(world.cache), "--batch_size", "4", "--batches", "2"]) == 0
    assert capsys.readouterr().out.count("images/s") == 4


def test_inspect_of_a_row_shows_its_crops(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(world.cache), "--row", "13", "--view_set", "1"]) == 0
    text = capsys.readouterr().out
    row = json.loads(text[text.index('{\n  "view_set": 1') :])
    index = load_index(world.shards)
    assert row["id"] == f"{int(index.uid[13]):016x}" and row["image_crc32c"] == f"{int(index.crc32c[13]):08x}"
    crop = row["crops"][0]
    assert crop["image height << 16 | image width"] == int(index.height[13]) << 16 | int(index.width[13])
    assert 0 <= crop["top"] <= index.height[13] - crop["height"]
    assert main(["inspect", str(world.cache), "--row", "14"]) == 2


def test_repair_command_names_what_it_drops_and_build_restores_it(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world.cache / "data.zarr/v1/patch/c.2.0.0.0.0"
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    assert main(["verify", str(world.cache)]) == 1
    damaged = path.read_bytes()
    assert main(["repair", str(world.cache)]) == 2
    assert "Pass --yes" in capsys.readouterr().err and path.read_bytes() == damaged
    assert main(["repair", str(world.cache), "--yes"]) == 0
    assert "view set 1: move shard 2 aside: " in capsys.readouterr().out
    assert [p.read_bytes() for p in world.cache.glob(f"damaged/*/data.zarr/v1/patch/{path.name}")] == [damaged]
    assert main(["verify", str(world.cache)]) == 1
    assert "view set 1: 1 of 3 shards are not built yet" in capsys.readouterr().out
    assert main(world.build) == 0
    assert path.read_bytes() == before


def test_calibrate_command_recommends_a_codec(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--rows", "12", *world.flags]) == 0
    output = capsys.readouterr().out
    assert "12 images read; codecs measured on 8 crops that did not calibrate them" in output
    assert "recommended: --codec int8" in output
    assert main(["calibrate", "--rows", "3", *world.flags]) == 2
    assert "3 images make less than two batches" in capsys.readouterr().err


def test_bad_input_is_a_message_and_status_2(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no teacher cache here" in capsys.readouterr().err
    assert main(["verify", str(world.cache), "--teacher", "2"]) == 2
    assert "Pass --shards FOLDER" in capsys.readouterr().err
    assert main([*world.build, "--data_seed", "6"]) == 2
    assert "crops.seed: this run 6, the cache 5" in capsys.readouterr().err


def test_teacher_overflow_in_the_real_teacher_is_an_error(world: SimpleNamespace, tmp_path: Path) -> None:
    class Loud(FrozenTeacher):
        def __call__(self, crops: torch.Tensor, num_crops: int = 2) -> TeacherTargets:
            targets = world.teacher(crops, num_crops)
            return TeacherTargets(cls=targets.cls * 1e6, patches=targets.patches)

    loud = Loud.__new__(Loud)
    loud.__dict__.update(world.teacher.__dict__)
    with pytest.raises(ValueError, match=r"cls token: largest magnitude .*, fp16 holds 65504"):
        build(world, tmp_path / "cache").run(loud, CPU, progress=False)
