"""Frozen prototypes in the teacher's space: spherical k-means, fixed centring, calibrated temperatures.

Public DINOv3 weights hold no DINO or iBOT head, and a random head gives targets of almost maximal entropy.
So the prototypes are fitted once to the teacher's own tokens. The target is
`softmax((W norm(f - mu) - c) / tau_t)`: W the prototypes, mu the mean token, c the mean logit, which is what
DINO's EMA centring converges to when teacher and data are frozen.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from common.files import write_atomic
from distill.config import PrototypeConfig
from distill.teacher import TeacherTargets
from distill.weights import tensors_sha256

FORMAT_VERSION = 1
PROTOTYPES = "prototypes.safetensors"
_ASSIGN_CHUNK = 8192
# 2 tokens of 2 crops of 131,072 images are 32 a prototype, and 2 GB at width 1024.
_PATCHES_PER_CROP = 2
# A small set has fewer prototypes than were asked for: each is the mean of two tokens at least.
_TOKENS_PER_PROTOTYPE = 2
_log = logging.getLogger(__name__)


class PrototypeBank(nn.Module):
    """Prototypes of one kind of token, with all that turns a teacher token into a target.

    Buffers: `weight` [k, d], unit rows; `mean` [d]; `std` [d]; `centre` [k]; `calibrated_temp` [].
    """

    weight: Tensor
    mean: Tensor
    std: Tensor
    centre: Tensor
    calibrated_temp: Tensor

    def __init__(self, num_prototypes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_prototypes, dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("centre", torch.zeros(num_prototypes))
        self.register_buffer("calibrated_temp", torch.zeros(()))

    def logits(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Return cosines of tokens, the mean taken out, to the prototypes, in fp32."""
        return self.cosines(tokens.float() - self.mean)

    def cosines(self, centred: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Return cosines to the prototypes, in fp32, of tokens whose mean was taken out already."""
        return fp32_product(F.normalize(centred.float(), dim=-1), self.weight)

    def targets(self, tokens: Float[Tensor, "*b d"], temperature: Tensor) -> Float[Tensor, "*b k"]:
        """Return the teacher's target distribution at `temperature` (a 0-d tensor), in fp32."""
        return F.softmax((self.logits(tokens) - self.centre) / temperature, dim=-1)

    def standardise(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Return tokens with the teacher's mean and standard deviation taken out, in fp32."""
        return (tokens.float() - self.mean) / self.std


def fp32_product(x: Float[Tensor, "*b d"], weight: Float[Tensor, "k d"]) -> Float[Tensor, "*b k"]:
    """Return x @ weight.T in fp32; under autocast of operands in its dtype, of which only the sum is not rounded.

    A cosine rounded to bf16 is off by 0.002, which at a temperature of 0.04 is 0.05 in a log-probability.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return F.linear(x, weight)
    dtype = torch.get_autocast_dtype(device)
    product: Tensor = _Fp32Product.apply(x.flatten(0, -2).to(dtype), weight.to(dtype))
    return product.unflatten(0, x.shape[:-1])


class _Fp32Product(torch.autograd.Function):
    """torch has a product with an output of another dtype on CUDA alone, and without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cuda":
                return torch.mm(x, weight.T, out_dtype=torch.float32)
            return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        of_weight = gradient.T @ x if ctx.needs_input_grad[1] else None
        return gradient @ weight if ctx.needs_input_grad[0] else None, of_weight


@dataclass(frozen=True)
class Prototypes:
    """The two banks and the identity of what they were fitted to."""

    cls: PrototypeBank
    patch: PrototypeBank
    fingerprint: dict[str, Any]


def fit_prototypes(
    stream: Iterable[TeacherTargets],
    config: PrototypeConfig,
    *,
    seed: int,
    fingerprint: dict[str, Any],
    device: torch.device,
) -> Prototypes:
    """Fit both banks to streamed teacher tokens.

    Args:
        stream: teacher targets, in a fixed order; read until `config.prototype_rows` images were seen.
        config: greatest number of prototypes (0: mean and deviation alone), iterations, the calibration's target.
        seed: seed of the choice of patch tokens and of the initial prototypes.
        fingerprint: what the tokens were made from (teacher, crops, data); saved along.
        device: where k-means runs.

    Raises:
        UserError: there are no tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    cls, patches = _collect(stream, config, generator)
    banks = [
        _fit_bank(tokens.to(device), config, generator, name) for name, tokens in (("cls", cls), ("patch", patches))
    ]
    return Prototypes(banks[0], banks[1], fingerprint)


def save_prototypes(prototypes: Prototypes, path: Path) -> None:
    """Write both banks and the fingerprint as safetensors, whole or not at all."""
    tensors = {
        f"{name}.{key}": value.cpu().contiguous()
        for name in ("cls", "patch")
        for key, value in getattr(prototypes, name).state_dict().items()
    }
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "fingerprint": json.dumps(prototypes.fingerprint, sort_keys=True),
        "sha256": tensors_sha256(tensors),
    }
    write_atomic(path, save(tensors, metadata))


def load_prototypes(path: Path, *, expect: dict[str, Any] | None = None) -> Prototypes:
    """Read what `save_prototypes` wrote.

    Args:
        path: the safetensors file.
        expect: fingerprint that the prototypes must have been fitted to.

    Raises:
        UserError: the file is damaged, or was fitted to something else; the message names each difference.
    """
    advice = "Delete the file to fit the prototypes again."
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}). {advice}") from error
    if metadata.get("sha256") != tensors_sha256(tensors):
        raise UserError(f"{path}: its tensors do not have the sha256 that its header states. {advice}")
    fingerprint = json.loads(metadata["fingerprint"])
    if expect is not None:
        differing = sorted(k for k in set(expect) | set(fingerprint) if expect.get(k) != fingerprint.get(k))
        if differing:
            listed = "; ".join(f"{k}: file {fingerprint.get(k)!r}, run {expect.get(k)!r}" for k in differing)
            raise UserError(f"{path}: fitted to something else ({listed}). {advice}")
    banks = []
    for name in ("cls", "patch"):
        bank = PrototypeBank(*tensors[f"{name}.weight"].shape)
        bank.load_state_dict({key: tensors[f"{name}.{key}"] for key in bank.state_dict()})
        banks.append(bank)
    return Prototypes(banks[0], banks[1], fingerprint)


def fit_or_share_prototypes(
    stream: Callable[[], Iterable[TeacherTargets]],
    config: PrototypeConfig,
    *,
    own: Path,
    shared: Path | None,
    seed: int,
    fingerprint: dict[str, Any],
    device: torch.device,
) -> None:
    """Write a run's prototypes: those of `shared` where they are of this fingerprint, else newly fitted ones.

    Args:
        stream: gives the teacher's tokens, if they are needed.
        config: see `fit_prototypes`, like `seed`, `fingerprint` and `device`.
        own: the run's file.
        shared: a file beside a cache, written where there is none, so that later runs from the cache share it.
    """
    if shared and shared.is_file() and load_prototypes(shared).fingerprint == fingerprint:
        write_atomic(own, shared.read_bytes())
        return
    save_prototypes(fit_prototypes(stream(), config, seed=seed, fingerprint=fingerprint, device=device), own)
    if shared and not shared.is_file():
        write_atomic(shared, own.read_bytes())


def spherical_kmeans(
    unit: Float[Tensor, "n d"], k: int, *, iterations: int, generator: torch.Generator
) -> Float[Tensor, "k d"]:
    """Cluster unit vectors by cosine; clusters that lose all members restart at the worst-represented vectors.

    Args:
        unit: unit vectors, fp32.
        k: number of clusters, at most n.
        iterations: Lloyd iterations.
        generator: CPU generator that draws the initial centres.

    Returns:
        Unit centres, fp32.
    """
    first = torch.randperm(unit.shape[0], generator=generator)[:k].to(unit.device)
    centres = unit[first]
    for _ in range(iterations):
        best, nearest = _assign(unit, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit)
        counts = torch.bincount(nearest, minlength=k)
        dead = torch.nonzero(counts == 0).flatten()
        sums[dead] = unit[torch.argsort(best, stable=True)[: len(dead)]]
        centres = F.normalize(sums, dim=-1)
    return centres


def calibrated_temperature(logits: Float[Tensor, "n k"], top1_mass: float) -> float:
    """Return the temperature at which the median largest probability of softmax(logits / t) is `top1_mass`."""
    low, high = 1e-3, 10.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        mass = F.softmax(logits / middle, dim=-1).amax(-1).median().item()
        low, high = (middle, high) if mass > top1_mass else (low, middle)
    return (low * high) ** 0.5


def _collect(
    stream: Iterable[TeacherTargets], config: PrototypeConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Keep every cls token and `_PATCHES_PER_CROP` random patch tokens of each crop, fp32 on the CPU."""
    cls, patches, seen = [], [], 0
    with tqdm(desc="tokens for prototypes", unit="images", total=config.prototype_rows, disable=None) as bar:
        for targets in stream:
            tokens = targets.patches.flatten(0, 1)  # [b*g, n, d]
            draws = torch.rand(tokens.shape[:2], generator=generator)
            chosen = draws.topk(min(_PATCHES_PER_CROP, tokens.shape[1]), dim=1).indices.to(tokens.device)
            # Chosen where they are: of 196 tokens of a crop 194 need not travel.
            kept = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
            patches.append(kept.flatten(0, 1).float().cpu())
            cls.append(targets.cls.flatten(0, 1).float().cpu())
            seen += len(targets.cls)
            bar.update(len(targets.cls))
            if seen >= config.prototype_rows:
                break
    if not cls:
        raise UserError("prototypes: the teacher's token stream was empty. Check that the shards hold images.")
    return torch.cat(cls), torch.cat(patches)


def _fit_bank(tokens: Tensor, config: PrototypeConfig, generator: torch.Generator, name: str) -> PrototypeBank:
    k = min(config.num_prototypes, tokens.shape[0] // _TOKENS_PER_PROTOTYPE)
    if k < config.num_prototypes:
        asked = config.num_prototypes
        _log.warning("%d prototypes instead of %d: there are %d %s tokens to fit them to", k, asked, len(tokens), name)
    bank = PrototypeBank(k, tokens.shape[1]).to(tokens.device)
    bank.mean.copy_(tokens.mean(0))
    bank.std.copy_(tokens.std(0).clamp_min(1e-6))
    if not k:
        return bank  # no loss reads prototypes
    unit = F.normalize(tokens - bank.mean, dim=-1)
    bank.weight.copy_(
        spherical_kmeans(unit, k, iterations=config.prototype_iterations, generator=generator)
    )
    sums = torch.zeros(k, dtype=torch.float64, device=tokens.device)
    for chunk in tokens.split(_ASSIGN_CHUNK):
        sums += bank.logits(chunk).double().sum(0)
    bank.centre.copy_(sums / tokens.shape[0])
    sample = tokens[torch.randperm(tokens.shape[0], generator=generator)[:2048].to(tokens.device)]
    temperature = calibrated_temperature(bank.logits(sample) - bank.centre, config.target_top1_mass)
    bank.calibrated_temp.fill_(temperature)
    return bank


def _assign(unit: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [(chunk @ centres.T).max(dim=1) for chunk in unit.split(_ASSIGN_CHUNK)]
    return torch.cat([p.values for p in pairs]), torch.cat([p.indices for p in pairs])
