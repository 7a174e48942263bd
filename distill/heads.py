"""Student heads: from student tokens to prototype logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.config import StudentConfig
from distill.prototypes import PrototypeBank, fp32_product


class LinearHead(nn.Module):
    """Student width -> teacher width; logits by the teacher's own frozen prototypes.

    The bias starts at the teacher's mean token, so that the projection starts among the teacher's tokens.
    """

    def __init__(self, in_dim: int, bank: PrototypeBank) -> None:
        super().__init__()
        self.projection = nn.Linear(in_dim, bank.mean.shape[0])
        nn.init.trunc_normal_(self.projection.weight, std=0.02)
        with torch.no_grad():
            self.projection.bias.copy_(bank.mean)

    def forward(self, tokens: Float[Tensor, "*b ds"], bank: PrototypeBank) -> Float[Tensor, "*b k"]:
        """Return cosines to the prototypes in the teacher's space, fp32."""
        return bank.cosines(centred_projection(self, tokens, bank))


class MlpHead(nn.Module):
    """DINO's projection head: a three-layer MLP, L2 norm, and a learned last layer; and a linear projection.

    The projection serves the regression terms, which need tokens of the teacher's width.
    """

    def __init__(self, in_dim: int, bank: PrototypeBank, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        k, teacher_dim = bank.weight.shape
        self.projection = nn.Linear(in_dim, teacher_dim)
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = nn.Linear(bottleneck_dim, k, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.projection.bias.copy_(bank.mean)

    def forward(self, tokens: Float[Tensor, "*b ds"], bank: PrototypeBank) -> Float[Tensor, "*b k"]:
        """Return logits of the learned last layer, fp32."""
        return fp32_product(F.normalize(self.mlp(tokens).float(), dim=-1), self.last_layer.weight)


def centred_projection(
    head: LinearHead | MlpHead, tokens: Float[Tensor, "*b ds"], bank: PrototypeBank
) -> Float[Tensor, "*b d"]:
    """Project to the teacher's width and take the teacher's mean out.

    Out of the bias, in fp32: added to a bf16 sum and taken off again, the mean would leave its rounding behind.
    """
    return F.linear(tokens, head.projection.weight, head.projection.bias - bank.mean)


def create_head(
    config: StudentConfig, in_dim: int, bank: PrototypeBank, *, logits: bool, projection: bool
) -> LinearHead | MlpHead:
    """Create the configured head for one kind of token.

    Args:
        config: which head, and its widths.
        in_dim: the student's width.
        bank: prototypes of that kind of token.
        logits: a loss reads the head's logits.
        projection: a loss reads its projection. What none reads is frozen: DDP waits for every gradient.
    """
    if config.head == "linear" or not logits:
        head = LinearHead(in_dim, bank)
        return head.requires_grad_(logits or projection)
    mlp_head = MlpHead(in_dim, bank, config.mlp_head_hidden_dim, config.mlp_head_bottleneck_dim)
    mlp_head.requires_grad_(logits)
    mlp_head.projection.requires_grad_(projection)
    return mlp_head


def create_proteus_heads(cls_width: int, patch_width: int, teacher_dim: int) -> nn.ModuleList:
    """Create Proteus' three heads, LayerNorm and a linear layer each: for cls, patch and masked patch tokens."""
    widths = (cls_width, patch_width, patch_width)
    return nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, teacher_dim)) for width in widths)
