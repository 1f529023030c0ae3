from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detector.data.images import LARGEST, is_cut_off, read_image, read_reduced
from detector.errors import DataError

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """60 x 80, smooth and different in every corner and channel."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, (80, 60), interpolation=cv2.INTER_CUBIC))


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "x.png"), ("RGB", "x.jpg"), ("RGB", "x.webp"), ("RGB", "x.bmp"), ("RGB", "x.tiff"), ("RGB", "x.gif"),
        ("L", "x.png"), ("L", "x.jpg"), ("1", "x.png"), ("LA", "x.png"), ("RGBA", "x.png"), ("P", "x.png"),
    ],
)  # fmt: skip
def test_every_kind_of_file_becomes_rgb_as_pillow_sees_it(
    tmp_path: Path, picture: Image.Image, mode: str, name: str
) -> None:
    if mode in ("RGBA", "LA"):
        image = picture.convert(mode)
        image.putalpha(Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (60, 1))))
    else:
        image = picture.convert(mode)
    path = saved(tmp_path / name, image)
    found = read_image(path, (60, 80))
    assert found.shape == (60, 80, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB")).astype(int)
    assert np.abs(found - expected).max() <= (2 if name.endswith((".jpg", ".webp")) else 0)


def test_a_cmyk_jpeg_has_the_right_colours(tmp_path: Path, picture: Image.Image) -> None:
    path = saved(tmp_path / "x.jpg", picture.convert("CMYK"), quality=95)
    found = read_image(path).astype(int)
    with Image.open(path) as opened:
        assert opened.mode == "CMYK"
        expected = np.asarray(opened.convert("RGB"))
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found - np.asarray(picture)).mean() < 8


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_brought_to_eight_by_a_fixed_range(tmp_path: Path, suffix: str) -> None:
    for top in (65535, 4096):  # a dark image stays dark: no stretching by what the image happens to hold
        grey = np.linspace(0, top, 4800).reshape(60, 80).astype(np.uint16)
        for image in (grey, np.stack([grey, grey[::-1], grey[:, ::-1]], 2)):
            path = tmp_path / f"x{suffix}"
            cv2.imwrite(str(path), image)
            found = read_image(path).astype(int)
            expected = image[..., ::-1] if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
            assert np.abs(found - expected / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_camera_orientation_as_the_annotations_expect(
    tmp_path: Path, picture: Image.Image, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path / f"x{suffix}", picture, exif=exif)
    with Image.open(path) as opened:
        stored = np.asarray(opened.convert("RGB"))
    turned = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.transpose(1, 0, 2), 6: np.rot90(stored, -1), 7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(stored),
    }[orientation]  # fmt: skip
    assert np.abs(read_image(path).astype(int) - turned).max() <= 1
    assert np.abs(read_image(path, turned.shape[:2]).astype(int) - turned).max() <= 1
    if orientation >= 5:  # only then do the sizes tell what the annotations were made for
        assert np.abs(read_image(path, (60, 80)).astype(int) - stored).max() <= 1
    with pytest.raises(DataError, match="but the annotations say 61, 80"):
        read_image(path, (61, 80))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.bmp", "x.gif", "x.tiff"])
def test_cut_off_files_are_refused(tmp_path: Path, picture: Image.Image, name: str, share: float) -> None:
    path = saved(tmp_path / name, picture.resize((640, 480)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    if name == "x.jpg" and share > 0.02:  # a download whose place on the disk was reserved
        path.write_bytes(content[: int(len(content) * share)].ljust(len(content), b"\0"))
        with pytest.raises(DataError, match="cut off"):
            read_image(path)


def test_a_jpeg_with_a_preview_inside_and_with_something_after_its_end(tmp_path: Path, picture: Image.Image) -> None:
    def jpeg(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        return buffer.getvalue()

    preview, whole = jpeg(picture.resize((16, 12))), jpeg(picture)
    segment = b"Exif\0\0" + preview
    with_preview = whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + whole[2:]
    for after in (b"", b"\0" * 100, b"a phone's video"):
        (tmp_path / "x.jpg").write_bytes(with_preview + after)
        assert read_image(tmp_path / "x.jpg", (60, 80)).shape == (60, 80, 3)
    cut = with_preview[:-200]
    assert b"\xff\xd9" in cut  # the preview's
    assert is_cut_off(np.frombuffer(cut, dtype=np.uint8))
    assert is_cut_off(np.frombuffer(cut[:40], dtype=np.uint8))
    assert not is_cut_off(np.frombuffer(b"\x89PNG" + b"\0" * 20, dtype=np.uint8))


def test_files_that_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    with pytest.raises(DataError, match=r"x\.jpg: cannot read the image \(No such file"):
        read_image(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_image(path)
    path.write_text("<html>404</html>")
    with pytest.raises(DataError, match="not an image"):
        read_image(path)
    with pytest.raises(DataError, match="cannot read"):
        read_image(tmp_path)


def test_a_name_with_other_letters(tmp_path: Path, picture: Image.Image) -> None:
    assert read_image(saved(tmp_path / "größe 图.png", picture)).shape == (60, 80, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(80, 60), (333, 217), (7, 5), (1, 1)])
def test_both_decoders_give_the_same_bytes(
    tmp_path: Path, picture: Image.Image, mode: str, subsampling: int, size: tuple[int, int]
) -> None:
    for progressive in (False, True):
        image = picture.resize(size).convert(mode)
        path = saved(tmp_path / "x.jpg", image, quality=85, subsampling=subsampling, progressive=progressive)
        assert np.array_equal(read_image(path), cv2.imread(str(path), cv2.IMREAD_COLOR_RGB))


def test_a_jpeg_with_camera_data_or_odd_sampling_is_left_to_cv2(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object, **__: object) -> object:
        raise AssertionError("this one is plain")

    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = saved(tmp_path / "a.jpg", picture, exif=exif)
    exif[ORIENTATION] = 1
    plain = saved(tmp_path / "b.jpg", picture, exif=exif)
    content = turned.read_bytes()
    garbled = tmp_path / "d.jpg"
    garbled.write_bytes(content.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX"))
    assert garbled.read_bytes() != content
    odd = saved(tmp_path / "c.jpg", picture.convert("CMYK"), subsampling=2)
    with monkeypatch.context() as patch:
        patch.setattr("detector.data.images.simplejpeg.decode_jpeg", cannot)
        assert read_image(turned).shape == (80, 60, 3)
        assert np.array_equal(read_image(garbled), cv2.imread(str(garbled), cv2.IMREAD_COLOR_RGB))
        with pytest.raises(AssertionError, match="plain"):
            read_image(plain)
    monkeypatch.setattr("detector.data.images.cv2.imdecode", cannot)
    assert read_image(plain).shape == (60, 80, 3)
    with pytest.raises(AssertionError, match="plain"):
        read_image(odd)


def huge_png(path: Path, side: int) -> Path:
    """A file of a few kB that says it is `side` x `side` pixels, as a black picture of that size would."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.bmp"])
