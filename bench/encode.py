"""Images per second from JPEG files in memory to crops on the device: DALI and our crop against Pillow on all cores.

    python -m bench.encode [--images N] [--device cpu|cuda] [--json FILE]

The images are of 500 x 375 pixels, as ImageNet's mostly are, cropped to 256. `pillow` decodes and crops in a thread
per core, which run at once; `ours` is what `soflow encode` does before the VAE: DALI where it is
installed, and the crop on the device. The crops are compared first. Prints a table, then one line of JSON.
"""

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.figures import keep
from soflow.data.crop import center_crop
from soflow.data.decode import open_decoder
from soflow.data.feeder import has_dali

SIDE = 256
BATCH = 64
ROUNDS = 3


def make_images(count: int) -> list[bytes]:
    """Return `count` smooth random JPEG files."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(count):
        file = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    return contents


def pillow_crop(content: bytes) -> np.ndarray:
    """Return ADM's crop of a file, by Pillow alone."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    while min(image.size) >= 2 * SIDE:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = SIDE / min(image.size)
    size = (round(image.size[0] * scale), round(image.size[1] * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
    return pixels[top : top + SIDE, left : left + SIDE]


def ways(device: torch.device) -> dict[str, Callable[[list[bytes]], list[Tensor]]]:
    """Return what turns files into crops on the device, by name."""
    cores = os.cpu_count() or 1
    pool = ThreadPoolExecutor(cores)
    decode = open_decoder("dali" if has_dali() else "pillow", device, cores)

    def pillow(contents: list[bytes]) -> list[Tensor]:
        return list(torch.from_numpy(np.stack(list(pool.map(pillow_crop, contents)))).to(device))

    def ours(contents: list[bytes]) -> list[Tensor]:
        return [center_crop(image, SIDE) for image in decode(contents) if isinstance(image, Tensor)]

    return {"pillow": pillow, "ours": ours}


def rate(way: Callable[[list[bytes]], list[Tensor]], contents: list[bytes], device: torch.device) -> float:
    """Return images per second of one way."""
    start = time.perf_counter()
    for first in range(0, len(contents), BATCH):
        way(contents[first : first + BATCH])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return len(contents) / (time.perf_counter() - start)


def main() -> int:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="default 512")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"--images: got {args.images}, expected at least 1")
    torch.set_num_threads(1)
    device, contents = torch.device(args.device), make_images(args.images)
    found = ways(device)
    crops = {name: torch.stack(way(contents[:BATCH])).cpu().int() for name, way in found.items()}
    apart = (crops["ours"] - crops["pillow"]).abs()
    rounds = [{name: rate(way, contents, device) for name, way in found.items()} for _ in range(ROUNDS)]
    rates = {name: statistics.median(one[name] for one in rounds) for name in found}
    for name, value in rates.items():
        print(f"{name:8}{value:8.0f} images/s{value / rates['pillow']:8.2f}")
    print(f"crops differ by at most {int(apart.max())}, {float((apart > 0).float().mean()):.2%} of the bytes")
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "dali": has_dali(),
        "images_per_s": rates,
        "ratio": rates["ours"] / rates["pillow"],
        "largest_difference": int(apart.max()),
    }
    keep(args.json, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
