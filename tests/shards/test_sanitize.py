"""What becomes of each odd file, and that every decoder reads the same pixels from what is stored."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shards.manifest import RowFlag
from shards.sanitize import ImageRejected, ImageWarned, sanitise

# For sources that are lossy themselves. Quality 95 quantises luma in steps of 1 to 12 and chroma in steps of 2
# to 10, an error of at most 12 / sqrt(12) = 3.5 a coefficient, and most coefficients of these smooth images are
# smaller than that; quality 75 in steps five times as coarse, but of the gradient only low ones are not 0.
MEAN_ERROR = 3.0


def test_every_odd_file_becomes_what_the_corpus_states(odd_files: dict[str, Any]) -> None:
    assert len(odd_files) >= 25
    for name, odd in odd_files.items():
        if odd.outcome == "rejected":
            with pytest.raises(ImageRejected) as caught:
                sanitise(odd.data)
            assert odd.detail in str(caught.value), (name, str(caught.value))
            continue
        stored = sanitise(odd.data)
        if odd.outcome == "verbatim":
            assert (stored.jpeg == odd.data, stored.origin, stored.flags) == (True, "", odd.flags), name
        else:
            assert (stored.origin, stored.flags) == (odd.detail, odd.flags | RowFlag.REENCODED), name
            header = simplejpeg.decode_jpeg_header(stored.jpeg)
            assert header == (stored.height, stored.width, "YCbCr", "444"), name


def test_reencoded_images_show_what_the_originals_showed(odd_files: dict[str, Any]) -> None:
    compared = 0
    for name, odd in odd_files.items():
        if odd.pixels is None:
            continue
        jpeg = sanitise(odd.data).jpeg
        if odd.lossless:
            pixels = np.ascontiguousarray(odd.pixels)
            assert jpeg == simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444"), name
        else:
            shown = simplejpeg.decode_jpeg(jpeg).astype(int)
            assert shown.shape == odd.pixels.shape, name
            assert np.abs(shown - odd.pixels).mean() < MEAN_ERROR, name
        compared += 1
    assert compared >= 20


def test_dali_simplejpeg_and_pillow_decode_all_that_is_stored_to_the_same_pixels(
    odd_files: dict[str, Any],
) -> None:
    dali = pytest.importorskip("nvidia.dali")
    stored = {name: sanitise(odd.data) for name, odd in odd_files.items() if odd.outcome != "rejected"}
    encoded = [np.frombuffer(image.jpeg, np.uint8) for image in stored.values()]

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode() -> Any:
        jpegs = dali.fn.external_source(iter([image] for image in encoded), batch=True)
        return dali.fn.decoders.image(jpegs, adjust_orientation=False)

    pipeline = decode()
    pipeline.build()
    for name, image in stored.items():
        by_dali = np.asarray(pipeline.run()[0].at(0))
        by_simplejpeg = simplejpeg.decode_jpeg(image.jpeg, strict=True)
        by_pillow = np.asarray(Image.open(io.BytesIO(image.jpeg)).convert("RGB"))
        assert by_dali.shape == (image.height, image.width, 3), name
        np.testing.assert_array_equal(by_dali, by_simplejpeg, err_msg=name)
        np.testing.assert_array_equal(by_pillow, by_simplejpeg, err_msg=name)


def test_keep_warned_stores_what_pillow_reads_of_a_damaged_jpeg(odd_files: dict[str, Any]) -> None:
    rotten = odd_files["bit_rot_in_scan"].data
    stored = sanitise(rotten, keep_warned=True)
    assert stored.flags == RowFlag.WARNED | RowFlag.REENCODED
    by_pillow = np.asarray(Image.open(io.BytesIO(rotten)).convert("RGB")).astype(int)
    assert np.abs(simplejpeg.decode_jpeg(stored.jpeg) - by_pillow).mean() < MEAN_ERROR
    with pytest.raises(ImageRejected, match="damaged JPEG"):
        sanitise(odd_files["half"].data, keep_warned=True)


def test_what_pillow_reads_without_a_word_is_told_from_what_it_cannot_read(odd_files: dict[str, Any]) -> None:
    for name, kind in (("bit_rot_in_scan", ImageWarned), ("half", ImageRejected)):
        with pytest.raises(ImageRejected) as caught:
            sanitise(odd_files[name].data)
        assert type(caught.value) is kind


def test_keep_warned_keeps_the_picture_of_a_jpeg_whose_fault_does_not_touch_it(
    odd_files: dict[str, Any], make_photo: Callable[..., Any]
) -> None:
    whole = simplejpeg.decode_jpeg(odd_files["sampling_420"].data)
    for name in ("stray_bytes_before_scan", "padding_before_end_mark"):
        with pytest.raises(ImageWarned):
            sanitise(odd_files[name].data)
        stored = sanitise(odd_files[name].data, keep_warned=True)
        assert stored.flags == RowFlag.WARNED | RowFlag.REENCODED
        assert np.abs(simplejpeg.decode_jpeg(stored.jpeg).astype(int) - whole).mean() < MEAN_ERROR, name


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1), bit=st.integers(0, 7), kind=st.sampled_from(["420", "444", "progressive"]))
def test_the_check_at_an_eighth_warns_exactly_where_a_full_decode_warns(place: float, bit: int, kind: str) -> None:
    data = bytearray(_SAMPLES[kind])
    data[int(place * (len(data) - 1))] ^= 1 << bit
    outcomes = []
    for scaled in ({}, {"min_height": 1, "min_width": 1, "min_factor": 8}):
        try:
            simplejpeg.decode_jpeg(bytes(data), strict=True, **scaled)
            outcomes.append("clean")
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def _samples() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    progressive = io.BytesIO()
    Image.fromarray(pixels).save(progressive, "JPEG", progressive=True)
    return {
        "420": simplejpeg.encode_jpeg(pixels, colorsubsampling="420"),
        "444": simplejpeg.encode_jpeg(pixels, colorsubsampling="444"),
        "progressive": progressive.getvalue(),
    }


_SAMPLES = _samples()


def test_a_sampling_that_simplejpeg_has_no_name_for_is_reencoded_as_pillow_reads_it() -> None:
    gradient = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    jpeg = bytearray(simplejpeg.encode_jpeg(gradient, colorsubsampling="411"))
    jpeg[jpeg.index(b"\xff\xc0") + 11] = 0x14  # luma 1x4: the blocks of 4:1:1 stand one below the other in 4:4:1
    stored = sanitise(bytes(jpeg))
    assert (stored.origin, stored.height, stored.width) == ("JPEG of unusual sampling", 64, 64)
    by_pillow = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)
    assert np.abs(simplejpeg.decode_jpeg(stored.jpeg) - by_pillow).mean() < MEAN_ERROR


def test_the_reason_of_a_rejection_is_the_same_each_time() -> None:
    jpeg = _SAMPLES["444"]
    frame = jpeg.index(b"\xff\xc0")
    two_components = b"\xff\xc0\x00\x0e" + jpeg[frame + 4 : frame + 9] + b"\x02" + jpeg[frame + 10 : frame + 16]
    with pytest.raises(ImageRejected, match=r"^damaged JPEG: Pillow cannot identify it$"):
        sanitise(jpeg[:frame] + two_components + jpeg[frame + 19 :])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_the_bytes_an_image_is_stored_or_rejected(data: st.DataObject) -> None:
    base = _SAMPLES[data.draw(st.sampled_from(sorted(_SAMPLES)))]
    start = data.draw(st.integers(0, len(base)))
    mutated = base[:start] + data.draw(st.binary(max_size=40)) + base[start + data.draw(st.integers(0, 40)) :]
    try:
        stored = sanitise(mutated)
    except ImageRejected as rejection:
        assert str(rejection)
        return
    assert simplejpeg.decode_jpeg(stored.jpeg, strict=True).shape == (stored.height, stored.width, 3)


def test_where_pillow_rotates_firn_rotates_and_the_size_is_that_of_the_pixels(make_jpeg: Any, make_photo: Any) -> None:
    base = make_jpeg(make_photo(30, 40))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    blocks = {
        "short": _exif(0x0112, 3, 1, 6 << 16),
        "long": _exif(0x0112, 4, 1, 6),
        "two shorts": _exif(0x0112, 3, 2, 6 << 16 | 1),
        "byte": _exif(0x0112, 1, 1, 6 << 24),
        "rational": _exif(0x0112, 5, 1, 26) + struct.pack(">II", 6, 1),
        "none": _exif(0x0100, 3, 1, 40 << 16),
        "cut": _exif(0x0112, 3, 1, 6 << 16)[:20],
        "of 200 entries": _exif(0x0112, 3, 1, 6 << 16).replace(b"\0\1\1\x12", b"\0\xc8\1\x12", 1),
        "xmp": xmp,
    }
    rotated = 0
    for name, block in blocks.items():
        data = base[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + base[2:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            try:
                shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            except (SyntaxError, struct.error):
                shown = np.asarray(image.convert("RGB"))
        stored = sanitise(data)
        pixels = simplejpeg.decode_jpeg(stored.jpeg)
        assert pixels.shape == (stored.height, stored.width, 3) == shown.shape, name
        assert np.abs(pixels.astype(int) - shown).mean() < MEAN_ERROR, name
        rotated += shown.shape[0] == 40
    assert 4 <= rotated < len(blocks)


def _exif(tag: int, kind: int, count: int, value: int) -> bytes:
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, tag, kind, count, value, 0)


def test_pillows_limit_of_pixels_is_not_ours(odd_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert sanitise(odd_files["png"].data).origin == "PNG"
    assert Image.MAX_IMAGE_PIXELS == 100


def test_reencoding_gives_the_same_bytes_each_time(make_photo: Callable[..., Any]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(make_photo(30, 40)).save(buffer, "PNG")
    assert sanitise(buffer.getvalue()) == sanitise(buffer.getvalue())
