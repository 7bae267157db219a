"""The compiled programs of training: a train step, a scoring step, and a step that scores continuations.

A step's rows come in A micro-batches. Each gives the sum of the losses of the pairs that stand in it and that sum's
gradient; sums are added and divided by the number of pairs once, last, so accumulation saves memory and changes results
only in float order.

Next: `model/decoder.py`, which turns the rows into hidden states.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from sr_dpo_jax import losses
from sr_dpo_jax.batch import CHOSEN, REJECTED, Batch
from sr_dpo_jax.model.adapter import join
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.model.logprobs import continuation_logprobs, response_logprobs
from sr_dpo_jax.parallel.mesh import jit_on, replicated
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.optim import Schedule, updates_done
from sr_dpo_jax.train.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]
Fixed = Params | None
"""Parameters that are not trained, where there are any."""

SAME_ROUNDING = {"xla_allow_excess_precision": False}
"""XLA may keep a bfloat16 value in float32 where it fuses, and it fuses differently in a program with a backward pass.
Policy and reference would then round differently, and the first margins would be noise instead of zero."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probs of both responses of each pair, `[B, 2]` float32, nats; axis 1 is the side."""

    plain: Array
    augmented: Array | None
    """The same with p ⊕ x in place of x; None where p is not used."""
    tokens: Array
    """`[B, 2]` int32, scored tokens; 0 where a pair was absent."""
    against: Array | None = None
    """The same with a second instruction in the place of p; None where there is none."""
    whole: Array | None = None
    """`plain` with every token counted in full; None where it is that."""
    log_squares: Array | None = None
    """`[B, 2]` float32, Σ log Σ_v π(v)² over the scored tokens, for the pairs' weights; None where there are none."""

    @property
    def logprobs(self) -> Array:
        """The log-probs of the responses themselves, whatever the objective makes of their length."""
        return self.plain if self.whole is None else self.whole


def pair_metrics(
    objective: Objective, policy: Scores, reference: Scores | None, refinement: Array | None = None
) -> dict[str, Array]:
    """Computes the loss and the metrics of every pair.

    Args:
      objective: the loss and its numbers; of a weighted sum the metrics beside the loss are its main term's.
      policy: scores of the policy.
      reference: scores of the frozen reference; None where the objective needs none.
      refinement: Δ, `[B]` float32, where it is known before step 0; None where the policy judges.

    Returns:
      One float32 value a pair, `[B]`, under the names of metrics.jsonl.
    """
    metrics = _metrics_of_loss(objective.main, policy, reference, refinement)
    if objective.terms:
        parts = (
            weight * _metrics_of_loss(term, policy, reference, refinement)["loss"] for weight, term in objective.terms
        )
        metrics["loss"] = sum(parts, jnp.zeros(()))
    tokens = jnp.maximum(policy.tokens, 1)
    if objective.sft_weight:
        metrics["loss"] += objective.sft_weight * losses.sft(policy.logprobs[:, CHOSEN]) / tokens[:, CHOSEN]
    if policy.log_squares is not None:
        weights = losses.on_policy_weight(policy.logprobs, policy.log_squares, tokens)
        metrics["weight"] = weights[:, CHOSEN] * weights[:, REJECTED]
        metrics["loss"] *= metrics["weight"]
    return metrics


def _metrics_of_loss(
    objective: Objective, policy: Scores, reference: Scores | None, refinement: Array | None
) -> dict[str, Array]:
    """Computes `pair_metrics` of one loss, without what stands beside it."""
    kind, beta = objective.kind, objective.numbers.get("beta", 1.0)
    sides = {"chosen": CHOSEN, "rejected": REJECTED} if kind.needs_rejected else {"chosen": CHOSEN}
    logps = {f"logps/{name}": policy.logprobs[:, side] for name, side in sides.items()}
    arrays = {f"{name}_logprob": policy.logprobs[:, side] for name, side in sides.items()}
    if not kind.needs_rejected:
        return {"loss": pair_losses(objective, arrays), **logps}
    tokens = jnp.maximum(policy.tokens, 1)  # absent pairs have none, and their losses are dropped
    ratios = log_ratios(policy.plain, None if reference is None else reference.plain)
    rewards = ratios / tokens if kind.per_token and reference is None else ratios
    margin = difference(rewards)
    metrics = {
        "rewards/chosen": beta * rewards[:, CHOSEN],
        "rewards/rejected": beta * rewards[:, REJECTED],
        "rewards/margins": beta * margin,
        "rewards/accuracies": (margin > 0).astype(jnp.float32),
        **logps,
        "margin": margin,
    }
    if policy.augmented is not None and (reference is None or reference.augmented is not None):
        augmented = log_ratios(policy.augmented, None if reference is None else reference.augmented)
        augmented = difference(augmented, tokens if kind.per_token and reference is None else None)
        metrics["augmented/margin"] = augmented
        metrics["augmented/accuracies"] = (augmented > 0).astype(jnp.float32)
    arrays |= {f"{name}_log_ratio": ratios[:, side] for name, side in sides.items()}
    arrays |= {"margin": margin_of(objective, ratios, tokens), "preference": difference(policy.plain)}
    if reference is not None:
        arrays["reference_preference"] = difference(reference.plain)
    if kind.refined:
        if refinement is None:
            refinement = refinement_by(objective, policy, reference)
        arrays["refinement"] = metrics["refinement"] = refinement
    return {"loss": pair_losses(objective, arrays), **metrics}


