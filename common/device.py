"""The device that a process works on."""

from __future__ import annotations

import os

import torch

from common.errors import UserError


def pick_device(wanted: str) -> torch.device:
    """Return this process's device, the current one from here on: "cpu", "cuda" or "auto", a GPU where there is one.

    Raises:
        UserError: a GPU is asked for and torch sees none, or fewer than there are processes on this machine.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {wanted}: torch {torch.__version__} sees no CUDA device. Check `nvidia-smi` and the "
            "driver, or pass --device cpu."
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--device {wanted}: local rank {local_rank}, this machine has {torch.cuda.device_count()} GPUs. "
            "Ask for at most as many with NGPU, or pass --device cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
