"""Features, k-NN and L-BFGS on a GPU against the CPU."""

from __future__ import annotations

import pytest
import torch

from distill.evaluation.features import FeatureModel, extract_patch_tokens
from distill.evaluation.logistic import fit_logistic
from distill.evaluation.measures import knn_predict
from distill.models import _attend, create_backbone
from pipeline.batch import normalise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# bf16 rounds at 2^-9; each of two blocks and the norm adds a few such roundings.
BFLOAT16_ERROR = 10 * 2**-9
# Each stops when its objective is surely within this share of the optimum.
TOLERANCE = 1e-3


def clusters(num_rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, dim, generator=generator)
    labels = torch.randint(6, (num_rows,), generator=generator)
    return centres[labels] + torch.randn(num_rows, dim, generator=generator), labels


def test_logistic_regression_reaches_the_loss_of_the_cpu() -> None:
    features, labels = clusters(500, 12)
    strengths = [1e-3, 1e-1]
    there, here = (
        fit_logistic(
            features.to(device), labels.to(device), num_classes=6, regularisations=strengths, tolerance=TOLERANCE
        )
        for device in ("cuda", "cpu")
    )
    assert there.converged.all()
    torch.testing.assert_close(there.loss.cpu(), here.loss, rtol=TOLERANCE, atol=0)


def test_neighbours_vote_as_on_the_cpu() -> None:
    bank, labels = clusters(2000, 16)
    queries = bank + 0.1
    there = knn_predict(bank.cuda(), labels.cuda(), queries.cuda(), k=[1, 20])
    here = knn_predict(bank, labels, queries, k=[1, 20])
    for k in (1, 20):
        # Sums of votes that tie to the last digit may fall either way: one query in two hundred.
        assert (there[k].cpu() != here[k]).double().mean() <= 0.005


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, BFLOAT16_ERROR)])
def test_tokens_agree_with_the_cpu(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 1.0}
    model = create_backbone("vit_small", patch_size=8, model_args=args)
    crops = torch.randint(0, 256, (4, 48, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    here = extract_patch_tokens(FeatureModel(model, normalise), crops)
    there = extract_patch_tokens(FeatureModel(model.cuda(), normalise), crops.cuda(), dtype=dtype)
    assert (there - here).norm() / here.norm() < bound


def test_attention_over_packed_crops_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 201), (16, 41)]
    qkv = torch.randn(3, sum(b * t for b, t in shapes), 6, 64, generator=generator).bfloat16().float()
    weights = torch.randn(qkv[0].shape, generator=generator)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        x = qkv.to(device, dtype).requires_grad_()
        y = _attend(*x, shapes)
        (y.float() * weights.to(device)).sum().backward()
        results.append((y.detach().float().cpu(), x.grad.float().cpu()))
    for there, here in zip(*results, strict=True):
        assert (there - here).norm() <= BFLOAT16_ERROR * here.norm()
