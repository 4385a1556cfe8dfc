"""The budget schedule: how many triplets may live at each step."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import as_int


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets may live at each step (paper, section 3.3 and appendix A).

    Three phases: `init_budget` up to step tinit; a cubic decay to `target_budget`; and from step
    total_step - tfinal on, a fixed pattern of `target_budget` triplets.

    Args:
        init_budget: triplets at the start, over all matrices.
        target_budget: triplets at the end. Not below it, but above init_budget it prunes nothing.
        tinit: steps before the first pruning.
        tfinal: steps after the last.
        deltaT: steps between two prunings.
        total_step: steps of the whole training. Steps count from 1, so the last is total_step.
            None: not known yet; nothing after step tinit can be asked until it is.

    Every number may be NumPy's, in a 0-d tensor or a float, if it is a whole one; a plain int is
    kept.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is no whole number, or negative (deltaT, total_step: not positive),
            or there is no step left for the budgeting phase (tinit ≥ total_step - tfinal).
    """

    init_budget: int
    target_budget: int
    tinit: int
    tfinal: int
    deltaT: int
    total_step: int | None

    def __post_init__(self) -> None:
        least = dict.fromkeys(("init_budget", "target_budget", "tinit", "tfinal"), 0)
        least |= {"deltaT": 1, "total_step": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if name != "total_step" or value is not None:
                # Whatever kind of number a script has, a plain one is kept, and saved.
                object.__setattr__(self, name, as_int(name, value, smallest))
        if self.total_step is None:
            return
        if self.tinit >= self.final_step:
            raise ValueError(
                "tinit must be less than total_step - tfinal, got "
                f"tinit={self.tinit}, total_step={self.total_step}, tfinal={self.tfinal}"
            )

    @property
    def final_step(self) -> int:
        """The last step of the budgeting phase, at which the pattern is frozen.

        Raises:
            RuntimeError: total_step is not known yet.
        """
        if self.total_step is None:
            raise RuntimeError("total_step is not known yet: set it, for the budget depends on it")
        return self.total_step - self.tfinal

    def phase(self, step: int) -> str:
        """ "initial", "budgeting" or "final"."""
        step = as_int("step", step, 0)
        if step <= self.tinit:
            return "initial"
        return "budgeting" if step <= self.final_step else "final"

    def budget(self, step: int) -> int:
        """b(t): the number of triplets that may live at `step`."""
        step = as_int("step", step, 0)
        target = min(self.target_budget, self.init_budget)
        if step <= self.tinit:
            return self.init_budget
        if step >= self.final_step:
            return target
        remaining = 1 - (step - self.tinit) / (self.final_step - self.tinit)
        return int((self.init_budget - target) * remaining**3 + target)

    def masks_at(self, step: int) -> bool:
        """Whether triplets are pruned at `step`: every deltaT-th, the last one, and all final ones.

        PEFT's convention; loralib prunes at the last budgeting step only if deltaT divides it.
        """
        step = as_int("step", step, 0)
        if step <= self.tinit:
            return False
        return step >= self.final_step or step % self.deltaT == 0
