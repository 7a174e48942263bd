"""An exported student loads by timm's name, equal to the bit, and states where its licence comes from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants

from common.errors import UserError
from distill import export, onnx
from distill.checkpoint import CheckpointWriter
from distill.config import (
    DEFAULT_TEACHER,
    RuntimeConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    write_or_check_config,
)
from distill.export import (
    Card,
    ExportArgs,
    export_model,
    export_run,
    render_card,
    teacher_licence,
    verify_export,
)
from distill.models import cls_and_patches, create_backbone, create_student
from distill.onnx import require_onnx, write_onnx
from distill.prototypes import PROTOTYPES, Prototypes, save_prototypes
from distill.step import DistillStep

IMG_SIZE = 32
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def small_vit(seed: int = 0, **args: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5, **args}
    model = create_backbone("vit_small", patch_size=8, model_args=sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # nothing left at zero or one, where a lost key would not show
    return model.eval()


def a_card(**changes: Any) -> Card:
    fields: dict[str, Any] = {
        "name": "small",
        "student_arch": "vit_small",
        "teacher_arch": "vit_large_patch16_dinov3.lvd1689m",
        "licence": "dinov3-license",
        "step": 7,
        "ema": True,
        "img_size": IMG_SIZE,
    }
    return Card(**(fields | changes))


def tokens(model: Any) -> torch.Tensor:
    images = torch.randn(2, 3, IMG_SIZE, IMG_SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.forward_features(images)


def test_timm_loads_the_export_by_name_equal_to_the_bit(tmp_path: Path) -> None:
    model = small_vit(drop_path_rate=0.1)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.21, 0.22)
    folder = export_model(model, tmp_path / "out", card=a_card(), mean=mean, std=std)
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(tokens(loaded), tokens(model))
    with torch.inference_mode():
        pooled = loaded(torch.zeros(1, 3, IMG_SIZE, IMG_SIZE))
        assert torch.equal(pooled, loaded.forward_features(torch.zeros(1, 3, IMG_SIZE, IMG_SIZE))[:, 0])
    assert (tuple(loaded.pretrained_cfg["mean"]), tuple(loaded.pretrained_cfg["std"])) == (mean, std)
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, IMG_SIZE, IMG_SIZE)
    assert loaded.pretrained_cfg["license"] == "dinov3-license"
    assert "tag" not in json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert "drop_path_rate" not in json.loads((folder / "config.json").read_text())["model_args"]


def test_features_only_and_other_image_sizes_work(tmp_path: Path) -> None:
    model = small_vit()
    folder = export_model(model, tmp_path / "out", card=a_card())
    larger = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(2))
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pyramid: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=[1])
    with torch.inference_mode():
        expected = model.forward_features(larger)
        assert torch.equal(loaded.forward_features(larger), expected)
        unnormed = pyramid.eval()(larger)[0]  # [b, d, 8, 6]
        normed = model.norm(unnormed.flatten(2).transpose(1, 2))
    # The map is made contiguous in another layout before the norm: the last digits of fp32 may differ.
    torch.testing.assert_close(normed, expected[:, 5:], atol=1e-5, rtol=1e-5)


def test_torch_hub_gives_the_same_model(tmp_path: Path) -> None:
    model = small_vit()
    folder = export_model(model, tmp_path / "out", card=a_card())
    loaded = torch.hub.load(str(folder), "student", source="local").eval()
    assert torch.equal(tokens(loaded), tokens(model))


def test_the_sums_list_every_file_and_hold(tmp_path: Path) -> None:
    folder = export_model(small_vit(), tmp_path / "out", card=a_card())
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    listed = {name: digest for digest, name in lines}
    assert listed.keys() == {"README.md", "config.json", "hubconf.py", "model.safetensors"}
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = export_model(small_vit(), tmp_path / "out", card=a_card(), onnx=HAS_ONNX)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, mode) and len(modes) == 5 + HAS_ONNX
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_full_disk_is_named_and_leaves_the_earlier_export_whole(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(400_000)
    folder = export_model(small_vit(seed=1), disk / "out", card=a_card())  # takes 140 KB
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"out: the (disk is full|system allows no file of that size).*run the same"):
        export_model(small_vit(seed=2, embed_dim=64, depth=4), folder, card=a_card())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_transformers_gives_the_same_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is optional and not installed")
    model = small_vit()
    folder = export_model(model, tmp_path / "out", card=a_card())
    loaded = transformers.AutoModel.from_pretrained(folder).eval()
    assert torch.equal(tokens(SimpleNamespace(forward_features=lambda x: loaded(x).last_hidden_state)), tokens(model))


def test_an_earlier_export_is_replaced_and_anything_else_is_kept(tmp_path: Path) -> None:
    export_model(small_vit(seed=1), tmp_path / "out", card=a_card())
    model = small_vit(seed=2)
    folder = export_model(model, tmp_path / "out", card=a_card())
    assert torch.equal(tokens(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()), tokens(model))
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("words")
    with pytest.raises(UserError, match=r"thesis: the folder is not empty.*Choose another --output"):
        export_model(model, precious, card=a_card())
    assert (precious / "chapter.txt").read_text() == "words"


def test_an_export_that_loads_back_unequal_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = small_vit(seed=1), small_vit(seed=2)
    folder = export_model(model, tmp_path / "good", card=a_card())
    with pytest.raises(UserError, match=r"the export is not the student: weights \['cls_token'"):
        verify_export(folder, other, img_size=IMG_SIZE)
    # What a state dict does not hold, such as RoPE's periods, shows in the tokens only.
    other.load_state_dict(model.state_dict())
    other.rope.periods.mul_(1.5)
    with pytest.raises(UserError, match="weights are equal, the tokens are not"):
        export_model(other, tmp_path / "bad", card=a_card())
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_onnx_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"onnxscript are not installed.*pip install onnxscript"):
        require_onnx()
    with pytest.raises(UserError, match="or export without --onnx"):
        export_run(ExportArgs(run=str(tmp_path), onnx=True))


needs_onnx = pytest.mark.skipif(
    not HAS_ONNX,
    reason="onnx, onnxscript and onnxruntime are optional and not all installed",
)


@needs_onnx
@pytest.mark.filterwarnings("default")  # torch's exporter warns of its own deprecations
def test_onnx_gives_the_tokens_of_torch(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = small_vit()
    path = export_model(model, tmp_path / "out", card=a_card(), onnx=True) / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 96, 96), (3, 224, 224), (1, 224, 336), (3, 8, 40)):
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))
        cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
        with torch.inference_mode():
            expected = model.forward_features(images)
        # Another runtime's kernels: fp32 sums of 32 to 1176 terms in another order, over two blocks.
        torch.testing.assert_close(torch.from_numpy(cls), expected[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(patches), expected[:, 5:], atol=1e-4, rtol=1e-4)
    graph = onnx.load(path).graph
    assert not {"If", "Loop"} & {node.op_type for node in graph.node}
    sides = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input]
    assert sides == [["batch", 3, "8*h", "8*w"]]
    assert b".py" not in path.read_bytes()  # no paths of the machine that wrote it


@needs_onnx
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("arch", "patch"), [("vit_tiny_patch16_224", 16), ("convnext_atto", 32), ("resnet10t", 32)])
def test_other_students_give_onnx_of_any_size(tmp_path: Path, arch: str, patch: int) -> None:
    import onnxruntime

    model = create_student(StudentConfig(arch=arch, patch_size=patch), seed=0).eval()
    write_onnx(model, tmp_path / "m.onnx", img_size=224)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 96, 96), (3, 224, 224), (2, 224, 320)):
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            expected = cls_and_patches(model, images)
        for got, tokens_of_torch in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), tokens_of_torch, atol=1e-4, rtol=1e-4)


@needs_onnx
@pytest.mark.filterwarnings("default")
def test_a_model_of_one_image_size_gives_onnx_of_that_size(tmp_path: Path) -> None:
    import onnxruntime

    model = small_vit(img_size=IMG_SIZE, dynamic_img_size=False)
    write_onnx(model, tmp_path / "m.onnx", img_size=IMG_SIZE)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, IMG_SIZE, IMG_SIZE]
    images = torch.randn(3, 3, IMG_SIZE, IMG_SIZE, generator=torch.Generator().manual_seed(3))
    expected = model.forward_features(images)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected[:, 0], atol=1e-4, rtol=1e-4
    )


HUGGING_FACE = '{"model_type": "dinov3_vit"}'
RELEASED = (
    '{"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": {"tag": "lvd1689m", "license": "apache-2.0"}}'
)
OWN = '{"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": {"license": "mit"}}'
SILENT = '{"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": {}}'
META, EUPE = "dinov3-license", "fair-noncommercial-research-license"


@pytest.mark.parametrize(
    ("arch", "config", "weights", "weights_config", "licence"),
    [
        # timm's names: the weights that timm has for them.
        ("vit_large_patch16_dinov3.lvd1689m", None, None, None, META),
        ("vit_small", None, None, None, META),
        ("vit_tiny", None, None, None, EUPE),
        ("vit_small_patch14_dinov2.lvd142m", None, None, None, "apache-2.0"),
        ("vit_small_patch16_dinov3.no_such_tag", None, None, None, "unknown"),
        ("no_such_model", None, None, None, "unknown"),
        ("owner/without-a-prefix", None, None, None, "unknown"),
        # The hub: what the repository's config.json states where it is at hand, else its name.
        ("hf-hub:timm/vit_large_patch16_dinov3.lvd1689m", None, None, None, META),
        ("hf_hub:timm/vit_small_patch14_dinov2.lvd142m@main", None, None, None, "apache-2.0"),
        ("hf-hub:facebook/dinov3-vitl16-pretrain-lvd1689m", HUGGING_FACE, None, None, META),
        ("hf-hub:someone/my-own-dinov3", OWN, None, None, "mit"),
        ("hf-hub:someone/model@main", RELEASED, None, None, META),
        ("hf-hub:someone/model", None, None, None, "unknown"),
        # Folders: Meta's weights by the tag, whatever the folder's name or a mistaken statement.
        ("local-dir:ARCH", RELEASED, None, None, META),
        ("local-dir:ARCH", OWN, None, None, "mit"),
        ("local-dir:ARCH", SILENT, None, None, "unknown"),
        ("local-dir:ARCH", None, None, None, "unknown"),
        # Weights of the user's: what is stated with them counts, not what is stated with the architecture.
        ("vit_large_patch16_dinov3.lvd1689m", None, "dinov3_vitl16.pth", None, META),
        ("vit_large_patch16_dinov3", None, "any.pth", None, META),
        ("vit_small", None, "hub", HUGGING_FACE, META),
        ("vit_small", None, "export", OWN, "mit"),
        ("vit_small_patch14_dinov2.lvd142m", None, "renamed/model.safetensors", RELEASED, META),
        ("local-dir:ARCH", OWN, "dinov3_vits16.pth", None, META),
        ("hf-hub:someone/model", OWN, "w.safetensors", None, META),
        ("no_such_model", None, "any.pth", None, "unknown"),
    ],
)  # fmt: skip
def test_the_licence_follows_from_where_the_weights_are_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arch: str, config: str | None, weights: str | None, weights_config: str | None, licence: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "some name"
    if arch.startswith("hf-hub"):
        repository = tmp_path / "cache" / f"models--{arch[7:].split('@')[0].replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("abc")
        place = repository / "snapshots/abc"
    for folder, text in ((place, config), ((tmp_path / (weights or "")), weights_config)):
        folder = folder.parent if folder.suffix == ".safetensors" else folder
        if text is not None:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(text)
    given = str(tmp_path / weights) if weights else None
    assert teacher_licence(arch.replace("ARCH", str(place)), given) == licence


def test_a_run_from_a_cache_names_the_teacher_of_the_cache(
    tmp_path: Path, make_step: Callable[..., DistillStep], student_config: StudentConfig, prototypes: Prototypes
) -> None:
    cached = TeacherConfig(cache_path="cache")
    dinov2 = "vit_small_patch14_dinov2.lvd142m"
    cases = [
        (cached, dinov2, dinov2, "apache-2.0"),
        (cached, "vit_small_patch16_dinov3", "vit_small_patch16_dinov3 (of no release)", "unknown"),
        (cached, DEFAULT_TEACHER, DEFAULT_TEACHER, "dinov3-license"),
        (replace(cached, teacher_arch=dinov2, teacher_pretrained_weights="/w/mine.pth"), dinov2, dinov2, "apache-2.0"),
        (TeacherConfig(), dinov2, DEFAULT_TEACHER, "dinov3-license"),
    ]
    for number, (teacher, in_cache, named, licence) in enumerate(cases):
        run = tmp_path / f"run{number}"
        write_or_check_config(TrainConfig(student=student_config, teacher=teacher), run)
        fitted = Prototypes(prototypes.cls, prototypes.patch, {"teacher": {"architecture": in_cache}})
        save_prototypes(fitted, run / PROTOTYPES)
        writer = CheckpointWriter(run, RuntimeConfig())
        writer.save(7, {"model": make_step().state_dict(), "ema": None})
        writer.wait()
        folder = export_run(ExportArgs(run=str(run)))
        card = (folder / "README.md").read_text()
        assert f"frozen teacher\n`{named}`" in card
        assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == licence
        assert ("read from `mine.pth`, a file of the user's" in card) == ("mine.pth" in str(teacher))


def test_the_card_states_the_teachers_licence() -> None:
    meta = render_card(a_card(), create_backbone("vit_small"))
    assert "license: other\nlicense_name: dinov3-license" in meta
    assert "Pass these weights on only under that agreement" in meta
    assert "21.6 M parameters" in meta
    assert "license: apache-2.0" in render_card(a_card(licence="apache-2.0"), small_vit())
    assert "license: mit" in render_card(a_card(licence="MIT"), small_vit())
    unknown = render_card(a_card(licence="unknown"), small_vit())
    assert "license" not in unknown.split("---")[1]
    assert "look it up before you share these weights" in unknown
    assert "If they are Meta's DINOv3, or derived from it, it is the DINOv3 License" in unknown


def test_the_card_says_how_the_features_of_a_cnn_are_had() -> None:
    assert "model.num_prefix_tokens + n" in render_card(a_card(), small_vit())
    assert "model.forward_head(features, pre_logits=True)" in render_card(a_card(), create_backbone("resnet10t"))


def test_the_card_shows_measured_accuracies_only() -> None:
    assert "Not measured" in render_card(a_card(), small_vit())
    probe = {
        "protocol_sha256": "abcdef0123456789",
        "protocol": {"knn_k": [10]},
        "models": [{"name": "student", "detail": "step 7, EMA", "knn": {"10": 61.5}, "best": {"top1": 72.25}}],
    }
    card = render_card(a_card(probe=probe), small_vit())
    assert "| student | 61.50 | 72.25 |" in card
    assert "protocol `abcdef012345`" in card
    later = render_card(a_card(probe=probe, step=8), small_vit())
    assert "61.50" not in later
    assert "last probed at step 7, EMA" in later
    probe["models"] = [{"name": "student", "detail": "step 7, EMA", "knn": {}, "best": None}]
    assert "probed on shards without labels" in render_card(a_card(probe=probe), small_vit())


def test_the_command_prints_the_error_alone_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(tmp_path), "--no-ema"])
    assert export.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'config.json'}: no such file")
    assert "Traceback" not in said
