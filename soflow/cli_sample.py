"""`soflow sample`: images from a checkpoint, drawn by one process or several."""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from soflow.arguments import Command, add_weights, command_parser, file_name, numbers, positive
from soflow.config import OFFICIAL_VAE, Sampler, require_calls

if TYPE_CHECKING:
    import numpy as np

    from soflow.distributed import Processes
    from soflow.flow import SolutionFlow
    from soflow.vae import Vae

DONE, FAILED = 0, 1
PREVIEWED_CLASSES = SEEDS_PER_CLASS = 10
# how long a process waits for the others' share of a turn, or their copy of the checkpoint
PATIENCE_S = 1800.0


class UsageError(ValueError):
    """Arguments that cannot be used together or with the given checkpoint; the message says which and why."""


class _Task(NamedTuple):
    """What is drawn, and by what: image i has seeds[i] and, where there are classes, class i modulo their number."""

    flow: "SolutionFlow"
    vae: "Vae | None"
    weights: str
    step: int
    classes: Sequence[int]
    seeds: Sequence[int]

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        network: Any = self.flow.network
        return network.in_channels, network.input_size, network.input_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        channels, side, _ = self.noise_shape
        return (side, side, channels) if self.vae is None else (side * self.vae.reduction,) * 2 + (3,)


def _sample_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "sample",
        "Draw one image per seed. The classes take turns: image i has the i-th seed and class i modulo the number of "
        "classes, so the number of seeds must be a multiple of it. An image depends on its seed, its class, --nfe "
        "and --sampler and, but for rounding, not on the other images or the batch size. Several processes draw the "
        "same file: torchrun --nproc-per-node N -m soflow.cli sample ...",
        "examples:\n"
        "  soflow sample runs/digits --grid digits.png                  10 images of each of 10 classes, a row each\n"
        "  soflow sample runs/digits --seeds 0-49999 --npz samples.npz  5,000 of each\n"
        "  soflow sample runs/digits --nfe 2 --classes 3,7 --seeds 0-19 --grid digits.png\n"
        "  soflow sample runs/digits --nfe 4 --sampler chain --grid digits.png",
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="run folder (its newest checkpoint), step folder, exported folder, or official .pt file",
    )
    parser.add_argument("--nfe", type=positive, default=1, metavar="N", help="network calls per image (default 1)")
    parser.add_argument(
        "--sampler",
        choices=get_args(Sampler),
        help="how several calls make an image: from fresh noise each time, by solutions in a chain, or by steps of the "
        "velocity, heun taking two calls each (default: flow.sampler of the configuration)",
    )
    parser.add_argument(
        "--classes",
        type=numbers,
        metavar="LIST",
        help="such as 0,2,5-9 (default: the first ten; with --seeds all, or the first ones where the seeds are fewer)",
    )
    parser.add_argument(
        "--seeds",
        type=numbers,
        metavar="LIST",
        help="one per image, such as 0-99 (default: from 0 on, ten per class, or 0-99 where there are no classes)",
    )
    parser.add_argument(
        "--grid",
        type=file_name(".png"),
        metavar="FILE.png",
        help="write all images as one, classes as rows; it is made in memory",
    )
    parser.add_argument(
        "--npz",
        type=file_name(".npz"),
        metavar="FILE.npz",
        help="write the images in the order of the seeds, as the array arr_0, N x H x W x 3 uint8",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=100, metavar="N", help="images at once in a process (default 100)"
    )
    parser.add_argument(
        "--vae",
        metavar="NAME",
        help="decodes what is drawn: folder of a diffusers AutoencoderKL, or its name on the hub (default: none where "
        f"the run is of images; where it is of latents train.sample_vae, or else {OFFICIAL_VAE})",
    )
    add_weights(parser)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU when there is one (default)"
    )
    return parser


def _sample(args: argparse.Namespace) -> int:
    if args.grid is None and args.npz is None:
        raise UsageError("nothing to write: expected --grid FILE.png, --npz FILE.npz or both")
    if args.classes is not None and args.seeds is not None:
        _require_equal_turns(args.classes, args.seeds)
    from soflow.distributed import is_peer_failure, join_processes

    refusal = None
    try:
        with join_processes(args.device, PATIENCE_S, "--device") as processes:
            try:
                _draw_and_write(args, processes)
            except (ValueError, OSError) as error:
                # of all processes together: they leave each other in peace
                refusal = error
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        reason = str(error).strip().splitlines()[0]
        print(f"error: another process is gone, or does not answer: {reason}", file=sys.stderr)
        return FAILED
    if refusal is not None:
        raise refusal
    return DONE


def _draw_and_write(args: argparse.Namespace, processes: "Processes") -> None:
    task = _prepare(args, processes)
    start = time.perf_counter()
    _draw_all(task, args, processes)
    seconds = time.perf_counter() - start
    if processes.is_first:
        shared = f", {processes.world_size} processes" if processes.world_size > 1 else ""
        files = ", ".join(str(path) for path in (args.grid, args.npz) if path is not None)
        print(
            f"{len(task.seeds)} images, {args.nfe} NFE by {task.flow.sampler}, {task.weights} weights of step "
            f"{task.step}, {seconds:.1f} s on {processes.device}{shared}: {files}"
        )


