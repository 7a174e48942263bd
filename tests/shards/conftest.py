"""Images and source folders that the tests of shards share."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from shards.manifest import RowFlag

DATA = Path(__file__).parent / "data"
Pixels = npt.NDArray[np.uint8]


def photo(height: int, width: int, seed: int = 0) -> Pixels:
    """A smooth colour image with some detail, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (4, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth.astype(int) + rng.integers(-2, 3, smooth.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: Pixels, quality: int = 90, sampling: str = "420") -> bytes:
    """A baseline JPEG of RGB pixels."""
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=sampling)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """An image in a format of Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_orientation(data: bytes, orientation: int) -> bytes:
    """A JPEG with an EXIF block that holds an orientation alone."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def without_segment(data: bytes, marker: int) -> bytes:
    """A JPEG without its first segment of that marker."""
    start = data.index(bytes([0xFF, marker]))
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


@pytest.fixture(name="make_photo", scope="session")
def make_photo_fixture() -> Callable[..., Pixels]:
    return photo


@pytest.fixture(name="make_jpeg", scope="session")
def make_jpeg_fixture() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture(scope="session")
def make_class_folders() -> Callable[[Path, int, int], dict[str, bytes]]:
    """Writes ImageNet's layout, `n.../n..._i.JPEG`, of small JPEGs; returns bytes by relative name."""

    def make(root: Path, num_classes: int, images_a_class: int) -> dict[str, bytes]:
        files = {}
        rng = np.random.default_rng(num_classes)
        for number in range(num_classes):
            wnid = f"n{1440764 + 37 * number:08d}"
            (root / wnid).mkdir(parents=True)
            for image in range(images_a_class):
                height, width = rng.integers(16, 49, 2).tolist()
                name = f"{wnid}/{wnid}_{image * 7}.JPEG"
                files[name] = jpeg(photo(height, width, 1000 * number + image))
                (root / name).write_bytes(files[name])
        return files

    return make


@dataclass(frozen=True)
class OddFile:
    """A file of the corpus and what is to become of it.

    `outcome` is "verbatim", "re-encoded" or "rejected"; `detail` is, of a re-encoded file, what it is
    recorded to have been, and of a rejected one, a part of the reason. `pixels`: what a re-encoded image
    shows, `lossless` where that is what a decoder reads from it to the bit.
    """

    data: bytes
    outcome: str
    detail: str = ""
    flags: RowFlag = RowFlag(0)  # noqa: RUF009  (an enum is immutable)
    pixels: Pixels | None = None
    lossless: bool = False


def _cmyk() -> tuple[bytes, bytes, bytes, Pixels]:
    """One picture as CMYK inverted by Adobe's rule, as plain CMYK and as YCCK, and what it shows in RGB."""
    image = Image.fromarray(photo(40, 56)).convert("CMYK")
    shown = np.asarray(image.convert("RGB"))
    adobe = saved(image, "JPEG", quality=98)
    plain = saved(ImageChops.invert(image), "JPEG", quality=98)  # Pillow inverts again what it saves
    inverted = np.ascontiguousarray(255 - np.asarray(image))
    ycck = simplejpeg.encode_jpeg(inverted, quality=98, colorspace="CMYK", colorsubsampling="444")
    return adobe, without_segment(plain, 0xEE), ycck, shown


