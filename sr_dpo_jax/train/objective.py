"""The one table of objectives. A new objective is a function in `losses.py`, its keys in the schema and a row here.

Nothing else in the package asks for an objective's name to decide what to do. Imports no jax: reports read it too.

Next: `losses.py`, which holds the formulas that the rows name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from sr_dpo_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Kind:
    """The facts of an objective, whatever its numbers are."""

    arguments: tuple[str, ...]
    """The arrays that its function in `losses.py` takes, named as `train_step.pair_metrics` names them."""
    family: str
    """Objectives of one family share a figure, and their losses are of one scale: `likelihood`, `logistic`, `squared`
    or `squared, per token`."""
    needs_rejected: bool = True
    needs_reference: bool = True
    refined: bool = False
    """The augmented margin shifts the margin, so training needs the rows with p."""
    loss_at_zero: Callable[[float], float] | None = None
    """The loss where policy and reference are the same, as a function of β; None where the weights decide."""


def _ln_2(beta: float) -> float:
    return math.log(2)


def _quarter(beta: float) -> float:
    return 1 / (4 * beta**2)


LARGEST_LOSS = 1e32
"""The largest loss of a pair whose sums stay within float32."""
BOTH = ("margin", "augmented_margin")
LENGTHS = ("chosen_log_ratio", "rejected_log_ratio", "chosen_tokens", "rejected_tokens")
OBJECTIVES = {
    "sft": Kind(("chosen_logprob",), "likelihood", needs_rejected=False, needs_reference=False),
    "dpo": Kind(("margin",), "logistic", loss_at_zero=_ln_2),
    "sr_dpo": Kind(BOTH, "logistic", refined=True, loss_at_zero=_ln_2),
    "ipo": Kind(("margin",), "squared", loss_at_zero=_quarter),
    "sr_ipo": Kind(BOTH, "squared", refined=True, loss_at_zero=_quarter),
    "ipo_mean": Kind(LENGTHS, "squared, per token", loss_at_zero=_quarter),
}
"""Every objective by its name, which is that of its function in `losses.py` too."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective with its numbers."""

    name: str
    numbers: Mapping[str, float]
    """The keyword numbers of its function in `losses.py`: all keys of the section `objective` but the name."""

    @classmethod
    def of(cls, name: str, **numbers: float) -> "Objective":
        """Takes the keys of the configuration's section `objective`.

        Raises:
          UsageError: the loss begins at a number whose sums float32 holds as infinity, so that no step would count.
        """
        begins_at = OBJECTIVES[name].loss_at_zero
        if begins_at is not None and begins_at(numbers["beta"]) > LARGEST_LOSS:
            raise UsageError(
                f"objective.beta={numbers['beta']:g}: the loss of {name} begins at {begins_at(numbers['beta']):.2g}, "
                "too large for float32; raise objective.beta"
            )
        return cls(name, numbers)

    @property
    def kind(self) -> Kind:
        return OBJECTIVES[self.name]
