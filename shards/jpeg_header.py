"""Read from a JPEG's markers what decides its treatment: process, components, colour, orientation."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
BASELINE, PROGRESSIVE = 0xC0, 0xC2
PROCESS_NAMES = {
    0xC0: "baseline",
    0xC1: "extended sequential",
    0xC2: "progressive",
    0xC3: "lossless",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded progressive",
    0xCB: "arithmetic-coded lossless",
}
_STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_NOT_FRAMES = {0xC4, 0xC8, 0xCC}  # DHT, JPG, DAC lie in the range of the frame markers
_SOS, _APP0, _APP1, _APP14 = 0xDA, 0xE0, 0xE1, 0xEE
_ORIENTATION_TAG, _SHORT = 0x0112, 3


@dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say.

    Attributes:
        process: second byte of the frame marker; 0xC0 is baseline, 0xC2 progressive.
        precision: bits a sample.
        height: pixels.
        width: pixels.
        component_ids: one id a colour component.
        adobe_transform: colour transform of the Adobe marker, None where there is none.
        jfif: whether a JFIF marker is there.
        orientation: EXIF orientation 1..8; 1 where there is none or it is not valid.
    """

    process: int
    precision: int
    height: int
    width: int
    component_ids: tuple[int, ...]
    adobe_transform: int | None
    jfif: bool
    orientation: int

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


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and body of each segment up to the first scan's, as decoders find them: past stray bytes.

    Raises:
        ValueError: the bytes end, or a segment passes their end, before the first scan.
    """
    position = 2
    while True:
        start = data.find(b"\xff", position)
        while data[start : start + 2] == b"\xff\xff":  # fill bytes
            start += 1
        if start < 0 or len(data) < start + 4:
            raise ValueError("no scan")
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        position = start + 2
        if marker == 0 or marker in _STANDALONE:
            continue
        position += length
        if length < 2 or position > len(data):
            raise ValueError(f"the segment at byte {start} is cut")
        yield marker, data[start + 4 : position]
        if marker == _SOS:
            return


def parse_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the markers up to the first scan; None where they are not well formed."""
    frame: tuple[int, int, int, int, tuple[int, ...]] | None = None
    adobe_transform, jfif, orientation = None, False, 1
    try:
        for marker, body in _segments(data):
            if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
                frame = _parse_frame(marker, body)
                if frame is None:
                    return None
            elif marker == _APP0 and body.startswith(b"JFIF\0"):
                jfif = True
            elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
                adobe_transform = body[11]
            elif marker == _APP1 and body.startswith(b"Exif\0"):
                orientation = _exif_orientation(body[6:])
    except ValueError:
        return None
    return JpegHeader(*frame, adobe_transform, jfif, orientation) if frame else None


def _parse_frame(marker: int, body: bytes) -> tuple[int, int, int, int, tuple[int, ...]] | None:
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        return None
    precision, height, width = struct.unpack(">BHH", body[:5])
    return marker, precision, height, width, tuple(body[6::3])


def _exif_orientation(tiff: bytes) -> int:
    """Read the orientation from the first directory of an EXIF block; 1 where it is absent or not valid."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    if directory + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(directory + 2, min(directory + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == _ORIENTATION_TAG:
            return value if kind == _SHORT and count == 1 and 1 <= value <= 8 else 1
    return 1
