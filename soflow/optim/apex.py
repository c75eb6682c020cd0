"""The update by NVIDIA apex's FusedAdam."""

import importlib
from typing import Any

from torch import Tensor

from soflow import doctor
from soflow.optim.backend import GROUP_SETTINGS, Owner
from soflow.optim.reference import Reference


class Apex(Reference):
    """NVIDIA apex's FusedAdam over the same state; norm, averages and shadows as in the reference."""

    def __init__(self, optimizer: Owner) -> None:
        super().__init__(optimizer)
        if optimizer.name != "adamw" or optimizer.shadows:
            raise ValueError("optim.backend: got 'apex', expected another for RAdam or bf16 shadows, which it lacks")
        # it constructs one, which fails where apex was built without its CUDA extensions
        finding = doctor.run_check("NVIDIA apex", doctor.check_apex)
        if finding.status != "works":
            raise ValueError(f"optim.backend: got 'apex', which is {finding.status} here: {finding.detail}")
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
        self._fused_adam = fused_adam(
            [{"params": group["params"]} for group in optimizer.param_groups], adam_w_mode=True
        )

    def _move(self, groups: list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]) -> None:
        optimizer, theirs = self._optimizer, self._fused_adam
        for group in optimizer.param_groups[len(theirs.param_groups) :]:
            theirs.add_param_group({"params": group["params"]})
        # by identity: groups that compare as equal would compare their tensors
        inner_of = {}
        for group, inner in zip(optimizer.param_groups, theirs.param_groups, strict=True):
            inner.update({key: group[key] for key in GROUP_SETTINGS})
            inner_of[id(group)] = inner
        for group, pairs in groups:
            states = [optimizer.state[param] for param, _ in pairs]
            done = {int(state["step"].item()) for state in states}
            if len(done) > 1:
                raise ValueError(
                    f"optim.backend: got 'apex' with parameters after {sorted(done)} steps, expected one number: apex "
                    "counts the steps of a param group, not of a parameter"
                )
            inner_of[id(group)]["step"] = done.pop()
            for (param, _), state in zip(pairs, states, strict=True):
                theirs.state[param] = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                state["step"] += 1
        theirs.step()
