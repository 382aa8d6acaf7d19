"""The one decoder: every form, mode and orientation of an image, and files that mean harm."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.data.datasets import LabelledImages, StreamedImages
from hf_robust_vision.data.decode import MAX_PIXELS_VARIABLE, CorruptImageError, decode_image
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.pixels import PixelTransform
from tests.conftest import SIZE, picture


PACKAGE = Path(__file__).parents[2] / "hf_robust_vision"
FIT = PixelTransform(SIZE, (SIZE, SIZE))
KINDS = ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm")


def encoded(image, kind="png", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def bytes_of(image):
    """A decoded image as `PIL` would hold it."""
    return (decode_image(image) * 255).round().byte().permute(1, 2, 0).numpy()


def claims(width, height, pixels=b""):
    """A grey PNG that says it has this size, whatever it holds."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["path", "bytes", "pil", "entry with bytes", "entry with path"])
def test_every_form_of_an_image(kind, tmp_path):
    image = picture(0, 1)
    image.save(tmp_path / "image.png")
    value = {
        "path": str(tmp_path / "image.png"),
        "bytes": encoded(image),
        "pil": image,
        "entry with bytes": {"bytes": encoded(image), "path": None},
        "entry with path": {"bytes": None, "path": str(tmp_path / "image.png")},
    }[kind]
    got = decode_image(value)
    assert got.dtype == torch.float32
    assert torch.equal((got * 255).round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("value", [None, 3, {"bytes": None, "path": None}])
def test_what_is_no_image(value):
    with pytest.raises(CorruptImageError, match=r"image 3 of here is no image but (NoneType|int)"):
        decode_image(value, "image 3 of here")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "PA"])
def test_other_modes_become_rgb(mode):
    image = picture(0, 0).convert("LA" if mode == "PA" else mode).convert(mode)
    assert decode_image(image).shape == (3, SIZE, SIZE)


def test_alpha_is_dropped_as_transformers_does(tmp_path):
    """A number holds for the picture that the stock pipeline sees, hidden colours included."""
    image = picture(0, 0).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "alpha.png")
    assert np.array_equal(bytes_of(image), np.array(load_image(str(tmp_path / "alpha.png"))))


