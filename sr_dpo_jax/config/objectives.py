"""The section `objective`: the losses by name, and the keys of each. `train/objective.py` holds what each of them is.

A class serves the losses that have the same keys. The losses of a `MarginObjective` have a refined twin each,
`sr_NAME`, with the same keys and `lam`: the twins are made of the classes here, and none is written down.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, create_model

from sr_dpo_jax.config.section import TWIN, NonNegativeRate, Rate, Section, only_what_says_something

Flipped = Annotated[float, Field(ge=0, lt=0.5)]
"""A share of flipped labels."""


class SftObjective(Section):
    """−log π(y⁺|x) of the chosen responses: supervised fine-tuning."""

    name: Literal["sft"]


class PairObjective(Section):
    """An objective that compares two responses."""

    name: str
    sft_weight: NonNegativeRate = 0.0
    """α of α·NLL, the mean of −log π per token of the chosen response, which is added to the loss (RPO,
    arXiv:2404.19733)."""


class ScaledObjective(PairObjective):
    """An objective with a β of its own."""

    beta: Rate = 0.1
    """β, the strength of the pull towards the reference; without a reference the scale of the margin."""


class ReferenceObjective(PairObjective):
    """An objective of log-ratios, policy over reference."""

    ld_alpha: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Length desensitisation (LD-DPO, arXiv:2409.06411): tokens beyond the length of the pair's shorter response count
    with this weight in every log-prob, with p too; 0 leaves them out. Null counts all tokens alike."""


class WeightingObjective(ReferenceObjective):
    """An objective whose losses belong to pairs, so that these can have weights."""

    use_weighting: bool = False
    """Multiplies a pair's loss by how much its two responses are the policy's own (WPO, arXiv:2406.11827), under
    stop_gradient: the product of exp of the mean over tokens of log π(y_t) − log Σ_v π(v)²."""


class MarginObjective(ScaledObjective):
    """An objective whose loss has a margin that Δ can shift: each of its names stands for `sr_NAME` too."""


class DivergenceObjective(MarginObjective, WeightingObjective):
    """An objective whose margin may be that of another divergence from the reference."""

    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence that holds the policy near the reference (f-DPO, arXiv:2309.16240). Each log-ratio r passes
    through f′(eʳ), which leaves it as it is for `reverse_kl`, that of DPO."""
    divergence_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """α of `alpha_divergence`: 1 is reverse_kl, 0 is forward_kl."""


class DpoObjective(DivergenceObjective):
    name: Literal["dpo", "sigmoid_norm", "robust"]
    """`sigmoid_norm` is DPO with each log-ratio divided by its tokens, as OLMo 3 trains with beta=5. `robust` is
    unbiased under flipped labels (arXiv:2403.00409)."""
    label_smoothing: Flipped = 0.0
    """ε, the assumed share of flipped labels; with `dpo` it is conservative DPO."""


class IpoObjective(DivergenceObjective):
    name: Literal["ipo", "ipo_mean", "hinge"]
    """`ipo` is the paper's form on sums of log-probs; `ipo_mean` divides each by its length, as TRL does. `hinge` is
    the calibration loss of SLiC (arXiv:2305.10425) on the margin."""


class ExoObjective(DivergenceObjective):
    name: Literal["exo_pair"]
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """ε of the labels (1 − ε, ε), from which the policy's judgement shall differ least (arXiv:2402.00856)."""


class DiscopopObjective(DivergenceObjective):
    name: Literal["discopop"]
    tau: Rate = 0.05
    """τ of the gate σ(β·m/τ) between the logistic and the exponential loss (arXiv:2406.08414)."""


class AotObjective(MarginObjective, ReferenceObjective):
    """Sorts over the pairs of the whole step: for `batch.accumulation_steps: 1` alone. Its losses are of ranks."""

    name: Literal["aot", "aot_unpaired"]
    """Alignment by optimal transport (arXiv:2406.05882): policy against reference, or chosen against rejected."""
    label_smoothing: Flipped = 0.0
    """ε, the assumed share of flipped labels."""


class AnchoredObjective(MarginObjective, WeightingObjective):
    name: Literal["apo_down"]
    """Lowers both responses, the rejected one more (arXiv:2408.06266). Δ shifts the term with the margin."""


class SidesObjective(ScaledObjective, WeightingObjective):
    """An objective of both log-ratios apart: there is no margin for Δ to shift."""

    name: Literal["apo_zero", "nca_pair", "bco_pair", "sppo_hard"]
    """arXiv:2408.06266, 2402.05369, 2404.04656 and 2405.00675."""


class SimpoObjective(MarginObjective):
    name: Literal["simpo"]
    """SimPO (arXiv:2405.14734): log-probs per token, without a reference."""
    beta: Rate = 2.0
    """β, the scale of the margin; SimPO takes 2 to 10."""
    gamma: NonNegativeRate = 0.5
    """γ, the target that β·m must exceed."""


