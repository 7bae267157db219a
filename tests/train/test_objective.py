"""The table of objectives against the functions in `losses.py`, the configuration's keys and values at zero."""

import inspect
import json
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_dpo_jax import losses
from sr_dpo_jax.config import objectives as sections
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.config.schema import Refinement as RefinementSection
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.objective import OBJECTIVES, TWIN, Objective, Refinement
from sr_dpo_jax.train.train_step import Scores, averages, pair_losses, pair_metrics

TERMS = [{"name": "dpo", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2, "beta": 0.3}]
SECTION_OF = {
    name: kind for kind in sections.KINDS + sections.TWINS for name in get_args(kind.model_fields["name"].annotation)
}
LN_2 = math.log(2)
AT_ZERO = {
    **dict.fromkeys(("dpo", "sigmoid_norm", "robust", "aot", "aot_unpaired"), LN_2),
    **dict.fromkeys(("ipo", "ipo_mean"), 25.0),
    **dict.fromkeys(("hinge", "apo_down", "apo_zero"), 1.0),
    **dict.fromkeys(("nca_pair", "bco_pair"), 2 * LN_2),
    "exo_pair": -LN_2 - math.log(1e-3 * 0.999) / 2,
    "discopop": (1 + LN_2) / 2,
    "sppo_hard": 50.0,
    "mixed": 0.8 * LN_2 + 0.2 * 2 * LN_2,
}
"""With β = 0.1."""
LOSSES = [name for name in OBJECTIVES if OBJECTIVES[name].function]
"""All but the weighted sum of others."""
BOTH_SIDES = [name for name in OBJECTIVES if OBJECTIVES[name].needs_rejected]
REFINED = [name for name in OBJECTIVES if OBJECTIVES[name].refined]
POLICY = Scores(
    jnp.array([[-3.0, -5.0], [-9.0, -4.0], [-2.0, -8.0]]),
    jnp.array([[-2.0, -9.0], [-8.0, -6.0], [-3.0, -7.5]]),
    jnp.array([[4, 2], [3, 5], [1, 6]]),
)
REFERENCE = Scores(
    jnp.array([[-3.5, -4.0], [-8.0, -4.5], [-2.5, -9.5]]),
    jnp.array([[-2.5, -8.0], [-8.5, -5.0], [-2.0, -7.0]]),
    POLICY.tokens,
)


PAPER = Refinement()


def numbers_of(name: str, **numbers: Any) -> dict[str, Any]:
    """The keys of an objective with β = 0.1, λ = 0.5 and defaults."""
    given, section = {"beta": 0.1, "lam": 0.5, "terms": TERMS} | numbers, SECTION_OF[name]
    if name == "mixed":  # lists are tuples in JSON alone
        keys = {key: given[key] for key in given if key in section.model_fields}
        return section.model_validate_json(json.dumps({"name": name, **keys})).model_dump()
    return section(name=name, **{key: given[key] for key in given if key in section.model_fields}).model_dump()


def objective(name: str, refinement: Refinement = PAPER, **numbers: Any) -> Objective:
    return Objective.of(refinement=refinement, **numbers_of(name, **numbers))


def raw_of(section: dict[str, Any]) -> dict[str, Any]:
    return {"output_dir": "x", "model": {"path": "x"}, "data": {"path": "x"}, "objective": section}


def metrics_of(it: Objective, policy: Scores = POLICY, reference: Scores = REFERENCE) -> dict[str, jax.Array]:
    return pair_metrics(it, policy, reference if it.kind.needs_reference else None)


@pytest.mark.parametrize("name", ["ipo", "sr_ipo", "ipo_mean"])
def test_a_loss_that_begins_beyond_float32_is_refused(name):
    """Every step would be skipped, and a short run would end with 0."""
    numbers = {"beta": 1e-20} | ({"lam": 0.5} if OBJECTIVES[name].refined else {})
    with pytest.raises(UsageError, match=f"objective.beta=1e-20: the loss of {name} begins at 2.5e.39"):
        Objective.of(name, **numbers)
    assert Objective.of(name, **(numbers | {"beta": 1e-15})).numbers["beta"] == 1e-15


