"""What the losses need of the teacher, from a live forward pass or from the cache alike."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """Final-norm tokens of the frozen teacher on the global crops of `b` images, image-major.

    Attributes:
        cls: cls tokens, [b, g, d].
        patches: patch tokens, [b, g, n, d]; class and register tokens left out.
    """

    cls: Float[Tensor, "b g d"]
    patches: Float[Tensor, "b g n d"]
