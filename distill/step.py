"""The compiled object: from uint8 crops and teacher tokens to the weighted sum of the losses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from distill import losses
from distill.config import LossConfig, StudentConfig
from distill.heads import centred_projection, create_head, create_proteus_heads
from distill.models import (
    check_plain_student,
    cls_and_patches,
    is_packable,
    packed_tokens,
    patch_side,
    rope_table,
    token_widths,
)
from distill.prototypes import PrototypeBank, Prototypes
from distill.teacher import TeacherTargets
from kernels.spd import log_euclidean_loss, reduce_tokens, spd_logm, token_spd
from pipeline.batch import MultiCropBatch, normalise


class Metric(NamedTuple):
    """A number that the step gives: its name, whether it is a loss term, whether the console line shows it."""

    name: str
    is_term: bool = False
    shown: bool = False


METRICS = (
    Metric("loss", shown=True),
    Metric("dino", is_term=True),
    Metric("dino_entropy"),
    Metric("dino_kl", shown=True),
    Metric("ibot", is_term=True),
    Metric("ibot_entropy"),
    Metric("ibot_kl", shown=True),
    *(Metric(name, True, True) for name in ("koleo", "cls", "spd", "patch", "mse", "gram", "softmax_gram", "proteus")),
    Metric("target_usage"),
    Metric("student_usage"),
)
METRIC_NAMES = tuple(metric.name for metric in METRICS)
TERMS = tuple(metric.name for metric in METRICS if metric.is_term)


class StepInputs(NamedTuple):
    """The tensors of one batch; see `MultiCropBatch` and `TeacherTargets`."""

    global_crops: UInt8[Tensor, "gb G G 3"]
    local_crops: UInt8[Tensor, "lb L L 3"]
    masks: Bool[Tensor, "gb n"]
    masked_indices: Int64[Tensor, " m"]
    teacher_cls: Float[Tensor, "b g d"]
    teacher_patches: Float[Tensor, "b g n d"]

    @staticmethod
    def of(batch: MultiCropBatch, targets: TeacherTargets) -> StepInputs:
        """Join a batch with its targets, the teacher's patch tokens on the student's grid."""
        targets = targets.on_grid(batch.masks.shape[1])
        tensors = (batch.global_crops, batch.local_crops, batch.masks, batch.masked_indices)
        return StepInputs(*tensors, targets.cls, targets.patches)

    def micro_batches(self, number: int) -> list[StepInputs]:
        """Cut into `number` micro-batches of consecutive images, without a host sync.

        Every image has the same number of masked patches, so the cut keeps static shapes.
        """
        b = self.teacher_cls.shape[0]
        assert b % number == 0, f"{b} images do not split into {number}"
        size = b // number
        return [self._images(i * size, size) for i in range(number)] if number > 1 else [self]

    def _images(self, first: int, size: int) -> StepInputs:
        b, n = self.teacher_cls.shape[0], self.masks.shape[1]

        def cut(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, b))[:, first : first + size].flatten(0, 1) if x.shape[0] else x

        crop, patch = self.masked_indices // n, self.masked_indices % n
        image, view = crop % b, crop // b
        by_image = torch.argsort(image, stable=True).unflatten(0, (b, -1))[first : first + size].flatten()
        indices = (view[by_image] * size + image[by_image] - first) * n + patch[by_image]
        return StepInputs(
            cut(self.global_crops),
            cut(self.local_crops),
            cut(self.masks),
            indices.sort().values,
            self.teacher_cls[first : first + size],
            self.teacher_patches[first : first + size],
        )


class StepScalars(NamedTuple):
    """What the schedule sets, as 0-d tensors: teacher temperatures of the DINO and iBOT targets, KoLeo's factor."""

    cls_temp: Float[Tensor, ""]
    patch_temp: Float[Tensor, ""]
    koleo_scale: Float[Tensor, ""]


