"""The graph for a GPU, as far as DALI checks it without one: its operators, and what the decoder is told."""

import pytest
import torch

from pipeline.augmentation import named_augmentation
from pipeline.crops import BackendOptions, training_work
from pipeline.dali import _build

dali = pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")


@pytest.fixture
def decoder(monkeypatch):
    """What the decoder was called with, for a pipeline that is described and not built."""
    arguments = {}
    real = dali.fn.decoders.image

    def image(*inputs, **keywords):
        arguments.update(keywords)
        return real(*inputs, **keywords)

    monkeypatch.setattr(dali.fn.decoders, "image", image)
    monkeypatch.setattr(dali.Pipeline, "build", lambda _: None)
    return arguments


@pytest.mark.parametrize("load", [False, True])
def test_a_gpu_decodes_by_one_engine_into_memory_taken_at_once(decoder, load):
    options = BackendOptions(torch.device("cuda", 1), 6, 16, load)
    pipe = _build(training_work(named_augmentation("dino"), teacher_crops=True), options)
    assert (pipe.device_id, pipe.num_threads, pipe.max_batch_size) == (1, 6, 16)
    assert pipe.exec_dynamic  # outputs stay valid after they are released
    assert decoder["device"] == "mixed"
    assert decoder["hw_decoder_load"] == load
    assert decoder["jpeg_fancy_upsampling"] is True
    assert decoder["adjust_orientation"] is False
    # A 20-megapixel JPEG's bytes, and its pixels, fit without another allocation.
    assert decoder["host_memory_padding"] >= 20 << 20
    assert decoder["device_memory_padding"] >= 3 * 20 << 20
    assert (decoder["preallocate_height_hint"] > 0) == load
    assert (decoder["preallocate_width_hint"] > 0) == load


def test_a_cpu_runs_the_same_graph_without_a_device(decoder):
    pipe = _build(
        training_work(named_augmentation("dino"), teacher_crops=True), BackendOptions(torch.device("cpu"), 2, 4)
    )
    assert pipe.device_id is None
    assert decoder["device"] == "cpu"
    assert decoder["adjust_orientation"] is False
