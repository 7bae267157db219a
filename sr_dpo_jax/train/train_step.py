"""The compiled functions: initialise, train on one step, score one step. All jits but generation's are here.

A step's rows come in A micro-batches. Each gives the sum of the losses of the pairs that stand in it and that sum's
gradient; sums are added and divided by the number of pairs once, last, so accumulation changes nothing but memory.

Next: `loop.py`, which calls these.
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
from sr_dpo_jax.model.logprobs import continuation_logprobs, response_logprobs
from sr_dpo_jax.parallel.mesh import constrain, replicated
from sr_dpo_jax.train.optim import Schedule, updates_done

Array = jax.Array
Params = Any

SAME_ROUNDING = {"xla_allow_excess_precision": False}
"""XLA may keep a bfloat16 value in float32 where it fuses, and fuses otherwise in a program that has a backward pass.
Policy and reference would then round differently, and the first margins would be noise instead of zero."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. The frozen reference is not in here: it is an argument of its own."""

    step: Array
    """int32, steps of the plan done so far, skipped ones too: where the data goes on. The optimizer counts updates."""
    params: Params
    optimizer_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of both responses of each pair, `[B, 2]` float32, nats; axis 1 is the side."""

    plain: Array
    augmented: Array | None
    """The same with p ⊕ x in place of x; None where p is not used."""
    tokens: Array
    """`[B, 2]` int32, scored tokens; 0 where a pair was absent."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which loss, with its numbers."""

    name: str
    beta: float
    lam: float
    label_smoothing: float

    @property
    def refined(self) -> bool:
        return self.name in ("sr_dpo", "sr_ipo")


def pair_metrics(objective: Objective, policy: Scores, reference: Scores | None) -> dict[str, Array]:
    """Loss and metrics, one value a pair, `[B]` float32; the names are those of metrics.jsonl.

    Args:
      objective: which loss.
      policy: scores of the policy.
      reference: scores of the frozen reference; None for sft.
    """
    logps = {"logps/chosen": policy.plain[:, CHOSEN]}
    if reference is None:
        return {"loss": losses.sft(policy.plain[:, CHOSEN]), **logps}
    log_ratio = policy.plain - reference.plain
    margin = log_ratio[:, CHOSEN] - log_ratio[:, REJECTED]
    metrics = {
        "rewards/chosen": objective.beta * log_ratio[:, CHOSEN],
        "rewards/rejected": objective.beta * log_ratio[:, REJECTED],
        "rewards/margins": objective.beta * margin,
        "rewards/accuracies": (margin > 0).astype(jnp.float32),
        **logps,
        "logps/rejected": policy.plain[:, REJECTED],
        "margin": margin,
    }
    augmented_margin = None
    if policy.augmented is not None:
        augmented_ratio = policy.augmented - reference.augmented
        augmented_margin = augmented_ratio[:, CHOSEN] - augmented_ratio[:, REJECTED]
        metrics["augmented/margin"] = augmented_margin
        metrics["augmented/accuracies"] = (augmented_margin > 0).astype(jnp.float32)
    if objective.refined:
        metrics["refinement"] = losses.refinement(augmented_margin, beta=objective.beta)
    return {"loss": _losses(objective, log_ratio, margin, augmented_margin, policy.tokens), **metrics}


def _losses(
    objective: Objective, log_ratio: Array, margin: Array, augmented_margin: Array | None, tokens: Array
) -> Array:
    beta, lam = objective.beta, objective.lam
    match objective.name:
        case "dpo":
            return losses.dpo(margin, beta=beta, label_smoothing=objective.label_smoothing)
        case "ipo":
            return losses.ipo(margin, beta=beta)
        case "ipo_mean":
            tokens = jnp.maximum(tokens, 1)  # absent pairs have none, and their losses are dropped
            return losses.ipo_mean(
                log_ratio[:, CHOSEN], log_ratio[:, REJECTED], tokens[:, CHOSEN], tokens[:, REJECTED], beta=beta
            )
        case "sr_dpo":
            return losses.sr_dpo(margin, augmented_margin, beta=beta, lam=lam)
        case "sr_ipo":
            return losses.sr_ipo(margin, augmented_margin, beta=beta, lam=lam)
    raise ValueError(f"unknown objective {objective.name!r}")


def score(graph: nnx.GraphDef, params: Params, batch: Batch, pairs: int, mesh: Mesh) -> Scores:
    """Scores of one micro-batch (rows without the axis A); pairs that stand in other micro-batches get zeros."""
    model = nnx.merge(graph, params)
    hidden, augmented_hidden = model(batch.plain, batch.augmented)
    matrix = model.vocabulary_matrix
    logprobs_of = partial(response_logprobs, pairs=pairs, cap=model.architecture.logit_cap, constrain=constrain(mesh))
    plain, tokens = logprobs_of(hidden, matrix, batch.plain)
    augmented = None
    if augmented_hidden is not None:
        augmented, _ = logprobs_of(augmented_hidden, jax.lax.stop_gradient(matrix), batch.augmented)
    return Scores(plain, augmented, tokens)


