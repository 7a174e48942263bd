"""k-NN of the student while it trains, on the run's own shards."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from distill.config import TrainConfig
from distill.evaluation.knn import knn_top1
from pipeline.batch import normalise
from pipeline.readers import CenterCropBatch, read_center_crops
from shards.format import load_manifest


def student_knn(student: nn.Module, config: TrainConfig, device: torch.device) -> float:
    """Return the k-NN top-1 accuracy in percent on `val_data_path`, with at most `knn_max_rows` training rows."""
    assert config.data.val_data_path is not None

    def crops(shards: str, limit: int | None) -> Iterator[CenterCropBatch]:
        rows = load_manifest(shards).num_rows
        return read_center_crops(
            shards,
            range(rows if limit is None else min(rows, limit)),
            size=config.data.global_crops_size,
            device=device,
            batch_size=config.optim.batch_size_per_gpu,
            **config.data.reading(),
        )

    bank = crops(config.data.data_path, config.runtime.knn_max_rows)
    return knn_top1(student, bank, crops(config.data.val_data_path, None), normalise=normalise, device=device)
