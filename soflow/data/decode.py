"""Image files into pixels: by NVIDIA DALI, on the GPU where there is one, or by Pillow.

On a CPU both give the same bits of a sound file: DALI gets what Pillow takes for a JPEG or WebP by its header, and what
DALI refuses Pillow tries. Neither turns an image as its EXIF orientation says, as the official recipe does not.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from soflow.data.feeder import has_dali
from soflow.data.image_folder import DECODE_ERRORS, decode_image, open_image
from soflow.data.source import DataError

Decoder = Callable[[Sequence[bytes]], "list[Tensor | str]"]
"""Files to pixels, (H, W, 3) uint8 on the decoder's device, or to why there are none."""


def open_decoder(name: Literal["auto", "dali", "pillow"], device: torch.device, threads: int) -> Decoder:
    """Return the decoder called so; auto is dali on a GPU where it is installed, else pillow."""
    if name == "auto":
        name = "dali" if device.type == "cuda" and has_dali() else "pillow"
    if name == "dali":
        if not has_dali():
            raise DataError("decoder: got 'dali', expected 'auto' or 'pillow', because DALI is not installed")
        return _dali_decoder(device)
    return _pillow_decoder(device, threads)


def _pillow_decoder(device: torch.device, threads: int) -> Decoder:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(contents: Sequence[bytes]) -> list[Tensor | str]:
        return [out if isinstance(out, str) else out.to(device) for out in pool.map(_decode_by_pillow, contents)]

    return decode


def _decode_by_pillow(content: bytes) -> Tensor | str:
    try:
        return torch.from_numpy(decode_image(content))
    except DECODE_ERRORS as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}"[:300]


def _dali_decoder(device: torch.device) -> Decoder:
    import nvidia.dali.experimental.dynamic as ndd

    on_gpu = device.type == "cuda"
    its_device = ndd.Device("gpu", device.index or 0) if on_gpu else ndd.Device("cpu")

    def run(contents: Sequence[bytes]) -> list[Tensor]:
        if on_gpu:
            # each thread has one of its own, the first if nothing says otherwise, and DALI comes back to it
            torch.cuda.set_device(device)
        # Fancy upsampling is what the CPU does: without it the bits would differ between the two.
        settings = {"device": "gpu", "jpeg_fancy_upsampling": True} if on_gpu else {"device": "cpu"}
        with its_device:
            files = ndd.as_batch([ndd.as_tensor(np.frombuffer(content, dtype=np.uint8)) for content in contents])
            images = ndd.decoders.image(files, adjust_orientation=False, **settings)
            return [from_dlpack(image.evaluate()).clone() for image in images.tensors]

    def run_each(contents: Sequence[bytes]) -> list[Tensor | None]:
        if not contents:
            return []
        try:
            return list(run(contents))
        except (RuntimeError, ValueError):
            # One bad file fails them all: find it.
            return [None] if len(contents) == 1 else [pixels for content in contents for pixels in run_each([content])]

    def decode(contents: Sequence[bytes]) -> list[Tensor | str]:
        suited = [suits_dali(content) for content in contents]
        by_dali = iter(run_each([content for content, suits in zip(contents, suited, strict=True) if suits]))
        results: list[Tensor | str] = []
        for content, suits in zip(contents, suited, strict=True):
            pixels = next(by_dali) if suits else None
            result = _decode_by_pillow(content) if pixels is None else pixels
            results.append(result if isinstance(result, str) else result.to(device))
        return results

    return decode


def suits_dali(content: bytes) -> bool:
    """Return whether DALI decodes such a file as Pillow does, and survives one that was cut off."""
    try:
        with open_image(content) as image:
            # Of a BMP that was cut off DALI makes the rest up, and PNGs that were can end the process.
            return image.format in ("JPEG", "WEBP")
    except DECODE_ERRORS:
        return False