def _verbatim_files() -> dict[str, OddFile]:
    image, flags = photo(40, 56), RowFlag
    pil, gray = Image.fromarray(image), Image.fromarray(image).convert("L")
    base = jpeg(image)
    samplings = ("444", "422", "420", "440", "411")
    return {f"sampling_{name}": OddFile(jpeg(image, sampling=name), "verbatim") for name in samplings} | {
        "gray": OddFile(saved(gray, "JPEG", quality=90), "verbatim", flags=flags.GRAY),
        "progressive": OddFile(saved(pil, "JPEG", progressive=True), "verbatim", flags=flags.PROGRESSIVE),
        "progressive_gray": OddFile(
            saved(gray, "JPEG", progressive=True), "verbatim", flags=flags.PROGRESSIVE | flags.GRAY
        ),
        "restart_markers": OddFile(saved(pil, "JPEG", restart_marker_blocks=1), "verbatim"),
        "orientation_1": OddFile(with_orientation(base, 1), "verbatim"),
        "orientation_invalid": OddFile(with_orientation(base, 9), "verbatim"),
        "exif_damaged": OddFile(with_orientation(base, 6).replace(b"MM\0*", b"MX\0*"), "verbatim"),
        "icc_profile": OddFile(saved(pil, "JPEG", icc_profile=bytes(500)), "verbatim"),
        "garbage_after_end": OddFile(base + b"\0" * 40 + b"tail", "verbatim", flags=flags.TRAILING_BYTES),
        "two_images": OddFile(base + jpeg(photo(9, 9)), "verbatim"),
        "one_pixel": OddFile(jpeg(image[:1, :1]), "verbatim"),
        "1x5000": OddFile(jpeg(photo(5000, 1)), "verbatim"),
        "5000x1": OddFile(jpeg(photo(1, 5000)), "verbatim"),
        "12000_wide": OddFile(jpeg(photo(24, 12000)), "verbatim"),
        "quality_100": OddFile(jpeg(image, 100, "444"), "verbatim"),
    }


