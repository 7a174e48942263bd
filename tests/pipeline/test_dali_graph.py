"""The graph for a GPU, as far as DALI checks it without one: its operators, and what the decoder is told."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augmentation import named_augmentation
from pipeline.crops import BackendOptions, CropRequest, center_work, training_work
from pipeline.dali import DaliCrops, _build
from pipeline.plan import center_crop_plan

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


@pytest.mark.parametrize(("batch", "side"), [(16, 2048), (256, 836)])
def test_the_engines_memory_is_sized_for_the_batch(decoder, batch, side):
    options = BackendOptions(torch.device("cuda", 0), 6, batch, True)
    _build(training_work(named_augmentation("dino"), teacher_crops=True), options)
    assert decoder["preallocate_height_hint"] == decoder["preallocate_width_hint"] == side
    assert 3 * side**2 * batch <= 512 << 20


def test_the_graph_cuts_no_arguments_and_keeps_three_batches_in_flight():
    work = training_work(named_augmentation("dino"), teacher_crops=True)
    pipe = _build(work, BackendOptions(torch.device("cpu"), 1, 4))
    described = pipe.serialize()
    assert described.count(b"TensorSubscript") == 0 < described.count(b"CoordTransform")
    assert pipe.cpu_queue_size == pipe.gpu_queue_size == DaliCrops.depth == 3


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_orientation_in_exif_changes_neither_size_nor_crops(orientation):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    jpegs = []
    for options in ({}, {"exif": exif}):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", **options)
        jpegs.append(np.frombuffer(stream.getvalue(), np.uint8))
    crops = DaliCrops(center_work(32), BackendOptions(torch.device("cpu"), 1, 2))
    sizes = np.array([[40, 60]] * 2)
    crops.submit(CropRequest(jpegs, sizes, center_crop_plan(sizes, crop_ratio=0.875)))
    plain, turned = crops.collect().clean_crops
    crops.close()
    assert torch.equal(plain, turned)


def test_a_cpu_runs_the_same_graph_without_a_device(decoder):
    pipe = _build(
        training_work(named_augmentation("dino"), teacher_crops=True), BackendOptions(torch.device("cpu"), 2, 4)
    )
    assert pipe.device_id is None
    assert decoder["device"] == "cpu"
    assert decoder["adjust_orientation"] is False