def test_the_table_and_the_configuration_know_the_same_objectives():
    assert OBJECTIVES.keys() == SECTION_OF.keys()
    assert TWIN == sections.TWIN
    for name, kind in OBJECTIVES.items():
        assert kind.refined == issubclass(SECTION_OF[name], sections.RefinedObjective), name
        assert kind.needs_rejected == issubclass(SECTION_OF[name], sections.PairObjective), name
        assert not kind.refined or OBJECTIVES[name.removeprefix(TWIN)].function == kind.function


def test_other_divergences_are_for_the_losses_that_trl_takes_them_for():
    takers = {name for name, section in SECTION_OF.items() if issubclass(section, sections.DivergenceObjective)}
    assert {name for name in takers if not OBJECTIVES[name].refined} == {
        *("dpo", "sigmoid_norm", "hinge", "ipo", "ipo_mean", "exo_pair", "robust", "discopop")
    }


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_calls_its_function_with_all_that_it_takes(name):
    """λ and Δ are left out where the objective is not refined."""
    kind = OBJECTIVES[name]
    parameters = inspect.signature(getattr(losses, kind.function)).parameters.values()
    arrays = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    numbers = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    optional = {parameter.name for parameter in parameters if parameter.default is not parameter.empty}
    assert len(kind.arguments) == len(arrays) - (not kind.refined and "refinement" in arrays)
    assert ("refinement" in arrays[-1:]) == (TWIN + name.removeprefix(TWIN) in OBJECTIVES)
    given = objective(name).numbers.keys()
    assert given <= numbers and numbers - given <= optional
    assert ("lam" in given) == kind.refined


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_where_policy_and_reference_are_the_same(name):
    plain, kind = name.removeprefix(TWIN), OBJECTIVES[name]
    expected = kind.loss_at_zero(numbers_of(name))
    assert (expected is None) == (not kind.needs_reference)
    if expected is not None:
        assert expected == pytest.approx(AT_ZERO.get(plain, expected))
        np.testing.assert_allclose(metrics_of(objective(name), POLICY, POLICY)["loss"], expected, rtol=1e-5)
        assert kind.loss_at_zero(numbers_of(name, sft_weight=0.5)) is None


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "margin") for name in REFINED), ("sr_ipo_mean", "contrast"), ("sr_aot", "contrast")]
)
def test_lam_zero_is_the_plain_objective_bit_for_bit(name, form):
    """Loss and gradient, of every twin; with λ > 0 the loss is another one, and Δ is no path for gradients."""

    def total(policy: jax.Array, augmented: jax.Array, it: Objective) -> jax.Array:
        return metrics_of(it, Scores(policy, augmented, POLICY.tokens))["loss"].sum()

    def bits(it: Objective) -> tuple[bytes, ...]:
        gradient = jax.grad(total)(POLICY.plain, POLICY.augmented, it)
        return np.asarray(metrics_of(it)["loss"]).tobytes(), np.asarray(gradient).tobytes()

    twin = objective(name, Refinement(form=form))
    plain = objective(name.removeprefix(TWIN))
    assert bits(objective(name, Refinement(form=form), lam=0.0)) == bits(plain) == bits(twin.settled(0.0))
    assert bits(twin) != bits(plain)
    assert not np.any(jax.grad(total, argnums=1)(POLICY.plain, POLICY.augmented, twin))
    shifted = metrics_of(twin, Scores(POLICY.plain, POLICY.augmented + jnp.array([0.1, 0.0]), POLICY.tokens))
    assert not np.array_equal(shifted["loss"], metrics_of(twin)["loss"]), "Δ depends on the log-probs with p"


@pytest.mark.parametrize("name", REFINED)
def test_the_margin_with_p_is_that_of_the_loss(name):
    """Δ = β·(the margin that the loss takes, with p): the same reference, lengths, odds and divergence."""
    divergences = ["reverse_kl"]
    if issubclass(SECTION_OF[name], sections.DivergenceObjective):
        divergences += ["forward_kl", "js_divergence"]
    for divergence in divergences:
        ratios = np.asarray(POLICY.augmented, np.float64)
        if OBJECTIVES[name].needs_reference:
            ratios -= REFERENCE.augmented
        if divergence == "forward_kl":
            ratios = 1 - np.exp(-ratios)
        if divergence == "js_divergence":
            ratios = np.log(2) - np.log1p(np.exp(-ratios))
        if OBJECTIVES[name].per_token:
            ratios /= POLICY.tokens
        if OBJECTIVES[name].odds:
            ratios = np.log(np.exp(ratios) / (1 - np.exp(ratios)))
        found = metrics_of(objective(name, beta=0.3, divergence=divergence))["refinement"]
        np.testing.assert_allclose(found, 0.3 * (ratios[:, 0] - ratios[:, 1]), rtol=2e-5)


