"""What others do to an image: two global and eight local crops by torchvision and by Pillow alone."""

from __future__ import annotations

import io
import math
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from pipeline.augmentation import Augmentation
from pipeline.batch import IMAGENET_MEAN, IMAGENET_STD


class TorchvisionRecipe:
    """The multi-crop transform of DINOv3's published code, composed of torchvision v2's public transforms.

    Random resized crop (bicubic) and flip of the PIL image; colour jitter with probability 0.8, gray 0.2; blur
    with the stated probability 1, 0.1, 0.5, as our backends, and solarize 0.2 on the second global crop; then a
    tensor, and with `normalise` also float32 and the ImageNet statistics, as published.
    """

    def __init__(self, a: Augmentation, *, normalise: bool) -> None:
        """Compose the three chains of transforms."""
        from torchvision.transforms import v2

        jitter = v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
        colour = [v2.RandomApply([jitter], p=a.jitter_prob), v2.RandomGrayscale(p=a.gray_prob)]
        end: list[Any] = [v2.ToImage()]
        if normalise:
            mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
            end += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=mean, std=std)]

        def chain(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
            crop = v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC)
            blurred = v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=a.blur_sigma)], p=blur)
            parts = [crop, v2.RandomHorizontalFlip(p=a.flip_prob), *colour, blurred]
            if solarize:
                parts.append(v2.RandomSolarize(threshold=128, p=solarize))
            return v2.Compose(parts + end)

        pairs = zip(a.blur_prob_global, a.solarize_prob_global, strict=True)
        self._global = [chain(a.global_crops_size, a.global_crops_scale, b, s) for b, s in pairs]
        self._local = chain(a.local_crops_size, a.local_crops_scale, a.blur_prob_local, 0.0)
        self._num_local = a.num_local_crops

    def __call__(self, jpeg: bytes) -> list[Tensor]:
        """Decode an image and make its crops."""
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        return [t(image) for t in self._global] + [self._local(image) for _ in range(self._num_local)]


class PillowRecipe:
    """The same transform by Pillow alone: box resize, ImageEnhance, HSV hue, GaussianBlur, solarize; uint8."""

    def __init__(self, a: Augmentation) -> None:
        """Keep the parameters."""
        self._a = a

    def __call__(self, jpeg: bytes) -> list[npt.NDArray[np.uint8]]:
        """Decode an image and make its crops."""
        a = self._a
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        crops = []
        for blur, solarize in zip(a.blur_prob_global, a.solarize_prob_global, strict=True):
            crop = self._resized(image, a.global_crops_size, a.global_crops_scale)
            crops.append(np.asarray(self._distorted(crop, blur, solarize)))
        for _ in range(a.num_local_crops):
            crop = self._resized(image, a.local_crops_size, a.local_crops_scale)
            crops.append(np.asarray(self._distorted(crop, a.blur_prob_local, 0.0)))
        return crops

    def _resized(self, image: Image.Image, size: int, scale: tuple[float, float]) -> Image.Image:
        width, height = image.size
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(*(math.log(r) for r in self._a.aspect_ratio)))
        w = min(width, round(math.sqrt(area * ratio)))
        h = min(height, round(math.sqrt(area / ratio)))
        left, top = random.randint(0, width - w), random.randint(0, height - h)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        return ImageOps.mirror(crop) if random.random() < self._a.flip_prob else crop

    def _distorted(self, crop: Image.Image, blur: float, solarize: float) -> Image.Image:
        a = self._a
        if random.random() < a.jitter_prob:
            crop = ImageEnhance.Brightness(crop).enhance(1 + random.uniform(-a.brightness, a.brightness))
            crop = ImageEnhance.Contrast(crop).enhance(1 + random.uniform(-a.contrast, a.contrast))
            crop = ImageEnhance.Color(crop).enhance(1 + random.uniform(-a.saturation, a.saturation))
            turn = round(255 * random.uniform(-a.hue, a.hue))
            hue, saturation, value = crop.convert("HSV").split()
            hue = hue.point([(x + turn) % 256 for x in range(256)])
            crop = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        if random.random() < a.gray_prob:
            crop = crop.convert("L").convert("RGB")
        if random.random() < blur:
            crop = crop.filter(ImageFilter.GaussianBlur(random.uniform(*a.blur_sigma)))
        return ImageOps.solarize(crop, 128) if random.random() < solarize else crop