class CpoObjective(MarginObjective):
    name: Literal["cpo"]
    """CPO (arXiv:2401.08417): DPO without a reference, beside supervised fine-tuning."""
    label_smoothing: Flipped = 0.0
    """ε, the assumed share of flipped labels."""
    sft_weight: NonNegativeRate = 1.0
    """The weight of the mean of −log π per token of the chosen response."""


class OrpoObjective(MarginObjective):
    name: Literal["orpo"]
    """ORPO (arXiv:2403.07691): beta times the logistic loss of the log odds ratio, beside supervised fine-tuning; its
    beta is the λ of that paper."""
    sft_weight: NonNegativeRate = 1.0
    """The weight of the mean of −log π per token of the chosen response."""


class RefinedObjective(ScaledObjective):
    """A loss with its margin shifted by λΔ."""

    lam: Annotated[
        Annotated[NonNegativeRate, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
        Discriminator(lambda value: "word" if isinstance(value, str) else "number"),
    ]
    """λ, the weight of the refinement. The paper chooses from 0.1, 0.3, 0.5 and 1; 1 is Bayes' weight of a contrast.
    `auto`, for a contrast, is the slope of a logistic regression of the labels on it, from the scores of the model at
    the start; where that cannot be told from 0 the plain objective is trained."""


SOURCELESS = {"use_attribute_docstrings": False}
"""For classes that stand in no file: pydantic would look for their source in every module that is loaded."""


def _twin(kind: type[MarginObjective]) -> type[Section]:
    """Makes the class of `sr_NAME` for the names of a class."""
    names = tuple(TWIN + name for name in get_args(kind.model_fields["name"].annotation))
    name: Any = (Literal.__getitem__(names), ...)
    return create_model(
        f"Refined{kind.__name__}", __base__=(kind, RefinedObjective), __cls_kwargs__=SOURCELESS, name=name
    )


PLAIN_KINDS: tuple[type[Section], ...] = (
    SftObjective,
    DpoObjective,
    IpoObjective,
    ExoObjective,
    DiscopopObjective,
    AotObjective,
    AnchoredObjective,
    SidesObjective,
    SimpoObjective,
    CpoObjective,
    OrpoObjective,
)
"""Every class of plain losses."""
TWINS = tuple(_twin(kind) for kind in PLAIN_KINDS if issubclass(kind, MarginObjective))


def _term(kind: type[Section]) -> type[Section]:
    """Makes the class of a term of `mixed`: the keys of its loss but for those that belong to the sum, and a weight."""
    own = {key: field for key, field in kind.model_fields.items() if key not in WeightingObjective.model_fields}
    fields: dict[str, Any] = {key: (field.annotation, field) for key, field in own.items()}
    name: Any = (kind.model_fields["name"].annotation, ...)
    weight: Any = (Rate, Field(description="The factor of this term in the sum."))
    fields = {"name": name, **fields, "weight": weight}
    return create_model(f"{kind.__name__}Term", __base__=Section, __cls_kwargs__=SOURCELESS, **fields)


TERMS = tuple(_term(kind) for kind in PLAIN_KINDS + TWINS if issubclass(kind, PairObjective))

if TYPE_CHECKING:
    Term = Section
else:
    Term = Annotated[Union[TERMS], Field(discriminator="name")]  # noqa: UP007 (made of a list)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class MixedObjective(WeightingObjective):
    """A weighted sum of losses, as MPO has it (arXiv:2411.10442)."""

    name: Literal["mixed"]
    terms: Annotated[tuple[Term, ...], BeforeValidator(_as_tuple), Field(min_length=2)]
    """A list of {name, weight, ...}: each names a loss that compares responses, plain or `sr_`, with keys of its own.
    `sft_weight`, `ld_alpha` and `use_weighting` stand beside the list, and serve the whole sum."""


KINDS = (*PLAIN_KINDS, MixedObjective)
"""Every class of objectives but the twins."""


def parts_of(objective: Section) -> tuple[Any, ...]:
    """Gives the terms of a sum, or the objective itself."""
    return objective.terms if isinstance(objective, MixedObjective) else (objective,)


def is_a(part: Any, kind: type[Section]) -> bool:
    """Tells whether an objective or a term has a loss of this kind, plain or refined."""
    return part.name.removeprefix(TWIN) in get_args(kind.model_fields["name"].annotation)


def is_refined(objective: Section) -> bool:
    """Tells whether the objective, or a term of it, has a refinement."""
    return any(hasattr(part, "lam") for part in parts_of(objective))


if TYPE_CHECKING:
    Objective = SftObjective | PairObjective
else:
    Objective = Annotated[
        Annotated[Union[KINDS + TWINS], Field(discriminator="name")],  # noqa: UP007 (made of a list)
        only_what_says_something(*KINDS, *TWINS),
    ]
"""The name decides which other keys there are."""
