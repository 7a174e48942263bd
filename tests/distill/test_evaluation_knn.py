"""k-NN against a plain loop over pairs, and its use on a model during training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from distill.evaluation.measures import knn_accuracy, knn_predict, knn_top1, neighbours_kept
from distill.models import create_backbone
from pipeline.batch import normalise


def loop_over_pairs(
    bank: list[list[float]],
    labels: list[int],
    queries: list[list[float]],
    k: int,
    temperature: float,
) -> list[int]:
    def unit(vector: list[float]) -> list[float]:
        norm = math.sqrt(sum(x * x for x in vector))
        return [x / norm for x in vector]

    units = [unit(row) for row in bank]
    answers = []
    for query in queries:
        asked = unit(query)
        found = [
            (sum(a * b for a, b in zip(asked, row, strict=True)), labels[j])
            for j, row in enumerate(units)
        ]
        found.sort(reverse=True)
        votes: dict[int, float] = {}
        for similarity, label in found[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        answers.append(max(votes, key=lambda label: votes[label]))
    return answers


@pytest.mark.parametrize("block_elements", [2**26, 130])
def test_votes_equal_a_loop_over_pairs(block_elements: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(60, 5, generator=generator)
    labels = torch.randint(4, (60,), generator=generator)
    queries = torch.randn(35, 5, generator=generator)
    got = knn_predict(bank, labels, queries, k=[1, 5, 20], block_elements=block_elements)
    for k in (1, 5, 20):
        expected = loop_over_pairs(bank.tolist(), labels.tolist(), queries.tolist(), k, 0.07)
        assert got[k].tolist() == expected


def test_the_temperature_weighs_near_neighbours() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.4359], [0.9, -0.4359]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[2.0, 0.0]])
    # Similarities 1, 0.9, 0.9: two of class 1 outvote one of class 0 only where exp(-0.1 / T) > 1 / 2.
    assert knn_predict(bank, labels, query, k=[3], temperature=0.07)[3].item() == 0
    assert knn_predict(bank, labels, query, k=[3], temperature=1.0)[3].item() == 1


def test_too_many_neighbours_and_missing_classes_are_named() -> None:
    bank, labels = torch.randn(10, 3), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(UserError, match=r"k = \[5, 20\] with 10 possible neighbours.*--knn_k"):
        knn_predict(bank, labels, bank, k=[5, 20])
    with pytest.raises(UserError, match="10 queries, 10 of them and 0 of 10 bank images without a class"):
        knn_accuracy(bank, labels, bank, labels - 1, k=[1])


@dataclass(frozen=True)
class Crops:
    rows: npt.NDArray[np.int64]
    crops: Tensor
    labels: Tensor


def coloured(num_rows: int, seed: int, unlabelled: int = 0) -> list[Crops]:
    """Noisy images whose mean colour is their class, in two batches, the second partial."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_rows,), generator=generator)
    pixels = torch.randint(0, 60, (num_rows, 16, 16, 3), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(num_rows), :, :, labels] += 150
    labels[:unlabelled] = -1
    halves = zip(torch.arange(num_rows).split(20), pixels.split(20), labels.split(20), strict=True)
    return [Crops(rows.numpy(), crops, classes) for rows, crops, classes in halves]


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}
    return create_backbone("vit_small", patch_size=8, model_args=args)


def test_a_model_in_training_is_scored_and_put_back() -> None:
    model = small_vit().train()
    options: dict[str, Any] = {"normalise": normalise, "device": "cpu"}
    # Mean colour survives a random ViT.
    assert knn_top1(model, coloured(64, 1), coloured(30, 2), k=5, **options) == 100
    # k is cut to the 64 rows of the bank, which then all vote.
    bank, queries = coloured(64, 1), coloured(30, 2)
    assert knn_top1(model, bank, queries, k=1000, **options) == knn_top1(model, bank, queries, k=64, **options)
    assert model.training
    # Nothing made without gradients may have stayed in the model.
    model(normalise(coloured(4, 3)[0].crops)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("block_elements", [2**26, 130])
def test_neighbours_kept_equals_a_loop_over_sets(block_elements: int) -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = [torch.randn(rows, 6, generator=generator) for rows in (40, 11)]
    student = [rows @ torch.randn(6, 4, generator=generator) for rows in teacher]
    kept = 0
    for ours, theirs in zip(student[1], teacher[1], strict=True):
        sets = [
            set(torch.cosine_similarity(query[None], bank).topk(5).indices.tolist())
            for query, bank in ((ours, student[0]), (theirs, teacher[0]))
        ]
        kept += len(sets[0] & sets[1])
    found = neighbours_kept(student[0], teacher[0], student[1], teacher[1], k=5, block_elements=block_elements)
    assert found == 100 * kept / 55
    assert neighbours_kept(teacher[0], 3 * teacher[0], teacher[1], teacher[1], k=5) == 100


def test_unlabelled_rows_neither_vote_nor_count() -> None:
    model = small_vit()
    bank, queries = coloured(64, 1, unlabelled=20), coloured(40, 2, unlabelled=20)
    assert knn_top1(model, bank, queries, k=5, normalise=normalise, device="cpu") == 100
    with pytest.raises(UserError, match="0 of 64 bank images and 20 of 40 val images have a class"):
        knn_top1(model, coloured(64, 1, unlabelled=64), queries, normalise=normalise, device="cpu")
