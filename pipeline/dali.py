"""Crops by NVIDIA DALI: one graph for GPU and CPU, parameters from outside. The only module that imports DALI.

Each sample is its JPEG bytes and the arguments of each view. The image is decoded once and resized ten times:
decoding ten regions costs 2.8 times as much.
"""

from __future__ import annotations

import importlib
import io
import math
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.cpu_crops import BLUR_TAPS, SOLARIZE_THRESHOLD
from pipeline.crops import BackendOptions, BadSampleError, CropRequest, Crops, CropWork
from pipeline.plan import CropPlan

# A batch takes longer from bytes to crops than the GPU works on it: with two, decoder and GPU wait for each other.
_IN_FLIGHT = 3

Arguments = dict[str, npt.NDArray[Any]]
# DALI has no per-sample switch for its blur; at this sigma the outer taps are exactly 0 in float32.
_NO_BLUR_SIGMA = 1e-3

# Buffers that nvJPEG keeps per thread. Sized for ImageNet's larger images at once, so that memory does not
# grow while training meets them one by one.
_DEVICE_MEMORY_PADDING = 64 << 20
_HOST_MEMORY_PADDING = 32 << 20
# The hardware engine takes memory for a whole batch of images of the size that it is told.
_PREALLOCATE_SIDE, _PREALLOCATE_BYTES = 2048, 512 << 20


def missing_reason() -> str | None:
    """Say why DALI cannot be used, or None where it can."""
    try:
        _dali()
    except ImportError as error:
        return f"DALI cannot be imported ({error})"
    return None


def _dali() -> tuple[Any, Any, Any]:
    """DALI's operators, pipeline decorator and types; untyped, as its stubs lack half of them."""
    dali: Any = importlib.import_module("nvidia.dali")
    return dali.fn, dali.pipeline_def, dali.types


def arguments(plan: CropPlan, work: CropWork) -> Arguments:
    """Lay a plan out for the graph: by name, one array [n, ...] for each argument of an operator.

    An operator that cut them from one packed array would cost more than the feeding. A flip is a region with its left
    and right swapped.
    """
    top, left, height, width = plan.boxes.astype(np.float32).T  # [v, n]
    flips = plan.flips.T
    start = np.stack([top, left + width * flips], -1)
    end = np.stack([top + height, left + width * ~flips], -1)
    made: Arguments = {}
    for view in range(work.num_views):
        made |= {f"start{view}": start[view], f"end{view}": end[view]}
        if work.distorted:
            made[f"colour{view}"] = plan.colour[:, view]
            if work.blur[view]:
                sigma = plan.blur_sigma[:, view, None]
                made[f"sigma{view}"] = np.where(sigma > 0, sigma, np.float32(_NO_BLUR_SIGMA))
            if work.solarize[view]:
                made[f"solarize{view}"] = plan.solarize[:, view] * np.uint8(255)
    return {name: np.ascontiguousarray(values) for name, values in made.items()}


