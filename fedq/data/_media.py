"""Images and sound files as arrays; shared by the sources that read media."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY_MODES = frozenset({"1", "L", "I;16", "I"})


def stack_images(images: Sequence[Image], size: int, where: str) -> NDArray[np.uint8]:
    """Return images as (N, H, W) uint8 if all are grey, else as (N, H, W, 3).

    Args:
      images: Loaded Pillow images; any that is not grey makes all of them RGB.
      size: Pixels of both sides after resizing; 0 keeps a size that all share.
      where: What errors call the source.

    Raises:
      ConfigError: If sizes differ and ``size`` is 0.
    """
    if not size and len(sizes := sorted({image.size for image in images})) > 1:
        some = ", ".join(f"{w} x {h}" for w, h in sizes[:3])
        raise ConfigError(f"{where} has images of several sizes ({some}); set data.size=PIXELS")
    mode = "L" if all(image.mode in _GREY_MODES for image in images) else "RGB"
    pixels = []
    for image in images:
        converted = _flatten(image).convert(mode)
        if size and converted.size != (size, size):
            converted = converted.resize((size, size))
        pixels.append(np.asarray(converted))
    return np.stack(pixels)


def _flatten(image: Image) -> Image:
    """Undo what Pillow's conversion would clip (16-bit grey) or warn about (palettes)."""
    if image.mode == "P":
        return image.convert("RGBA")
    if image.mode in ("I", "I;16"):
        from PIL.Image import fromarray

        return fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image


def read_wav(path: Path, rate: int, where: str) -> tuple[NDArray[np.float32], int]:
    """Read PCM sound as (T, C) float32 in [-1, 1), and its samples per second.

    Args:
      path: A WAV file of 8 or 16 bits per sample.
      rate: Wanted samples per second, a divisor of the file's: blocks of samples are averaged, a
        crude low-pass filter. 0 keeps the file's.
      where: What errors call the file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            file_rate = file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise ConfigError(f"{where} is not a PCM WAV file: {error}") from None
    if width not in (1, 2):
        raise ConfigError(f"{where} has {8 * width} bits per sample; convert it to 16")
    data = data[: len(data) // (width * channels) * width * channels]  # a cut last frame
    samples: NDArray[np.float32]
    if width == 1:
        samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / np.float32(128)
    else:
        samples = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
    samples = samples.reshape(-1, channels)
    if not rate or rate == file_rate:
        return samples, file_rate
    if file_rate % rate:
        raise ConfigError(
            f"{where} has {file_rate} samples per second; data.rate={rate} must divide that"
        )
    factor = file_rate // rate
    blocks = samples[: len(samples) // factor * factor].reshape(-1, factor, channels)
    return blocks.mean(axis=1).astype(np.float32), rate