def _prepare(args: argparse.Namespace, processes: "Processes") -> _Task:
    """Load what draws, the same in every process."""
    from soflow import images
    from soflow.run_folder import flow_of, read_trained
    from soflow.vae import load_vae

    with processes.failing_together():
        for path in filter(None, (args.grid, args.npz) if processes.is_first else ()):
            images.require_writable(path)
        trained = read_trained(args.path, args.weights)
        flow = flow_of(trained, args.path, processes.device, args.sampler)
        network: Any = flow.network
        require_calls("--nfe", args.nfe, flow.sampler)
        classes, seeds = _choose_images(args.classes, args.seeds, network.num_classes)
        vae = None
        if name := args.vae or trained.vae:
            vae = load_vae(name, processes.device)
            vae.require_channels("--vae", network.in_channels)
    first_step = processes.agree(trained.step)
    with processes.failing_together():
        # the newest checkpoint of a run that goes on may have changed in between
        if trained.step != first_step:
            raise UsageError(
                f"{args.path}: got step {trained.step} here and {first_step} in process 0, expected a step folder"
            )
    # an export holds one kind, whichever was asked for
    return _Task(flow, vae, trained.kind, trained.step, classes, seeds)


def _choose_images(
    classes: Sequence[int] | None, seeds: Sequence[int] | None, num_classes: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the classes that take turns, none for an unconditional network, and the seeds: what is None is chosen."""
    if num_classes == 0:
        if classes is not None:
            raise UsageError("--classes: expected nothing, because the network is unconditional")
        return (), range(PREVIEWED_CLASSES * SEEDS_PER_CLASS) if seeds is None else seeds
    if classes is None:
        classes = range(min(num_classes, PREVIEWED_CLASSES if seeds is None else len(seeds)))
    if max(classes) >= num_classes:
        raise UsageError(f"--classes: got {max(classes)}, expected classes from 0 to {num_classes - 1}")
    if seeds is None:
        seeds = range(SEEDS_PER_CLASS * len(classes))
    _require_equal_turns(classes, seeds)
    return classes, seeds


def _require_equal_turns(classes: Sequence[int], seeds: Sequence[int]) -> None:
    if len(seeds) % len(classes):
        raise UsageError(
            f"--seeds: got {len(seeds)} seeds, expected a multiple of {len(classes)}, the number of classes"
        )


def _draw_all(task: _Task, args: argparse.Namespace, processes: "Processes") -> None:
    """Draw all images, in batches that the processes take in turn, and write them in order from the first process.

    A batch holds the same images whatever the number of processes; in memory there are two of each process at most: a
    turn is written while the next is drawn.
    """
    count, size, num = len(task.seeds), args.batch_size, processes.world_size
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    with ExitStack() as files:
        with processes.failing_together():
            write = files.enter_context(_writing(task, args)) if processes.is_first else _write_nothing
        writer = files.enter_context(ThreadPoolExecutor(1, thread_name_prefix="images"))
        parts: list[np.ndarray] = []
        for first in range(0, len(batches), num):
            turn = batches[first : first + num]
            with processes.failing_together():
                writing = writer.submit(write, parts)
                own = _draw(task, turn[processes.rank] if processes.rank < len(turn) else range(0), args.nfe)
                writing.result()
            parts = processes.collect(own, [len(batch) for batch in turn])
        with processes.failing_together():
            write(parts)
            files.close()


def _draw(task: _Task, batch: range, nfe: int) -> "np.ndarray":
    """Return the images of one batch, which may be empty: (n, H, W, C) uint8."""
    import numpy as np
    import torch

    from soflow.images import to_uint8
    from soflow.sampling import sample, sample_noise

    if not batch:
        return np.empty((0, *task.image_shape), np.uint8)
    device, shape = next(task.flow.parameters()).device, task.noise_shape
    noise, renoise = sample_noise(torch.tensor(task.seeds[batch.start : batch.stop], device=device), shape, nfe)
    classes = [task.classes[index % len(task.classes)] for index in batch] if task.classes else None
    labels = None if classes is None else torch.tensor(classes, device=device)
    x = sample(task.flow, labels, (len(batch), *shape), nfe, noise, renoise)
    if not torch.isfinite(x).all():
        raise UsageError("the network draws NaN or infinity: its training has diverged")
    return to_uint8(x if task.vae is None else task.vae.decode(x))


@contextmanager
def _writing(task: _Task, args: argparse.Namespace) -> "Iterator[Callable[[Sequence[np.ndarray]], None]]":
    """Yield what takes the images in order; --npz and --grid are there after the block, or as they were."""
    import numpy as np
    from tqdm import tqdm

    from soflow import images

    count, (height, width, channels) = len(task.seeds), task.image_shape
    pixels = np.empty((0 if args.grid is None else count, height, width, channels), np.uint8)
    # torchrun ends its processes by it
    with _interrupted_by(signal.SIGTERM), ExitStack() as files:
        bar = files.enter_context(tqdm(total=count, unit="image", file=sys.stderr, disable=None))
        append = None if args.npz is None else files.enter_context(images.writing_npz(args.npz, (count, height, width)))
        written = 0

        def write(parts: "Sequence[np.ndarray]") -> None:
            nonlocal written
            for part in parts:
                if append is not None:
                    append(part)
                if args.grid is not None:
                    pixels[written : written + len(part)] = part
                written += len(part)
                bar.update(len(part))

        yield write
        files.close()
        if args.grid is not None:
            columns = count // len(task.classes) if task.classes else math.ceil(math.sqrt(count))
            rows = pixels
            if task.classes:
                # from classes taking turns to one row per class
                rows = pixels.reshape(columns, len(task.classes), *task.image_shape).swapaxes(0, 1)
            images.save_png(args.grid, images.grid(rows.reshape(pixels.shape), columns))


def _write_nothing(parts: "Sequence[np.ndarray]") -> None:
    """What the other processes do with images: the first has them."""


@contextmanager
def _interrupted_by(signum: int) -> Iterator[None]:
    """Let a signal raise KeyboardInterrupt in the block; else it ends the process, and leaves half a file behind."""
    previous = signal.signal(signum, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signum, previous)


COMMANDS = {"sample": Command("draw images from a checkpoint", _sample_parser, _sample)}
