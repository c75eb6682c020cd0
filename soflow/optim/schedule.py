"""How the learning rate goes over a run."""

import math

from soflow.config import OptimConfig


def learning_rate(config: OptimConfig, total_steps: int, step: int) -> float:
    """Return the rate of the 0-based `step` of `total_steps`: up linearly to lr, then constant, or a cosine down to 0.

    The last warm-up step has the whole rate; the cosine, which begins after it, would reach 0 at step `total_steps`.
    """
    rate = config.lr
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
        rate *= 0.5 * (1.0 + math.cos(math.pi * progress))
    return rate
