"""The command line: `soflow train`, `sample`, `doctor`, and those of `soflow.cli_data` and `soflow.cli_trained`.

Exit codes: 0 done; 1 the training diverged or lost a process, or the doctor found something required that does not
work; 2 bad input, or a disk that refuses, with one message on stderr; 3 the training was stopped by a signal, after it
saved its state (of several processes 0); 130 interrupted at once.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from soflow import __version__, cli_data, cli_trained
from soflow.arguments import Command, command_parser, file_name, numbers, positive
from soflow.config import OFFICIAL_VAE, Sampler, require_calls

# What a command needs is imported when it runs: --help should not wait for torch, nor the doctor depend on it.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from soflow.config import Config
    from soflow.doctor import Report
    from soflow.flow import SolutionFlow
    from soflow.vae import Vae

DONE, FAILED, BAD_INPUT, STOPPED = range(4)
INTERRUPTED = 130  # as shells have it
PREVIEWED_CLASSES = SEEDS_PER_CLASS = 10


class UsageError(ValueError):
    """Arguments that cannot be used together or with the given checkpoint; the message says which and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: of the process) names; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="soflow",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train one-step generators with solution flow models, and sample from them.",
        epilog="\n".join(["commands:", *(f"  {name:<8} {command.summary}" for name, command in COMMANDS.items())])
        + "\n\nsoflow COMMAND --help says more.",
        usage="soflow COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"soflow {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    command = COMMANDS[chosen.command]
    # Intermixed: options may stand between the overrides of `train`.
    args = command.parser().parse_intermixed_args(chosen.arguments)
    try:
        return command.run(args)
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if args.traceback:
            raise
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED


# ------------------------------------------------------------------------------------------------
# soflow train


def _train_parser() -> argparse.ArgumentParser:
    from soflow.config_file import describe_fields

    lines = ["fields of the configuration:"]
    for field in describe_fields():
        default = "required" if field.default == "required" else f"default {field.default}"
        lines += [f"  {field.name}: {field.type}; {default}", f"      {field.help}"]
    parser = command_parser(
        "train",
        "Train a network from a configuration. A run that was interrupted continues when the same command is given "
        "again. Several processes: torchrun --nproc-per-node N train.py CONFIG ...",
        "\n".join(lines),
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/digits.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="changes to it; the value is read as YAML",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="STEP_FOLDER",
        help="continue from this checkpoint of the run and drop later ones",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--dry-run", action="store_true", help="build everything, say what would be trained, write nothing"
    )
    only.add_argument("--print-config", action="store_true", help="print the complete configuration as YAML and stop")
    only.add_argument("--print-folder", action="store_true", help="print the run folder and stop")
    return parser


def _train(args: argparse.Namespace) -> int:
    from soflow.config_file import dump_config, load_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(dump_config(config), end="")
        return DONE
    if args.print_folder:
        print(config.folder)
        return DONE
    if args.dry_run:
        print(_summary(config, args.resume))
        return DONE

    from soflow.distributed import join_processes
    from soflow.trainer import DivergedError, Trainer
    from soflow.watchdog import PeerError

    try:
        with join_processes(config.engine.device, config.engine.timeout_s) as processes:
            trainer = Trainer(config, processes, args.resume)
            complete = trainer.fit()
            if processes.is_first:
                again = "the same command" if args.resume is None else "the same command without --resume"
                end = "complete" if complete else f"stopped, {again} continues it"
                print(f"{trainer.folder.path}: step {trainer.finished}, {end}")
    except (DivergedError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    # torchrun takes every other code for a failure, and would start a stopped run again: status.json tells them apart
    return DONE if complete or processes.world_size > 1 else STOPPED


def _summary(config: "Config", resume: Path | None) -> str:
    """What training would do, after building all of it; the weights without memory, so that any size fits."""
    import torch

    from soflow.assembly import training_ops
    from soflow.data import open_source
    from soflow.distributed import resolve_device
    from soflow.flow import build_flow
    from soflow.memory import predict_peak
    from soflow.run_folder import find_run
    from soflow.step import build_objective
    from soflow.trainer import require_matching_data, require_update

    device = resolve_device(config.engine.device)
    source = open_source(config.data)
    require_matching_data(config, source, world_size=1)
    require_update(config, device)
    ops = training_ops(config, device)
    with torch.device("meta"):
        flow = build_flow(config.network, config.flow, ops)
    build_objective(config, ops)
    network, train = config.network, config.train
    millions = sum(parameter.numel() for parameter in flow.parameters()) / 1e6
    shape = " x ".join(map(str, source.image_shape))
    epochs = train.total_steps * train.batch_size / len(source)
    folder, start = find_run(config, resume, print)
    memory = predict_peak(config, source.image_shape, device)
    lines = {
        "network": f"{network.name}, {millions:.1f} M parameters, {shape}, {network.num_classes or 'no'} classes",
        "data": f"{config.data.source}, {len(source)} samples, {source.num_classes} classes",
        "training": f"{train.total_steps} steps of {train.batch_size} samples: {epochs:.1f} epochs",
        "device": f"{device}, {config.engine.precision}",
        "memory": f"{memory / 2**30:.1f} GiB of tensors at most",
        "run folder": f"{folder.path} ({'from the start' if start is None else f'continues from {start.name}'})",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


# ------------------------------------------------------------------------------------------------
# soflow sample


def _sample_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "sample",
        "Draw one image per seed. The classes take turns: image i has the i-th seed and class i modulo the number of "
        "classes, so the number of seeds must be a multiple of it. An image depends on its seed, its class, --nfe "
        "and --sampler, not on the other images or the batch size.",
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
        "--grid", type=file_name(".png"), metavar="FILE.png", help="write all images as one, classes as rows"
    )
    parser.add_argument(
        "--npz",
        type=file_name(".npz"),
        metavar="FILE.npz",
        help="write the images in the order of the seeds, as the array arr_0, N x H x W x 3 uint8",
    )
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="images at once (default 100)")
    parser.add_argument(
        "--vae",
        default=OFFICIAL_VAE,
        metavar="NAME",
        help="for networks of latents: folder of a diffusers AutoencoderKL, or its name on the hub "
        f"(default {OFFICIAL_VAE})",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="averaged weights, or those of the last step (default ema)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU when there is one (default)"
    )
    return parser


def _sample(args: argparse.Namespace) -> int:
    if args.grid is None and args.npz is None:
        raise UsageError("nothing to write: expected --grid FILE.png, --npz FILE.npz or both")
    if args.classes is not None and args.seeds is not None:
        _require_equal_turns(args.classes, args.seeds)
    import torch

    from soflow import images
    from soflow.distributed import resolve_device
    from soflow.run_folder import load_flow
    from soflow.vae import load_vae

    for path in filter(None, (args.grid, args.npz)):
        images.require_writable(path)
    device = resolve_device(args.device)
    flow, step = load_flow(args.path, args.weights, device, args.sampler)
    network: Any = flow.network
    require_calls("--nfe", args.nfe, flow.sampler)
    classes, seeds = _choose_images(args.classes, args.seeds, network.num_classes)
    vae = None if network.in_channels in images.IMAGE_CHANNELS else load_vae(args.vae, device)
    if vae is not None:
        vae.require_channels("--vae", network.in_channels)
    labels = torch.tensor(classes, device=device).repeat(len(seeds) // len(classes)) if classes else None

    start = time.perf_counter()
    pixels = _draw(flow, vae, torch.tensor(seeds, device=device), labels, args.nfe, args.batch_size)
    seconds = time.perf_counter() - start

    if args.npz is not None:
        images.save_npz(args.npz, pixels)
    if args.grid is not None:
        columns = len(seeds) // len(classes) if classes else math.ceil(math.sqrt(len(seeds)))
        # From classes taking turns to one row per class.
        rows = pixels.reshape(columns, len(classes), *pixels.shape[1:]).swapaxes(0, 1) if classes else pixels
        images.save_png(args.grid, images.grid(rows.reshape(pixels.shape), columns))
    print(
        f"{len(seeds)} images, {args.nfe} NFE by {flow.sampler}, {args.weights} weights of step {step}, "
        f"{seconds:.1f} s on {device}: " + ", ".join(str(path) for path in (args.grid, args.npz) if path is not None)
    )
    return DONE


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


def _draw(
    flow: "SolutionFlow", vae: "Vae | None", seeds: "Tensor", labels: "Tensor | None", nfe: int, batch_size: int
) -> "np.ndarray":
    import numpy as np
    import torch
    from tqdm import tqdm

    from soflow.images import to_uint8
    from soflow.sampling import sample, sample_noise

    network: Any = flow.network
    shape = (network.in_channels, network.input_size, network.input_size)
    batches = []
    with tqdm(total=len(seeds), unit="image", file=sys.stderr, disable=None) as bar:
        for start in range(0, len(seeds), batch_size):
            rows = slice(start, start + batch_size)
            noise, renoise = sample_noise(seeds[rows], shape, nfe)
            x = sample(flow, None if labels is None else labels[rows], (len(noise), *shape), nfe, noise, renoise)
            if not torch.isfinite(x).all():
                raise UsageError("the network draws NaN or infinity: its training has diverged")
            batches.append(to_uint8(x if vae is None else vae.decode(x)))
            bar.update(len(x))
    return np.concatenate(batches)


# ------------------------------------------------------------------------------------------------
# soflow doctor


def _doctor_parser() -> argparse.ArgumentParser:
    parser = command_parser("doctor", "Say what of this machine works, what is missing or broken, and why.", None)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _doctor(args: argparse.Namespace) -> int:
    from soflow.doctor import examine

    report = examine()
    print(json.dumps(asdict(report) | {"ok": report.ok}, indent=1) if args.json else _report_text(report))
    return DONE if report.ok else FAILED


def _report_text(report: "Report") -> str:
    lines = [f"Python {report.python} on {report.platform}"]
    lines += [
        f"GPU {gpu.index}: {gpu.name}, capability {gpu.capability}, {gpu.memory_gib:.1f} GiB" for gpu in report.gpus
    ]
    for title, required in (("required", True), ("optional", False)):
        lines += ["", f"{title}:"]
        for finding in report.findings:
            if finding.required == required:
                detail = " ".join(finding.detail.split())
                lines.append(f"  {finding.status:<8} {finding.name:<15} {finding.version or '-':<12} {detail}".rstrip())
    return "\n".join([*lines, "", f"everything required works: {'yes' if report.ok else 'no'}"])


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


COMMANDS = {
    "train": Command("train a network from a configuration, or continue its run", _train_parser, _train),
    "sample": Command("draw images from a checkpoint", _sample_parser, _sample),
    **cli_data.COMMANDS,
    **cli_trained.COMMANDS,
    "doctor": Command("say what of this machine works, what is missing or broken, and why", _doctor_parser, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
