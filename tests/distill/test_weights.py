"""Teacher weights in Meta's and timm's layouts, and every way in which they can be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from common.errors import UserError
from distill.models import create_backbone
from distill.weights import load_weights, meta_to_timm, stated_origin, tensors_sha256

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def meta_layout(model: Any, *, qkv_bias: float = 0.0) -> dict[str, Tensor]:
    """Return a timm DINOv3 state dict under the keys of Meta's release, training-only keys included."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        key = key.replace("reg_token", "storage_tokens")
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if key.endswith(("q_bias", "v_bias")):
            continue
        state[key] = value
        if key.endswith("attn.qkv.weight"):
            width = value.shape[0] // 3
            prefix = key.removesuffix("weight")
            state[prefix + "bias"] = torch.full((3 * width,), qkv_bias)
            state[prefix + "bias_mask"] = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
    width = state["cls_token"].shape[-1]
    state["mask_token"] = torch.zeros(1, width)
    state["rope_embed.periods"] = model.rope.periods.bfloat16()
    return state


def huggingface_layout(model: Any, *, gated: bool = False) -> dict[str, Tensor]:
    """Return a timm DINOv3 state dict under the keys that transformers 5.24 saves a DINOv3ViTModel with."""
    width = model.embed_dim
    theirs: dict[str, Tensor] = {"embeddings.mask_token": torch.zeros(1, 1, width)}
    renamed = {
        "blocks.": "layer.", "attn.proj": "attention.o_proj", "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1", "patch_embed.proj": "embeddings.patch_embeddings",
        "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
    }  # fmt: skip
    renamed |= {"fc1_g": "gate_proj", "fc1_x": "up_proj"} if gated else {"fc1": "up_proj"}
    renamed |= {"fc2": "down_proj", "attn.q_bias": "attention.q_proj.bias", "attn.v_bias": "attention.v_proj.bias"}
    for key, value in model.state_dict().items():
        for ours, name in renamed.items():
            key = key.replace(ours, name)
        if "attn.qkv" in key:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                theirs[key.replace("attn.qkv", f"attention.{letter}_proj")] = part.contiguous()
        elif not key.endswith("k_bias"):
            theirs[key] = value
    if gated:  # this one has no biases of queries and values: theirs are zeros
        theirs |= {
            f"layer.{i}.attention.{x}_proj.bias": torch.zeros(width) for i in range(len(model.blocks)) for x in "qv"
        }
    return theirs


