"""The fallback without DALI: simplejpeg decode, torch and Pillow resize, OpenCV colour and blur, in threads."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.crops import BackendOptions, CropRequest, Crops, CropWork, finished

BLUR_TAPS = 9
SOLARIZE_THRESHOLD = 128

# Pixels along each side of a shrunk crop whose cubic kernel, four source pixels times the scale wide, reaches
# beyond the box.
_EDGE = 2

_SOLARIZED = np.array([x if x < SOLARIZE_THRESHOLD else 255 - x for x in range(256)], np.uint8)
_IDENTITY = np.eye(3, 4, dtype=np.float32)


def decode(jpeg: npt.NDArray[np.uint8], size: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Decode a JPEG strictly.

    Args:
        jpeg: encoded image, uint8 [bytes].
        size: expected height and width.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        ValueError: the image is damaged, or has another size.
    """
    image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True)
    if image.shape[:2] != (size[0], size[1]):
        raise ValueError(f"{image.shape[0]} x {image.shape[1]} pixels, the index says {size[0]} x {size[1]}")
    return image


@dataclass
class _InFlight:
    request: CropRequest
    global_crops: Tensor | None
    local_crops: Tensor | None
    clean_crops: Tensor | None
    done: list[Future[None]]


class CpuCrops:
    """A crop backend on CPU threads; its crops are copied to the device if that is a GPU."""

    depth = 2

    def __init__(self, work: CropWork, options: BackendOptions) -> None:
        """Start the threads; OpenCV's own are switched off, as each image is one thread's work."""
        cv2.setNumThreads(0)
        self._work = work
        self._device = options.device
        self._in_flight: deque[_InFlight] = deque()
        self._pool = _start_threads(options.num_threads)

    def submit(self, request: CropRequest) -> None:
        """Start one task an image."""
        w, n = self._work, len(request.jpegs)
        batch = _InFlight(
            request,
            self._empty(w.num_global * n, w.global_size) if w.distorted else None,
            self._empty(w.num_local * n, w.local_size) if w.distorted else None,
            self._empty(w.num_global * n, w.global_size) if w.clean else None,
            [],
        )
        batch.done = [self._pool.submit(self._crop_image, batch, i) for i in range(n)]
        self._in_flight.append(batch)

    def collect(self) -> Crops:
        """Wait for the oldest request's images."""
        batch = self._in_flight.popleft()
        finished(batch.done)
        return Crops(*(self._to_device(t) for t in (batch.global_crops, batch.local_crops, batch.clean_crops)))

    def reset(self) -> None:
        """Cancel what has not begun."""
        for batch in self._in_flight:
            for future in batch.done:
                future.cancel()
        self._in_flight.clear()

    def close(self) -> None:
        """Stop the threads."""
        self.reset()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _empty(self, rows: int, side: int) -> Tensor:
        return torch.empty(rows, side, side, 3, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _to_device(self, crops: Tensor | None) -> Tensor | None:
        return None if crops is None else crops.to(self._device, non_blocking=True)

    def _crop_image(self, batch: _InFlight, i: int) -> None:
        w, request = self._work, batch.request
        n, plan = len(request.jpegs), request.plan
        pixels = decode(request.jpegs[i], request.sizes[i])
        image = Image.fromarray(pixels)
        for view in range(w.num_views):
            is_global = view < w.num_global
            size = w.global_size if is_global else w.local_size
            crop = resize(pixels, image, plan.boxes[i, view], size, flip=bool(plan.flips[i, view]))
            if is_global and batch.clean_crops is not None:
                batch.clean_crops[view * n + i].numpy()[...] = crop
            if not w.distorted:
                continue
            crop = distort(crop, plan.colour[i, view], float(plan.blur_sigma[i, view]), bool(plan.solarize[i, view]))
            target = batch.global_crops if is_global else batch.local_crops
            assert target is not None
            row = (view if is_global else view - w.num_global) * n + i
            target[row].numpy()[...] = crop


def _start_threads(num_threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch runs on one core, as each image is one thread's work.

    torch.set_num_threads sets what a thread takes over when it first uses torch; so it is called in each new
    thread, and then set back for the rest of the program.
    """
    of_the_rest = torch.get_num_threads()
    if of_the_rest == 1:
        return ThreadPoolExecutor(num_threads, thread_name_prefix="crops")
    started = threading.Barrier(num_threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the setting over when it first asks, and keeps it
        started.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="crops", initializer=start)
    for _ in range(num_threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(of_the_rest)
    return pool


def resize(
    pixels: npt.NDArray[np.uint8], image: Image.Image, box: npt.NDArray[np.int32], size: int, *, flip: bool
) -> npt.NDArray[np.uint8]:
    """Resize a box of an image by Keys cubic (a = -0.5), antialiased, reading beyond the box.

    Pillow does just that, but torch's vector code does it several times as fast, only without reading beyond the
    box. So torch makes the crop and Pillow its outermost pixels; what is enlarged in any direction is Pillow's.

    Args:
        pixels: uint8 [h, w, 3], RGB.
        image: the same as a Pillow image.
        box: top, left, height, width.
        size: side of the crop in pixels.
        flip: mirror the crop horizontally.

    Returns:
        uint8 [size, size, 3].
    """
    top, left, height, width = (int(x) for x in box)
    bottom, right = top + height, left + width
    if min(height, width) < size:
        crop = _by_pillow(image, (left, top, right, bottom), (size, size))
    else:
        inside = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
        shrunk = F.interpolate(inside, size=(size, size), mode="bicubic", antialias=True)
        crop = shrunk[0].permute(1, 2, 0).contiguous().numpy()
        high, wide = _EDGE * height / size, _EDGE * width / size
        crop[:_EDGE] = _by_pillow(image, (left, top, right, top + high), (size, _EDGE))
        crop[-_EDGE:] = _by_pillow(image, (left, bottom - high, right, bottom), (size, _EDGE))
        crop[:, :_EDGE] = _by_pillow(image, (left, top, left + wide, bottom), (_EDGE, size))
        crop[:, -_EDGE:] = _by_pillow(image, (right - wide, top, right, bottom), (_EDGE, size))
    return cv2.flip(crop, 1) if flip else crop  # type: ignore[return-value]


def _by_pillow(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Resize (left, top, right, bottom) to (width, height)."""
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=None))


def distort(
    crop: npt.NDArray[np.uint8], colour: npt.NDArray[np.float32], blur_sigma: float, solarize: bool
) -> npt.NDArray[np.uint8]:
    """Apply the affine colour map, the Gaussian blur and solarize; rounded to uint8 after each.

    Args:
        crop: uint8 [size, size, 3].
        colour: float32 [3, 4].
        blur_sigma: in pixels, 0 for none; nine taps, edges reflected without repeating the border.
        solarize: invert values >= 128.

    Returns:
        uint8 [size, size, 3].
    """
    if not np.array_equal(colour, _IDENTITY):
        crop = cv2.transform(crop, colour)  # type: ignore[assignment]
    if blur_sigma > 0:
        # cv2.GaussianBlur would round the taps to 1/256; this one is in float32, and faster.
        taps = cv2.getGaussianKernel(BLUR_TAPS, blur_sigma, cv2.CV_32F)
        crop = cv2.sepFilter2D(crop, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101)  # type: ignore[assignment]
    return cv2.LUT(crop, _SOLARIZED) if solarize else crop  # type: ignore[return-value]
