"""Two processes over gloo give the gradient of one process with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from kernels.spd import log_euclidean_loss, spd_logm, token_spd

WORLD = 2
CROPS = 4
TOLERANCE = 16 * 2.0**-24
"""Relative to the gradient's norm: the mean of two halves against the mean of the whole, a few fp32 roundings
in products of 16 tokens by 24 channels."""


def make_model():
    torch.manual_seed(0)
    return torch.nn.Linear(24, 32)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(CROPS, 16, 24, generator=generator), torch.randn(CROPS, 16, 48, generator=generator)


def loss_of(model, inputs, teacher, backend):
    with torch.no_grad():
        target = spd_logm(token_spd(teacher), backend=backend)
    return log_euclidean_loss(model(inputs), target, backend=backend)


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch._dynamo.config.optimize_ddp = False
    compiled = torch.compile(loss_of, dynamic=False, backend="aot_eager")
    found = {}
    try:
        for backend, step in (("eigh", loss_of), ("eigh compiled", compiled), ("resolvent", loss_of)):
            model = DistributedDataParallel(make_model())
            inputs, teacher = batch()
            step(model, inputs[rank::WORLD], teacher[rank::WORLD], backend.split()[0]).backward()
            found[backend] = [parameter.grad for parameter in model.parameters()]
        if rank == 0:
            torch.save(found, folder / "gradients.pt")
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def gradients_of_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(free_port(), folder), nprocs=WORLD)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("backend", ["eigh", "eigh compiled", "resolvent"])
def test_two_ranks_give_the_gradient_of_the_whole_batch(gradients_of_two_ranks, backend):
    model = make_model()
    inputs, teacher = batch()
    loss_of(model, inputs, teacher, backend.split()[0]).backward()
    for of_ranks, parameter in zip(gradients_of_two_ranks[backend], model.parameters(), strict=True):
        assert float((of_ranks - parameter.grad).norm() / parameter.grad.norm()) <= TOLERANCE
