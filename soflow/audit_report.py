"""An audit as a table in Markdown, as JSON and as a plot."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from soflow.audit import WAYS, GapErrors, StepAudit
from soflow.checkpoint import replacing

COLORS = {"fp32": "tab:blue", "tf32-like": "tab:orange", "bf16": "tab:red"}
STYLES = {"two_pass": "-", "difference": "--"}


def table(audits: Sequence[StepAudit]) -> str:
    """Return three tables: every checkpoint at the gap of its step, the last one at every gap, and where noise crosses.

    Errors are relative to the exact slope.
    """
    last = audits[-1]
    over_training = [
        (str(audit.step), _cell(audit.r), f"{audit.order:.3f}", *_error_cells(audit.at(audit.r))) for audit in audits
    ]
    over_gaps = [(_cell(errors.r), *_error_cells(errors)) for errors in last.gaps]
    summary = [
        (way, _cell(last.F_error[way.split()[1]]), _cell(_prediction_ratio(last, way)), _cell(last.crossing[way]))
        for way in WAYS
    ]
    return "\n\n".join(
        (
            "Each checkpoint, at the gap ratio r of its step:",
            _grid(("step", "r", "order of bias", "bias", *WAYS), over_training),
            f"Step {last.step}, at every gap:",
            _grid(("r", "bias", *WAYS), over_gaps),
            f"Step {last.step}, the ways: relative error of F, geometric mean over r of noise by its prediction, and "
            "the r below which the noise exceeds the bias:",
            _grid(("way", "error of F", "noise / predicted", "crossing r"), summary),
        )
    )


def save_json(path: Path, audits: Sequence[StepAudit], about: dict[str, Any]) -> None:
    """Write `about` and every audit; a number that does not exist, NaN here, is null there."""
    content = {**about, "torch": torch.__version__, "steps": [_without_nan(asdict(audit)) for audit in audits]}
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def save_plot(path: Path, audits: Sequence[StepAudit], first_r: float, last_r: float) -> None:
    """Draw bias and noise over r for the last checkpoint and, where there are several, over training, as a PNG.

    first_r, last_r: gap ratios of the run's first and last step, equal where they are constant.
    """
    # Not from pyplot, which keeps figures and looks for a screen.
    figure = Figure(figsize=(12 if len(audits) > 1 else 9, 6), layout="constrained")
    axes = figure.subplots(1, 2 if len(audits) > 1 else 1, squeeze=False)[0]
    last = audits[-1]
    gaps = [errors.r for errors in last.gaps]
    for index, earlier in enumerate(audits[:-1]):
        label = f"bias, steps {audits[0].step} to {audits[-2].step}" if index == 0 else None
        axes[0].loglog([e.r for e in earlier.gaps], [e.bias for e in earlier.gaps], color="0.8", lw=1, label=label)
    _draw(axes[0], gaps, last.gaps)
    for way in WAYS:
        axes[0].loglog(gaps, [errors.predicted[way] for errors in last.gaps], color="0.3", ls=":", lw=0.8)
    # with an edge: one that is constant is seen too
    axes[0].axvspan(min(first_r, last_r), max(first_r, last_r), color="0.95", lw=2, zorder=0)
    axes[0].set(title=f"step {last.step}; grey: the run's gaps; dotted: predicted", xlabel="gap ratio r")
    axes[0].set_ylabel("error of the slope, relative to the exact slope")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    if len(audits) > 1:
        _draw(axes[1], [audit.step for audit in audits], [audit.at(audit.r) for audit in audits])
        axes[1].set(
            title="each step at the gap of the schedule", xlabel="step", xscale="linear", ylim=axes[0].get_ylim()
        )
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw(axes: Axes, x: Sequence[float], errors: Sequence[GapErrors]) -> None:
    axes.loglog(x, [at.bias for at in errors], color="black", lw=2.5, label="bias of the finite difference")
    for way in WAYS:
        lookahead, precision = way.split()
        label = f"noise, {lookahead} {precision}"
        axes.loglog(x, [at.noise[way] for at in errors], color=COLORS[precision], ls=STYLES[lookahead], label=label)


def _prediction_ratio(audit: StepAudit, way: str) -> float:
    pairs = [(errors.noise[way], errors.predicted[way]) for errors in audit.gaps]
    if any(noise <= 0 or predicted <= 0 for noise, predicted in pairs):
        return math.nan
    return math.exp(sum(math.log(noise / predicted) for noise, predicted in pairs) / len(pairs))


def _error_cells(errors: GapErrors) -> tuple[str, ...]:
    return _cell(errors.bias), *(_cell(errors.noise[way]) for way in WAYS)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
