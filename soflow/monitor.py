"""Watching the method: does the consistency loss still learn what it should? Decided once per interval, from its means.

Metrics, written beside the losses:

    method/lipschitz            root mean square of |dF| over that of |dx| along the look-ahead, over the consistency
                                rows: how much the network amplifies a step along the trajectory
    method/min_gap_share        share of the consistency rows whose look-ahead is the least gap, where r has no say
    method/guidance_collapse    1 while the velocity loss does not fall although the consistency loss did, else 0
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

# What the training step sums for the metrics above: means over the consistency rows.
WATCHED = ("method/dx_square", "method/dF_square", "method/min_gap_share")

WINDOW = 5
CONSISTENCY_FALL = 0.2


class Observation(NamedTuple):
    """The metrics of an interval, and the warning that it gives reason to, if any."""

    metrics: dict[str, float]
    warning: str | None


class Monitor:
    """Turns the means of each interval into metrics, and warns at the onset of a guidance collapse.

    Guidance mixes the network's own velocity into what it learns, and the consistency loss alone is smallest for a
    solution that no longer moves: then it falls, and the velocity loss stays. So the last 5 intervals are compared to
    the 5 before them. A collapse begins where the mean consistency loss fell by 20 % and the mean velocity loss did not
    fall, and lasts until the velocity loss falls.
    """

    def __init__(self) -> None:
        self._history: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)
        self._collapsed = False

    def observe(self, means: Mapping[str, float]) -> Observation:
        """Return the metrics of an interval with these means, where `WATCHED` became the metrics of the method.

        Without consistency rows, or where every step was skipped (NaN), there is nothing to watch, and none of them.
        """
        metrics = {name: mean for name, mean in means.items() if name not in WATCHED}
        dx_square, dF_square, min_gap_share = (means[name] for name in WATCHED)
        if not dx_square > 0:
            return Observation(metrics, None)
        before = self._collapsed
        self._history.append((means["loss/velocity_mse"], means["loss/consistency_mse"]))
        self._collapsed = self._is_collapsed()
        metrics |= {
            "method/lipschitz": math.sqrt(dF_square / dx_square),
            "method/min_gap_share": min_gap_share,
            "method/guidance_collapse": float(self._collapsed),
        }
        return Observation(metrics, self._warning() if self._collapsed and not before else None)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not stopped, as plain JSON values."""
        return {"history": [list(losses) for losses in self._history], "collapsed": self._collapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._history.clear()
        self._history.extend((velocity, consistency) for velocity, consistency in state["history"])
        self._collapsed = state["collapsed"]

    def _is_collapsed(self) -> bool:
        if len(self._history) < 2 * WINDOW:
            return False
        (old_velocity, new_velocity), (old_consistency, new_consistency) = self._means()
        # a velocity loss of 0 is that of no velocity rows
        stays = 0 < old_velocity <= new_velocity
        return stays and (self._collapsed or new_consistency <= (1 - CONSISTENCY_FALL) * old_consistency)

    def _means(self) -> list[tuple[float, float]]:
        columns = ([losses[index] for losses in self._history] for index in range(2))
        return [(sum(column[:WINDOW]) / WINDOW, sum(column[WINDOW:]) / WINDOW) for column in columns]

    def _warning(self) -> str:
        (old_velocity, new_velocity), (old_consistency, new_consistency) = self._means()
        return (
            f"warning: guidance may be collapsing: over the last {2 * WINDOW} intervals the consistency loss fell from "
            f"{old_consistency:.4g} to {new_consistency:.4g}, but the velocity loss went from {old_velocity:.4g} to "
            f"{new_velocity:.4g}; raise objective.mix_ratio or objective.fm_ratio, or lower objective.cfg_scale"
        )
