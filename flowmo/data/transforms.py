"""Pictures in and out: files to PIL, PIL to tensors in [-1, 1], tensors back to PIL and PNG.

Layout: PIL images are 8-bit RGB; tensors are [3, H, W] or [N, 3, H, W] holding value / 127.5 - 1, unless said
otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from flowmo.files import atomic_write

PathLike = str | os.PathLike[str]


class ImageReadError(ValueError):
    """A file that exists but gives no usable picture. `path` and `reason` say which and why."""

    def __init__(self, path: PathLike, reason: str) -> None:
        super().__init__(f"cannot read {os.fspath(path)} as a picture: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageReadError], tuple[Path, str]]:
        # pickled between worker processes: the default would call the class with the message alone
        return type(self), (self.path, self.reason)


def load_image(path: PathLike) -> Image.Image:
    """Read a picture file as 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, palettes and grey levels are expanded,
    deep grey levels are scaled to 8 bits with rounding, and of an animation the first frame is taken.

    Raises:
        FileNotFoundError: no such file.
        ImageReadError: a folder, not a picture, damaged or cut short, or so many pixels that Pillow suspects
            a decompression bomb (its own error is the cause of ours).
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such picture file: {os.fspath(path)}")
    if not os.path.isfile(path):
        raise ImageReadError(path, "not a regular file; give the path of one picture")
    return decode_image(path, path)


def decode_image(source: PathLike | BinaryIO, path: PathLike) -> Image.Image:
    """As :func:`load_image`, of a path or of a file's bytes; `path` is the name for error messages.

    Raises ImageReadError as there.
    """
    try:
        with Image.open(source) as img:
            img.load()
            return _to_rgb(ImageOps.exif_transpose(img))
    except Image.DecompressionBombError as error:
        reason = f"{error}; raise PIL.Image.MAX_IMAGE_PIXELS if you trust this file"
        raise ImageReadError(path, reason) from error
    except Image.UnidentifiedImageError as error:
        reason = "Pillow knows no such format, or the file is damaged at its start"
        raise ImageReadError(path, reason) from error
    except Exception as error:  # Pillow's decoders answer damaged files with a dozen kinds of exception
        raise ImageReadError(path, f"{type(error).__name__}: {error}") from error


def _to_rgb(img: Image.Image) -> Image.Image:
    if img.mode in ("I", "F") or img.mode.startswith("I;16"):
        return Image.fromarray(_deep_to_uint8(np.asarray(img), img.mode)).convert("RGB")
    if img.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in img.info:
        img = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
    # convert() returns a copy, so the pixels outlive the open file
    return img.convert("RGB")


