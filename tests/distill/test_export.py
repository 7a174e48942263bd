"""An exported student loads by timm's name, equal to the bit, and states where its licence comes from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from common.errors import UserError
from distill import export
from distill.export import (
    Card,
    ExportArgs,
    export_model,
    export_run,
    render_card,
    require_onnx,
    teacher_licence,
    verify_export,
)
from distill.models import create_vit

IMG_SIZE = 32


def small_vit(seed: int = 0, **args: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5, **args}
    model = create_vit("vit_small", patch_size=8, model_args=sizes)
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
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"onnxscript are not installed.*pip install onnxscript"):
        require_onnx()
    with pytest.raises(UserError, match="or export without --onnx"):
        export_run(ExportArgs(run=str(tmp_path), onnx=True))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are optional and not all installed",
)
@pytest.mark.filterwarnings("default")  # torch's exporter warns of its own deprecations
def test_onnx_gives_the_tokens_of_torch(tmp_path: Path) -> None:
    import onnxruntime

    model = small_vit()
    folder = export_model(model, tmp_path / "out", card=a_card(), onnx=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, IMG_SIZE, IMG_SIZE, generator=torch.Generator().manual_seed(3))
    cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
    with torch.inference_mode():
        expected = model.forward_features(images)
    # Another runtime's kernels: fp32 sums of 32 to 128 terms in another order, over two blocks.
    torch.testing.assert_close(torch.from_numpy(cls), expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(patches), expected[:, 5:], atol=1e-4, rtol=1e-4)


def test_the_card_states_the_teachers_licence(tmp_path: Path) -> None:
    assert teacher_licence("vit_large_patch16_dinov3.lvd1689m") == "dinov3-license"
    assert teacher_licence("vit_small_patch14_dinov2.lvd142m") == "apache-2.0"
    assert teacher_licence("hf-hub:someone/model") == "unknown"
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"license": "mit"}}')
    assert teacher_licence(f"local-dir:{tmp_path}") == "mit"
    assert teacher_licence(f"local-dir:{tmp_path / 'nowhere'}") == "unknown"
    meta = render_card(a_card(), 21_586_944)
    assert "license: other\nlicense_name: dinov3-license" in meta
    assert "Pass these weights on only under that agreement" in meta
    assert "21.6 M parameters" in meta
    assert "license: apache-2.0" in render_card(a_card(licence="apache-2.0"), 1)
    unknown = render_card(a_card(licence="unknown"), 1)
    assert "license" not in unknown.split("---")[1]
    assert "look it up before you share these weights" in unknown


def test_the_card_shows_measured_accuracies_only() -> None:
    assert "Not measured" in render_card(a_card(), 1)
    probe = {
        "protocol_sha256": "abcdef0123456789",
        "protocol": {"knn_k": [10]},
        "models": [{"name": "student", "detail": "step 7, EMA", "knn": {"10": 61.5}, "best": {"top1": 72.25}}],
    }
    card = render_card(a_card(probe=probe), 1)
    assert "| student | 61.50 | 72.25 |" in card
    assert "protocol `abcdef012345`" in card
    later = render_card(a_card(probe=probe, step=8), 1)
    assert "61.50" not in later
    assert "last probed at step 7, EMA" in later


def test_the_command_prints_the_error_alone_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(tmp_path), "--no-ema"])
    assert export.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'config.json'}: no such file")
    assert "Traceback" not in said
