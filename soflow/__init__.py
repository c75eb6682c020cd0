"""SoFlow: one-step generators that learn the solution function of the flow ODE."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soflow.flow import SolutionFlow
    from soflow.flow_matching import FlowMatching
    from soflow.meanflow import MeanFlow
    from soflow.objective import Batch, Objective, ObjectiveOutput
    from soflow.sampling import sample, sample_noise
    from soflow.times import gap_ratio, middle_time

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "FlowMatching",
    "MeanFlow",
    "Objective",
    "ObjectiveOutput",
    "SolutionFlow",
    "gap_ratio",
    "middle_time",
    "sample",
    "sample_noise",
]

# Loaded at first use: `soflow --help` should not wait for torch, and `soflow doctor` has to run without it.
_HOMES = {
    "Batch": "soflow.objective",
    "FlowMatching": "soflow.flow_matching",
    "MeanFlow": "soflow.meanflow",
    "Objective": "soflow.objective",
    "ObjectiveOutput": "soflow.objective",
    "SolutionFlow": "soflow.flow",
    "gap_ratio": "soflow.times",
    "middle_time": "soflow.times",
    "sample": "soflow.sampling",
    "sample_noise": "soflow.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
