"""SoFlow: one-step generators that learn the solution function of the flow ODE."""

from soflow.flow import SolutionFlow
from soflow.objective import Batch, Objective, ObjectiveOutput
from soflow.sampling import sample, sample_noise
from soflow.times import gap_ratio, middle_time

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Objective",
    "ObjectiveOutput",
    "SolutionFlow",
    "gap_ratio",
    "middle_time",
    "sample",
    "sample_noise",
]
