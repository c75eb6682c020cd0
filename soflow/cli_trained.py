"""`soflow audit` and `soflow export`: what a training left behind."""

import argparse
import re
import sys
from contextlib import suppress
from pathlib import Path

from soflow.arguments import Command, add_weights, command_parser, numbers, positive
from soflow.config import WIDTHS, is_width

DONE = 0


# ------------------------------------------------------------------------------------------------
# soflow audit


def _audit_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "audit",
        "Take the slope that a run trained on apart, on the CPU: its finite difference against the exact derivative "
        "(bias), and its arithmetic in several precisions against float64 (noise), as a function of the gap ratio r. "
        "Prints tables and writes audit.json and audit.png.",
        "examples:\n"
        "  soflow audit runs/digits                    the newest checkpoint\n"
        "  soflow audit runs/digits --steps all        over training: all that train.keep_last left",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--steps", type=_steps, default="newest", metavar="all|newest|LIST", help="which checkpoints (default newest)"
    )
    parser.add_argument("--samples", type=positive, default=32, metavar="N", help="rows to measure (default 32)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="of data, noise and times (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default RUN/audit)")
    return parser


def _audit(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from soflow import audit_report
    from soflow.audit import audit
    from soflow.images import require_writable
    from soflow.run_folder import RunFolder
    from soflow.step import gap_ratio_at

    found = audit(args.run, args.steps, args.samples, args.seed)
    out = args.run / "audit" if args.out is None else args.out
    out.mkdir(parents=True, exist_ok=True)
    require_writable(out / "audit.json")
    audits = list(tqdm(found, unit="checkpoint", file=sys.stderr, disable=None))
    config = RunFolder(args.run).read_config()
    about = {"run": config.name, "seed": args.seed, "samples": args.samples}
    audit_report.save_json(out / "audit.json", audits, about)
    ends = gap_ratio_at(config, 0), gap_ratio_at(config, config.train.total_steps - 1)
    audit_report.save_plot(out / "audit.png", audits, *ends)
    print(f"{audit_report.table(audits)}\n\n{out / 'audit.json'}, {out / 'audit.png'}")
    return DONE


def _steps(text: str) -> str | list[int]:
    return text if text in ("all", "newest") else numbers(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 0 to 10**18 - 1")
    return int(text)


# ------------------------------------------------------------------------------------------------
# soflow export


def _export_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "export",
        "Write trained weights to a new folder: model.safetensors, config.json with the shape of the network, and a "
        "model card. `soflow sample` reads it.",
        "examples:\n"
        "  soflow export runs/digits out                      the averaged weights of the newest checkpoint\n"
        "  soflow export runs/digits out --sigma-rel 0.07     another average, of a run with ema.profiles=[0.05,0.1]",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="run folder, step folder, or official .pt file")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what to write; nothing may be there")
    which = parser.add_mutually_exclusive_group()
    add_weights(which)
    which.add_argument(
        "--sigma-rel",
        type=_width,
        metavar="WIDTH",
        help="averaged by a power-function profile of this relative width: rebuilt from those of ema.profiles in all "
        "checkpoints of the run",
    )
    return parser


def _export(args: argparse.Namespace) -> int:
    from soflow.export import write_export
    from soflow.run_folder import read_trained, rebuild_average

    remark = ""
    if args.sigma_rel is None:
        trained = read_trained(args.path, args.weights)
    else:
        trained, off = rebuild_average(args.path, args.sigma_rel)
        remark = f", averaged as by sigma_rel {args.sigma_rel} (profile off by {off:.1e} of its norm)"
    write_export(args.folder, trained)
    print(f"{args.folder}: {trained.network.name}, {trained.kind} weights of step {trained.step}{remark}")
    return DONE


def _width(text: str) -> float:
    with suppress(ValueError):
        if is_width(width := float(text)):
            return width
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a number {WIDTHS}")


COMMANDS = {
    "audit": Command("say how wrong the slope of a run is, and why: bias or noise", _audit_parser, _audit),
    "export": Command("write trained weights as safetensors, with a model card", _export_parser, _export),
}
