"""Crops in plain torch, on CPU or GPU: DALI's conventions to the letter; the reference in tests.

Each output pixel is a weighted sum over a few input pixels, one axis after the other, as an embedding bag: a
gather of rows with per-row weights. The order of every sum is fixed, so a crop does not depend on its batch,
and no matrix unit rounds the weights to TF32.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pipeline.cpu_crops import BLUR_TAPS, SOLARIZE_THRESHOLD, decode
from pipeline.crops import BackendOptions, CropRequest, Crops, CropWork, finished
from pipeline.plan import CropPlan

_KEYS_A = -0.5
_KEYS_SUPPORT = 2.0

# What a GPU crops at once: enough images to fill it, few enough padded pixels for its memory.
_GPU_IMAGES = 16
_GPU_PIXELS = _GPU_IMAGES << 20


@dataclass(frozen=True)
class Taps:
    """Input pixels of each of `s` output pixels of `c` crops along one axis, and their weights."""

    index: Int64[Tensor, "c s k"]
    weight: Float[Tensor, "c s k"]


def cubic_taps(
    start: Float[Tensor, " c"], end: Float[Tensor, " c"], length: Int64[Tensor, " c"], size: int, num_taps: int
) -> Taps:
    """Which input pixels make each output pixel along one axis, and with what weights.

    Keys' cubic kernel with a = -0.5, widened by the scale when shrinking; positions beyond the image are
    clamped to its edge (the convention of DALI's resize with a region of interest).

    Args:
        start: first edge of each region, float64; beyond `end` for a mirrored one.
        end: last edge of each region, float64.
        length: pixels of the whole image along this axis.
        size: output pixels.
        num_taps: at least `taps_needed` of the longest region; more only adds zeros.

    Returns:
        Indices and weights, which sum to one.
    """
    scale = (end - start) / size
    width = scale.abs().clamp_min(1.0)
    places = torch.arange(size, device=start.device, dtype=torch.float64)
    centre = start[:, None] + (places + 0.5) * scale[:, None]
    first = torch.floor(centre - _KEYS_SUPPORT * width[:, None])
    pixel = first[..., None] + torch.arange(num_taps, device=start.device)
    t = ((pixel + 0.5 - centre[..., None]) / width[:, None, None]).abs()
    a = _KEYS_A
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weight = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    # Summed tap by tap: a reduction's order would depend on the number of taps, and so on the batch.
    total = torch.zeros_like(centre)
    for tap in weight.unbind(-1):
        total = total + tap
    weight = weight / total[..., None]
    index = torch.minimum(pixel.long().clamp_min(0), (length - 1)[:, None, None])
    return Taps(index, weight.float())


def taps_needed(longest: int, size: int) -> int:
    """Taps that cover the kernel of a region of that many pixels."""
    return math.ceil(2 * _KEYS_SUPPORT * max(1.0, longest / size)) + 1


def resample(
    images: Float[Tensor, "n h w 3"],
    which: Int64[Tensor, " c"],
    rows: Taps,
    columns: Taps,
) -> UInt8[Tensor, "c s s 3"]:
    """Resize regions of images, rows first, with taps from `cubic_taps`.

    Args:
        images: float32, padded to a common size.
        which: image of each crop.
        rows: along the height.
        columns: along the width.

    Returns:
        Crops, rounded to uint8.
    """
    n, h, w, _ = images.shape
    c, size, _ = rows.index.shape
    index = (rows.index + (which * h)[:, None, None]).reshape(c * size, -1)
    tall = F.embedding_bag(
        index, images.reshape(n * h, w * 3), per_sample_weights=rows.weight.reshape(c * size, -1), mode="sum"
    )
    wide = tall.reshape(c, size, w, 3).transpose(1, 2).reshape(c * w, size * 3)  # [c*w, s*3]
    index = (columns.index + (torch.arange(c, device=which.device) * w)[:, None, None]).reshape(c * size, -1)
    crops = F.embedding_bag(index, wide, per_sample_weights=columns.weight.reshape(c * size, -1), mode="sum")
    return _round(crops.reshape(c, size, size, 3).transpose(1, 2)).to(torch.uint8).contiguous()


def distort(
    crops: UInt8[Tensor, "c s s 3"],
    colour: Float[Tensor, "c 3 4"],
    blur_sigma: Float[Tensor, " c"],
    solarize: Tensor,
) -> UInt8[Tensor, "c s s 3"]:
    """Apply the affine colour map, Gaussian blur (nine taps, reflected edges) and solarize, rounding between.

    Args:
        crops: uint8.
        colour: the last column is added.
        blur_sigma: in pixels, 0 for none.
        solarize: bool [c], invert values >= 128.
    """
    x = crops.float()
    red, green, blue = x.unbind(-1)
    c = colour[:, None, None]
    x = _round(
        torch.stack(
            [red * c[..., i, 0] + green * c[..., i, 1] + blue * c[..., i, 2] + c[..., i, 3] for i in range(3)], -1
        )
    )
    x = torch.where((blur_sigma > 0)[:, None, None, None], _round(_blur(x, blur_sigma)), x)
    x = torch.where(solarize[:, None, None, None] & (x >= SOLARIZE_THRESHOLD), 255 - x, x)
    return x.to(torch.uint8)


def _blur(x: Float[Tensor, "c s s 3"], sigma: Float[Tensor, " c"]) -> Float[Tensor, "c s s 3"]:
    radius, size = BLUR_TAPS // 2, x.shape[1]
    offset = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    # A sigma of 0 is not used; 1 keeps its taps finite.
    kernel = torch.exp(-0.5 * (offset / torch.where(sigma > 0, sigma, 1.0)[:, None]) ** 2)
    kernel = kernel / kernel.sum(-1, keepdim=True)  # [c, 9]
    place = torch.arange(-radius, size + radius, device=x.device).abs()
    place = torch.where(place >= size, 2 * (size - 1) - place, place)
    for axis in (1, 2):
        padded = x.index_select(axis, place)
        x = sum(
            (padded.narrow(axis, k, size) * kernel[:, k, None, None, None] for k in range(BLUR_TAPS)),
            start=torch.zeros_like(x),
        )
    return x


def _round(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255)


@dataclass
class _InFlight:
    request: CropRequest
    images: list[Future[npt.NDArray[np.uint8]]]


class TorchCrops:
    """A crop backend in torch: decodes on CPU threads, crops on the device."""

    depth = 2

    def __init__(self, work: CropWork, options: BackendOptions) -> None:
        """Start the decoding threads."""
        self._work = work
        self._device = options.device
        self._in_flight: deque[_InFlight] = deque()
        self._pool = ThreadPoolExecutor(options.num_threads, thread_name_prefix="decode")

    def submit(self, request: CropRequest) -> None:
        """Start decoding."""
        pairs = zip(request.jpegs, request.sizes, strict=True)
        images = [self._pool.submit(decode, jpeg, size) for jpeg, size in pairs]
        self._in_flight.append(_InFlight(request, images))

    @torch.no_grad()
    def collect(self) -> Crops:
        """Wait for the oldest request's images and crop them."""
        batch = self._in_flight.popleft()
        images = finished(batch.images)
        w, n, plan = self._work, len(images), batch.request.plan
        g, device = w.num_global, self._device
        global_crops = _empty(g, n, w.global_size, device) if w.distorted else None
        local_crops = _empty(w.num_local, n, w.local_size, device) if w.distorted else None
        clean_crops = _empty(g, n, w.global_size, device) if w.clean else None
        # A GPU takes several images at once; a CPU's caches are best served by one.
        on_gpu = device.type == "cuda"
        for chosen in chunks(batch.request.sizes, *((_GPU_IMAGES, _GPU_PIXELS) if on_gpu else (1, 0))):
            padded, sizes = self._padded([images[i] for i in chosen])
            where = torch.from_numpy(chosen).to(device)
            views = plan[chosen]
            crops = self._resized(padded, sizes, views, range(g), w.global_size)
            if clean_crops is not None:
                clean_crops[:, where] = crops
            if global_crops is not None and local_crops is not None:
                global_crops[:, where] = self._distorted(crops, views, range(g))
                if w.num_local:
                    local = range(g, w.num_views)
                    crops = self._resized(padded, sizes, views, local, w.local_size)
                    local_crops[:, where] = self._distorted(crops, views, local)
        return Crops(*(None if c is None else c.flatten(0, 1) for c in (global_crops, local_crops, clean_crops)))

    def reset(self) -> None:
        """Cancel what has not begun."""
        for batch in self._in_flight:
            for future in batch.images:
                future.cancel()
        self._in_flight.clear()

    def close(self) -> None:
        """Stop the threads."""
        self.reset()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _padded(self, images: Sequence[npt.NDArray[np.uint8]]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Images on the device, zero-padded to a common size, float32 [n, h, w, 3], and their sizes."""
        sizes = np.array([image.shape[:2] for image in images])
        height, width = sizes.max(0).tolist()
        on_gpu = self._device.type == "cuda"
        padded = torch.zeros(len(images), height, width, 3, dtype=torch.uint8, pin_memory=on_gpu)
        for row, image in zip(padded.numpy(), images, strict=True):
            row[: image.shape[0], : image.shape[1]] = image
        return padded.to(self._device, non_blocking=True).float(), sizes

    def _resized(self, images: Tensor, sizes: npt.NDArray[np.int64], plan: CropPlan, views: range, side: int) -> Tensor:
        """Clean crops of some views, uint8 [v, n, side, side, 3]."""
        n, v, device = len(sizes), len(views), self._device
        boxes = plan.boxes[:, views.start : views.stop].swapaxes(0, 1).reshape(v * n, 4)
        flips = plan.flips[:, views.start : views.stop].swapaxes(0, 1).reshape(-1)
        top, left, height, width = boxes.T
        right = left + width
        edges = np.stack([top, top + height, np.where(flips, right, left), np.where(flips, left, right)])
        start_y, end_y, start_x, end_x = torch.from_numpy(edges.astype(np.float64)).to(device)
        lengths = torch.from_numpy(np.tile(sizes, (v, 1))).to(device)
        num_taps = taps_needed(int(boxes[:, 2:].max()), side)
        rows = cubic_taps(start_y, end_y, lengths[:, 0], side, num_taps)
        columns = cubic_taps(start_x, end_x, lengths[:, 1], side, num_taps)
        crops = resample(images, torch.arange(n, device=device).repeat(v), rows, columns)
        return crops.reshape(v, n, side, side, 3)

    def _distorted(self, crops: Tensor, plan: CropPlan, views: range) -> Tensor:
        chosen = slice(views.start, views.stop)
        parameters = (
            torch.from_numpy(np.ascontiguousarray(part[:, chosen].swapaxes(0, 1))).to(self._device).flatten(0, 1)
            for part in (plan.colour, plan.blur_sigma, plan.solarize)
        )
        return distort(crops.flatten(0, 1), *parameters).reshape(crops.shape)


def chunks(sizes: npt.NDArray[np.int64], most_images: int, most_pixels: int) -> list[npt.NDArray[np.int64]]:
    """Group images of like size, to be padded to a common one.

    Args:
        sizes: height and width, [n, 2].
        most_images: of a group.
        most_pixels: of a group, padding included; only a single image may have more.

    Returns:
        Positions of each group's images.
    """
    groups: list[list[int]] = []
    height = width = 0
    for i in np.argsort(sizes.prod(1), kind="stable").tolist():
        height, width = max(height, int(sizes[i, 0])), max(width, int(sizes[i, 1]))
        more = len(groups[-1]) + 1 if groups else 0
        if 0 < more <= most_images and more * height * width <= most_pixels:
            groups[-1].append(i)
        else:
            groups.append([i])
            height, width = sizes[i].tolist()
    return [np.array(group) for group in groups]


def _empty(views: int, n: int, side: int, device: torch.device) -> Tensor:
    return torch.empty(views, n, side, side, 3, dtype=torch.uint8, device=device)
