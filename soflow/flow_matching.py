"""Flow matching: the velocity alone, for comparison; its samples integrate the flow in steps.

Source: Lipman et al. 2023 (arXiv 2210.02747), here with the guidance and the adaptive weight of SoFlow's velocity rows.
"""

from soflow.flow import SolutionFlow
from soflow.objective import Batch, GuidedObjective, ObjectiveOutput, end_times, trained_labels, velocity_terms


class FlowMatching(GuidedObjective):
    """Weighted |v_pred - v|^2 at s = t in every row: what SoFlow's objective is without consistency rows."""

    def __call__(self, flow: SolutionFlow, batch: Batch) -> ObjectiveOutput:
        """Return the losses of `batch` under `flow`; ValueError unless all of its rows are velocity rows."""
        if batch.num_velocity != len(batch):
            raise ValueError(f"num_velocity: got {batch.num_velocity} of {len(batch)} rows, expected all of them")
        x_t, v_t = self.point(flow, batch)
        v, nothing, mix = self.look_ahead(flow, batch, x_t, v_t)
        conditions = trained_labels(flow, batch), batch.augment_labels, batch.draw_keys
        F_t = flow.network(x_t, batch.t, end_times(batch), *conditions)
        loss, statistics = self.ops.solution_loss(
            F_t, nothing, x_t, v, *velocity_terms(flow, mix), self.loss_p, self.loss_eps
        )
        return ObjectiveOutput(loss, *statistics.flatten().unbind())