class DistillStep(nn.Module):
    """Student, heads, frozen prototypes and losses in one module, a plain function of tensors.

    The whole forward pass is one graph. Autocast lives inside, around backbone and heads only: compiled code
    under an outer autocast gives wrong gradients for fp32 losses (PyTorch issue 179804).
    """

    mask_token: nn.Parameter

    def __init__(
        self,
        student: nn.Module,
        prototypes: Prototypes,
        config: StudentConfig,
        weights: LossConfig,
        *,
        student_temp: float,
        global_crops_size: int,
        local_crops_size: int,
        autocast: bool,
    ) -> None:
        super().__init__()
        self.student = student
        self.cls_bank: PrototypeBank = prototypes.cls
        self.patch_bank: PrototypeBank = prototypes.patch
        cls_width, patch_width = token_widths(student)
        self.uses_cls_projection = bool(weights.cls_loss_weight or weights.mse_loss_weight)
        self.uses_patch_projection = bool(
            weights.patch_loss_weight or weights.mse_loss_weight or weights.softmax_gram_loss_weight
        )
        self.cls_head = create_head(
            config, cls_width, self.cls_bank, logits=bool(weights.dino_loss_weight), projection=self.uses_cls_projection
        )
        self.patch_head = create_head(
            config,
            patch_width,
            self.patch_bank,
            logits=bool(weights.ibot_loss_weight),
            projection=self.uses_patch_projection,
        )
        self.masked_pass = bool(weights.proteus_loss_weight)
        if self.masked_pass:
            self.proteus_heads = create_proteus_heads(cls_width, patch_width, self.cls_bank.mean.shape[0])
        masks_input = config.mask_student_input or self.masked_pass
        # Outside the student, so that an exported student has exactly timm's keys.
        self.mask_token = nn.Parameter(torch.zeros(patch_width), requires_grad=masks_input)
        side = global_crops_size // patch_side(student)
        self.patch_grid = (side, side)
        self.packed = is_packable(student)
        if self.packed:
            for name, size in (("global_rope", global_crops_size), ("local_rope", local_crops_size)):
                self.register_buffer(name, rope_table(student, size), persistent=False)  # type: ignore[arg-type]
        else:
            sizes = (global_crops_size, local_crops_size)[: 2 if weights.dino_loss_weight else 1]
            check_plain_student(student, sizes, arch=config.arch, masks=masks_input)
        self.weights = weights
        self.student_temp = student_temp
        self.mask_student_input = config.mask_student_input
        self.residual_in_fp32 = config.residual == "fp32"
        self.autocast = autocast

    def forward(self, *tensors: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, " metrics"]]:
        """Return the loss and the detached `METRICS`, each term unweighted, both fp32.

        Args:
            tensors: those of `StepInputs`, then those of `StepScalars`.
        """
        count = len(StepInputs._fields)
        inputs, scalars = StepInputs(*tensors[:count]), StepScalars(*tensors[count:])
        terms, parts = self.terms(inputs, scalars)
        total = torch.zeros((), device=inputs.global_crops.device)
        for name, value in terms.items():
            weight = getattr(self.weights, f"{name}_loss_weight")
            total = total + value * (weight * scalars.koleo_scale if name == "koleo" else weight)
        zero = torch.zeros_like(total)
        values = {"loss": total, **terms, **parts}
        return total, torch.stack([values.get(name, zero).detach().float() for name in METRIC_NAMES])

    def terms(self, inputs: StepInputs, scalars: StepScalars) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return every loss term with a weight, unweighted, and what is logged beside them; 0-d, fp32."""
        global_crops, local_crops, masks, masked_indices, teacher_cls, teacher_patches = inputs
        cls_temp, patch_temp, _ = scalars
        b, g = teacher_cls.shape[:2]
        teacher_cls = teacher_cls.transpose(0, 1)  # [g, b, d]
        teacher_patches = teacher_patches.transpose(0, 1).flatten(0, 1)  # [g*b, n, d]
        with self._autocast(global_crops.device):
            cls, patches, masked = self._student_tokens(global_crops, local_crops, masks)
            dino = self._dino_logits(cls, teacher_cls, cls_temp) if self.weights.dino_loss_weight else None
            ibot = self._ibot_logits(patches, teacher_patches, masked_indices, patch_temp)
            projected_cls = projected_patches = None
            if self.uses_cls_projection:
                projected_cls = centred_projection(self.cls_head, cls[: g * b], self.cls_bank)
            if self.uses_patch_projection:
                projected_patches = centred_projection(self.patch_head, patches, self.patch_bank)
            proteus = self._proteus_pairs(cls[: g * b], patches, masked, masked_indices, teacher_cls, teacher_patches)
        terms: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        if dino is not None:
            views, targets = dino[0].unflatten(0, (-1, b)), dino[1]  # [v, b, k], [g, b, k]
            terms["dino"] = losses.dino_loss(
                views, targets, student_temp=self.student_temp, same_view=self.weights.dino_same_view
            )
            parts |= self._prototype_metrics("dino", terms["dino"], targets)
            parts["target_usage"] = _usage(targets)
            parts["student_usage"] = _usage(F.softmax(views[:g] / self.student_temp, dim=-1))
        if ibot is not None:
            per_image = masks.sum(1)[masked_indices // masks.shape[1]].float()
            terms["ibot"] = losses.ibot_loss(*ibot, per_image, num_crops=g * b, student_temp=self.student_temp)
            of_masked_crops = terms["ibot"] * (g * b / (1 / per_image).sum())
            parts |= self._prototype_metrics("ibot", of_masked_crops, ibot[1])
        terms |= self._token_terms(cls[: g * b].unflatten(0, (g, b)), patches, teacher_patches)
        terms |= self._regression_terms(projected_cls, projected_patches, teacher_cls.flatten(0, 1), teacher_patches)
        if proteus is not None:
            terms["proteus"] = losses.proteus_loss(*proteus)
        return terms, parts

    def _student_tokens(
        self, global_crops: Tensor, local_crops: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return cls tokens of all views, crop-major [v*b, d], patch tokens of the global crops [g*b, n, d], and
        those of the masked pass, where a loss asks for one."""
        crops = [normalise(x) for x in (global_crops, local_crops) if x.shape[0]]
        views = len(crops)
        if not self.packed:
            tokens = [cls_and_patches(self.student, x) for x in crops]
            return torch.cat([cls for cls, _ in tokens]), tokens[0][1], None
        ropes = [self.global_rope, self.local_rope][:views]
        masked: list[Tensor | None] = [masks if self.mask_student_input else None, None][:views]
        if self.masked_pass:
            crops, ropes, masked = [*crops, crops[0]], [*ropes, ropes[0]], [*masked, masks]
        sequences = packed_tokens(
            self.student,  # type: ignore[arg-type]
            crops,
            ropes,  # type: ignore[arg-type]
            masks=masked,
            mask_token=self.mask_token,
            residual_in_fp32=self.residual_in_fp32,
        )
        prefix = int(self.student.num_prefix_tokens)  # type: ignore[arg-type]
        cls = torch.cat([x[:, 0] for x in sequences[:views]])
        return cls, sequences[0][:, prefix:], sequences[-1][:, prefix:] if self.masked_pass else None

    def _proteus_pairs(
        self,
        cls: Tensor,
        patches: Tensor,
        masked: Tensor | None,
        masked_indices: Tensor,
        teacher_cls: Tensor,
        teacher_patches: Tensor,
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Projected student tokens and the teacher's, for each of Proteus' three terms."""
        if masked is None:
            return None
        hidden = (x.flatten(0, 1).index_select(0, masked_indices) for x in (masked, teacher_patches))
        pairs = ((cls, teacher_cls.flatten(0, 1)), (patches, teacher_patches), hidden)
        return [(head(s), t) for head, (s, t) in zip(self.proteus_heads, pairs, strict=True)]

    def _dino_logits(self, cls: Tensor, teacher_cls: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_head(cls, self.cls_bank), self.cls_bank.targets(teacher_cls, temperature)

    def _ibot_logits(
        self, patches: Tensor, teacher_patches: Tensor, masked_indices: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        if not self.weights.ibot_loss_weight or not masked_indices.shape[0]:
            return None
        student = patches.flatten(0, 1).index_select(0, masked_indices)
        teacher = teacher_patches.flatten(0, 1).index_select(0, masked_indices)
        return self.patch_head(student, self.patch_bank), self.patch_bank.targets(teacher, temperature)

    def _token_terms(self, cls: Tensor, patches: Tensor, teacher_patches: Tensor) -> dict[str, Tensor]:
        """Terms on the student's own tokens: KoLeo of each global crop [g, b, d], relations of patch tokens."""
        weights, terms = self.weights, {}
        if weights.koleo_loss_weight:
            terms["koleo"] = losses.koleo_loss(cls, all_ranks=weights.koleo_all_ranks)
        if weights.spd_loss_weight:
            eps, backend = weights.spd_eps, weights.spd_backend
            reduction = weights.spd_reduction, weights.spd_max_tokens
            with torch.no_grad():
                teacher_tokens = reduce_tokens(teacher_patches, self.patch_grid, *reduction)
                teacher_log = spd_logm(token_spd(teacher_tokens, eps=eps), eps=eps, backend=backend)
            student_tokens = reduce_tokens(patches, self.patch_grid, *reduction)
            terms["spd"] = log_euclidean_loss(student_tokens, teacher_log, eps=eps, backend=backend)
        if weights.gram_loss_weight:
            terms["gram"] = losses.gram_loss(patches, teacher_patches)
        return terms

    def _regression_terms(
        self, cls: Tensor | None, patches: Tensor | None, teacher_cls: Tensor, teacher_patches: Tensor
    ) -> dict[str, Tensor]:
        """Terms on tokens projected into the teacher's space; of `cls` and `patches` its mean is taken out already."""
        weights, terms = self.weights, {}
        if cls is not None and weights.cls_loss_weight:
            terms["cls"] = losses.cls_loss(cls, teacher_cls.float() - self.cls_bank.mean)
        if patches is not None and weights.softmax_gram_loss_weight:
            terms["softmax_gram"] = losses.softmax_gram_loss(patches.float() + self.patch_bank.mean, teacher_patches)
        if patches is not None and (weights.patch_loss_weight or weights.mse_loss_weight):
            student, teacher = patches.float() / self.patch_bank.std, self.patch_bank.standardise(teacher_patches)
            if weights.patch_loss_weight:
                terms["patch"] = losses.patch_regression_loss(student, teacher)
            if weights.mse_loss_weight:
                assert cls is not None
                cls_error = F.mse_loss(cls.float() / self.cls_bank.std, self.cls_bank.standardise(teacher_cls))
                terms["mse"] = cls_error + F.mse_loss(student, teacher)
        return terms

    def _prototype_metrics(self, name: str, loss: Tensor, targets: Tensor) -> dict[str, Tensor]:
        entropy, divergence = losses.cross_entropy_parts(loss.detach(), targets)
        return {f"{name}_entropy": entropy, f"{name}_kl": divergence}

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def _usage(probs: Tensor) -> Tensor:
    """Effective number of prototypes in use: the perplexity of the mean distribution."""
    mean = probs.flatten(0, -2).mean(0)
    return torch.exp(-torch.special.xlogy(mean, mean).sum())
