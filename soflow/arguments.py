"""Arguments that several commands take, and the parser that all of them have."""

import argparse
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MAX_NUMBERS = 10_000_000


class Command(NamedTuple):
    """One command: its line of the help, its parser, and what it does; it returns the exit code."""

    summary: str
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int]


def command_parser(command: str, description: str, epilog: str | None) -> argparse.ArgumentParser:
    """Return the parser of `soflow command`."""
    parser = argparse.ArgumentParser(
        prog=f"soflow {command}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(description, 100),
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
    return parser


def add_weights(parser: argparse._ActionsContainer) -> None:
    """Add --weights, which of a checkpoint's: ema or model."""
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="averaged weights, or those of the last step (default ema)",
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return natural(text, least=1)


def natural(text: str, least: int = 0) -> int:
    """Parse an integer of at least `least`."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {least}")
    return int(text)


def numbers(text: str) -> list[int]:
    """Parse the numbers of a list such as '0,2,5-9', in the order given; no number twice."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers and ranges such as 0,2,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"got {part.strip()!r}, expected a range that ends at {first} or later")
        if len(found) + last - first >= MAX_NUMBERS:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected at most {MAX_NUMBERS} numbers")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected no number twice")
    return found


def file_name(suffix: str) -> Callable[[str], Path]:
    """Return the parser of a file name that ends in `suffix`."""

    def parse(text: str) -> Path:
        if Path(text).suffix != suffix:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a file name that ends in {suffix}")
        return Path(text)

    return parse