def refinement_by(objective: Objective, judge: Scores, reference: Scores | None) -> Array:
    """Computes Δ of every pair from the judge's scores, `[B]` float32; no gradient flows into it.

    Args:
      objective: says how Δ is made.
      judge: scores with p, and with the second instruction where there is one: the policy's or the reference's.
      reference: scores of the frozen reference, for Δ of the form `margin`; None where the objective needs none.
    """
    tokens = jnp.maximum(judge.tokens, 1)
    if objective.refinement.form == "contrast":
        without = judge.plain if judge.against is None else judge.against
        of_response = tokens if objective.kind.per_token else None
        return losses.contrast(difference(judge.augmented, of_response), difference(without, of_response))
    ratios = log_ratios(judge.augmented, None if reference is None else reference.augmented)
    return losses.refinement(margin_of(objective, ratios, tokens), beta=objective.numbers["beta"])


def log_ratios(policy: Array, reference: Array | None) -> Array:
    """Subtracts the reference's log-probs, `[B, 2]`; gives the log-probs themselves where there is no reference."""
    return policy if reference is None else policy - reference


def margin_of(objective: Objective, ratios: Array, tokens: Array) -> Array:
    """Computes the margin that the objective's loss takes, `[B]`.

    Args:
      objective: says whether it is per token, one of log odds, or of another divergence.
      ratios: log-ratios, or log-probs where the objective has no reference, `[B, 2]`.
      tokens: scored tokens, at least 1, `[B, 2]`.
    """
    kind = objective.kind
    values = losses.divergence_score(ratios, divergence=objective.divergence, alpha=objective.divergence_alpha)
    if kind.odds:
        return difference(losses.log_odds(values / tokens))
    return difference(values, tokens if kind.per_token else None)


def difference(values: Array, tokens: Array | None = None) -> Array:
    """Subtracts the rejected side from the chosen one, `[B, 2]` to `[B]`; with `tokens` each is divided by its own."""
    if tokens is not None:
        values = values / tokens
    return values[:, CHOSEN] - values[:, REJECTED]


def pair_losses(objective: Objective, arrays: dict[str, Array]) -> Array:
    """Calls the objective's function in `losses.py` with the arrays that its kind names and its numbers."""
    function = getattr(losses, objective.kind.function)
    return function(*(arrays[name] for name in objective.kind.arguments), **objective.numbers)


def score(
    graph: nnx.GraphDef,
    params: Params,
    batch: Batch,
    pairs: int,
    *,
    ld_alpha: float | None = None,
    squares: bool = False,
) -> Scores:
    """Scores one micro-batch (rows without the axis A); pairs that stand in other micro-batches get zeros.

    `ld_alpha` is as for `response_logprobs`, `squares` likewise, of the rows without p.
    """
    model = nnx.merge(graph, params)
    others = [rows for rows in (batch.augmented, batch.against) if rows is not None]
    hidden, *frozen = model(batch.plain, *others)
    matrix = model.vocabulary_matrix
    sums_of = partial(response_logprobs, pairs=pairs, cap=model.architecture.logit_cap, ld_alpha=ld_alpha)
    plain = sums_of(hidden, matrix, batch.plain, squares=squares)
    matrix = jax.lax.stop_gradient(matrix)
    augmented, against, *_ = [
        *(sums_of(states, matrix, rows).logprobs for states, rows in zip(frozen, others, strict=True)),
        *(None, None),
    ]
    return Scores(plain.logprobs, augmented, plain.tokens, against, plain.whole, plain.log_squares)


def make_score_step(
    graph: nnx.GraphDef, *, pairs: int, mesh: Mesh, ld_alpha: float | None = None, squares: bool = False
) -> Callable[[Params, Batch], Scores]:
    """Makes `(params, batch) -> Scores`, whole on every device: for the reference, evaluation and `sr-dpo score`.

    `ld_alpha` and `squares` are as for `score`.
    """
    return _summed(mesh, lambda params, micro: score(graph, params, micro, pairs, ld_alpha=ld_alpha, squares=squares))


def make_continuation_step(
    graph: nnx.GraphDef, *, pairs: int, mesh: Mesh
) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """Makes `(params, batch of chosen sides) -> (log-probs, tokens that were not the likeliest)`, each `[B]`.

    Both are whole on every device. Benchmarks ask with it whether a continuation is the greedy one.
    """

    def part(params: Params, micro: Batch) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        (hidden,) = model(micro.plain)
        cap = model.architecture.logit_cap
        return continuation_logprobs(hidden, model.vocabulary_matrix, micro.plain, pairs=pairs, cap=cap)

    return _summed(mesh, part)


