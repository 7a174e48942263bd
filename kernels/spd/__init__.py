"""Log-Euclidean distance between the token Gram matrices of student and teacher, with exact gradients."""

from kernels.spd.loss import log_euclidean_loss, spd_logm
from kernels.spd.matrices import TokenReduction, channel_spd, plan_reduction, reduce_tokens, token_spd

__all__ = [
    "TokenReduction",
    "channel_spd",
    "log_euclidean_loss",
    "plan_reduction",
    "reduce_tokens",
    "spd_logm",
    "token_spd",
]
