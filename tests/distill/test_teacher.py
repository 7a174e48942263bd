"""The frozen teacher: its tokens, its RoPE table, its fingerprint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch.testing import assert_close

from common.errors import UserError
from distill.config import TeacherConfig
from distill.export import Card, export_model
from distill.models import create_backbone
from distill.teacher import FrozenTeacher, TeacherTargets, load_teacher
from pipeline.batch import normalise
from tests.distill.test_weights import huggingface_layout, meta_layout

CPU = torch.device("cpu")
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "dynamic_img_size": False, "init_values": 0.5}


def small_teacher(dtype: torch.dtype = torch.float32, *, round_rope_periods: bool = False) -> FrozenTeacher:
    torch.manual_seed(0)
    model = create_backbone("vit_small", patch_size=8, model_args=SMALL)
    if round_rope_periods:
        model.rope.periods.copy_(model.rope.periods.bfloat16())
    return FrozenTeacher(model, arch="small", img_size=32, dtype=dtype, device=CPU)


def random_crops(count: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def test_targets_are_image_major_final_norm_tokens_without_registers() -> None:
    teacher, crops = small_teacher(), random_crops(6)
    targets = teacher(crops)
    tokens = teacher.model.forward_features(normalise(crops))
    assert targets.cls.shape == (3, 2, 32)
    assert targets.patches.shape == (3, 2, 16, 32) == (3, 2, teacher.num_patches(), teacher.embed_dim)
    for image in range(3):
        for view in range(2):
            row = tokens[view * 3 + image]
            # Batches of 6 and of 6 in the same order: equal to the bit.
            assert torch.equal(targets.cls[image, view], row[0])
            assert torch.equal(targets.patches[image, view], row[5:])
    assert not targets.cls.requires_grad


def test_any_timm_vit_with_a_class_token_can_teach() -> None:
    model = create_backbone("vit_tiny_patch16_224", model_args={"img_size": 32})
    teacher = FrozenTeacher(model, arch="plain", img_size=32, dtype=torch.float32, device=CPU)
    targets = teacher(random_crops(2))
    assert targets.patches.shape == (1, 2, 4, 192)
    image = normalise(random_crops(2), mean=(0.5,) * 3, std=(0.5,) * 3)  # this model's own normalisation
    assert_close(targets.cls[0, 1], model.forward_features(image)[1, 0])


@pytest.mark.parametrize(
    ("arch", "input_size", "num_prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", 42, 5),
        ("vit_small_patch14_dinov2", 42, 1),
        ("vit_tiny_patch16_224", 48, 1),
        ("vit_small_patch8_224", 48, 1),
        ("eva02_tiny_patch14_224", 42, 1),
        ("vit_small_patch16_dinov3", 48, 5),
    ],
)
def test_a_patch_that_does_not_divide_the_crop_sees_all_of_it(arch: str, input_size: int, num_prefix: int) -> None:
    torch.manual_seed(0)
    args = {"img_size": input_size, "dynamic_img_size": False, "depth": 1}
    teacher = FrozenTeacher(
        create_backbone(arch, model_args=args), arch=arch, img_size=48, dtype=torch.float32, device=CPU
    )
    crops = random_crops(2, 48)
    images = normalise(crops, mean=teacher.mean, std=teacher.std)
    if input_size != 48:
        images = F.interpolate(images, size=(input_size, input_size), mode="bilinear", antialias=True)
    tokens = teacher.model.forward_features(images)
    side = input_size // int(teacher.model.patch_embed.patch_size[0])
    assert teacher.num_patches() == side**2
    assert_close(teacher(crops).patches[0, 1], tokens[1, num_prefix:], rtol=0, atol=0)
    assert ("input_size" in teacher.fingerprint()) == (input_size != 48)


@pytest.mark.parametrize(("old", "new"), [(16, 14), (28, 14), (14, 28), (6, 3), (5, 5), (3, 7)])
def test_tokens_on_another_grid_are_the_means_of_those_they_cover(old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = TeacherTargets(torch.zeros(1, 2, 4), torch.randn(1, 2, old**2, 4, generator=generator))

    def weights() -> torch.Tensor:
        """Tents of the coarser grid's width about the centre of each new patch, [new, old]."""
        rows = torch.zeros(new, old, dtype=torch.float64)
        width = max(old / new, 1.0)
        for i in range(new):
            for j in range(old):
                rows[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * old / new) / width)
        return rows / rows.sum(1, keepdim=True)

    grid = targets.patches.double().view(1, 2, old, old, 4)
    expected = torch.einsum("yh,xw,bghwd->bgyxd", weights(), weights(), grid).flatten(2, 3)
    found = targets.on_grid(new**2)
    # Two passes of at most 5 products each, of numbers of about 1, in fp32.
    assert_close(found.patches.double(), expected, rtol=0, atol=64 * 2.0**-24)
    assert found.cls is targets.cls


