"""The command line: `soflow train`, `doctor`, and those of `soflow.cli_sample`, `cli_data` and `cli_trained`.

Exit codes: 0 done; 1 the training diverged, a process is lost, or the doctor found something required that does not
work; 2 bad input, or a disk that refuses, with one message on stderr; 3 the training was stopped by a signal, after it
saved its state (under torchrun, or of several processes, 0); 130 interrupted at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from soflow import __version__, cli_data, cli_sample, cli_trained
from soflow.arguments import Command, command_parser

# What a command needs is imported when it runs: --help should not wait for torch, nor the doctor depend on it.
if TYPE_CHECKING:
    from soflow.config import Config
    from soflow.doctor import Report

DONE, FAILED, BAD_INPUT, STOPPED = range(4)
INTERRUPTED = 130  # as shells have it
# of the processes by torchrun, of the job by Slurm
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


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
        "--dry-run", action="store_true", help="build everything but the VAE, say what would be trained, write nothing"
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

    restarts = [name for name in RESTART_COUNTS if int(os.environ.get(name, "0")) > 0]
    if args.resume is not None and restarts:
        raise ValueError(
            f"--resume: got {args.resume} in a restart ({restarts[0]}={os.environ[restarts[0]]}), expected none: it "
            "would drop what was trained since; the same command without it continues from the newest checkpoint"
        )

    from torch.distributed import is_torchelastic_launched

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
    return DONE if complete or processes.world_size > 1 or is_torchelastic_launched() else STOPPED


def _summary(config: "Config", resume: Path | None) -> str:
    """What training would do, after building all of it but the VAE; the weights without memory: any size fits."""
    import torch

    from soflow import checkpoint
    from soflow.assembly import training_ops
    from soflow.data import open_source
    from soflow.data.feeder import require_feeder
    from soflow.distributed import resolve_device
    from soflow.flow import build_flow
    from soflow.memory import predict_peak
    from soflow.run_folder import find_run, require_own_checkpoint
    from soflow.step import build_objective
    from soflow.trainer import require_matching_data, require_update

    device = resolve_device(config.engine.device)
    source = open_source(config.data)
    require_matching_data(config, source, world_size=1)
    require_feeder(config.data)
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
    if start is not None:
        require_own_checkpoint(config, source.fingerprint, checkpoint.read(start), start)
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
    **cli_sample.COMMANDS,
    **cli_data.COMMANDS,
    **cli_trained.COMMANDS,
    "doctor": Command("say what of this machine works, what is missing or broken, and why", _doctor_parser, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