def test_an_image_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path: Path, name: str) -> None:
    path, side = tmp_path / name, 30_000
    if name == "x.png":
        huge_png(path, side)
    else:  # a small file whose header says that it is large
        Image.new("RGB", (64, 48)).save(path)
        content = bytearray(path.read_bytes())
        at, form = {"x.jpg": (content.find(b"\xff\xc0") + 5, ">HH"), "x.gif": (6, "<HH"), "x.bmp": (18, "<ii")}[name]
        content[at : at + struct.calcsize(form)] = struct.pack(form, side, side)
        path.write_bytes(content)
    tracemalloc.start()
    try:
        for size in (None, (side, side), (9, 9)):
            with pytest.raises(DataError) as caught:
                read_image(path, size)
            assert str(path) in str(caught.value)
            assert "cut it into tiles" in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    if name in ("x.png", "x.jpg"):
        with pytest.raises(DataError, match=r"30000, 30000: 900 million pixels, which would take 2\.5 GiB"):
            read_image(path)
    with pytest.raises(DataError, match=r"15000, 15000: 225 million pixels"):
        read_reduced(path, (side, side), (15_000, 15_000))


def test_the_largest_images_that_are_read_are_larger_than_cameras_make() -> None:
    assert 150e6 < LARGEST < 2 * (Image.MAX_IMAGE_PIXELS or 0)
