"""The one table of objectives. A new objective is a function in `losses.py`, its keys in the schema and a row here.

Nothing else in the package asks for an objective's name to decide what to do. Imports no jax: reports read it too.

Next: `losses.py`, which holds the formulas that the rows name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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
    """Objectives of one family share a figure, and their losses are of one scale: `likelihood`, `logistic`, `squared`,
    `squared, per token`, `hinge` or `other`."""
    needs_rejected: bool = True
    needs_reference: bool = True
    per_token: bool = False
    """Every log-prob is divided by the tokens of its response, in the margin and in the refinement alike."""
    odds: bool = False
    """The margin is one of log odds, of which each is made of a log-prob per token."""
    scaled: bool = True
    """λΔ is subtracted from β·m; where it is not scaled, from m."""
    refined: bool = False
    """The refinement Δ, the function's last array, shifts the margin."""
    at_zero: Callable[[Mapping[str, Any]], float | None] | None = None
    """The preference term where policy and reference are the same and Δ = 0, as a function of the objective's numbers;
    None where the weights decide."""

    def loss_at_zero(self, numbers: Mapping[str, Any]) -> float | None:
        """Gives the loss where policy and reference are the same and Δ = 0; None where the weights decide.

        `numbers` are the keys of the section `objective`.
        """
        weights_decide = numbers.get("sft_weight") or numbers.get("use_weighting")
        return None if self.at_zero is None or weights_decide else self.at_zero(numbers)


def _always(loss: float) -> Callable[[Mapping[str, Any]], float]:
    return lambda numbers: loss


def _quarter(numbers: Mapping[str, Any]) -> float:
    return float(1 / (4 * numbers["beta"] ** 2))


def _divergence_from_labels(numbers: Mapping[str, Any]) -> float:
    share = numbers["label_smoothing"]
    return -math.log(2) - math.log(share * (1 - share)) / 2


def _of_terms(numbers: Mapping[str, Any]) -> float | None:
    """Adds up the terms of a weighted sum; None where the weights of the model decide on one of them."""
    losses = [(term["weight"], OBJECTIVES[term["name"]].loss_at_zero(term)) for term in numbers["terms"]]
    return None if any(loss is None for _, loss in losses) else sum(weight * loss for weight, loss in losses if loss)


