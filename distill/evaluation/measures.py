"""Measures of frozen features that train no classifier: weighted k-NN, effective rank, agreement with the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from common.errors import UserError
from distill.config import TrainConfig
from distill.evaluation.features import FeatureModel, Normalise, extract_features, forward_features, in_eval_mode
from distill.teacher import FrozenTeacher, load_teacher, load_teacher_of
from pipeline.batch import CropBatch, normalise
from pipeline.readers import read_center_crops
from shards.manifest import load_index, load_manifest

TEMPERATURE = 0.07
# Similarities held at once: 2^26 fp32 numbers are 256 MB.
BLOCK_ELEMENTS = 2**26
AGREEMENT_ROWS = 4096  # of train, and of val, that are compared with the teacher's during training, at most
PATCH_IMAGES = 64  # of train, and of val, whose patch tokens are compared with the teacher's


def knn_votes(
    bank: Float[Tensor, "n d"],
    bank_labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "q d"],
    *,
    k: Sequence[int],
    temperature: float = TEMPERATURE,
    block_elements: int = BLOCK_ELEMENTS,
) -> Iterator[dict[int, Float[Tensor, "r c"]]]:
    """Votes of each query's k nearest bank rows in cosine similarity, for consecutive blocks of r queries.

    A neighbour of similarity s votes exp(s / temperature) for its class (Wu et al. 2018, "Unsupervised
    feature learning via non-parametric instance discrimination", as used by DINO, DINOv2 and DINOv3).

    Args:
        bank: features of the labelled images, any float dtype; normalised here.
        bank_labels: their classes, 0 or above.
        queries: features to classify, on the device of `bank`.
        k: numbers of neighbours; one search serves all of them.
        temperature: of the vote.
        block_elements: similarities computed at once; bounds the memory, not the result.

    Raises:
        UserError: a k is below 1 or above the number of possible neighbours.
    """
    if not k or min(k) < 1 or max(k) > len(bank):
        raise UserError(
            f"k-NN: k = {list(k)} with {len(bank)} possible neighbours. Each k must be from 1 to the number "
            "of labelled images. Choose a smaller k (--knn_k) or give more training images."
        )
    bank = F.normalize(bank.float(), dim=1)
    num_classes = int(bank_labels.max()) + 1
    rows_at_once = max(1, block_elements // max(len(bank), num_classes))
    for block in queries.split(rows_at_once):
        similarity = F.normalize(block.float(), dim=1) @ bank.T  # [r, n]
        nearest, index = similarity.topk(max(k), dim=1)
        weights = ((nearest - 1) / temperature).exp()  # shifted by the greatest similarity: only ratios count
        labels = bank_labels[index]
        yield {
            each: weights.new_zeros(len(block), num_classes).scatter_add_(1, labels[:, :each], weights[:, :each])
            for each in k
        }


def knn_predict(
    bank: Float[Tensor, "n d"],
    bank_labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "q d"],
    *,
    k: Sequence[int],
    temperature: float = TEMPERATURE,
    block_elements: int = BLOCK_ELEMENTS,
) -> dict[int, Int64[Tensor, " q"]]:
    """For each k the class of each query with most votes, int64 [q], on the device of `bank`; see `knn_votes`."""
    predictions: dict[int, list[Tensor]] = {each: [bank_labels.new_empty(0)] for each in k}
    blocks = knn_votes(bank, bank_labels, queries, k=k, temperature=temperature, block_elements=block_elements)
    for votes in blocks:
        for each, tally in votes.items():
            predictions[each].append(tally.argmax(dim=1))
    return {each: torch.cat(parts) for each, parts in predictions.items()}


def knn_accuracy(
    bank: Float[Tensor, "n d"],
    bank_labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "q d"],
    query_labels: Int64[Tensor, " q"],
    *,
    k: Sequence[int],
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k; see `knn_predict`.

    Raises:
        UserError: no query, or a label is unknown (negative).
    """
    if len(queries) == 0 or min(int(bank_labels.min()), int(query_labels.min())) < 0:
        raise UserError(
            f"k-NN: {len(queries)} queries, {int((query_labels < 0).sum())} of them and "
            f"{int((bank_labels < 0).sum())} of {len(bank_labels)} bank images without a class. "
            "Accuracy needs at least one query and a class for every image. Leave unlabelled rows out."
        )
    predictions = knn_predict(bank, bank_labels, queries, k=k)
    return {each: 100 * (predicted == query_labels).double().mean().item() for each, predicted in predictions.items()}


def knn_top1(
    model: nn.Module,
    bank: Iterable[CropBatch],
    queries: Iterable[CropBatch],
    *,
    normalise: Normalise,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    k: int = 20,
) -> float:
    """Top-1 accuracy in percent of a model's cls token, cheap enough to run every few epochs of training.

    Args:
        model: a timm ViT; its training mode is restored.
        bank: labelled centre crops that vote, as `pipeline.readers.read_center_crops` yields them.
        queries: labelled centre crops to classify, of other rows or other shards.
        normalise: uint8 NHWC to float NCHW.
        device: where the model is.
        dtype: compute dtype.
        k: number of neighbours; the bank's size where that is smaller.

    Rows without a class (label -1) neither vote nor count.

    Raises:
        UserError: no labelled row among the bank or the queries.
    """
    known = extract_features(model, bank, normalise=normalise, device=device, dtype=dtype)
    asked = extract_features(model, queries, normalise=normalise, device=device, dtype=dtype)
    voters, asking = known.labels >= 0, asked.labels >= 0
    if not (voters.any() and asking.any()):
        raise UserError(
            f"k-NN during training: {int(voters.sum())} of {len(voters)} bank images and {int(asking.sum())} of "
            f"{len(asking)} val images have a class. Pack labelled images, or set --knn_every_epochs 0."
        )
    k = min(k, int(voters.sum()))
    accuracy = knn_accuracy(
        known.cls[voters, -1].to(device),
        known.labels[voters].to(device),
        asked.cls[asking, -1].to(device),
        asked.labels[asking].to(device),
        k=[k],
    )
    return accuracy[k]


def has_labels(config: TrainConfig) -> bool:
    """Tell whether training and validation data both have labels, so that accuracies can be measured."""
    folders = (config.data.data_path, config.data.val_data_path)
    return all(folder is not None and bool((load_index(folder).label >= 0).any()) for folder in folders)


def check_validation(config: TrainConfig, device: torch.device, cached_teacher: Mapping[str, Any] | None) -> None:
    """Open the validation data, so that it fails before the training and not at the first judgement.

    Args:
        config: of the run.
        device: where the student will be judged.
        cached_teacher: fingerprint of the teacher in the cache; None where it is live.

    Raises:
        UserError: it is no folder of shards, its classes are not those of the training data, or there are no labels,
            nor the cache's teacher to compare with.
    """
    path = config.data.val_data_path
    if path is None:
        return
    classes, known = load_manifest(path).class_names, load_manifest(config.data.data_path).class_names
    if not has_labels(config):
        if cached_teacher is not None and config.runtime.knn_every_epochs > 0:
            _check_teacher(config, device, cached_teacher)
        return
    if classes != known:
        pairs = enumerate(zip(classes, known, strict=False))
        what = next((f"number {i} is {a!r} there, {b!r} here" for i, (a, b) in pairs if a != b), "one list is longer")
        raise UserError(
            f"--val_data_path {path}: its classes are not those of {config.data.data_path} ({what}). Pack it again "
            f"with --classes {Path(config.data.data_path) / 'classes.json'}."
        )


def _check_teacher(config: TrainConfig, device: torch.device, cached: Mapping[str, Any]) -> None:
    try:
        load_teacher_of(config.teacher, cached, device=device)
    except UserError as error:
        raise UserError(
            f"--val_data_path {config.data.val_data_path}: without labels the student is judged by its teacher, and "
            f"{config.teacher.teacher_arch} cannot be that: {error} Give the cache's teacher by --teacher_arch and "
            "--teacher_pretrained_weights, labelled data, or --knn_every_epochs 0."
        ) from error


def judge_student(student: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Judge a student on `val_data_path`, with at most `knn_max_rows` training rows.

    Returns:
        `knn_top1` in percent where there are labels; else `rankme` of the val cls tokens, `cosine` of cls and
        `patch_cosine` of patch tokens to the teacher's by a linear map fitted on train, and `neighbours`, the share in
        percent of the teacher's 10 nearest train images that the student keeps.
    """
    assert config.data.val_data_path is not None

    def crops(shards: str, limit: int | None) -> Iterator[CropBatch]:
        rows = load_manifest(shards).num_rows
        return read_center_crops(
            shards,
            range(rows if limit is None else min(rows, limit)),
            size=config.data.global_crops_size,
            device=device,
            batch_size=config.optim.batch_size_per_gpu,
            **config.data.reading(),
        )

    if has_labels(config):
        bank = crops(config.data.data_path, config.runtime.knn_max_rows)
        top1 = knn_top1(student, bank, crops(config.data.val_data_path, None), normalise=normalise, device=device)
        return {"knn_top1": top1}
    teacher = load_teacher(config.teacher, img_size=config.data.global_crops_size, device=device)
    entry, limit = FeatureModel(student, normalise), min(AGREEMENT_ROWS, config.runtime.knn_max_rows)
    train, val = (
        _tokens_of_both(entry, teacher, crops(path, limit))
        for path in (config.data.data_path, config.data.val_data_path)
    )
    return {
        "rankme": rankme(val[0]),
        "cosine": cosine_to_teacher(*train[:2], *val[:2]),
        "neighbours": neighbours_kept(*train[:2], *val[:2], k=min(10, len(train[0]))),
        "patch_cosine": cosine_to_teacher(*train[2:], *val[2:]),
    }


def _tokens_of_both(
    student: FeatureModel, teacher: FrozenTeacher, crops: Iterable[CropBatch]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cls tokens of student and teacher, and their patch tokens of the first images on one grid; fp32."""
    cls: list[tuple[Tensor, Tensor]] = []
    patches: list[tuple[Tensor, Tensor]] = []
    with in_eval_mode(student.model):
        for batch in crops:
            tokens, prefix = forward_features(student, batch.crops, dtype=torch.float32, layers=1)[-1]
            targets = teacher(batch.crops, 1).on_grid(tokens.shape[1])
            cls.append((prefix[:, 0].cpu(), targets.cls[:, 0].float().cpu()))
            if sum(len(seen) for seen, _ in patches) < PATCH_IMAGES * tokens.shape[1]:
                patches.append((tokens.flatten(0, 1).cpu(), targets.patches[:, 0].float().flatten(0, 1).cpu()))
    # Cloned outside inference mode, as those of `extract_patch_tokens`.
    both = [torch.cat(parts).clone() for pairs in (cls, patches) for parts in zip(*pairs, strict=True)]
    return both[0], both[1], both[2], both[3]


def neighbours_kept(
    student_bank: Float[Tensor, "n d"],
    teacher_bank: Float[Tensor, "n e"],
    student_queries: Float[Tensor, "q d"],
    teacher_queries: Float[Tensor, "q e"],
    *,
    k: int,
    block_elements: int = BLOCK_ELEMENTS,
) -> float:
    """Share in percent of each query's k nearest bank rows by the teacher that are among its k nearest by the student.

    Nearest by cosine similarity. Rows of bank and queries are those of the same images for both; of random features
    about 100 * k / n is kept.
    """
    kept = 0
    rows_at_once = max(1, block_elements // len(student_bank))
    banks = [F.normalize(bank.float(), dim=1) for bank in (student_bank, teacher_bank)]
    for queries in zip(student_queries.split(rows_at_once), teacher_queries.split(rows_at_once), strict=True):
        near = [
            (F.normalize(block.float(), dim=1) @ bank.T).topk(k, dim=1).indices
            for block, bank in zip(queries, banks, strict=True)
        ]
        kept += int((near[0][:, :, None] == near[1][:, None, :]).sum())
    return 100 * kept / (k * len(student_queries))


RANKME_MAX_ROWS = 25_600


def rankme(features: Float[Tensor, "n d"], *, max_rows: int = RANKME_MAX_ROWS) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023, RankMe).

    Args:
        features: [n, d], uncentred, as the paper has it; fp64 inside.
        max_rows: evenly spaced rows that are used of a longer matrix (25,600 in the paper).

    Returns:
        From 1 (one direction) to min(n, d) (all directions alike).
    """
    if len(features) > max_rows:
        features = features[torch.linspace(0, len(features) - 1, max_rows, device=features.device).long()]
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum()
    entropy = torch.special.entr(share).sum()
    return entropy.exp().item()


@dataclass(frozen=True)
class LinearMap:
    """x -> (x - student_mean) @ weight, the best estimate of teacher - teacher_mean.

    Attributes:
        weight: fp32 [d, e].
        student_mean: fp32 [d].
        teacher_mean: fp32 [e].
    """

    weight: Float[Tensor, "d e"]
    student_mean: Float[Tensor, " d"]
    teacher_mean: Float[Tensor, " e"]

    def centred(self, student: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """Estimate of the teacher's features less their mean."""
        return (student - self.student_mean) @ self.weight

    def __call__(self, student: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """Estimate of the teacher's features."""
        return self.centred(student) + self.teacher_mean


def fit_linear_map(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"], *, ridge: float = 1e-3) -> LinearMap:
    """Ridge regression from a student's features to its teacher's.

    Args:
        student: [n, d].
        teacher: [n, e], same rows.
        ridge: penalty, in units of the mean eigenvalue of the student's covariance.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise UserError(
            f"linear map: {len(student)} student and {len(teacher)} teacher rows. Both need the same rows, two "
            "at least. Extract both models over the same images."
        )
    student_mean, teacher_mean = student.double().mean(dim=0), teacher.double().mean(dim=0)
    centred = student.double() - student_mean
    covariance = centred.T @ centred / len(student)
    cross = centred.T @ (teacher.double() - teacher_mean) / len(student)
    penalty = (ridge * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(len(covariance), dtype=torch.float64, device=student.device)
    weight = torch.linalg.solve(covariance + penalty * identity, cross)
    return LinearMap(weight.float(), student_mean.float(), teacher_mean.float())


def cosine_to_teacher(
    student_train: Float[Tensor, "n d"],
    teacher_train: Float[Tensor, "n e"],
    student_val: Float[Tensor, "m d"],
    teacher_val: Float[Tensor, "m e"],
    *,
    ridge: float = 1e-3,
) -> float:
    """Mean cosine on val between the teacher's features and the student's, mapped linearly onto them.

    The map is fitted on train, the same way for every model, so a student needs no projection head to be
    compared. Both sides are centred by the teacher's train mean: an uncentred cosine is mostly the mean that
    all images share, and a random network scores high on it.
    """
    mapping = fit_linear_map(student_train, teacher_train, ridge=ridge)
    estimate = mapping.centred(student_val.float())
    truth = teacher_val.float() - mapping.teacher_mean
    return F.cosine_similarity(estimate, truth, dim=1).double().mean().item()
