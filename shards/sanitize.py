"""Decide once, strictly, what becomes of an image: kept verbatim, re-encoded, or rejected with the reason."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg
from PIL import Image, ImageChops, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from shards.manifest import RowFlag

MAX_SIDE = 32767  # heights and widths travel in 15 bits of the crop specs
MAX_PIXELS = 1 << 26  # 67 Mpx, 200 MB as RGB: what one decode may cost in packing and in every epoch
MAX_FILE_BYTES = 1 << 28
REENCODE_QUALITY = 95

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
BASELINE, PROGRESSIVE = 0xC0, 0xC2
_OTHER_PROCESSES = {
    0xC1: "extended sequential",
    0xC3: "lossless",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded progressive",
    0xCB: "arithmetic-coded lossless",
}
_STANDALONE = {0x00, 0x01, *range(0xD0, 0xD8)}  # markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # DHT, JPG, DAC lie in their range
_SOS, _APP0, _APP1, _APP14 = 0xDA, 0xE0, 0xE1, 0xEE
_ORIENTATION_TAG = 0x0112
_PNG_START, _PNG_OF_PIXELS = b"\x89PNG\r\n\x1a\n", {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}

_UNNAMED_SAMPLING = "Could not determine subsampling level"  # turbojpeg's words

# Formats that Pillow may open. Others that it knows start programs (EPS) or are no photographs.
_OTHER_FORMATS = ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_SCALE_FACTORS = (1, 2, 4, 8)  # tried in this order: the first that brings an image inside the limits
_MAX_WHOLE_PIXELS = 8 * MAX_PIXELS  # of formats that are decoded at full size before they are scaled: 1.6 GB as RGB


class ImageRejected(ValueError):
    """An image that cannot be stored; the message is the reason."""


class ImageWarned(ImageRejected):
    """A JPEG that shows a picture, but of which the decoder warns as it does of damage."""


@dataclass(frozen=True)
class StoredImage:
    """What goes into a shard: the JPEG, its size in pixels, its flags and what it was re-encoded from."""

    jpeg: bytes
    height: int
    width: int
    flags: RowFlag
    origin: str = ""  # why it was re-encoded, such as "PNG" or "CMYK JPEG"; empty where it was not


def policy_fields(*, keep_warned: bool) -> dict[str, Any]:
    """Return what decides the stored bytes, for the manifest: the limits, the quality, the versions."""
    return {
        "version": 4,
        "max_side": MAX_SIDE,
        "max_pixels": MAX_PIXELS,
        "max_file_bytes": MAX_FILE_BYTES,
        "reencode": f"RGB JPEG q{REENCODE_QUALITY} 4:4:4, EXIF orientation applied, alpha over white",
        "keep_warned": keep_warned,
        "simplejpeg": simplejpeg.__version__,
        "pillow": PIL.__version__,
    }


def sanitise(data: bytes, *, keep_warned: bool = False) -> StoredImage:
    """Return what to store for the bytes of an image file.

    An 8-bit baseline or progressive gray or YCbCr JPEG of orientation 1 that decodes without a warning is
    kept byte for byte. Whatever else decodes cleanly is re-encoded as an RGB JPEG.

    Args:
        data: the file's bytes.
        keep_warned: re-encode a JPEG about whose picture the decoder only warns, as Pillow reads it, instead
            of rejecting it. Damaged pixels may enter.

    Raises:
        ImageRejected: the bytes are no image, are damaged, or are too large.
    """
    if not data:
        raise ImageRejected("empty file (0 bytes)")
    if not data.startswith(SOI):
        return _encode(*_decode_other(data))
    header = _parse_header(data)
    factor = _scale_factor(header.height, header.width)
    try:
        _strict_decode(data, header)
    except ValueError as error:
        mended = _mend_headers(data, header)
        if mended == data:
            return _reencode_by_pillow(data, header, factor, str(error), keep_warned)
        stored = sanitise(mended, keep_warned=keep_warned)
        if stored.origin:
            return stored
        return _encode(_decode_to_rgb(mended, header, factor), "JPEG with wrong header fields")
    origin = _reason_to_reencode(header, factor)
    flags = RowFlag(0)
    if origin:
        if header.orientation != 1:
            flags |= RowFlag.ROTATED
        if factor != 1:
            flags |= RowFlag.DOWNSCALED
        return _encode(_decode_to_rgb(data, header, factor), origin, flags)
    if header.is_gray:
        flags |= RowFlag.GRAY
    if header.process == PROGRESSIVE:
        flags |= RowFlag.PROGRESSIVE
    if not data.endswith(EOI):
        flags |= RowFlag.TRAILING_BYTES
    return StoredImage(data, header.height, header.width, flags)


def _reencode_by_pillow(data: bytes, header: JpegHeader, factor: int, error: str, keep_warned: bool) -> StoredImage:
    """Re-encode what Pillow reads of a JPEG that turbojpeg failed at, or warned of."""
    if _UNNAMED_SAMPLING in error:  # no damage: libjpeg, and so Pillow, reads it
        return _encode(_decode_by_pillow(data, header, factor), "JPEG of unusual sampling")
    try:
        pixels = _decode_by_pillow(data, header, factor)
    except ImageRejected as rejection:
        raise ImageRejected(f"damaged JPEG: {error}") from rejection
    if not keep_warned:
        raise ImageWarned(f"damaged JPEG: {error}")
    return _encode(pixels, "JPEG with a warning", RowFlag.WARNED)


def _reason_to_reencode(header: JpegHeader, factor: int) -> str:
    """Return why a JPEG that decodes cleanly cannot be kept as it is; empty where it can."""
    components = len(header.component_ids)
    if components == 4:
        return "CMYK JPEG"
    if header.process not in (BASELINE, PROGRESSIVE):
        return f"{_OTHER_PROCESSES.get(header.process, hex(header.process))} JPEG"
    if not (header.is_gray or header.is_ycbcr):
        return "RGB JPEG" if components == 3 else f"{components}-component JPEG"
    if header.orientation != 1:
        return "JPEG with an EXIF orientation"
    return "JPEG over the size limit" if factor != 1 else ""


def _strict_decode(data: bytes, header: JpegHeader) -> None:
    """Decode every coefficient; ValueError with the decoder's message where it failed or warned.

    All of libjpeg's warnings come from markers and entropy decoding, none from the transform or the colour
    conversion; so the check decodes at 1/8 scale, where those cost next to nothing.
    """
    try:
        simplejpeg.decode_jpeg_header(data, strict=True)
    except KeyError as error:  # 4:4:1: turbojpeg has a name for it, simplejpeg none
        raise ValueError(_UNNAMED_SAMPLING) from error
    if len(header.component_ids) == 4:
        colorspace = "CMYK"
    else:
        colorspace = "GRAY" if header.is_gray or header.is_ycbcr else "RGB"
    simplejpeg.decode_jpeg(data, colorspace=colorspace, min_height=1, min_width=1, min_factor=8, strict=True)


def _scale_factor(height: int, width: int) -> int:
    """Return the smallest factor of _SCALE_FACTORS that brings an image inside the limits."""
    if height == 0 or width == 0:
        raise ImageRejected(f"no pixels: {width}x{height}")
    for factor in _SCALE_FACTORS:
        scaled_height, scaled_width = -(-height // factor), -(-width // factor)
        if max(scaled_height, scaled_width) <= MAX_SIDE and scaled_height * scaled_width <= MAX_PIXELS:
            return factor
    raise ImageRejected(f"too large: {width}x{height}; at 1/8 still over {MAX_PIXELS} pixels")


def _decode_to_rgb(data: bytes, header: JpegHeader, factor: int) -> npt.NDArray[np.uint8]:
    if len(header.component_ids) == 4:
        return _decode_by_pillow(data, header, factor)
    height, width = -(-header.height // factor), -(-header.width // factor)
    pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=height, min_width=width, strict=True)
    return _orient(pixels, header.orientation)


def _decode_by_pillow(data: bytes, header: JpegHeader, factor: int) -> npt.NDArray[np.uint8]:
    """Decode a JPEG that turbojpeg does not convert to RGB, such as CMYK, inverted by Adobe's rule or not."""
    if factor != 1:
        raise ImageRejected(f"too large: {header.width}x{header.height}, and only decodable at full size")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            image: Image.Image = opened
            # Pillow takes every CMYK file for inverted. By Adobe's rule only those with its marker are.
            if image.mode == "CMYK" and header.adobe_transform is None:
                image = ImageChops.invert(image)
            pixels = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:  # whose message holds an address in memory
        raise ImageRejected("damaged JPEG: Pillow cannot identify it") from error
    except (OSError, SyntaxError) as error:
        raise ImageRejected(f"damaged JPEG: {error}") from error
    return _orient(pixels, header.orientation)