def _deep_to_uint8(values: np.ndarray, mode: str) -> np.ndarray:
    """[H, W] of more than 8 bits -> uint8. Integers count as 16 bits, as in Pillow's mode I of PNG files."""
    low, high = float(values.min()), float(values.max())
    if mode == "F":
        if not (low >= 0.0 and high <= 255.0):
            raise ValueError(f"floating-point values {low:g} to {high:g}; expected 0..1 or 0..255")
        return np.rint(values * (255.0 if high <= 1.0 else 1.0)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"integer values {low:g} to {high:g}; expected 0..65535")
    return ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def resize_shorter(img: Image.Image, size: int) -> Image.Image:
    """Scale so that the shorter side is `size` pixels: bilinear, antialiased as Pillow does.

    The longer side rounds down, as is customary. An image of that size already is returned as it is.
    """
    width, height = img.size
    short = min(width, height)
    if short == size:
        return img
    target = (size * width // short, size * height // short)
    return img.resize(target, Image.Resampling.BILINEAR)


def random_crop(img: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A `size` x `size` crop at a uniformly drawn position."""
    _check_crop(img, size)
    left = int(rng.integers(0, img.width - size + 1))
    top = int(rng.integers(0, img.height - size + 1))
    return img.crop((left, top, left + size, top + size))


def center_crop(img: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` crop (odd margins: half-pixel offsets go to the even side)."""
    _check_crop(img, size)
    left, top = round((img.width - size) / 2), round((img.height - size) / 2)
    return img.crop((left, top, left + size, top + size))


def _check_crop(img: Image.Image, size: int) -> None:
    if not 1 <= size <= min(img.size):
        raise ValueError(
            f"cannot cut a {size} x {size} crop from a picture of {img.width} x {img.height}; "
            "resize it first (resize_shorter)"
        )


def to_tensor(img: Image.Image | np.ndarray) -> Tensor:
    """8-bit picture (PIL, or uint8 [..., H, W, 3]) -> float32 [..., 3, H, W], value / 127.5 - 1."""
    if isinstance(img, Image.Image):
        img = np.asarray(img.convert("RGB"))
    if img.dtype != np.uint8 or img.ndim < 3 or img.shape[-1] != 3:
        raise ValueError(f"expected a uint8 array [..., H, W, 3], got {img.dtype} {list(img.shape)}")
    return normalize(torch.from_numpy(np.array(img)).movedim(-1, -3).contiguous())


def deliver(batch: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; to a GPU from pinned memory, since the host would wait for any other copy."""
    if device.type != "cuda":
        return batch.to(device)
    return (batch if batch.is_pinned() else batch.pin_memory()).to(device, non_blocking=True)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape -> float32, value / 127.5 - 1, on the same device."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Floating [...] in [-1, 1] -> uint8 [...]: the nearest of the 256 levels (ties to even), clipped.

    Raises ValueError for NaN, which no grey level stands for.
    """
    if not images.is_floating_point():
        raise ValueError(f"expected floating-point pictures in [-1, 1], got {images.dtype}")
    levels = (images.detach().float() + 1.0).mul_(127.5)
    if torch.isnan(levels).any():
        raise ValueError("a picture to be converted to 8 bits holds NaN; the model that made it has diverged")
    return levels.round_().clamp_(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """One picture [3, H, W], floating in [-1, 1] or uint8 -> PIL RGB."""
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"expected one picture [3, H, W], got {list(image.shape)}")
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def make_grid(
    rows: Sequence[Tensor],  # each [N, 3, H, W], floating in [-1, 1] or uint8; N may differ
    labels: Sequence[str] | None = None,  # one a row, written to its left
    *,
    separator: int = 2,
    scale: int = 1,  # integer magnification, nearest neighbour
) -> Image.Image:
    """Rows of pictures on white with thin separators; row r, column n is rows[r][n]."""
    if not rows:
        raise ValueError("make_grid needs at least one row of pictures [N, 3, H, W]")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"make_grid got {len(rows)} rows and {len(labels)} labels")
    if scale < 1 or separator < 0:
        raise ValueError(f"make_grid expects scale >= 1 and separator >= 0, got {scale} and {separator}")
    for row in rows:
        if row.dim() != 4 or row.shape[1] != 3 or 0 in row.shape:
            raise ValueError(f"every row must be [N, 3, H, W] and not empty, got {list(row.shape)}")

    font = _label_font()
    boxes = [font.getbbox(label) for label in labels or ()]
    margin = int(max((box[2] for box in boxes), default=0)) + (8 if labels else 0)
    width = margin + max(separator + row.shape[0] * (row.shape[3] * scale + separator) for row in rows)
    height = separator + sum(row.shape[2] * scale + separator for row in rows)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)

    top = separator
    for i_row, row in enumerate(rows):
        tile_h, tile_w = row.shape[2] * scale, row.shape[3] * scale
        if labels is not None:
            draw.text((4, top + tile_h // 2), labels[i_row], fill="black", font=font, anchor=_anchor(font))
        for i_column, picture in enumerate(row):
            tile = to_pil(picture)
            if scale > 1:
                tile = tile.resize((tile_w, tile_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + separator + i_column * (tile_w + separator), top))
        top += tile_h + separator
    return canvas


def _label_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size=13)
    except ImportError:  # a Pillow built without FreeType has only its fixed bitmap font
        return ImageFont.load_default()


def _anchor(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str | None:
    return "lm" if isinstance(font, ImageFont.FreeTypeFont) else None


def save_png(image: Image.Image | Tensor, path: PathLike) -> Path:
    """Write a PIL image or one picture [3, H, W] as PNG, making the folder; nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = to_pil(image) if isinstance(image, Tensor) else image
    atomic_write(path, lambda name: picture.save(name, format="PNG"))
    return path