def _summed(mesh: Mesh, part: Callable[[Params, Batch], Any]) -> Callable[[Params, Batch], Any]:
    """Compiles `part` over the micro-batches of a batch, and sums what it gives for each."""

    def step(params: Params, batch: Batch) -> Any:
        parts = jax.lax.map(lambda micro: part(params, micro), _micro_batches(batch))
        return jax.tree.map(lambda sums: sums.sum(axis=0), parts)

    return jit_on(mesh, step, out_shardings=replicated(mesh), compiler_options=SAME_ROUNDING)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    objective: Objective,
    *,
    pairs: int,
    mesh: Mesh,
    abstract: TrainState,
) -> Callable[[TrainState, Fixed, Fixed, Batch], tuple[TrainState, Metrics]]:
    """Makes `(state, base or None, reference params or None, batch) -> (state, metrics)`; the state is consumed.

    `abstract` describes the state. Where adapters are trained, pass the base, which gets no gradient; where everything
    is, None. With an online reference, pass its parameters, of which the base is no part; with a cached one, pass None:
    the batch holds its scores. Metrics are means over the step's pairs; `grad_norm` is taken before clipping. Where
    loss or gradient is not finite, `skipped` is 1 and the step changes nothing but its own number: parameters and
    optimizer stay as they were.
    """

    def loss_sum(params: Params, base: Fixed, reference_params: Fixed, micro: Batch) -> tuple[Array, Any]:
        options = {"ld_alpha": objective.ld_alpha, "squares": objective.use_weighting}
        policy = score(graph, join(params, base), micro, pairs, **options)
        reference_params = None if reference_params is None else join(reference_params, base)
        reference = _reference_scores(graph, reference_params, micro, policy, objective, pairs)
        present = policy.tokens[:, CHOSEN] > 0
        per_pair = pair_metrics(objective, policy, reference, micro.refinement)
        per_pair = {name: jnp.where(present, value, 0.0) for name, value in per_pair.items()}
        return per_pair["loss"].sum(), (policy.tokens, per_pair)

    def step(state: TrainState, base: Fixed, reference_params: Fixed, batch: Batch) -> tuple[TrainState, Metrics]:
        def accumulate(gradients: Params, micro: Batch) -> tuple[Params, Any]:
            more, aux = jax.grad(loss_sum, has_aux=True)(state.params, base, reference_params, micro)
            return jax.tree.map(lambda total, part: total + part.astype(total.dtype), gradients, more), aux

        zeros = jax.tree.map(
            lambda param: jnp.zeros(param.shape, jnp.promote_types(param.dtype, jnp.float32)), state.params
        )
        gradients, (tokens, per_pair) = jax.lax.scan(accumulate, zeros, _micro_batches(batch))
        gradients = jax.tree.map(lambda total: total / pairs, gradients)
        grad_norm = optax.tree.norm(gradients)
        gradients = jax.tree.map(lambda gradient, param: gradient.astype(param.dtype), gradients, state.params)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
        metrics = averages({name: value.sum(axis=0) for name, value in per_pair.items()}, tokens.sum(axis=0))
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])  # a NaN gradient makes the norm NaN
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": schedule(updates_done(state.optimizer_state)),
            "skipped": 1.0 - finite,
        }
        # Selected, not multiplied by 0: 0 · NaN is NaN.
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), optimizer_state),
            (state.params, state.optimizer_state),
        )
        return TrainState(state.step + 1, params, optimizer_state), metrics

    out_shardings = (jax.tree.map(lambda leaf: leaf.sharding, abstract), replicated(mesh))
    return jit_on(mesh, step, donate_argnums=0, out_shardings=out_shardings, compiler_options=SAME_ROUNDING)


def averages(per_pair: dict[str, Array], tokens: Array) -> dict[str, Array]:
    """Averages over pairs; where there is one response, also gives the loss per token, a ratio of two sums."""
    means = {name: value.mean() for name, value in per_pair.items()}
    if "logps/rejected" not in per_pair:
        means["loss_per_token"] = per_pair["loss"].sum() / tokens[:, CHOSEN].sum()
    return means


def _micro_batches(batch: Batch) -> Batch:
    """Repeats what belongs to pairs for every micro-batch, so that all arrays begin with the axis A."""
    steps = batch.plain.tokens.shape[0]
    of_pairs = {name: getattr(batch, name) for name in ("reference", "reference_augmented", "refinement")}
    repeated = {
        name: None if array is None else jnp.broadcast_to(array, (steps, *array.shape))
        for name, array in of_pairs.items()
    }
    return dataclasses.replace(batch, **repeated)


def _reference_scores(
    graph: nnx.GraphDef, params: Params | None, micro: Batch, policy: Scores, objective: Objective, pairs: int
) -> Scores | None:
    """Takes the reference's scores from the batch (cached) or from its parameters (online)."""
    if not objective.kind.needs_reference:
        return None
    if params is None:
        return Scores(micro.reference, micro.reference_augmented, policy.tokens)
    params = jax.lax.stop_gradient(params)
    return jax.lax.stop_gradient(score(graph, params, micro, pairs, ld_alpha=objective.ld_alpha))