@pytest.fixture
def source() -> nn.Module:
    torch.manual_seed(0)
    model = create_backbone("vit_small", model_args=SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def fresh() -> nn.Module:
    return create_backbone("vit_small", model_args=SMALL)


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_metas_layout_loads_to_the_same_model(source: nn.Module, tmp_path: Path, wrap: str | None) -> None:
    state = meta_layout(source)
    torch.save({wrap: state} if wrap else state, tmp_path / "dinov3.pth")
    target = fresh()
    load_weights(target, tmp_path / "dinov3.pth")
    assert tensors_sha256(target.state_dict()) == tensors_sha256(source.state_dict())


def test_the_released_vit_large_has_exactly_the_keys_and_shapes_that_are_expected() -> None:
    with torch.device("meta"):
        large = create_backbone("vit_large_patch16_dinov3.lvd1689m")
    state = {key: torch.zeros(()).expand(value.shape) for key, value in meta_layout(large).items()}
    renamed = meta_to_timm(state, has_qkv_bias=False, where="test")
    expected = {key: value.shape for key, value in large.state_dict().items()}
    assert {key: value.shape for key, value in renamed.items()} == expected
    # Three tokens, RoPE periods, patch embedding and norm of two each; 15 tensors in each of 24 blocks.
    assert len(state) == 3 + 1 + 2 + 2 + 24 * 15


def test_safetensors_in_timms_layout_load(source: nn.Module, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    target = fresh()
    load_weights(target, tmp_path / "model.safetensors")
    assert tensors_sha256(target.state_dict()) == tensors_sha256(source.state_dict())


def test_qkv_biases_go_to_the_variant_that_has_them(tmp_path: Path) -> None:
    target = create_backbone("vit_tiny", model_args=SMALL)
    torch.save(meta_layout(target, qkv_bias=0.25), tmp_path / "tiny.pth")
    load_weights(target, tmp_path / "tiny.pth")
    assert target.blocks[1].attn.q_bias.eq(0.25).all()
    assert target.blocks[1].attn.v_bias.eq(0.25).all()
    assert target.blocks[1].attn.k_bias.eq(0).all()


def test_qkv_biases_that_the_model_has_no_place_for_are_refused(source: nn.Module, tmp_path: Path) -> None:
    torch.save(meta_layout(source, qkv_bias=0.25), tmp_path / "w.pth")
    with pytest.raises(UserError, match="_qkvb variant"):
        load_weights(fresh(), tmp_path / "w.pth")


def test_missing_extra_and_misshapen_keys_are_all_listed(source: nn.Module, tmp_path: Path) -> None:
    state = dict(source.state_dict())
    del state["norm.bias"]
    state["head.weight"] = torch.zeros(10, 32)
    state["cls_token"] = torch.zeros(1, 1, 48)
    save_file(state, tmp_path / "bad.safetensors")
    target = fresh()
    before = tensors_sha256(target.state_dict())
    with pytest.raises(UserError) as error:
        load_weights(target, tmp_path / "bad.safetensors")
    message = str(error.value)
    assert "missing: norm.bias (32,)" in message
    assert "not in the model: head.weight (10, 32)" in message
    assert "cls_token: the file has (1, 1, 48), the model (1, 1, 32)" in message
    assert tensors_sha256(target.state_dict()) == before


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: not a readable checkpoint"):
        load_weights(fresh(), tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"plain\.pth: not a readable checkpoint"):
        load_weights(fresh(), tmp_path / "plain.pth")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "no such file"),
        ("empty.pth", b"", "not a readable checkpoint"),
        ("half.safetensors", b"\x08\x00", "not a readable checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_weights(fresh(), tmp_path / name)


def test_a_checkpoint_of_a_trainer_is_not_taken_for_a_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "trainer.pth")
    with pytest.raises(UserError, match="no plain state dict"):
        load_weights(fresh(), tmp_path / "trainer.pth")


def test_metas_dinov2_keys_load_with_positions_of_another_image_size(tmp_path: Path) -> None:
    arch = "vit_small_patch14_reg4_dinov2"
    source = create_backbone(arch, model_args={"img_size": 70, "depth": 1})
    meta = {key.replace("reg_token", "register_tokens"): value for key, value in source.state_dict().items()}
    # Meta adds a position to the class token; timm holds the sum.
    position = torch.randn(1, 1, 384)
    meta["pos_embed"] = torch.cat([position, meta["pos_embed"]], dim=1)
    meta["cls_token"] = meta["cls_token"] - position
    meta["mask_token"] = torch.zeros(1, 384)
    torch.save(meta, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    same = create_backbone(arch, model_args={"img_size": 70, "depth": 1})
    load_weights(same, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    for key, value in source.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], value)
    smaller = create_backbone(arch, model_args={"img_size": 42, "depth": 1})
    load_weights(smaller, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    expected = resample_abs_pos_embed(source.pos_embed, (3, 3), num_prefix_tokens=0)
    torch.testing.assert_close(smaller.pos_embed, expected)


@pytest.mark.parametrize(
    ("arch", "gated"), [("vit_small_patch16_dinov3_qkvb", False), ("vit_huge_plus_patch16_dinov3", True)]
)
def test_hugging_faces_keys_give_the_same_weights(arch: str, gated: bool, tmp_path: Path) -> None:
    model = create_backbone(arch, model_args=SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    theirs = huggingface_layout(model, gated=gated)
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(theirs, folder / "model.safetensors")
    for place in (folder, folder / "model.safetensors"):
        other = create_backbone(arch, model_args=SMALL)
        load_weights(other, place)
        assert tensors_sha256(other.state_dict()) == tensors_sha256(model.state_dict())


def test_the_teacher_of_a_training_checkpoint_loads_without_its_heads(tmp_path: Path) -> None:
    source = create_backbone("vit_small", model_args=SMALL)
    state = {f"backbone.{key}": value for key, value in meta_layout(source).items()}
    state["dino_head.mlp.0.weight"] = torch.zeros(4, 32)
    torch.save({"teacher": state, "iteration": 12}, tmp_path / "teacher_checkpoint.pth")
    model = create_backbone("vit_small", model_args=SMALL)
    load_weights(model, tmp_path / "teacher_checkpoint.pth")
    assert tensors_sha256(model.state_dict()) == tensors_sha256(source.state_dict())


def test_weights_of_another_architecture_are_told_in_one_line_with_the_likely_one(tmp_path: Path) -> None:
    save_file(create_backbone("vit_tiny").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        load_weights(create_backbone("vit_small"), tmp_path / "w.safetensors")
    assert "width 192, depth 12 and patch size 16, likely vit_tiny_patch16_dinov3" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_files_rope_periods_are_returned_and_tell_another_number_of_heads(source: Any, tmp_path: Path) -> None:
    torch.save(meta_layout(source), tmp_path / "dinov3.pth")
    target: Any = fresh()
    own = target.rope.periods.clone()
    assert torch.equal(load_weights(target, tmp_path / "dinov3.pth"), own.bfloat16())
    assert torch.equal(target.rope.periods, own)  # a student that starts from a file keeps what its export will have
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    assert load_weights(target, tmp_path / "timm.safetensors") is None
    # The number of heads shows in no weight.
    with pytest.raises(UserError, match=r"dinov3.pth: 4 rope_embed.periods, the model has 2.*another number of heads"):
        load_weights(create_backbone("vit_small", model_args=SMALL | {"num_heads": 4}), tmp_path / "dinov3.pth")


def test_what_is_stated_of_weights_is_read_beside_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "vit", "pretrained_cfg": {"tag": "lvd1689m"}}')
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert stated_origin(place) == {"architecture": "vit", "tag": "lvd1689m"}
    assert stated_origin(tmp_path / "other.pth") == stated_origin(tmp_path / "absent") == {}
    (tmp_path / "config.json").write_text('{"model_type": "dinov3_vit"}')  # Hugging Face's
    assert stated_origin(tmp_path) == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not JSON \(.*Restore it"):
        stated_origin(tmp_path)