class DaliCrops:
    """A crop backend by DALI on its device."""

    depth = _IN_FLIGHT

    def __init__(self, work: CropWork, options: BackendOptions) -> None:
        """Build the graph and run it once on a tiny image, so that what is missing shows here."""
        self._work = work
        self._options = options
        self._on_gpu = options.device.type == "cuda"
        self._in_flight: deque[CropRequest] = deque()
        self._held: deque[tuple[Any, torch.cuda.Event]] = deque()
        self._pipe: Any = None
        self._start()

    def submit(self, request: CropRequest) -> None:
        """Hand a request to DALI; bytes are not copied, so they are kept until it is collected."""
        if self._pipe is None:
            self._start()
        self._in_flight.append(request)
        self._feed(list(request.jpegs), arguments(request.plan, self._work))
        self._pipe.schedule_run()

    def collect(self) -> Crops:
        """Wait for the oldest request."""
        request = self._in_flight.popleft()
        try:
            outputs = self._outputs()
        except RuntimeError as error:
            bad = _undecodable(request, self._options)
            if not bad:
                raise
            raise BadSampleError(bad) from error
        sizes = from_dlpack(outputs[0].as_tensor()).numpy()[:, :2]
        wrong = np.flatnonzero((sizes != request.sizes).any(1))
        if len(wrong):
            expected = request.sizes
            raise BadSampleError(
                {
                    int(i): f"{sizes[i, 0]} x {sizes[i, 1]} pixels, the index says {expected[i, 0]} x {expected[i, 1]}"
                    for i in wrong
                }
            )
        crops = self._joined(outputs[1:])
        if self._on_gpu:
            self._hold((outputs, request))
        return crops

    def reset(self) -> None:
        """Drop the graph with all that is in it; the next request builds a new one."""
        self._pipe = None  # waits for what runs, which reads the encoded images of the requests
        self._in_flight.clear()

    def close(self) -> None:
        """Free the graph, its threads and its memory."""
        self.reset()
        for _, event in self._held:
            event.synchronize()  # the GPU may still read what is let go of below
        self._held.clear()

    def _start(self) -> None:
        self._pipe = _build(self._work, self._options)
        tiny, made = _tiny_request(self._work)
        # The first run of a pipeline takes as many batches as it prefetches; from then on one run is one batch.
        for _ in range(_IN_FLIGHT):
            self._feed([tiny], made)
        self._pipe.schedule_run()
        for _ in range(_IN_FLIGHT):
            self._pipe.share_outputs()
            self._pipe.release_outputs()

    def _feed(self, jpegs: list[npt.NDArray[np.uint8]], made: Arguments) -> None:
        self._pipe.feed_input("jpegs", jpegs)
        for name, values in made.items():
            self._pipe.feed_input(name, values)

    def _outputs(self) -> Any:
        if self._on_gpu:
            outputs = self._pipe.share_outputs(cuda_stream=torch.cuda.current_stream(self._options.device))
        else:
            outputs = self._pipe.share_outputs()
        self._pipe.release_outputs()
        return outputs

    def _joined(self, outputs: Any) -> Crops:
        """Join the views to crop-major tensors of torch's own memory.

        DALI hands its buffers over without a copy. The views are as many buffers; joining them is one copy on the
        device, of half a megabyte an image at 2x224 + 8x96, and gives DALI its buffers back at once.
        """
        w = self._work
        views = [_as_torch(output) for output in outputs]
        clean = views[: w.num_global] if w.clean else []
        rest = views[len(clean) :]
        return Crops(
            _cat(rest[: w.num_global], w.global_size, self._options.device) if w.distorted else None,
            _cat(rest[w.num_global :], w.local_size, self._options.device) if w.distorted else None,
            _cat(clean, w.global_size, self._options.device) if w.clean else None,
        )

    def _hold(self, buffers: Any) -> None:
        """Keep the encoded images and DALI's buffers until the GPU has read them."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._options.device))
        self._held.append((buffers, event))
        while self._held and self._held[0][1].query():
            self._held.popleft()


def _cat(views: list[Tensor], side: int, device: torch.device) -> Tensor:
    if not views:
        return torch.empty(0, side, side, 3, dtype=torch.uint8, device=device)
    return torch.cat(views)


def _as_torch(output: Any) -> Tensor:
    return from_dlpack(output.as_tensor())


def _build(work: CropWork, options: BackendOptions) -> Any:
    fn, pipeline_def, types = _dali()

    on_gpu = options.device.type == "cuda"

    @pipeline_def(
        batch_size=options.max_batch_size,
        num_threads=options.num_threads,
        device_id=(options.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=_IN_FLIGHT,
        exec_dynamic=True,
    )
    def crops() -> Any:
        jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1, no_copy=True)
        image = _decoded(jpegs, options)
        clean, distorted = [], []
        for view in range(work.num_views):
            is_global = view < work.num_global
            crop = fn.resize(
                image,
                size=[work.global_size if is_global else work.local_size] * 2,
                roi_start=_argument("start", view, 1),
                roi_end=_argument("end", view, 1),
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                dtype=types.UINT8,
            )
            if is_global and work.clean:
                clean.append(crop)
            if work.distorted:
                distorted.append(_distorted(crop, view, work, on_gpu=on_gpu))
        return (image.shape(), *clean, *distorted)

    pipe = crops()
    pipe.build()
    return pipe


def _decoded(jpegs: Any, options: BackendOptions) -> Any:
    fn, _, types = _dali()

    if options.device.type != "cuda":
        return fn.decoders.image(jpegs, device="cpu", output_type=types.RGB, adjust_orientation=False)
    side = min(_PREALLOCATE_SIDE, math.isqrt(_PREALLOCATE_BYTES // 3 // options.max_batch_size))
    return fn.decoders.image(
        jpegs,
        device="mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        hw_decoder_load=float(options.hw_decoder),
        device_memory_padding=_DEVICE_MEMORY_PADDING,
        host_memory_padding=_HOST_MEMORY_PADDING,
        # Only the hardware engine reads these hints; 0 reserves nothing for it.
        preallocate_height_hint=side if options.hw_decoder else 0,
        preallocate_width_hint=side if options.hw_decoder else 0,
    )


def _argument(name: str, view: int, ndim: int, dtype: str = "FLOAT") -> Any:
    fn, _, types = _dali()
    return fn.external_source(name=f"{name}{view}", dtype=getattr(types, dtype), ndim=ndim)


def _distorted(crop: Any, view: int, work: CropWork, *, on_gpu: bool) -> Any:
    fn, _, types = _dali()

    crop = fn.coord_transform(crop, MT=_argument("colour", view, 2), dtype=types.UINT8)
    if work.blur[view]:
        crop = fn.gaussian_blur(crop, sigma=_argument("sigma", view, 1), window_size=BLUR_TAPS)
    if work.solarize[view]:
        inverts = _argument("solarize", view, 0, "UINT8")
        crop = crop ^ ((crop >= SOLARIZE_THRESHOLD) * (inverts.gpu() if on_gpu else inverts))  # 255 - x is x ^ 255
    return crop


def _tiny_request(work: CropWork) -> tuple[npt.NDArray[np.uint8], Arguments]:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    one = (1, work.num_views)
    boxes = np.broadcast_to(np.array([0, 0, 16, 16], np.int32), (*one, 4))
    nothing, colour = np.zeros(one, np.float32), np.zeros((*one, 3, 4), np.float32)
    plan = CropPlan(boxes, nothing > 0, colour, nothing, nothing > 0)
    return np.frombuffer(stream.getvalue(), np.uint8), arguments(plan, work)


def decode_pipeline(options: BackendOptions) -> Any:
    """Build a pipeline that only decodes; run it with `jpegs=[...]`."""
    fn, pipeline_def, types = _dali()

    @pipeline_def(
        batch_size=options.max_batch_size,
        num_threads=options.num_threads,
        device_id=(options.device.index or 0) if options.device.type == "cuda" else None,
        prefetch_queue_depth=1,
    )
    def decoded() -> Any:
        return _decoded(fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1, no_copy=True), options)

    return decoded()


def _undecodable(request: CropRequest, options: BackendOptions) -> dict[int, str]:
    """Decode each image on its own and give the reason for those that fail."""
    bad, pipe = {}, None
    for i, jpeg in enumerate(request.jpegs):
        if pipe is None:
            pipe = decode_pipeline(replace(options, max_batch_size=1, num_threads=1))
        try:
            pipe.run(jpegs=[jpeg])
        except RuntimeError:
            bad[i] = "DALI cannot decode it"
            pipe = None  # a pipeline that failed is no longer valid
    return bad
