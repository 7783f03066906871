"""Encoded images to one uint8 tensor: decoded once by Pillow, in threads, with a progress bar when it takes long."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..errors import BadData

_PATIENCE = 2.0  # seconds without a progress bar
_CHUNK = 256  # images per task: a task of one 32×32 image would cost more than its decoding
_GREY = {"1", "L", "LA", "La"}
_DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}


def decode(sources: Sequence[bytes | Path], where: Callable[[int], str], size: int | None = None) -> Tensor:
    """(N, C, H, W) uint8 from N encoded images (bytes or files), resized to size×size if `size` is given.

    C is 3 if any image has colours, else 1; transparency is dropped. `where(i)` names image i in an error. Raises
    BadData for an image that cannot be decoded, for more than 8 bits per channel, and for unequal sizes.
    """
    chunks = [range(begin, min(begin + _CHUNK, len(sources))) for begin in range(0, len(sources), _CHUNK)]

    def work(chunk: range) -> list[np.ndarray]:
        return [_pixels(sources[i], where(i), size) for i in chunk]

    pixels: list[np.ndarray] = []
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for decoded in _with_progress(pool.map(work, chunks), len(chunks), "Decoding images"):
            pixels += decoded
    finally:
        pool.shutdown(cancel_futures=True)
    return _stack(pixels, where)


def check_size(size: int | None) -> None:
    """BadData unless `size` is None or a number of pixels."""
    if size is not None and size < 1:
        raise BadData(f"size is {size}, but images need at least 1 pixel a side.")


def _pixels(source: bytes | Path, name: str, size: int | None) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            mode = image.mode
            if mode not in _DEEP:
                small = image.convert("L" if mode in _GREY else "RGB")
                return np.asarray(small if size is None else small.resize((size, size), Image.Resampling.BILINEAR))
    except Exception as error:  # broken bytes make Pillow raise a dozen types, SyntaxError and struct.error among them
        raise BadData(f"The image in {name} cannot be decoded ({error}); repair or remove it.") from error
    raise BadData(f"The image in {name} has more than 8 bits per channel (Pillow mode {mode}); convert it to 8 bits.")


def _stack(pixels: list[np.ndarray], where: Callable[[int], str]) -> Tensor:
    for i, image in enumerate(pixels):
        if image.shape[:2] != pixels[0].shape[:2]:
            raise BadData(
                f"The images have unequal sizes: {_by(pixels[0])} pixels in {where(0)}, {_by(image)} in {where(i)}; "
                "give size= to resize them all."
            )
    if all(image.ndim == 2 for image in pixels):
        return torch.from_numpy(np.stack(pixels)[:, None])
    coloured = [np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image for image in pixels]
    return torch.from_numpy(np.stack(coloured)).permute(0, 3, 1, 2).contiguous()


def _by(image: np.ndarray) -> str:
    return f"{image.shape[0]}×{image.shape[1]}"


def _with_progress(parts: Iterable[list[np.ndarray]], total: int, text: str) -> Iterator[list[np.ndarray]]:
    """The parts as they come; a bar on a terminal once `_PATIENCE` seconds have passed."""
    begin = time.monotonic()
    bar: Progress | None = None
    with contextlib.ExitStack() as stack:
        for done, part in enumerate(parts, 1):
            if bar is None and sys.stderr.isatty() and time.monotonic() - begin > _PATIENCE:
                bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
                task = bar.add_task(text, total=total)
            if bar is not None:
                bar.update(task, completed=done)
            yield part