LARGEST_LOSS = 1e32
"""The largest loss of a pair whose sums stay within float32."""
MARGIN = ("margin",)
RATIOS = ("chosen_log_ratio", "rejected_log_ratio")
PREFERENCES = ("preference", "reference_preference")
LN_2, ONE, TWO_LN_2 = _always(math.log(2)), _always(1.0), _always(2 * math.log(2))
PLAIN = {
    "sft": Kind("sft", ("chosen_logprob",), "likelihood", needs_rejected=False, needs_reference=False),
    "dpo": Kind("dpo", MARGIN, "logistic", at_zero=LN_2),
    "sigmoid_norm": Kind("dpo", MARGIN, "logistic", per_token=True, at_zero=LN_2),
    "robust": Kind("robust", MARGIN, "logistic", at_zero=LN_2),
    "ipo": Kind("ipo", MARGIN, "squared", scaled=False, at_zero=_quarter),
    "ipo_mean": Kind("ipo", MARGIN, "squared, per token", scaled=False, per_token=True, at_zero=_quarter),
    "hinge": Kind("hinge", MARGIN, "hinge", at_zero=ONE),
    "exo_pair": Kind("exo_pair", MARGIN, "other", at_zero=_divergence_from_labels),
    "discopop": Kind("discopop", MARGIN, "other", at_zero=_always((1 + math.log(2)) / 2)),
    "aot": Kind("aot", PREFERENCES, "logistic", at_zero=LN_2),
    "aot_unpaired": Kind("aot_unpaired", RATIOS, "logistic", at_zero=LN_2),
    "apo_down": Kind("apo_down", RATIOS, "other", at_zero=ONE),
    "simpo": Kind("simpo", MARGIN, "logistic", per_token=True, needs_reference=False),
    "cpo": Kind("dpo", MARGIN, "logistic", needs_reference=False),
    "orpo": Kind("orpo", MARGIN, "other", per_token=True, odds=True, scaled=False, needs_reference=False),
}
SIDES = {
    "apo_zero": Kind("apo_zero", RATIOS, "other", at_zero=ONE),
    "nca_pair": Kind("nca_pair", RATIOS, "other", at_zero=TWO_LN_2),
    "bco_pair": Kind("bco_pair", RATIOS, "other", at_zero=TWO_LN_2),
    "sppo_hard": Kind("sppo_hard", RATIOS, "squared", at_zero=lambda numbers: 2 * _quarter(numbers)),
}
"""Objectives without a margin that Δ could shift."""
SUMS = {"mixed": Kind("", (), "other", at_zero=_of_terms)}
"""Weighted sums of the others: no function of their own."""
REFINEMENT = "refinement"
TWIN = "sr_"
OBJECTIVES = {
    **PLAIN,
    **SIDES,
    **{
        TWIN + name: dataclasses.replace(kind, arguments=(*kind.arguments, REFINEMENT), refined=True)
        for name, kind in PLAIN.items()
        if kind.needs_rejected
    },
    **SUMS,
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
    """The keyword numbers of its function in `losses.py`: all keys of the section `objective` but the name and those
    below. `lam` may be "auto" until the reference has scored the training pairs."""
    refinement: Refinement = Refinement()
    """How Δ is made where the objective has one."""
    divergence: str = "reverse_kl"
    """The divergence from the reference that the margin is one of, as `losses.divergence_score` names it."""
    divergence_alpha: float | None = None
    sft_weight: float = 0.0
    """The weight of −log π per token of the chosen response, which is added to the loss."""
    ld_alpha: float | None = None
    """The weight of tokens beyond the length of the shorter response, in every log-prob; None: 1."""
    use_weighting: bool = False
    """A pair's loss is multiplied by how much both responses are the policy's own."""
    terms: tuple[tuple[float, "Objective"], ...] = ()
    """The terms of a weighted sum, each behind its weight; none where the objective is a loss itself."""

    @classmethod
    def of(
        cls,
        name: str,
        refinement: Refinement = Refinement(),
        *,
        divergence: str = "reverse_kl",
        divergence_alpha: float | None = None,
        sft_weight: float = 0.0,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        terms: Sequence[Mapping[str, Any]] = (),
        **numbers: Any,
    ) -> "Objective":
        """Takes the keys of the configuration's section `objective`.

        Raises:
          UsageError: the loss begins at a number whose sums float32 holds as infinity, so that no step would count; or
            the terms of a sum do not go together.
        """
        of_sum: dict[str, Any] = {"sft_weight": sft_weight, "ld_alpha": ld_alpha, "use_weighting": use_weighting}
        if terms:
            parts = [(term["weight"], {key: term[key] for key in term if key != "weight"}) for term in terms]
            made = tuple((weight, cls.of(refinement=refinement, **keys)) for weight, keys in parts)
            _require_alike([term for _, term in made])
            return cls(name, {}, refinement, **of_sum, terms=made)
        begins_at = OBJECTIVES[name].loss_at_zero(numbers)
        if begins_at is not None and begins_at > LARGEST_LOSS:
            raise UsageError(
                f"objective.beta={numbers['beta']:g}: the loss of {name} begins at {begins_at:.2g}, "
                "too large for float32; raise objective.beta"
            )
        return cls(name, numbers, refinement, divergence, divergence_alpha, **of_sum)

    @property
    def main(self) -> "Objective":
        """The objective whose margin and rewards are shown: of a sum the first term with Δ, or else the first."""
        terms = [term for _, term in self.terms] or [self]
        return next((term for term in terms if OBJECTIVES[term.name].refined), terms[0])

    @property
    def kind(self) -> Kind:
        """The facts of the objective; those of a sum are its main term's, as all terms agree in what matters here."""
        return self.main.kind if self.terms else OBJECTIVES[self.name]

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
        """The reference scores the training pairs before step 0, if it is cached, or judges them."""
        return self.kind.needs_reference or (self.scored_with_p and (self.judged_before or self.unsettled))

    @property
    def unsettled(self) -> bool:
        """λ is "auto", and not known yet."""
        return self.numbers.get("lam") == "auto" or any(term.unsettled for _, term in self.terms)

    def settled(self, lam: float) -> "Objective":
        """Gives the objective with this λ in place of "auto"; with λ = 0 the plain one, which needs no Δ."""
        if self.terms:
            terms = ((weight, term.settled(lam) if term.unsettled else term) for weight, term in self.terms)
            return dataclasses.replace(self, terms=tuple(terms))
        if lam == 0:
            numbers = {key: number for key, number in self.numbers.items() if key != "lam"}
            return dataclasses.replace(self, name=self.name.removeprefix(TWIN), numbers=numbers)
        return dataclasses.replace(self, numbers={**self.numbers, "lam": lam})


def _require_alike(terms: Sequence[Objective]) -> None:
    """Refuses a sum whose terms would need different margins or Δ to be shown, or known before step 0."""
    with_reference = [term.name for term in terms if term.kind.needs_reference]
    without = [term.name for term in terms if not term.kind.needs_reference]
    if with_reference and without:
        raise UsageError(
            f"objective.terms: {with_reference[0]} has a reference and {without[0]} has none, so that their margins "
            "are of different things; choose terms of one sort"
        )
    refined = [term for term in terms if term.kind.refined]
    lengths = {term.kind.per_token: term.name for term in refined}
    if len(lengths) > 1 and any(term.judged_before or term.unsettled for term in refined):
        raise UsageError(
            f"objective.terms: Δ of {lengths[True]} is per token and that of {lengths[False]} is not, and a pair has "
            "one Δ that is known before step 0; choose terms of one sort, or set refinement.judge=policy"
        )
