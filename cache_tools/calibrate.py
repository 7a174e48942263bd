"""Which codec the user's own features bear: spectrum and errors of each, measured before anything is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cache_tools.build import Teacher
from cache_tools.codec import ChannelMoments, CodecQuality, measure_codec
from cache_tools.layout import CODECS, CacheSpec, CodecName
from common.errors import UserError
from pipeline.batch import CropBatch

# int8 is recommended where it leaves both of these; on spectra like a ViT's it leaves about 0.6 % and 0.99995.
MOST_LOG_GRAM_ERROR = 0.015
LEAST_STANDARDISED_COSINE = 0.9995
TESTED_CROPS = 64


@dataclass(frozen=True)
class CodecReport:
    """One codec on the user's features."""

    codec: CodecName
    bytes_per_image: float
    quality: CodecQuality


@dataclass(frozen=True)
class FeatureReport:
    """What the features look like and what each codec does to them.

    Attributes:
        rows: images read.
        tested_crops: crops, not among those of the calibration, on which the codecs were measured.
        effective_rank: exp of the entropy of the covariance's spectrum of patch tokens.
        largest_channel_share: share of the variance in the channel that has most.
        codecs: a report for each.
        recommended: int8 where its errors are small enough, else fp16.
    """

    rows: int
    tested_crops: int
    effective_rank: float
    largest_channel_share: float
    codecs: tuple[CodecReport, ...]
    recommended: CodecName

    def table(self) -> str:
        """Return the report as text."""
        lines = [
            f"{self.rows} images read; codecs measured on {self.tested_crops} crops that did not calibrate them",
            f"patch tokens: effective rank {self.effective_rank:.1f}, "
            f"largest channel {self.largest_channel_share:.1%} of the variance",
            f"{'codec':8}{'kB/image':>10}{'cosine':>11}{'std. p1':>11}{'Gram':>10}{'log-Gram':>10}",
        ]
        for report in self.codecs:
            q = report.quality
            lines.append(
                f"{report.codec:8}{report.bytes_per_image / 1e3:10.1f}{q.cosine:11.6f}"
                f"{q.standardised_cosine_p1:11.6f}{q.gram:10.2%}{q.log_gram:10.2%}"
            )
        lines.append(f"recommended: --codec {self.recommended}")
        return "\n".join(lines)


@torch.no_grad()
def measure_features(
    teacher: Teacher, batches: Iterable[CropBatch], *, num_crops: int, device: torch.device
) -> FeatureReport:
    """Run the teacher over crops and measure; the last batches test what the first calibrate.

    Raises:
        UserError: there are fewer than two batches.
    """
    moments, count = ChannelMoments(), 0
    held: Tensor | None = None
    covariance: Tensor | None = None
    rows = 0
    for batch in batches:
        if held is not None:
            moments.add(held)
            tokens = held.double().flatten(0, -2)
            part = tokens.mT @ tokens
            covariance = part if covariance is None else covariance + part
            count += len(tokens)
        held = teacher(batch.crops.to(device), num_crops=num_crops).patches
        rows += len(batch.rows)
    if held is None or covariance is None:
        raise UserError(f"calibrate: {rows} images make less than two batches. Lower --batch_size or raise --rows.")
    calibration = moments.calibration()
    mean = torch.tensor(calibration.mean, device=covariance.device).double()
    covariance = covariance / count - torch.outer(mean, mean)
    spectrum = torch.linalg.eigvalsh(covariance.cpu()).clamp(min=0)
    share = spectrum / spectrum.sum().clamp(min=1e-300)
    tested = held.flatten(0, 1)[:TESTED_CROPS].float().cpu()
    reports = tuple(
        CodecReport(
            codec,
            CacheSpec((1024,), num_crops, tested.shape[1], tested.shape[2], codec).view_set_bytes() / 1024,
            measure_codec(tested, codec, calibration),
        )
        for codec in CODECS
    )
    int8 = reports[0].quality
    good = int8.log_gram <= MOST_LOG_GRAM_ERROR and int8.standardised_cosine_p1 >= LEAST_STANDARDISED_COSINE
    variance = covariance.diagonal()
    return FeatureReport(
        rows=rows,
        tested_crops=len(tested),
        effective_rank=float(torch.special.entr(share).sum().exp()),
        largest_channel_share=float(variance.max() / variance.sum()),
        codecs=reports,
        recommended="int8" if good else "fp16",
    )