@pytest.mark.parametrize(
    ("arch", "input_size", "patches", "width"),
    [("convnext_atto", 64, 4, 320), ("resnet10t", 64, 4, 512), ("vit_pwee_patch16_reg1_gap_256", 48, 9, 256)],
)
def test_a_teacher_without_a_class_token_gives_its_pooled_features_in_its_place(
    arch: str, input_size: int, patches: int, width: int
) -> None:
    model = create_backbone(arch, vit_args={"img_size": input_size, "dynamic_img_size": False})
    teacher = FrozenTeacher(model, arch=arch, img_size=50, dtype=torch.float32, device=CPU)
    targets = teacher(random_crops(2, 50))
    assert (teacher.num_patches(), teacher.embed_dim, teacher.input_size) == (patches, width, input_size)
    assert targets.patches.shape == (1, 2, patches, width)
    images = normalise(random_crops(2, 50), mean=teacher.mean, std=teacher.std)
    images = F.interpolate(images, size=(input_size, input_size), mode="bilinear", antialias=True)
    assert_close(targets.cls[0], model(images), rtol=0, atol=0)


def test_a_teacher_of_two_widths_is_refused() -> None:
    with pytest.raises(UserError, match="pooled features are 1024 wide and its last map 288"):
        FrozenTeacher(create_backbone("mobilenetv3_small_050"), arch="m", img_size=64, dtype=torch.float32, device=CPU)


def test_crops_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"crops of \(48, 48\) pixels, it was made for 32"):
        small_teacher()(random_crops(2, 48))


def test_a_bf16_teacher_keeps_its_rope_table_in_fp32_with_rounded_periods() -> None:
    exact, half = small_teacher(), small_teacher(torch.bfloat16, round_rope_periods=True)
    table = half.model.rope.pos_embed_cached
    assert table.dtype == torch.float32
    periods = exact.model.rope.periods.bfloat16().float()
    assert half.fingerprint()["rope_periods"] == periods.tolist()
    assert exact.fingerprint()["rope_periods"] != periods.tolist()
    reference = small_teacher(round_rope_periods=True)
    assert torch.equal(table, reference.model.rope.pos_embed_cached)


def test_the_fingerprint_changes_with_every_weight_and_setting() -> None:
    base = small_teacher().fingerprint()
    assert small_teacher().fingerprint() == base
    changed = small_teacher()
    with torch.no_grad():
        changed.model.blocks[1].mlp.fc2.bias[3] += 1e-3
    assert changed.fingerprint()["state_dict_sha256"] != base["state_dict_sha256"]
    assert small_teacher(torch.bfloat16).fingerprint()["dtype"] == "bfloat16"


def test_a_local_file_and_a_named_architecture_make_the_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = create_backbone("vit_small", model_args={"init_values": 0.5})
    save_file(source.state_dict(), tmp_path / "t.safetensors")
    config = TeacherConfig(teacher_arch="vit_small", teacher_pretrained_weights=str(tmp_path / "t.safetensors"))
    teacher = load_teacher(config, img_size=32, device=CPU)
    source.rope.periods.copy_(source.rope.periods.bfloat16().float())
    expected = source.eval().forward_features(normalise(random_crops(2)))
    # The same weights and table, the RoPE table cached or not: the same operations in the same order.
    assert_close(teacher(random_crops(2)).patches[0, 1], expected[1, 5:], rtol=1e-5, atol=1e-5)