def _reencoded_files() -> dict[str, OddFile]:
    image = photo(40, 56)
    pil = Image.fromarray(image)
    gray, alpha = pil.convert("L"), pil.convert("RGBA")
    transparent = np.asarray(alpha).copy()
    transparent[:, :28, 3] = 0
    over_white = image.copy()
    over_white[:, :28] = 255
    wide = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29
    adobe, plain, ycck, shown = _cmyk()
    base = jpeg(image)
    deep = np.random.default_rng(1).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    y, x = np.mgrid[0:16, 0:24]
    gradient = np.stack([x * 10, y * 15, (x + y) * 6], -1).astype(np.uint8)
    palette = pil.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    # A photograph of 72 Mpx, over the limit: halved.
    huge = simplejpeg.encode_jpeg(np.full((6000, 12000, 1), 90, np.uint8), colorspace="GRAY", colorsubsampling="Gray")
    files = {
        f"orientation_{number}": OddFile(
            with_orientation(jpeg(image, 98, "444"), number),
            "re-encoded",
            "JPEG with an EXIF orientation",
            RowFlag.ROTATED,
            pixels=_oriented(simplejpeg.decode_jpeg(jpeg(image, 98, "444")), number),
            lossless=True,
        )
        for number in range(2, 9)
    }
    plainly = {
        "cmyk_adobe_inverted": (adobe, "CMYK JPEG", shown),
        "cmyk_plain": (plain, "CMYK JPEG", shown),
        "ycck": (ycck, "CMYK JPEG", shown),
        "rgb_jpeg": (saved(pil, "JPEG", quality=98, keep_rgb=True), "RGB JPEG", image),
        "arithmetic": ((DATA / "arithmetic.jpg").read_bytes(), "arithmetic-coded JPEG", gradient),
        "arithmetic_progressive": (
            (DATA / "arithmetic_progressive.jpg").read_bytes(),
            "arithmetic-coded progressive JPEG",
            gradient,
        ),
        "unusual_sampling": (
            (DATA / "unusual_sampling.jpg").read_bytes(),
            "JPEG of unusual sampling",
            gradient,
        ),
        "extended_sequential": (
            (DATA / "extended_sequential.jpg").read_bytes(),
            "extended sequential JPEG",
            None,
        ),
        "png": (saved(pil, "PNG"), "PNG", image),
        "png_palette": (saved(palette, "PNG"), "PNG", np.asarray(palette.convert("RGB"))),
        "png_alpha": (saved(Image.fromarray(transparent), "PNG"), "PNG", over_white),
        "png_gray_alpha": (saved(Image.fromarray(transparent).convert("LA"), "PNG"), "PNG", None),
        "png_16_bit": (saved(Image.fromarray(wide), "PNG"), "PNG", _gray_to_rgb(np.round(wide / 257))),
        "png_1_bit": (saved(gray.convert("1"), "PNG"), "PNG", np.asarray(gray.convert("1").convert("RGB"))),
        "png_rotated": (saved(pil, "PNG", exif=_exif(6)), "PNG", _oriented(image, 6)),
        "png_48_bit": (cv2.imencode(".png", deep)[1].tobytes(), "PNG", (deep[..., ::-1] >> 8).astype(np.uint8)),
        # What is wrong beside the picture is no fault of the picture.
        "tiff_resolution": (_tiff_with_two_units(image), "TIFF", image),
        "png_cut_exif": (saved(pil, "PNG", exif=_exif(6)[:20]), "PNG", image),
        "png_bad_text_checksum": (_flipped(saved(pil, "PNG", pnginfo=_text()), b"tEXtkey"), "PNG", image),
        "png_huge_text": (saved(pil, "PNG", pnginfo=_text(bytes(1 << 21))), "PNG", image),
        "pgm_16_bit": (saved(Image.fromarray(wide), "PPM"), "PPM", _gray_to_rgb(np.round(wide / 257))),
        "pgm_12_bit": (b"P5 2 1 4095 " + b"\x0f\xff\0\0", "PPM", np.array([[[255] * 3, [0] * 3]], np.uint8)),
        "ppm": (saved(pil, "PPM"), "PPM", image),
        "jpeg_2000": (saved(pil, "JPEG2000", irreversible=False), "JPEG2000", image),
        "gif": (saved(palette, "GIF"), "GIF", np.asarray(palette.convert("RGB"))),
        "gif_animated": (saved(palette, "GIF", save_all=True, append_images=[gray.convert("P")]), "GIF", None),
        "webp": (saved(pil, "WEBP", lossless=True), "WEBP", image),
        "bmp": (saved(pil, "BMP"), "BMP", image),
        "tiff": (saved(pil, "TIFF"), "TIFF", image),
        "tiff_16_bit": (saved(Image.fromarray(wide), "TIFF"), "TIFF", _gray_to_rgb(np.round(wide / 257))),
    }
    files |= {
        name: OddFile(
            data,
            "re-encoded",
            origin,
            pixels=pixels,
            lossless=not origin.endswith(("JPEG", "JPEG of unusual sampling")),
        )
        for name, (data, origin, pixels) in plainly.items()
    }
    files |= {
        name: OddFile(
            data, "re-encoded", "JPEG with wrong header fields", pixels=simplejpeg.decode_jpeg(base), lossless=True
        )
        for name, data in {
            "unknown_jfif_revision": base.replace(b"JFIF\0\1\1", b"JFIF\0\0\0"),
            "scan_of_a_phone": _with_scan_parameters(base, b"\0\0\0"),
            "scan_of_another_phone": _with_scan_parameters(base, b"\1\x3e\x11"),
        }.items()
    }
    files |= {
        name: OddFile(
            data,
            "re-encoded",
            f"{form} over the size limit",
            RowFlag.DOWNSCALED,
            np.full((shape[0], shape[1], 3), 90, np.uint8),
            lossless=True,
        )
        for name, form, data, shape in (
            ("png_40000_wide", "PNG", saved(Image.new("L", (40000, 9), 90), "PNG"), (5, 20000)),
            ("png_of_palette", "PNG", saved(Image.new("L", (40000, 9), 90).convert("P"), "PNG"), (5, 20000)),
            ("png_of_alpha", "PNG", saved(Image.new("LA", (40000, 9), (90, 255)), "PNG"), (5, 20000)),
            ("bmp_70000_high", "BMP", saved(Image.new("L", (9, 70000), 90), "BMP"), (17500, 3)),
        )
    }
    files["72_megapixels"] = OddFile(
        huge,
        "re-encoded",
        "JPEG over the size limit",
        RowFlag.DOWNSCALED,
        np.full((3000, 6000, 3), 90, np.uint8),
        lossless=True,
    )
    return files


