"""The one table of objectives. A new objective is a function in `losses.py`, its keys in the schema and a row here.

Nothing else in the package asks for an objective's name to decide what to do. Imports no jax: reports read it too.

Next: `losses.py`, which holds the formulas that the rows name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from sr_dpo_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Kind:
    """The facts of an objective, whatever its numbers are."""

    function: str
    """The name of its function in `losses.py`."""
    arguments: tuple[str, ...]
    """The arrays that the function takes, named as `train_step.pair_metrics` names them."""
    family: str
    """Objectives of one family share a figure, and their losses are of one scale: `likelihood`, `logistic`, `squared`
    or `squared, per token`."""
    needs_rejected: bool = True
    needs_reference: bool = True
    per_token: bool = False
    """Every log-prob is divided by the tokens of its response, in the margin and in the refinement alike."""
    refined: bool = False
    """The refinement Δ, the function's last array, shifts the margin."""
    loss_at_zero: Callable[[float], float] | None = None
    """The loss where policy and reference are the same and Δ = 0, as a function of β; None where the weights decide."""


def _ln_2(beta: float) -> float:
    return math.log(2)


def _quarter(beta: float) -> float:
    return 1 / (4 * beta**2)


LARGEST_LOSS = 1e32
"""The largest loss of a pair whose sums stay within float32."""
MARGIN = ("margin",)
PLAIN = {
    "sft": Kind("sft", ("chosen_logprob",), "likelihood", needs_rejected=False, needs_reference=False),
    "dpo": Kind("dpo", MARGIN, "logistic", loss_at_zero=_ln_2),
    "ipo": Kind("ipo", MARGIN, "squared", loss_at_zero=_quarter),
    "ipo_mean": Kind("ipo", MARGIN, "squared, per token", per_token=True, loss_at_zero=_quarter),
}
REFINEMENT = "refinement"
TWIN = "sr_"
OBJECTIVES = PLAIN | {
    TWIN + name: dataclasses.replace(PLAIN[name], arguments=(*PLAIN[name].arguments, REFINEMENT), refined=True)
    for name in ("dpo", "ipo", "ipo_mean")
}
"""Every objective by its name: the plain ones, and `sr_NAME` for those whose loss Δ can shift."""


@dataclasses.dataclass(frozen=True)
class Refinement:
    """How Δ is made. The paper's is the margin with p, judged by the policy."""

    form: str = "margin"
    """`margin`: β·m̂. `contrast`: d(p ⊕ x) − d(x), or − d(p′ ⊕ x) with a second instruction p′."""
    judge: str = "policy"
    """Whose log-probs they are: the `policy`'s in the step, or the `reference`'s, known before step 0. With `ratings`
    Δ comes from the ratings of the rows."""
    against: bool = False
    """There is a second instruction p′."""
    offset: str = "log"
    """With ratings: Δ is α·log of their difference, or α times it (`linear`)."""
    alpha: float = 1.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective with its numbers."""

    name: str
    numbers: Mapping[str, Any]
    """The keyword numbers of its function in `losses.py`: all keys of the section `objective` but the name. `lam` may
    be "auto" until the reference has scored the training pairs."""
    refinement: Refinement = Refinement()
    """How Δ is made where the objective has one."""

    @classmethod
    def of(cls, name: str, refinement: Refinement = Refinement(), **numbers: Any) -> "Objective":
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
        return cls(name, numbers, refinement)

    @property
    def kind(self) -> Kind:
        return OBJECTIVES[self.name]

    @property
    def judged_in_step(self) -> bool:
        """The policy judges, so the step has rows with p."""
        return self.kind.refined and self.refinement.judge == "policy"

    @property
    def judged_before(self) -> bool:
        """Δ of every pair is known before step 0, and the step costs what the plain objective's costs."""
        return self.kind.refined and self.refinement.judge != "policy"

    @property
    def scored_with_p(self) -> bool:
        """The reference scores the training pairs with p too: Δ, or the augmented margin, is made of it."""
        return self.kind.refined and self.refinement.judge != "ratings"

    @property
    def wants_scores(self) -> bool:
        """The model at the start scores the training pairs before step 0, if the reference is cached."""
        return self.kind.needs_reference or (self.scored_with_p and self.judged_before)

    @property
    def unsettled(self) -> bool:
        """λ is "auto", and not known yet."""
        return self.numbers.get("lam") == "auto"

    def settled(self, lam: float) -> "Objective":
        """Gives the objective with this λ in place of "auto"; with λ = 0 the plain one, which needs no Δ."""
        if lam == 0:
            numbers = {key: number for key, number in self.numbers.items() if key != "lam"}
            return dataclasses.replace(self, name=self.name.removeprefix(TWIN), numbers=numbers)
        return dataclasses.replace(self, numbers={**self.numbers, "lam": lam})