def test_a_refinement_is_of_the_reference_too():
    """Its contrast, known before step 0, for an objective that has no other use of the reference."""
    known = jnp.array([0.3, -0.2, 1.5])
    it = objective("sr_simpo", Refinement(form="contrast", judge="reference"), beta=2.0, gamma=0.3)
    assert it.wants_scores and it.judged_before
    mean = np.asarray(POLICY.plain) / np.asarray(POLICY.tokens)
    expected = np.logaddexp(0, -(2.0 * (mean[:, 0] - mean[:, 1]) - 0.3 - 0.5 * known))
    np.testing.assert_allclose(pair_metrics(it, POLICY, None, known)["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "per_token"), [("simpo", True), ("orpo", True), ("cpo", False)])
def test_pairs_and_a_reference_are_two_questions(name, per_token):
    """Without a reference rewards are log-probs, per token where the loss is."""
    it = objective(name, beta=2.0)
    per_pair = metrics_of(it)
    plain, augmented = np.asarray(POLICY.plain, np.float64), np.asarray(POLICY.augmented, np.float64)
    if per_token:
        plain, augmented = plain / POLICY.tokens, augmented / POLICY.tokens
    expected = {
        "rewards/chosen": 2.0 * plain[:, 0],
        "rewards/rejected": 2.0 * plain[:, 1],
        "rewards/margins": 2.0 * (plain[:, 0] - plain[:, 1]),
        "rewards/accuracies": plain[:, 0] > plain[:, 1],
        "margin": plain[:, 0] - plain[:, 1],
        "augmented/margin": augmented[:, 0] - augmented[:, 1],
        "augmented/accuracies": augmented[:, 0] > augmented[:, 1],
        "logps/chosen": POLICY.plain[:, 0],
        "logps/rejected": POLICY.plain[:, 1],
    }
    assert per_pair.keys() == expected.keys() | {"loss"}
    for key, value in expected.items():
        np.testing.assert_allclose(per_pair[key], value, rtol=1e-6, err_msg=key)
    assert "loss_per_token" not in averages(per_pair, POLICY.tokens)
    sft = pair_metrics(objective("sft"), POLICY, None)
    assert averages(sft, POLICY.tokens)["loss_per_token"] == pytest.approx(14 / 8)


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_the_term_of_fine_tuning_beside_every_loss(name):
    with_term, without = (metrics_of(objective(name, sft_weight=weight))["loss"] for weight in (0.7, 0.0))
    np.testing.assert_allclose(with_term - without, 0.7 * np.array([3 / 4, 9 / 3, 2 / 1]), rtol=2e-4)


@pytest.mark.parametrize("name", REFINED)
def test_pairs_weigh_as_much_as_they_are_the_policys_own(name):
    """Loss and gradient are those without weights, times the weight: no gradient flows through it."""
    if "use_weighting" not in SECTION_OF[name].model_fields:
        with pytest.raises(UsageError, match="use_weighting"):
            config_from_dict(raw_of({"name": name, "lam": 0.5, "use_weighting": True}), where="x")
        return
    squares = jnp.array([[-2.0, -3.5], [-8.0, -3.0], [-1.0, -9.0]])
    exponents = (np.asarray(POLICY.plain) - np.asarray(squares)) / np.asarray(POLICY.tokens)
    weight = np.exp(exponents.sum(axis=1))

    def losses_of(plain: jax.Array, log_squares: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        scores = Scores(plain, POLICY.augmented, POLICY.tokens, log_squares=log_squares)
        per_pair = metrics_of(objective(name), scores)
        return per_pair["loss"].sum(), per_pair

    of_weighted = jax.value_and_grad(losses_of, has_aux=True)(POLICY.plain, squares)
    of_plain = jax.value_and_grad(losses_of, has_aux=True)(POLICY.plain, None)
    np.testing.assert_allclose(of_weighted[0][1]["weight"], weight, rtol=1e-5)
    np.testing.assert_allclose(of_weighted[0][1]["loss"], weight * of_plain[0][1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(of_weighted[1], weight[:, None] * of_plain[1], rtol=1e-5, atol=1e-7)
    assert OBJECTIVES[name].loss_at_zero(numbers_of(name, use_weighting=True)) is None


def test_log_probs_that_are_shown_and_fine_tuned_on_are_whole():
    """`ld_alpha` is a matter of margins alone."""
    whole = POLICY.plain - 1.5
    scores = Scores(POLICY.plain, POLICY.augmented, POLICY.tokens, whole=whole)
    per_pair, other = metrics_of(objective("dpo", sft_weight=0.7), scores), metrics_of(objective("dpo"))
    np.testing.assert_array_equal(per_pair["logps/rejected"], whole[:, 1])
    np.testing.assert_array_equal(per_pair["margin"], other["margin"])
    np.testing.assert_allclose(
        per_pair["loss"] - other["loss"], 0.7 * np.array([4.5 / 4, 10.5 / 3, 3.5 / 1]), rtol=2e-4
    )


def test_cpo_and_orpo_have_it_by_default():
    """And only they: RPO is `dpo` with a weight of one's own. A twin has the defaults of its plain loss."""
    assert {name for name in BOTH_SIDES if objective(name).sft_weight} == {"cpo", "sr_cpo", "orpo", "sr_orpo"}
    for name in REFINED:
        fields, plain = SECTION_OF[name].model_fields, SECTION_OF[name.removeprefix(TWIN)].model_fields
        assert {key: field.default for key, field in fields.items() if key not in ("name", "lam")} == {
            key: field.default for key, field in plain.items() if key != "name"
        }


def test_a_weighted_sum_is_the_sum_of_its_terms():
    """Each with its own numbers; beside it the term of fine-tuning, once, and the metrics of the first term with Δ."""
    terms = [
        {"name": "bco_pair", "weight": 0.2, "beta": 0.3},
        {"name": "sr_dpo", "weight": 0.8, "lam": 0.5, "label_smoothing": 0.1},
        {"name": "sr_ipo_mean", "weight": 0.01, "lam": 2.0, "beta": 0.5},
    ]
    mixed = metrics_of(objective("mixed", terms=terms, sft_weight=0.7))
    parts = [metrics_of(objective(**{key: term[key] for key in term if key != "weight"})) for term in terms]
    expected = sum(term["weight"] * part["loss"] for term, part in zip(terms, parts, strict=True))
    np.testing.assert_allclose(mixed["loss"] - 0.7 * np.array([3 / 4, 9 / 3, 2 / 1]), expected, rtol=2e-5)
    assert mixed.keys() == parts[1].keys()
    for name in mixed.keys() - {"loss"}:
        np.testing.assert_array_equal(mixed[name], parts[1][name], err_msg=name)


def test_a_weighted_sum_settles_the_lam_of_its_terms():
    terms = [
        {"name": "sr_dpo", "weight": 1.0, "lam": "auto"},
        {"name": "sr_hinge", "weight": 1.0, "lam": 0.5},
        {"name": "bco_pair", "weight": 1.0},
    ]
    made = objective("mixed", Refinement(form="contrast", judge="reference"), terms=terms)
    assert made.unsettled and made.judged_before and made.wants_scores
    half, none = made.settled(0.25), made.settled(0.0)
    assert [term.numbers.get("lam") for _, term in half.terms] == [0.25, 0.5, None] and not half.unsettled
    assert [term.name for _, term in none.terms] == ["dpo", "sr_hinge", "bco_pair"] and none.kind.refined


@pytest.mark.parametrize(
    ("terms", "options", "problem"),
    [
        (["dpo", "simpo"], {}, "dpo has a reference and simpo has none"),
        (["sr_dpo", "sr_ipo_mean"], {"form": "contrast", "judge": "reference"}, "sr_ipo_mean is per token and that of"),
        (["dpo"], {}, "objective.terms"),
        (["dpo", "sft"], {}, "objective.terms.1.name='sft': not known"),
        (["dpo", "mixed"], {}, "objective.terms.1.name='mixed': not known"),
        (["dpo", {"name": "hinge", "sft_weight": 1.0}], {}, "objective.terms.1.sft_weight"),
        (["dpo", {"name": "hinge", "divergence": "alpha_divergence"}], {}, "set objective.terms.1.divergence_alpha"),
        (["dpo", {"name": "hinge", "lam": 1.0}], {}, "objective.terms.1.lam=1.0: hinge does not take it"),
        (["dpo", "sr_hinge"], {"judge": "reference"}, "margin is 0"),
        (["dpo", "hinge"], {"form": "contrast"}, "objective.name=mixed has no refinement"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(terms, options, problem):
    whole = [{"weight": 1.0} | ({"name": term} if isinstance(term, str) else term) for term in terms]
    whole = [term | ({"lam": 0.5} if str(term["name"]).startswith(TWIN) else {}) for term in whole]
    with pytest.raises(UsageError, match=problem):
        config = config_from_dict(raw_of({"name": "mixed", "terms": whole}) | {"refinement": options}, where="x")
        made = Refinement(**{key: options[key] for key in options})
        Objective.of(refinement=made, **config.objective.model_dump())


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"batch": {"accumulation_steps": 2}}, "batch.accumulation_steps=2: objective.terms.1.name=aot sorts"),
        ({"objective": {"use_weighting": True}}, "objective.use_weighting: objective.terms.1.name=aot sorts"),
        ({"objective": {"beta": 0.3}}, "objective.beta"),
    ],
)
def test_what_a_sum_cannot_have_is_refused(section, problem):
    raw = raw_of({"name": "mixed", "terms": [{"name": "dpo", "weight": 1.0}, {"name": "aot", "weight": 1.0}]})
    for name, keys in section.items():
        raw[name] = {**raw.get(name, {}), **keys}
    with pytest.raises(UsageError, match=problem):
        config_from_dict(raw, where="x")


def test_arrays_reach_their_arguments_in_order():
    """Chosen and rejected differ in log-ratio and length, so that an exchange of two arguments shows."""
    per_pair = metrics_of(objective("ipo_mean"))
    assert float(per_pair["loss"][0]) == pytest.approx((0.5 / 4 + 1.0 / 2 - 5) ** 2)
    per_pair = metrics_of(objective("apo_down"))
    of_chosen, of_margin = (1 / (1 + math.exp(-0.1 * value)) for value in (0.5, 1.5))
    assert float(per_pair["loss"][0]) == pytest.approx(of_chosen + 1 - of_margin)
    per_pair = metrics_of(objective("aot"))
    policy, reference = np.sort([2.0, -5.0, 6.0]), np.sort([0.5, -3.5, 7.0])
    np.testing.assert_allclose(per_pair["loss"], np.logaddexp(0, -0.1 * (policy - reference)), rtol=1e-6)
    shifted = {"margin": jnp.array([2.0]), "refinement": jnp.array([0.1])}
    expected = -math.log(1 / (1 + math.exp(-(0.1 * 2.0 - 0.5 * 0.1))))
    assert float(pair_losses(objective("sr_dpo"), shifted)[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_pair_that_is_absent_spoils_nothing(name):
    """Pairs of other micro-batches have log-probs of 0 and no tokens; losses and gradients of theirs are dropped."""

    def total(plain: jax.Array) -> jax.Array:
        tokens = POLICY.tokens.at[1].set(0)
        scores = Scores(plain, POLICY.augmented.at[1].set(0.0), tokens)
        return jnp.where(tokens[:, 0] > 0, metrics_of(objective(name), scores)["loss"], 0.0).sum()

    value, gradient = jax.value_and_grad(total)(POLICY.plain.at[1].set(0.0))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_sections_of_the_refinement_and_the_table_agree():
    """The step's `Refinement` has the defaults that the configuration gives it."""
    fields = RefinementSection.model_fields
    made = Refinement()
    assert all(getattr(made, key) == fields[key].default for key in ("form", "judge", "offset", "alpha"))