def _rejected_files() -> dict[str, OddFile]:
    image = photo(40, 56)
    base, large, png = jpeg(image), jpeg(photo(120, 160)), saved(Image.fromarray(image), "PNG")
    progressive = saved(Image.fromarray(image), "JPEG", progressive=True)
    frame, scan = base.index(b"\xff\xc0"), base.index(b"\xff\xda")
    reasons = {
        "stray_bytes_before_scan": (base[:scan] + bytes(5) + base[scan:], "extraneous bytes"),
        "stray_bytes_after_start": (base[:2] + b"\r\nx" + base[2:], "extraneous bytes"),
        "padding_before_end_mark": (base[:-2] + bytes(50) + base[-2:], "extraneous bytes"),
        "without_end_mark": (base[:-2], "Premature end of JPEG file"),
        "empty": (b"", "empty file"),
        "half": (large[: len(large) // 2], "Premature end of JPEG file"),
        "scan_cut_by_one_block": (base[:-60] + b"\xff\xd9", "Corrupt JPEG data: premature end"),
        "half_and_zeros": (large[: len(large) // 2] + bytes(len(large)) + b"\xff\xd9", "Corrupt JPEG data"),
        "scan_that_goes_on": (base[:-2] + large[-90:], "extraneous bytes before marker 0xd9"),
        "progressive_without_end_mark": (progressive[:-2], "Premature end of JPEG file"),
        "header_alone": (base[:100], "markers are not well formed"),
        "start_mark_alone": (base[:2], "markers are not well formed"),
        "bit_rot_in_scan": (_bit_rot(base), "Corrupt JPEG data"),
        "12_bit": (base[: frame + 4] + b"\x0c" + base[frame + 5 :], "12-bit JPEG"),
        "height_0": (base[: frame + 5] + b"\0\0" + base[frame + 7 :], "no pixels"),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "no image: begins with b'<!DOCTYPE"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n", "no image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        "zeros": (bytes(4096), "no image"),
        "png_half": (png[: len(png) // 2], "damaged"),
        "png_bad_checksum": (png[:60] + bytes([png[60] ^ 1]) + png[61:], "damaged PNG: broken data stream"),
        "gif_cut": (saved(Image.fromarray(image).convert("P"), "GIF")[:900], "damaged"),
        "float_tiff": (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "mode F"),
        "png_bad_header": (
            png[:20] + b"\xff" + png[21:],
            "damaged PNG: broken PNG file (bad header checksum in b'IHDR')",
        ),
        "png_broken_chunk": (png.replace(b"IDAT", b"ID\0T"), r"damaged PNG: broken PNG file (chunk b'ID\x00T')"),
        "png_no_such_size": (saved(Image.new("1", (300000, 8)), "PNG"), "too large: 300000x8; at 1/8 still over"),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC or another film format, which is not read: convert"),
    }
    return {name: OddFile(data, "rejected", reason) for name, (data, reason) in reasons.items()}


def _bit_rot(data: bytes) -> bytes:
    """Flip one bit of the scan such that the decoder can notice; the first place is taken."""
    scan = data.index(b"\xff\xda") + 14
    for place in range(scan, len(data) - 2):
        rotten = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        try:
            simplejpeg.decode_jpeg(rotten, strict=True)
        except ValueError:
            return rotten
    raise AssertionError("no bit of the scan matters")


def _flipped(data: bytes, place: bytes) -> bytes:
    """A file with one bit flipped behind a place."""
    end = data.index(place) + len(place)
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


def _text(value: bytes = b"value") -> PngInfo:
    info = PngInfo()
    info.add_text("key", value.decode(), zip=len(value) > 100)
    return info


def _tiff_with_two_units(pixels: Pixels) -> bytes:
    """A TIFF whose tag of the unit of resolution holds two values, of which Pillow warns."""
    data = bytearray(saved(Image.fromarray(pixels), "TIFF", resolution_unit=2, dpi=(72, 72)))
    entry = data.index(struct.pack("<HHI", 296, 3, 1))
    data[entry + 4] = 2
    return bytes(data)


def _with_scan_parameters(data: bytes, parameters: bytes) -> bytes:
    """A baseline JPEG whose scan states another part of the spectrum than all of it."""
    return data.replace(b"\0\x3f\0", parameters)


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _oriented(pixels: Pixels, orientation: int) -> Pixels:
    """What a viewer shows, by Pillow's named transposes, from the EXIF standard's table."""
    transpose = Image.Transpose
    operation = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }[orientation]
    return np.asarray(Image.fromarray(pixels).transpose(operation))


def _gray_to_rgb(values: npt.NDArray[np.floating[Any]]) -> Pixels:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


@pytest.fixture(scope="session")
def odd_files() -> dict[str, OddFile]:
    """The corpus: odd files by name, with what each becomes."""
    return _verbatim_files() | _reencoded_files() | _rejected_files()
