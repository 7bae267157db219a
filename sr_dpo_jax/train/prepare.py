"""Prepares the first step of training: plans, scores the reference, loads or restores the state, compiles.

A run starts from the first of these that applies: the newest good checkpoint in output_dir; with model.init=random,
weights drawn from the seed; otherwise the weights of model.path. A reference that the cache does not hold is scored
before step 0.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed, pair_sizes
from sr_dpo_jax.data.plan import Plan, covering_plan
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.durable.files import require_room
from sr_dpo_jax.durable.preemption import StopSignal
from sr_dpo_jax.durable.selection import Selection
from sr_dpo_jax.model.adapter import join
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.processes import on_leader, require_same, text_from_leader
from sr_dpo_jax.train.clock import Clock
from sr_dpo_jax.train.identity import identity_of, resume_point, surroundings
from sr_dpo_jax.train.measured import measured_sets, selection_so_far
from sr_dpo_jax.train.program import warn_of_no_learning
from sr_dpo_jax.train.samples import Samples
from sr_dpo_jax.train.scored_set import ScoredSet, compiled_sets, known_at_start, score_reference, training_feed
from sr_dpo_jax.train.setup import Setup
from sr_dpo_jax.train.state import TrainState, first_state


@dataclasses.dataclass(frozen=True)
class Job:
    """The things that the loop works with and never changes."""

    setup: Setup
    record: dict[str, Any]
    """Identity, software and reference digests. Each checkpoint stores them, and a start that resumes it compares."""
    feed: Feed
    """The training pairs and the plan of their steps, as batches."""
    total_steps: int
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """Compiled: a batch of another shape raises instead of compiling again."""
    base: Params | None
    """The parameters beside the adapters that are trained; None where all are."""
    reference_params: Params | None
    """The parameters of an online reference, without the base; None where it is cached."""
    held_out: tuple[ScoredSet, ...]
    samples: Samples | None
    selection: Selection
    """The best evaluation and the patience, as they stood at the step that this start goes on from."""
    evaluation_due: bool
    """That step was saved by a signal that came before its evaluation, or evaluated on other held-out pairs."""
    checkpoints: Checkpoints


def prepare(
    setup: Setup,
    pairs: TokenizedPairs,
    eval_sets: Mapping[str, TokenizedPairs],
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop: StopSignal,
    clock: Clock,
    allowed_changes: Sequence[str],
) -> tuple[Job, TrainState]:
    """Plans, compiles, scores the reference with these programs, loads or restores the state: all before step 1."""
    config, objective, plan = setup.config, setup.objective, setup.plan(pairs, list(eval_sets.values()))
    total_steps = setup.total_steps(plan)
    warn_of_no_learning(config.optimizer.model_dump(), total_steps, setup.model.param_dtype)
    checkpoints = Checkpoints(config.output_dir, keep=config.checkpoint.keep, strict=config.checkpoint.strict)
    require_same({"plan": plan.digest, "--allow-change": allowed_changes})
    record = _record(setup, pairs, plan, tokenizer, checkpoints)
    strict = {"strict": config.checkpoint.strict, "allowed_changes": allowed_changes}
    resumed, before = resume_point(checkpoints, record, where=config.output_dir, **strict)
    compiled = partial(clock.timed("compile", compiled_sets), params=setup.model.shapes, programs={})
    held_out = compiled([setup.scored_set(name, held, shape=plan.shape) for name, held in eval_sets.items()])
    training, scored = None, list(held_out)
    if objective.wants_scores and (objective.judged_before or objective.unsettled or not setup.online):
        covering = covering_plan(plan, *pair_sizes(pairs, with_rejected=True))
        training = setup.scored_set("training", pairs, plan=covering, augmented=objective.scored_with_p)
        scored.insert(0, training)
    record["reference"], reference_params, (trained, frozen) = clock.timed("reference", score_reference)(
        setup.model,
        scored,
        compiled,
        reference=setup.reference,
        remembered=before.get("reference", {}),
        between=stop.meet,
        online=setup.online,
        keep_base=resumed is None or config.lora is not None,
    )
    setup = setup.settled(record.setdefault("knowledge", known_at_start(training, objective, before, record)))
    program = setup.program(plan)
    _require_room(config, checkpoints, program.state)
    if resumed is None:
        state = first_state(program.state, trained, program.optimizer)
    else:
        state = TrainState(**checkpoints.restore(program.state.tree(), step=resumed))
    feed = training_feed(setup.packing, setup.objective, pairs, plan, training, online=setup.online)
    stop.meet()
    job = Job(
        setup=setup,
        record=record,
        feed=feed,
        total_steps=total_steps,
        train_step=clock.timed("compile", program.compiled)(state, frozen, reference_params, feed),
        base=frozen,
        reference_params=reference_params,
        held_out=held_out,
        samples=setup.samples(eval_sets, tokenizer, join(state.params, frozen)),
        checkpoints=checkpoints,
        **_evaluations(setup, checkpoints, record, before, eval_sets, total_steps=total_steps),
    )
    return job, state


def _record(
    setup: Setup, pairs: TokenizedPairs, plan: Plan, tokenizer: PreTrainedTokenizerBase, checkpoints: Checkpoints
) -> dict[str, Any]:
    """Collects what every checkpoint stores of the run; a run without an id draws one."""
    model = setup.model
    digests = {"tokenizer": tokenizer_digest(tokenizer), "weights_digest": model.base_digest}
    if model.adapter is not None:
        digests["adapter_digest"] = model.adapter.digest
    if setup.reference is not model:
        digests["reference_digest"] = setup.reference.digest
    steps = setup.total_steps(plan)
    identity = identity_of(pairs, plan, **digests, config=setup.config.model_dump(), total_steps=steps)
    run_id = text_from_leader(checkpoints.run_id or checkpoints.recorded_run_id() or secrets.token_hex(8))
    checkpoints.run_id = run_id
    return {"run_id": run_id, "identity": identity, "surroundings": surroundings(model.mesh)}


def _evaluations(
    setup: Setup,
    checkpoints: Checkpoints,
    record: dict[str, Any],
    before: Mapping[str, Any],
    eval_sets: Mapping[str, TokenizedPairs],
    *,
    total_steps: int,
) -> dict[str, Any]:
    """Takes up what the checkpoint that is resumed has measured, under the rule of the configuration: fields of Job."""
    section, train, step = setup.config.checkpoint, setup.config.train, before.get("next_step", 0)
    measured = [name for name in eval_sets if (section.best_metric or "").startswith(f"{name}/")]
    data = eval_sets[max(measured, key=len)].fingerprint if measured else ""
    patience = {"min_delta": train.early_stopping_min_delta, "patience": train.early_stopping_patience}
    rule = Selection(section.best_metric, section.best_mode, **patience, data=data)
    selection = selection_so_far(rule, before.get("selection"), checkpoints, strict=section.strict)
    ended = selection.over or step >= total_steps
    record["measured"], anew = measured_sets(before, eval_sets, step=step, ended=ended)
    due = anew or (bool(eval_sets) and before.get("evaluation_due", False))
    return {"selection": selection, "evaluation_due": due}


def _require_room(config: Config, checkpoints: Checkpoints, state: TrainState) -> None:
    """Counts the checkpoints that will stand at once: `keep`, the best one, and one more until it is verified."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    kept = config.checkpoint.keep + (config.checkpoint.best_metric is not None)
    to_come = max(kept + 1 - len(checkpoints.verified_steps()), 1)
    on_leader(lambda: require_room(checkpoints.directory, checkpoint_bytes=size, checkpoints=to_come))
