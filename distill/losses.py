"""The losses: pure functions of fp32 tensors. Each has a naive reference in the tests.

The SPD loss is `kernels.spd.log_euclidean_loss`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Renamed in torch 2.14, where the old name warns.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


def dino_loss(
    student_logits: Float[Tensor, "v b k"],
    teacher_probs: Float[Tensor, "g b k"],
    *,
    student_temp: float,
    same_view: bool = False,
) -> Float[Tensor, ""]:
    """Prototype cross-entropy of student views against teacher views of the same image (DINO, eq. 2-3).

    The v x g pairs factor through sums of targets, so no pair is ever formed:
    sum over pairs of -<p, log softmax(z/t)> = (number of views per target) * lse - <sum p, sum z/t>.

    Args:
        student_logits: cosines to the prototypes, fp32; the first g views are the global ones.
        teacher_probs: targets of the g global views, fp32, rows summing to one.
        student_temp: student temperature.
        same_view: also count the g pairs of a global view with itself.

    Returns:
        Mean over pairs and images, in nats.
    """
    v, b, _ = student_logits.shape
    g = teacher_probs.shape[0]
    logits = student_logits / student_temp
    lse = torch.logsumexp(logits, dim=-1)  # [v, b]
    total = g * lse.sum() - (teacher_probs.sum(0) * logits.sum(0)).sum()
    pairs = v * g
    if not same_view:
        total = total - lse[:g].sum() + (teacher_probs * logits[:g]).sum()
        pairs -= g
    return total / (pairs * b)


def ibot_loss(
    student_logits: Float[Tensor, "m k"],
    teacher_probs: Float[Tensor, "m k"],
    masked_per_image: Float[Tensor, " m"],
    *,
    num_crops: int,
    student_temp: float,
) -> Float[Tensor, ""]:
    """Prototype cross-entropy of masked patches (iBOT, eq. 2; normalised as in DINOv2 and DINOv3).

    Args:
        student_logits: cosines of masked student patches to the prototypes, fp32.
        teacher_probs: targets of the same patches, fp32.
        masked_per_image: number of masked patches on the crop of each row, so that a crop counts once
            whatever its share of masked patches.
        num_crops: all global crops of the batch, those without a mask too.
        student_temp: student temperature.

    Returns:
        Sum over crops of the mean cross-entropy of their masked patches, divided by `num_crops`, in nats.
    """
    cross_entropy = -(teacher_probs * F.log_softmax(student_logits / student_temp, dim=-1)).sum(-1)  # [m]
    return (cross_entropy / masked_per_image).sum() / num_crops


def koleo_loss(
    cls: Float[Tensor, "g b d"], *, all_ranks: bool = False, eps: float = 1e-8
) -> Float[Tensor, ""]:
    """Kozachenko-Leonenko estimator of (minus) the entropy of a batch (Sablayrolles et al. 2019; DINOv2).

    Args:
        cls: class tokens of g crops of each image, any scale; neighbours are looked for among the same crop of others.
        all_ranks: search the nearest neighbour in all ranks' tokens, gathered once for all crops. Gradients flow
            into the neighbour too: a detached gather has 40 % gradient error.
        eps: added to the distance inside the logarithm.

    Returns:
        Minus the mean log distance of an L2-normalised token to its nearest neighbour, summed over the crops.
    """
    x = F.normalize(cls.float(), dim=-1, eps=eps)
    others, offset = x, 0
    if all_ranks and dist.is_initialized() and dist.get_world_size() > 1:
        assert dist.group.WORLD is not None
        others = _all_gather(x.transpose(0, 1).contiguous(), 0, dist.group.WORLD).transpose(0, 1)  # [g, ranks * b, d]
        offset = dist.get_rank() * x.shape[1]
    with torch.no_grad():
        cosine = x @ others.mT  # [g, b, ranks * b]
        own = torch.arange(x.shape[1], device=x.device) + offset
        cosine = cosine.scatter(2, own[None, :, None].expand(len(x), -1, 1), -2.0)
        nearest = cosine.argmax(dim=2)  # [g, b]
    neighbours = others.gather(1, nearest[..., None].expand_as(x))
    distance = torch.linalg.vector_norm(x - neighbours, dim=-1)
    return -torch.log(distance + eps).mean(1).sum()


def cls_loss(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """One minus the mean cosine of projected student and teacher class tokens."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def cross_entropy_parts(
    loss: Float[Tensor, ""], teacher_probs: Float[Tensor, "... k"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Split a cross-entropy into the targets' entropy H and the divergence KL, in nats.

    H is a property of the targets alone; only KL says whether the student learns.
    """
    entropy = -torch.special.xlogy(teacher_probs, teacher_probs).sum(-1).mean()
    return entropy, loss - entropy


def patch_regression_loss(student: Float[Tensor, "*b d"], teacher: Float[Tensor, "*b d"]) -> Float[Tensor, ""]:
    """Baseline of RADIO, UNIC and EUPE: (1 - cosine) + smooth L1, on standardised teacher features."""
    return cls_loss(student, teacher) + F.smooth_l1_loss(student.float(), teacher.float())


def gram_loss(student: Float[Tensor, "b n ds"], teacher: Float[Tensor, "b n dt"]) -> Float[Tensor, ""]:
    """Baseline of DINOv3 (Gram anchoring, section 4.2): MSE of the Gram matrices of L2-normalised patches."""
    s, t = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return F.mse_loss(s @ s.mT, t @ t.mT)


def softmax_gram_loss(
    student: Float[Tensor, "b n ds"], teacher: Float[Tensor, "b n dt"], *, temperature: float = 0.07
) -> Float[Tensor, ""]:
    """Baseline of LightlyTrain's distillationv3: KL between rows of the softmax of patch cosine matrices."""
    s, t = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    log_s = F.log_softmax(s @ s.mT / temperature, dim=-1)
    log_t = F.log_softmax(t @ t.mT / temperature, dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def proteus_loss(
    cls: tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]],
    patches: tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]],
    masked: tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]],
) -> Float[Tensor, ""]:
    """Baseline of Proteus (Zhang et al. 2025): the sum of three mean squared errors on raw teacher tokens.

    Args:
        cls, patches: projected student tokens and the teacher's, of crops seen whole.
        masked: the same of masked patches, the student having seen the mask token in their place.

    Returns:
        Mean squared error of cls tokens, plus that of cls and patch tokens together, plus that of masked patches.
    """
    (s_cls, t_cls), (s_patches, t_patches), (s_masked, t_masked) = (
        (s.float(), t.float()) for s, t in (cls, patches, masked)
    )
    student, teacher = torch.cat([s_cls[:, None], s_patches], 1), torch.cat([t_cls[:, None], t_patches], 1)
    return F.mse_loss(s_cls, t_cls) + F.mse_loss(student, teacher) + F.mse_loss(s_masked, t_masked)
