"""From the bytes of an image file to pixels: what each format, mode and orientation becomes."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

try:  # Pillow reads HEIC, the format of many phones, with this package
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()

VERSION = 1  # of the pixels, part of the identity of the data: raise it with any change of them
SIZE = 224
# The largest photographs of phones have 108 million pixels. Decoding an image with transparency
# takes about 20 bytes per pixel. One large image and small ones in 16 threads took at most 4.7 GiB.
LARGEST = 120_000_000  # pixels
LARGE = 8_000_000  # pixels above which images are decoded one at a time
# Only what the suffixes promise: Pillow would run an interpreter on a PostScript file named .jpg.
Image.init()  # registers all formats
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "AVIF", "HEIF")
    if name in Image.OPEN
)
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # what undoes each value of the tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_large = threading.Lock()


class BrokenImage(ValueError):  # noqa: N818 - the image is skipped and listed, not an error
    """A file that cannot be decoded; the message is a short reason without the file's name."""


def decode(source: Path | bytes) -> np.ndarray:
    """Return the image in a file, given as its path or its bytes, as uint8 (224, 224, 3) RGB.

    EXIF data turn the image upright. An animation gives its first frame. Transparent pixels become
    white, 16-bit grey becomes 8-bit grey. The resize to 224 x 224 ignores the aspect ratio and uses
    Pillow's antialiased bilinear filter, as torchvision's `Resize((224, 224))` does on PIL images.

    Raises BrokenImage if the bytes are not a complete image or the image has more than LARGEST
    pixels, and OSError if the file cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise BrokenImage("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image, _room(*image.size):
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            rgb = _rgb(image)
            upright = rgb if turn is None else rgb.transpose(turn)
            return np.array(upright.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        kind = BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
        raise BrokenImage(
            f"{kind}, which Pillow cannot read here" if kind else "not an image"
        ) from error
    except Exception as error:  # Pillow's readers raise exceptions of any type on damaged files
        reason = str(error).partition("\n")[0][:100]
        raise BrokenImage(reason or type(error).__name__) from error


@contextmanager
def _room(width: int, height: int) -> Iterator[None]:
    """Wait until there is memory for an image of this size; raise BrokenImage above LARGEST."""
    if width * height > LARGEST:
        raise BrokenImage(f"{width} x {height} pixels, more than {LARGEST // 10**6} million")
    with _large if width * height > LARGE else nullcontext():
        yield


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if it is missing or the EXIF data are damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB."""
    if image.mode.startswith("I;16"):
        # Pillow's conversion would clip at 255. The factor is exact: 65535 / 257 is 255.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenImage("32-bit grey, whose white is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
