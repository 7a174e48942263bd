"""Fitted prototypes: k-means, centring, calibration, and the file they live in."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from common.errors import UserError
from distill.config import PrototypeConfig
from distill.heads import LinearHead, MlpHead
from distill.prototypes import (
    PrototypeBank,
    Prototypes,
    calibrated_temperature,
    fit_prototypes,
    load_prototypes,
    save_prototypes,
    spherical_kmeans,
)
from distill.teacher import TeacherTargets

CPU = torch.device("cpu")
CONFIG = PrototypeConfig(num_prototypes=8, prototype_rows=256, prototype_iterations=10)


def clustered_tokens(images: int, clusters: int = 8, dim: int = 24) -> Iterator[TeacherTargets]:
    """Stream tokens around `clusters` directions, with a large common mean as ViT features have."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(dim, clusters, generator=generator)).Q.T * 3
    for _ in range(images // 32):
        labels = torch.randint(0, clusters, (32, 2, 10), generator=generator)
        noise = 0.1 * torch.randn(32, 2, 10, dim, generator=generator)
        tokens = centres[labels] + noise + 10.0
        yield TeacherTargets(cls=tokens[:, :, 0], patches=tokens[:, :, 1:])


def test_prototypes_of_clustered_tokens_are_the_clusters_and_targets_are_sharp() -> None:
    prototypes = fit_prototypes(clustered_tokens(256), CONFIG, seed=0, fingerprint={}, device=CPU)
    targets = next(clustered_tokens(32))
    for bank, tokens in ((prototypes.cls, targets.cls), (prototypes.patch, targets.patches)):
        probs = bank.targets(tokens, torch.tensor(0.04))
        assert probs.amax(-1).median() > 0.9
        assert_close(bank.weight.norm(dim=-1), torch.ones(8))
        used = probs.flatten(0, -2).argmax(-1).bincount(minlength=8)
        assert (used > 0).sum() >= 6


def test_the_centre_is_the_mean_logit_and_the_mean_is_the_mean_token() -> None:
    prototypes = fit_prototypes(clustered_tokens(256), CONFIG, seed=0, fingerprint={}, device=CPU)
    cls = torch.cat([t.cls.flatten(0, 1) for t in clustered_tokens(256)])
    assert_close(prototypes.cls.mean, cls.mean(0), rtol=1e-5, atol=1e-5)
    assert_close(prototypes.cls.centre, prototypes.cls.logits(cls).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_under_autocast_cosines_round_their_operands_alone_and_their_gradients_are_those_of_autocast(
    head: str, compiled: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    dim, mean = 128, 20.0
    bank = PrototypeBank(64, dim)
    bank.weight.copy_(F.normalize(torch.randn(64, dim, generator=generator), dim=-1))
    bank.mean.fill_(mean)
    if head == "linear":
        model = LinearHead(dim, bank)
        torch.nn.init.eye_(model.projection.weight)
    else:
        model = MlpHead(dim, bank, 8, dim)
        model.mlp, model.last_layer = torch.nn.Identity(), torch.nn.Linear(dim, 64, bias=False)
        model.last_layer.weight.data.copy_(bank.weight)
    # Tokens near their prototypes: cosines near 1, which bf16 would hold to 2^-9.
    tokens = (bank.weight + 0.02 * torch.randn(64, dim, generator=generator)).bfloat16().float().requires_grad_()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    torch._dynamo.reset()
    unit, weight = F.normalize(tokens, dim=-1), bank.weight
    exact = unit.double() @ weight.double().T
    rounded = unit.bfloat16().double() @ weight.bfloat16().double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = call(tokens, bank)
    assert logits.dtype == torch.float32
    assert (logits - rounded).abs().max() < 8 * 2**-24  # an fp32 sum of 128 products, below 1
    weights = torch.randn(64, 64, generator=generator)
    found, expected = (torch.autograd.grad((x * weights).sum(), tokens)[0].double() for x in (logits, exact))
    assert (found - expected).norm() < 2**-6 * expected.norm()


def test_the_calibrated_temperature_gives_the_asked_median_top1_mass() -> None:
    prototypes = fit_prototypes(clustered_tokens(256), CONFIG, seed=0, fingerprint={}, device=CPU)
    cls = torch.cat([t.cls.flatten(0, 1) for t in clustered_tokens(256)])
    mass = prototypes.cls.targets(cls, prototypes.cls.calibrated_temp).amax(-1).median().item()
    assert mass == pytest.approx(0.6, abs=0.02)
    logits = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    temperature = calibrated_temperature(logits, 0.3)
    assert F.softmax(logits / temperature, -1).amax(-1).median().item() == pytest.approx(0.3, abs=1e-4)


def test_clusters_without_members_are_seeded_anew() -> None:
    # Three distinct directions and many copies: random starts coincide, so some centres begin without members.
    unit = F.normalize(torch.eye(3).repeat_interleave(torch.tensor([60, 2, 2]), 0), dim=-1)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centres = spherical_kmeans(unit, 3, iterations=6, generator=generator)
        assert (unit @ centres.T).amax(1).min() > 0.999


def test_a_terminal_sees_how_far_the_reading_of_tokens_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    fit_prototypes(clustered_tokens(256), CONFIG, seed=0, fingerprint={}, device=CPU)
    assert "tokens for prototypes" in terminal.getvalue() and "256/256" in terminal.getvalue()


def test_the_same_seed_gives_the_same_prototypes_and_another_seed_others() -> None:
    fits = [
        fit_prototypes(clustered_tokens(64), CONFIG, seed=s, fingerprint={}, device=CPU).patch.weight
        for s in (3, 3, 4)
    ]
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])


def test_prototypes_are_at_most_half_the_tokens() -> None:
    config = dataclasses.replace(CONFIG, num_prototypes=100)
    fitted = fit_prototypes(clustered_tokens(32), config, seed=0, fingerprint={}, device=CPU)
    assert (len(fitted.cls.weight), len(fitted.patch.weight)) == (32, 64)  # of 64 cls tokens, and 128 patch tokens


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(UserError, match="stream was empty"):
        fit_prototypes([], CONFIG, seed=0, fingerprint={}, device=CPU)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Prototypes, Path]:
    fitted = fit_prototypes(clustered_tokens(64), CONFIG, seed=0, fingerprint={"teacher": "a", "k": 8}, device=CPU)
    save_prototypes(fitted, tmp_path / "prototypes.safetensors")
    return fitted, tmp_path / "prototypes.safetensors"


def test_saved_prototypes_load_to_the_bit(saved: tuple[Prototypes, Path]) -> None:
    fitted, path = saved
    loaded = load_prototypes(path, expect={"teacher": "a", "k": 8})
    for name in ("cls", "patch"):
        before, after = getattr(fitted, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert [p.name for p in path.parent.iterdir()] == ["prototypes.safetensors"]


def test_prototypes_of_another_teacher_are_refused_field_by_field(saved: tuple[Prototypes, Path]) -> None:
    with pytest.raises(UserError, match="teacher: file 'a', run 'b'"):
        load_prototypes(saved[1], expect={"teacher": "b", "k": 8})


def test_a_flipped_byte_in_the_prototypes_is_found(saved: tuple[Prototypes, Path]) -> None:
    path = saved[1]
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="do not have the sha256"):
        load_prototypes(path)
    path.write_bytes(content[:20])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_prototypes(path)
