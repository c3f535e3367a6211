"""What each kind of image file decodes to."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.data.image_files import encoded, noise
from utils.data import decoding

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def at(pixels, x, y):
    """Return the pixel at fraction x of the width and fraction y of the height."""
    return tuple(int(value) for value in pixels[round(y * 223), round(x * 223)])


def near(pixel, colour, tolerance=6):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


@pytest.mark.parametrize("size", [(40, 30), (500, 375), (224, 224), (1, 1), (300, 100)])
def test_rgb_jpeg_equals_pillows_bilinear_resize(tmp_path, size):
    file = tmp_path / "1.jpg"
    file.write_bytes(encoded(noise(1, *size)))
    with Image.open(file) as image:
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
    pixels = decoding.decode(file)
    assert (pixels.dtype, pixels.shape, pixels.flags.writeable) == (np.uint8, (224, 224, 3), True)
    assert np.array_equal(pixels, expected)
    assert np.array_equal(decoding.decode(file.read_bytes()), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF"])
def test_suffix_does_not_matter(tmp_path, kind):
    (tmp_path / "1.jpg").write_bytes(encoded(Image.new("RGB", (20, 20), RED), kind))
    assert near(at(decoding.decode(tmp_path / "1.jpg"), 0.5, 0.5), RED)


# For each EXIF value: corners (x, y) of the upright image at the ends of the first stored row.
CORNERS = {
    1: ((0, 0), (1, 0)),
    2: ((1, 0), (0, 0)),
    3: ((1, 1), (0, 1)),
    4: ((0, 1), (1, 1)),
    5: ((0, 0), (0, 1)),
    6: ((1, 0), (1, 1)),
    7: ((1, 1), (1, 0)),
    8: ((0, 1), (0, 0)),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation(kind, orientation):
    stored = Image.new("RGB", (64, 48), BLACK)
    stored.paste(RED, (0, 0, 32, 24))
    stored.paste(GREEN, (32, 0, 64, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decoding.decode(encoded(stored, kind, exif=exif))
    corners = {(x, y): at(pixels, 0.1 + 0.8 * x, 0.1 + 0.8 * y) for x in (0, 1) for y in (0, 1)}
    red, green = CORNERS[orientation]
    assert near(corners.pop(red), RED)
    assert near(corners.pop(green), GREEN)
    assert all(near(pixel, BLACK) for pixel in corners.values())


def test_damaged_exif_data_is_ignored():
    image = noise(2)
    damaged = encoded(image, exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01\x03\x00")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        pixels = decoding.decode(damaged)
    assert np.array_equal(pixels, decoding.decode(encoded(image)))
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n4\nno hexadecimal digits")
    assert np.array_equal(
        decoding.decode(encoded(image, "PNG", pnginfo=text)), decoding.decode(encoded(image, "PNG"))
    )


def halves(mode, left, right):
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def palette(**options):
    image = Image.new("P", (40, 20), 0)
    image.putpalette([*BLUE, *RED])
    image.paste(1, (20, 0, 40, 20))
    return encoded(image, "PNG", **options)


def grey16(left, right):
    return Image.fromarray(np.repeat(np.array([[left] * 20 + [right] * 20], np.uint16), 20, axis=0))


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        pytest.param(encoded(halves("1", 0, 1), "PNG"), BLACK, WHITE, id="1 bit"),
        pytest.param(encoded(halves("L", 40, 200)), (40,) * 3, (200,) * 3, id="grey JPEG"),
        pytest.param(
            encoded(halves("LA", (0, 255), (0, 128)), "PNG"), BLACK, (127,) * 3, id="grey and alpha"
        ),
        pytest.param(
            encoded(halves("L", 0, 90), "PNG", transparency=0),
            WHITE,
            (90,) * 3,
            id="grey, one transparent",
        ),
        pytest.param(encoded(halves("RGBA", (*RED, 255), (*RED, 0)), "PNG"), RED, WHITE, id="RGBA"),
        pytest.param(
            encoded(halves("RGB", RED, BLUE), "PNG", transparency=BLUE),
            RED,
            WHITE,
            id="RGB, one transparent",
        ),
        pytest.param(palette(), BLUE, RED, id="palette"),
        pytest.param(palette(transparency=0), WHITE, RED, id="palette, one transparent"),
        pytest.param(
            palette(transparency=b"\x80\xff"), (127, 127, 255), RED, id="palette with alpha"
        ),
        pytest.param(
            encoded(halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255))), RED, BLACK, id="CMYK JPEG"
        ),
        pytest.param(
            encoded(halves("CMYK", (255, 255, 0, 0), (0, 0, 0, 0)), "TIFF"),
            BLUE,
            WHITE,
            id="CMYK TIFF",
        ),
        pytest.param(encoded(grey16(256, 32896), "PNG"), (1,) * 3, (128,) * 3, id="16 bit PNG"),
        pytest.param(encoded(grey16(0, 65535), "TIFF"), BLACK, WHITE, id="16 bit TIFF"),
    ],
)
def test_modes_become_rgb(data, left, right):
    pixels = decoding.decode(data)
    assert pixels.shape == (224, 224, 3)
    tolerance = 0 if data.startswith(b"\x89PNG") else 6
    assert near(at(pixels, 0.2, 0.5), left, tolerance)
    assert near(at(pixels, 0.8, 0.5), right, tolerance)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert at(decoding.decode(data), 0.5, 0.5) == RED


JPEG = encoded(noise(3, 200, 200))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404 not found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC, which Pillow cannot read here"),
        (b"\0\0\0\x18ftypavif" + bytes(40), ""),
        (JPEG[:20], ""),
        (encoded(noise(3), "PNG")[:900], ""),
        (encoded(Image.fromarray(np.ones((5, 5), np.float32)), "TIFF"), "32-bit grey"),
    ],
)
def test_broken_files(data, reason):
    with pytest.raises(decoding.BrokenImage) as caught:
        decoding.decode(data)
    assert reason in str(caught.value)
    assert 0 < len(str(caught.value)) <= 100
    assert "0x" not in str(caught.value)  # an object's address, which would differ between runs


def test_missing_file_is_not_a_broken_image(tmp_path):
    with pytest.raises(FileNotFoundError):
        decoding.decode(tmp_path / "1.jpg")


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", 50 * 50)
    running, most = [], []

    def rgb(image):
        running.append(1)
        time.sleep(0.02)
        most.append(len(running))
        running.pop()
        return image.convert("RGB")

    monkeypatch.setattr(decoding, "_rgb", rgb)
    for side, at_once in ((50, 4), (51, 1)):
        data = encoded(Image.new("RGB", (side, side)))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(decoding.decode, [data] * 8))
        assert max(most) == at_once
        most.clear()
