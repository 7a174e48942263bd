"""What a codec costs in accuracy, measured on given tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cache_tools.codec import Calibration, decode_int8, encode_int8
from cache_tools.format import CodecName

# The log-Gram matrix is the losses' own: Gram of normalised tokens plus the identity.
LOG_GRAM_EPS = 1.0


@dataclass(frozen=True)
class CodecQuality:
    """Errors of decoded tokens.

    Attributes:
        cosine: mean cosine of decoded and original tokens.
        standardised_cosine_p1: first percentile of the cosine after centring and scaling each channel: the harder
            test, since a common mean hides errors from the plain cosine.
        gram: relative Frobenius error of the Gram matrix of normalised tokens.
        log_gram: the same of log(Gram + I), which the SPD loss compares.
    """

    cosine: float
    standardised_cosine_p1: float
    gram: float
    log_gram: float

    def to_json(self) -> dict[str, float]:
        """Return a dictionary with six significant digits."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}


def measure_codec(patches: Float[Tensor, "b n d"], codec: CodecName, calibration: Calibration | None) -> CodecQuality:
    """Encode and decode tokens, and compare; `patches` are crops of n tokens in fp32 on the CPU."""
    if codec == "fp16":
        decoded = patches.half().float()
    else:
        assert calibration is not None
        mean, std = calibration.tensors()
        decoded = decode_int8(*encode_int8(patches, mean, std), mean, std)
    return compare_tokens(patches, decoded)


def compare_tokens(patches: Float[Tensor, "b n d"], decoded: Float[Tensor, "b n d"]) -> CodecQuality:
    """Return the errors of `decoded` against `patches`, computed in fp64."""
    x, y = patches.double(), decoded.double()
    mean = x.mean((0, 1))
    std = x.std((0, 1), correction=0).clamp(min=1e-12)
    cosine = torch.nn.functional.cosine_similarity
    standardised = cosine((x - mean) / std, (y - mean) / std, dim=-1).flatten()
    return CodecQuality(
        cosine=float(cosine(x, y, dim=-1).mean()),
        standardised_cosine_p1=float(standardised.quantile(0.01)),
        gram=_relative(_gram(x), _gram(y)),
        log_gram=_relative(_log(_gram(x)), _log(_gram(y))),
    )


def _gram(tokens: Tensor) -> Tensor:
    normal = torch.nn.functional.normalize(tokens, dim=-1)
    return normal @ normal.mT


def _log(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    logs = (values.clamp(min=0) + LOG_GRAM_EPS).log()
    return (vectors * logs.unsqueeze(-2)) @ vectors.mT


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).norm() / expected.norm().clamp(min=1e-300))
