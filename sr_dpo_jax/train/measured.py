"""The evaluations of a run so far, as a checkpoint keeps them, and which of them still count.

A number is that of the pairs that it was measured on: where held-out pairs are exchanged, the numbers before say
nothing of the ones that are there now.
"""

import logging
from collections.abc import Mapping
from typing import Any

from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.durable.selection import Selection
from sr_dpo_jax.errors import UsageError

log = logging.getLogger(__name__)


def measured_sets(
    before: Mapping[str, Any], sets: Mapping[str, TokenizedPairs], *, step: int, ended: bool
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Says since when the evaluations of a run are of the held-out pairs that are there now.

    Args:
      before: what the checkpoint that is resumed stored; empty for a new run.
      sets: the held-out sets by name.
      step: the step that this start goes on from.
      ended: no step is left, so that no evaluation would come by itself.

    Returns:
      By name the digest of each set and the first step whose evaluation counts; and whether the evaluation of `step` is
      to be done anew, as the last one was of other pairs.
    """
    known = before.get("measured", {})
    digests = {name: pairs.fingerprint for name, pairs in sets.items()}
    changed = [name for name, digest in digests.items() if known.get(name, {}).get("digest") != digest]
    anew = bool(changed) and ended and bool(before)
    if anew:
        log.info("held-out set %s: evaluated anew at step %d, as its pairs are others than before", changed[0], step)
    since = step if anew or not before else step + 1
    return {
        name: {"digest": digest, "since": since} if name in changed else dict(known[name])
        for name, digest in digests.items()
    }, anew


def selection_so_far(
    rule: Selection, record: Mapping[str, Any] | None, checkpoints: Checkpoints, *, strict: bool
) -> Selection:
    """Gives the rule with what a checkpoint's record has counted, or as it is where that was of another metric or data.

    Raises:
      UsageError: the best checkpoint cannot be used any more, and `strict` holds.
    """
    selection = rule if record is None else rule.resumed(record)
    if selection is None:
        log.warning(
            "checkpoint.best_metric is another one than before, or its held-out pairs are others: the evaluations so "
            "far do not count, and the best checkpoint so far stays no longer than others"
        )
        return rule
    if selection.step is not None:
        try:
            checkpoints.existing(selection.step)
        except UsageError as error:
            message = f"the best checkpoint cannot be used any more: {error}"
            if strict:
                raise UsageError(f"{message}; checkpoint.strict=true: restore it, or set that to false") from error
            log.warning("%s; only a better one takes its place", message)
    return selection