Hub = Callable[[str, Path], str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A function that puts a folder into an offline cache of the hub under a name, and returns timm's name for it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(name: str, folder: Path) -> str:
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        return f"hf-hub:{name}"

    return add


def test_released_weights_are_one_teacher_in_whatever_container(tmp_path: Path, hub: Hub) -> None:
    name = "vit_small_patch16_dinov3"
    torch.manual_seed(0)
    source: Any = timm.create_model(f"{name}.lvd1689m", num_classes=0, init_values=0.5)
    torch.save(meta_layout(source), tmp_path / "meta.pth")
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    for folder in ("released", "renamed folder"):
        save_for_hf(source, tmp_path / folder, safe_serialization=True)
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/config.json").write_text('{"model_type": "dinov3_vit"}')
    save_file(huggingface_layout(source), tmp_path / "huggingface/model.safetensors")
    containers = [
        (f"{name}.lvd1689m", "meta.pth"), (name, "meta.pth"), ("vit_small", "meta.pth"), (name, "timm.safetensors"),
        (name, "huggingface"), (name, "huggingface/model.safetensors"), (name, "released"),
        (f"local-dir:{tmp_path / 'released'}", None), (f"local-dir:{tmp_path / 'renamed folder'}/", None),
        (hub(f"timm/{name}.lvd1689m", tmp_path / "released"), None),
        (hub("someone/copy", tmp_path / "released") + "@main", None),
    ]  # fmt: skip
    expected = None
    for arch, file in containers:
        config = TeacherConfig(teacher_arch=arch, teacher_pretrained_weights=str(tmp_path / file) if file else None)
        teacher = load_teacher(config, img_size=32, device=CPU)
        found = (teacher.fingerprint(), teacher(random_crops(2)))
        expected = expected or found
        assert found[0] == expected[0], (arch, file)
        assert torch.equal(found[1].cls, expected[1].cls) and torch.equal(found[1].patches, expected[1].patches)
    assert expected is not None and expected[0]["architecture"] == f"{name}.lvd1689m"
    assert expected[0]["rope_periods"] == meta_layout(source)["rope_embed.periods"].tolist()


def test_what_firn_trained_is_one_teacher_with_the_periods_it_was_trained_with(tmp_path: Path, hub: Hub) -> None:
    torch.manual_seed(0)
    student: Any = create_backbone("vit_small", model_args={"init_values": 0.5}).eval()
    card = Card("s", "vit_small", "vit_large_patch16_dinov3.lvd1689m", "dinov3-license", step=0, ema=False, img_size=32)
    folder = export_model(student, tmp_path / "export", card=card)
    student.rope.update_feat_shape((2, 2))
    tokens = student.forward_features(normalise(random_crops(2)))
    for arch, file in ((f"local-dir:{folder}", None), (hub("someone/student", folder), None), ("vit_small", folder)):
        config = TeacherConfig(teacher_arch=arch, teacher_pretrained_weights=str(file) if file else None)
        teacher = load_teacher(config, img_size=32, device=CPU)
        assert teacher.fingerprint()["architecture"] == "vit_small_patch16_dinov3"
        assert teacher.fingerprint()["rope_periods"] == student.rope.periods.tolist()
        assert_close(teacher(random_crops(2)).patches[0, 1], tokens[1, 5:], rtol=1e-5, atol=1e-5)


def test_periods_that_a_file_holds_are_taken_as_they_are_and_checked(tmp_path: Path) -> None:
    state = meta_layout(create_backbone("vit_small"))
    state["rope_embed.periods"] = state["rope_embed.periods"].float() * 1.25
    torch.save(state, tmp_path / "own.pth")
    config = TeacherConfig(teacher_arch="vit_small", teacher_pretrained_weights=str(tmp_path / "own.pth"))
    found = load_teacher(config, img_size=32, device=CPU, dtype=torch.bfloat16)
    assert found.fingerprint()["rope_periods"] == state["rope_embed.periods"].tolist()
    state["rope_embed.periods"][3] = torch.inf
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(UserError, match=r"own.pth: rope.periods holds NaN or Inf"):
        load_teacher(config, img_size=32, device=CPU)


def test_a_name_that_leads_to_no_model_of_timms_says_what_to_give(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "dinov3_vit"}')
    named = hub("facebook/dinov3-vits16-pretrain-lvd1689m", tmp_path / "hf")
    for arch in (f"local-dir:{tmp_path / 'hf'}", named, "facebook/dinov3-vits16-pretrain-lvd1689m"):
        with pytest.raises(UserError, match=rf"--teacher_arch {re.escape(arch)}: .*folder as --teacher_pretrained_wei"):
            load_teacher(TeacherConfig(teacher_arch=arch), img_size=32, device=CPU)


def test_weights_that_cannot_be_downloaded_name_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--teacher_pretrained_weights"):
        load_teacher(TeacherConfig(teacher_arch="vit_small_patch16_dinov3.lvd1689m"), img_size=32, device=CPU)


def test_a_missing_local_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"local-dir:.*absent"):
        load_teacher(TeacherConfig(teacher_arch=f"local-dir:{tmp_path}/absent"), img_size=32, device=CPU)