def _orient(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Apply an EXIF orientation to pixels [h, w, 3]."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode_other(data: bytes) -> tuple[npt.NDArray[np.uint8], str, RowFlag]:
    """Decode the first frame of an image that is no JPEG; return RGB [h, w, 3], the format's name and flags."""
    try:
        return _decode_by_format(data)
    except ImageRejected as rejection:
        # Damage to what a PNG says beside its picture is none to the picture.
        pixels_alone = _png_of_pixels(data)
        if pixels_alone != data:
            with suppress(ImageRejected):
                return _decode_by_format(pixels_alone)
        raise rejection


def _decode_by_format(data: bytes) -> tuple[npt.NDArray[np.uint8], str, RowFlag]:
    origin = "PNG" if data.startswith(_PNG_START) else ""
    try:
        with _open(data, _OTHER_FORMATS) as image:
            origin = str(image.format)
            factor = _scale_factor(image.height, image.width)
            if image.width * image.height > _MAX_WHOLE_PIXELS:
                raise ImageRejected(f"too large: {image.width}x{image.height} {origin}, only decodable at full size")
            image.load()
            early = factor != 1 and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK")  # the rest only as RGB
            rgb = _to_rgb(image.reduce(factor) if early else image)
            pixels = _orient(np.asarray(rgb if early or factor == 1 else rgb.reduce(factor)), _orientation(image))
    except ImageRejected:
        raise
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp":
            raise ImageRejected("HEIC or another film format, which is not read: convert it to JPEG") from error
        raise ImageRejected(f"no image: begins with {data[:16]!r}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageRejected(f"damaged {origin}: {error}" if origin else f"damaged: {error}") from error
    if factor != 1:
        return pixels, f"{origin} over the size limit", RowFlag.DOWNSCALED
    return pixels, origin, RowFlag(0)


@contextmanager
def _open(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open an image of any size, in silence: what Pillow only warns of are metadata, such as a tag of a wrong type."""
    limit = Image.MAX_IMAGE_PIXELS
    # Image.open would not tell what is wrong with a chunk.
    png, file = data.startswith(_PNG_START), io.BytesIO(data)
    try:
        Image.MAX_IMAGE_PIXELS = None  # our own limits hold
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PngImageFile(file) if png else Image.open(file, formats=formats) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    """Return the orientation by which Pillow turns an opened image, 1..8; 1 where it cannot read it."""
    try:
        found = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # metadata may be anything, and so is what Pillow raises at them
        return 1
    return next((orientation for orientation in range(2, 9) if orientation == found), 1)


def _png_of_pixels(data: bytes) -> bytes:
    """Return a PNG without the chunks that its pixels do not need; other bytes as they are."""
    if not data.startswith(_PNG_START):
        return data
    parts, position = [_PNG_START], len(_PNG_START)
    while len(data) >= position + 8:
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] in _PNG_OF_PIXELS:
            parts.append(data[position:end])
        position = end
    return b"".join(parts)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: 16 bits scaled to 8, alpha laid over white."""
    # Of a PGM, Pillow scales the range that it states to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageRejected(f"pixels of mode {image.mode}, whose range is not known")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _encode(pixels: npt.NDArray[np.uint8], origin: str, flags: RowFlag = RowFlag.REENCODED) -> StoredImage:
    pixels = np.ascontiguousarray(pixels)
    jpeg = simplejpeg.encode_jpeg(pixels, quality=REENCODE_QUALITY, colorspace="RGB", colorsubsampling="444")
    height, width = pixels.shape[:2]
    return StoredImage(jpeg, height, width, flags | RowFlag.REENCODED, origin)


@dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say."""

    process: int  # second byte of the frame marker; 0xC0 is baseline, 0xC2 progressive
    precision: int  # bits a sample
    height: int  # pixels
    width: int  # pixels
    component_ids: tuple[int, ...]  # one id a colour component
    adobe_transform: int | None  # colour transform of the Adobe marker, None where there is none
    jfif: bool  # whether a JFIF marker is there
    orientation: int  # by which Pillow turns it, 1..8; 1 where there is none or it is not valid

    @property
    def is_gray(self) -> bool:
        """Whether there is one component."""
        return len(self.component_ids) == 1

    @property
    def is_ycbcr(self) -> bool:
        """Whether every decoder takes the three components for YCbCr: no marker or id says RGB."""
        if len(self.component_ids) != 3 or self.adobe_transform == 0:
            return False
        return self.jfif or self.adobe_transform == 1 or self.component_ids != (0x52, 0x47, 0x42)


def _parse_header(data: bytes) -> JpegHeader:
    """Read the markers up to the first scan; ImageRejected where they are not well formed or say other than 8 bits."""
    frame: tuple[int, int, int, int, tuple[int, ...]] | None = None
    adobe_transform, jfif, orientation = None, False, 1
    try:
        for marker, body, _ in _segments(data):
            if marker in _FRAMES:
                precision, height, width, components = struct.unpack_from(">BHHB", body)
                if len(body) != 6 + 3 * components:
                    raise ValueError("a frame of another length")
                frame = (marker, precision, height, width, tuple(body[6::3]))
            elif marker == _APP0 and body.startswith(b"JFIF\0"):
                jfif = True
            elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
                adobe_transform = body[11]
            elif marker == _APP1:
                orientation = 0  # EXIF or XMP may tell one
        if frame is None:
            raise ValueError("no frame")
    except (ValueError, struct.error) as error:
        raise ImageRejected("damaged JPEG: its markers are not well formed") from error
    if orientation == 0:
        with suppress(OSError, SyntaxError, ValueError), _open(data, ("JPEG",)) as image:
            orientation = _orientation(image)
        orientation = orientation or 1  # what is wrong is told where it is decoded
    header = JpegHeader(*frame, adobe_transform, jfif, orientation)
    if header.precision != 8:
        raise ImageRejected(f"{header.precision}-bit JPEG: decoders read 8 bits")
    return header


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield marker, body and where that begins of each segment up to the first scan's: past stray bytes, as decoders.

    ValueError where the bytes end, or a segment passes their end, before the first scan.
    """
    position, marker = 2, 0
    while marker != _SOS:
        start = data.find(b"\xff", position)
        while data[start : start + 2] == b"\xff\xff":  # fill bytes
            start += 1
        if start < 0 or len(data) < start + 4:
            raise ValueError("no scan")
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        position = start + 2
        if marker not in _STANDALONE:
            position += length
            if length < 2 or position > len(data):
                raise ValueError(f"the segment at byte {start} is cut")
            yield marker, data[start + 4 : position], start + 4


def _mend_headers(data: bytes, header: JpegHeader) -> bytes:
    """Set right the fields that decoders warn of and pass over, since the picture does not hang on them.

    These are JFIF's version, and of a sequential JPEG, as some phones write it, the part of the spectrum in a scan.
    """
    mended = bytearray(data)
    for marker, body, start in _segments(data):
        if marker == _APP0 and body.startswith(b"JFIF\0"):
            mended[start + 5 : start + 7] = b"\x01\x01"
    if header.process != PROGRESSIVE:
        for scan in re.finditer(rb"\xff\xda\0[\x08\x0a\x0c\x0e]", data):
            start = scan.end() + 1 + 2 * data[scan.end()]
            if len(data) >= start + 3 and scan.group()[-1] == 6 + 2 * data[scan.end()]:
                mended[start : start + 3] = b"\0\x3f\0"
    return bytes(mended)
