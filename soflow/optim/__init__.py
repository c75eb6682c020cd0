"""AdamW and RAdam with all that belongs to a step, by one of three backends."""

from soflow.optim.optimizer import Optimizer, build_optimizer

__all__ = ["Optimizer", "build_optimizer"]