def make_score_step(graph: nnx.GraphDef, *, pairs: int, mesh: Mesh) -> Callable[[Params, Batch], Scores]:
    """`(params, batch) -> Scores`, whole on every device: for the reference, evaluation and `sr-dpo score`."""

    def step(params: Params, batch: Batch) -> Scores:
        parts = jax.lax.map(lambda micro: score(graph, params, micro, pairs, mesh), _micro_batches(batch))
        return jax.tree.map(lambda part: part.sum(axis=0), parts)

    return jax.jit(step, out_shardings=replicated(mesh), compiler_options=SAME_ROUNDING)


def make_continuation_step(
    graph: nnx.GraphDef, *, pairs: int, mesh: Mesh
) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """`(params, batch of chosen sides) -> (log-probabilities, tokens that were not the likeliest)`, each `[B]`, whole
    on every device: for benchmarks, which ask whether a continuation is the greedy one."""

    def part(params: Params, micro: Batch) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        hidden, _ = model(micro.plain, None)
        return continuation_logprobs(
            hidden,
            model.vocabulary_matrix,
            micro.plain,
            pairs=pairs,
            cap=model.architecture.logit_cap,
            constrain=constrain(mesh),
        )

    def step(params: Params, batch: Batch) -> tuple[Array, Array]:
        parts = jax.lax.map(lambda micro: part(params, micro), _micro_batches(batch))
        return jax.tree.map(lambda sums: sums.sum(axis=0), parts)

    return jax.jit(step, out_shardings=replicated(mesh), compiler_options=SAME_ROUNDING)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    objective: Objective,
    *,
    pairs: int,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, dict[str, Array]]]:
    """`(state, reference params or None, batch) -> (state, metrics)`; the state passed in is consumed.

    The reference params are given where the reference is online, and the batch holds its scores otherwise. Metrics
    are means over the step's pairs; `grad_norm` is taken before clipping. Where loss or gradient is not finite,
    `skipped` is 1 and the step changes nothing but its own number: parameters and optimizer stay as they were.
    """

    def loss_sum(params: Params, reference_params: Params | None, micro: Batch) -> tuple[Array, tuple[Scores, Any]]:
        policy = score(graph, params, micro, pairs, mesh)
        reference = _reference(graph, reference_params, micro, policy, objective, pairs, mesh)
        present = policy.tokens[:, CHOSEN] > 0
        per_pair = pair_metrics(objective, policy, reference)
        per_pair = {name: jnp.where(present, value, 0.0) for name, value in per_pair.items()}
        return per_pair["loss"].sum(), (policy.tokens, per_pair)

    def step(state: TrainState, reference_params: Params | None, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        def accumulate(gradients: Params, micro: Batch) -> tuple[Params, Any]:
            more, aux = jax.grad(loss_sum, has_aux=True)(state.params, reference_params, micro)
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

    everywhere = replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, everywhere), compiler_options=SAME_ROUNDING)


def averages(per_pair: dict[str, Array], tokens: Array) -> dict[str, Array]:
    """Means over pairs; for sft also the loss per token, a ratio of two sums."""
    means = {name: value.mean() for name, value in per_pair.items()}
    if "margin" not in per_pair:
        means["loss_per_token"] = per_pair["loss"].sum() / tokens[:, CHOSEN].sum()
    return means


def state_shapes(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and types of the state that goes with these parameters."""
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def state_shardings(
    shapes: TrainState, param_shardings: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The optimizer's moments lie where their parameters lie; counters are everywhere."""
    everywhere = replicated(mesh)
    optimizer_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.optimizer_state,
        param_shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, param_shardings, optimizer_state)


def abstract_state(shapes: TrainState, shardings: TrainState) -> TrainState:
    """Shapes and types of a state with the shardings it is to be restored on."""
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), shapes, shardings
    )


def initialise(make: Callable[[], Any], shardings: Any) -> Any:
    """Runs `make()` compiled, with its results born sharded: nothing is ever whole on one device."""
    return jax.jit(make, out_shardings=shardings)()


def _micro_batches(batch: Batch) -> Batch:
    """The batch with the axis A in front of every array; reference scores are the same for each micro-batch."""
    steps = batch.plain.tokens.shape[0]

    def repeat(scores: Array | None) -> Array | None:
        return None if scores is None else jnp.broadcast_to(scores, (steps, *scores.shape))

    return dataclasses.replace(
        batch, reference=repeat(batch.reference), reference_augmented=repeat(batch.reference_augmented)
    )


def _reference(
    graph: nnx.GraphDef,
    params: Params | None,
    micro: Batch,
    policy: Scores,
    objective: Objective,
    pairs: int,
    mesh: Mesh,
) -> Scores | None:
    if objective.name == "sft":
        return None
    if params is None:
        return Scores(micro.reference, micro.reference_augmented, policy.tokens)
    return jax.lax.stop_gradient(score(graph, jax.lax.stop_gradient(params), micro, pairs, mesh))