def test_a_transparent_palette(tmp_path):
    image = picture(0, 0).quantize(8)
    content = encoded(image, transparency=bytes(range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(bytes_of(content), np.array(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_orientation(kind, orientation, tmp_path):
    """findings-reliability 6: a photo of a phone lay on its side; `datasets` and `transformers` turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(0, 0).crop((0, 0, SIZE, SIZE // 2))
    image.save(tmp_path / f"image.{kind}", exif=exif, **({"lossless": True} if kind == "webp" else {}))
    got = bytes_of(str(tmp_path / f"image.{kind}"))
    assert np.array_equal(got, np.array(load_image(str(tmp_path / f"image.{kind}"))))
    assert got.shape[:2] == ((SIZE // 2, SIZE) if orientation < 5 else (SIZE, SIZE // 2))


class TestWideValues:
    """findings-reliability 6: 16-bit grey and 32-bit integers became white, floats black."""

    WIDE = (
        ("png", "uint16", 65535),
        ("ppm", "uint16", 65535),
        ("tiff", "uint16", 65535),
        ("tiff", "int32", 2**31 - 1),
    )

    @pytest.mark.parametrize(("kind", "dtype", "top"), [*WIDE, ("tiff", "float32", 1)])
    def test_over_the_range_of_their_type(self, kind, dtype, top):
        wanted = np.linspace(0, 1, 256).reshape(16, 16)
        got = decode_image(encoded(Image.fromarray((wanted * top).astype(dtype)), kind))
        assert got.shape == (3, 16, 16)
        assert got.dtype == torch.float32
        assert np.abs(got.numpy() - wanted).max() < 1.01 / 65535  # one step of 16 bits

    @staticmethod
    def tagged(values, tag, number):
        """A TIFF with a tag that PIL would write otherwise."""
        content = bytearray(encoded(Image.fromarray(values), "tiff"))
        place = bytes(content).index(struct.pack("<HHI", tag, 3, 1)) + 8
        content[place : place + 2] = struct.pack("<H", number)
        return bytes(content)

    def test_unsigned_integers_of_32_bits(self):
        wanted = np.linspace(0, 1, 256).reshape(16, 16)
        content = self.tagged((wanted * (2**32 - 1)).astype(np.uint32).view(np.int32), 339, 1)
        assert np.abs(decode_image(content)[0].numpy() - wanted).max() < 1e-6

    def test_white_may_be_zero(self):
        wanted = np.linspace(0, 1, 256).reshape(16, 16)
        content = self.tagged((wanted * 65535).round().astype(np.uint16), 262, 0)
        assert np.abs(1 - decode_image(content)[0].numpy() - wanted).max() < 1e-6

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (np.linspace(0, 255, 64, dtype=np.float32), "values from 0 to 255, wanted 0 to 1"),
            (np.linspace(-1, 1, 64, dtype=np.float32), "values from -1 to 1, wanted 0 to 1"),
            (np.full(64, np.nan, dtype=np.float32), "values from nan to nan"),
            (np.arange(64, dtype=np.int32) - 1, "values from -1 to 62, wanted 0 to 2147483647"),
            (np.arange(64, dtype=np.int32) * 1000, "all but black: its values reach 63000 of 2147483647"),
            (np.arange(64, dtype=np.uint16), "all but black: its values reach 63 of 65535"),
        ],
    )
    def test_a_range_that_nobody_can_know(self, values, said):
        """Neither stretched image by image nor read as black."""
        with pytest.raises(CorruptImageError, match=said):
            decode_image(encoded(Image.fromarray(values.reshape(8, 8)), "tiff"))

    def test_black_is_black(self):
        assert decode_image(encoded(Image.fromarray(np.zeros((8, 8), np.uint16)))).max() == 0


class TestHostile:
    """findings-reliability 7: one such file killed a run, with --skip_corrupt, too."""

    @pytest.mark.parametrize(
        ("width", "height", "said"),
        [
            (100_000, 100_000, "corrupt or truncated.*decompression bomb"),
            (12_000, 12_000, r"has 12000 x 12000 pixels, over 50,000,000 \(set HF_ROBUST_VISION_MAX_PIXELS\)"),
            (65_000, 1, "65000 x 1 pixels: one edge is over 100 times the other"),
            (1, 65_000, "1 x 65000 pixels: one edge"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_size_is_judged_by_the_header(self, width, height, said):
        with pytest.raises(CorruptImageError, match=f"image 7 of here .*{said}.*--skip_corrupt"):
            decode_image(claims(width, height), "image 7 of here")

    def test_the_limit_is_the_users(self, monkeypatch):
        content = encoded(picture(0, 0))
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, str(SIZE * SIZE - 1))
        with pytest.raises(CorruptImageError, match="over 1,023"):
            decode_image(content)
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, str(SIZE * SIZE))
        assert decode_image(content).shape == (3, SIZE, SIZE)
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, "many")
        with pytest.raises(ValueError, match="must be a whole number of pixels, got 'many'") as caught:
            decode_image(content)
        assert not isinstance(caught.value, CorruptImageError)

    def test_a_stream_goes_on(self):
        bad = [claims(100_000, 100_000), claims(65_000, 1), claims(9, 9), b"", None]
        rows = [{"image": content, "label": 0} for content in [*bad, encoded(picture(0, 0))]]
        stream = StreamedImages(rows, ("a", "b"), FIT, name="s", split="train").without_corrupt()
        assert [item["ids"] for item in stream] == [len(bad)]
        assert stream.skipped == len(bad)

    def test_no_program_is_run(self):
        """PIL hands PostScript to Ghostscript."""
        with pytest.raises(CorruptImageError, match="cannot identify"):
            decode_image(encoded(picture(0, 0), "eps"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of PIL's, about what is wrong with the file
def test_truncated_at_any_byte(kind):
    """Whatever PIL raises, the caller sees one error with the name."""
    content = encoded(picture(0, 0, 16), kind)
    failures = 0
    for length in range(0, len(content), 3):
        try:
            decode_image(content[:length], "image 7 of here")
        except CorruptImageError as error:
            failures += 1
            assert "image 7 of here" in str(error)  # noqa: PT017
    assert failures > len(content) / 3 * 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_mutated(kind):
    """findings-reliability 7: 100 damaged files of each kind are whole images in [0, 1], or named as corrupt."""
    rng = np.random.default_rng(KINDS.index(kind))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(picture(0, 0, 24), kind, exif=exif), encoded(picture(1, 1, 24).convert("L"), kind)]
    read = refused = 0
    for case in range(100):
        content = bytearray(whole[case % 2])
        if case % 5 == 4:
            del content[rng.integers(1, len(content)) :]
        for _ in range(rng.integers(1, 9)):
            end = len(content) if case % 3 else min(64, len(content))  # every third time in the header
            content[rng.integers(end)] ^= 1 << rng.integers(8)
        try:
            image = decode_image(bytes(content), "image 7 of here")
        except CorruptImageError as error:
            refused += 1
            assert str(error).startswith("image 7 of here ")  # noqa: PT017
        else:
            read += 1
            assert image.ndim == 3
            assert len(image) == 3
            assert image.dtype == torch.float32
            assert torch.isfinite(image).all()
            assert 0 <= image.min() <= image.max() <= 1
    assert read + refused == 100
    assert refused > 10


@pytest.mark.parametrize("kind", [LabelledImages, StreamedImages, CaptionedImages])
def test_datasets_does_not_decode(kind):
    """Rows that were never told so give the file as well, whose 16 bits are then ours to read."""
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    entry = {"bytes": encoded(Image.fromarray(values)), "path": None}
    rows = datasets.Dataset.from_dict({"image": [entry] * 2, "label": [0, 1], "captions": ["a", "b"]})
    rows = rows.cast_column("image", datasets.Image())
    if kind is CaptionedImages:
        got = kind(rows, FIT, name="x", split="test").image(1)
    elif kind is StreamedImages:
        got = next(iter(kind(rows.to_iterable_dataset(), ("a", "b"), FIT, name="x", split="test")))["images"]
    else:
        got = kind(rows, ("a", "b"), FIT, name="x", split="test")[1]["images"]
    assert np.abs(got[0].numpy() - values / 65535).max() < 1e-6


def test_hostile_files_in_a_folder(image_folder, tmp_path):
    for name in "ab":
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "good.png").write_bytes(encoded(picture(0, 0)))
    (tmp_path / "test" / "a" / "bomb.png").write_bytes(claims(100_000, 100_000))
    (tmp_path / "test" / "b" / "line.png").write_bytes(claims(65_000, 1, b"\0" * 65_001))
    part = load_labelled_images(tmp_path, "test", FIT)
    assert [os.path.basename(part.rows[place]["image"]["path"]) for place in part.corrupt()] == [
        "bomb.png",
        "line.png",
    ]


def test_images_are_opened_in_one_place():
    """A second decoder would see another picture of the same file."""
    opening = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(word in file.read_text(encoding="utf-8") for word in ("Image.open", "imread", "decode=True"))
    }
    assert opening == {"data/decode.py"}
