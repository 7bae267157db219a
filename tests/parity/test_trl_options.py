"""TRL's options beside its losses, against its own trainer: length desensitisation, WPO weights and weighted sums.

From logits to loss: the rows are packed ones, and log-probs, their weights and those of pairs are made by the code of
the step. TRL takes the logits of the same positions, and an online reference. Gradients are those of the logits.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_trl_losses import PAIRS, compare, objective_of, torch, trainer_of, words  # noqa: F401 (torch is a fixture)

from sr_dpo_jax.batch import CHOSEN, REJECTED, Rows
from sr_dpo_jax.model.logprobs import response_logprobs
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.train_step import Scores, pair_metrics

ROWS, ROW_LENGTH, SCORED = 4, 60, 48
pytestmark = pytest.mark.parity


def world(seed: int) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Packed rows of pairs, and the logits of policy and reference at every token, `[R, T, V]`."""
    rng = np.random.default_rng(seed)
    lengths = [(2, *map(int, rng.integers(1, 9, 2))) for _ in range(PAIRS)]
    packed = tiny.pack(
        tiny.random_pairs(rng, lengths),
        [number % ROWS for number in range(PAIRS)],
        micro_batches=1,
        rows=ROWS,
        row_length=ROW_LENGTH,
        scored=SCORED,
    )
    shape = (ROWS, ROW_LENGTH, tiny.VOCABULARY)
    return jax.tree.map(lambda array: array[0], packed), rng.normal(0, 0.6, shape), rng.normal(0, 0.6, shape)


def trl(torch: Any, rows: Rows, policy: np.ndarray, reference: np.ndarray, **attributes: Any) -> tuple[Any, Any]:  # noqa: F811
    """Loss, and its gradient for the logits."""
    given = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "ld_alpha": None}
    given |= {"use_weighting": False, "precompute_ref_logps": False, "_metrics": {"train": defaultdict(list)}}
    given |= {"args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None)}
    given |= {"_total_train_tokens": 0, "_tp_size": 1, "model": torch.nn.Module()}
    given["model"].is_gradient_checkpointing = False
    given["loss_weights"] = [1.0] * len(attributes["loss_types"])
    of_side = [  # [2B] of places of a response's scored positions, chosen ones first
        [np.argwhere(rows.slot == 2 * pair + side) for pair in range(PAIRS)] for side in (CHOSEN, REJECTED)
    ]
    places = [*of_side[0], *of_side[1]]
    longest = max(map(len, places))
    mask = np.array([np.arange(longest) < len(place) for place in places]).astype(np.int64)
    padded = np.array([np.pad(place, ((0, longest - len(place)), (0, 0)), mode="edge") for place in places])
    row, position = padded[..., 0], padded[..., 1]
    source, target = rows.source[row, position], torch.tensor(rows.target[row, position]).long()

    def outputs(logits: Any) -> Any:
        logps = torch.log_softmax(logits[row, source], dim=-1)
        at_target = logps.gather(-1, target[..., None])[..., 0] * torch.tensor(mask)
        squares = torch.logsumexp(2 * logps, dim=-1)
        zeros = torch.zeros(mask.shape)
        of_tokens = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "log_sum_sq_probs": squares}
        return SimpleNamespace(log_probs=at_target, **of_tokens)

    given["ref_model"] = lambda **kwargs: outputs(torch.tensor(reference))
    trainer = trainer_of("trl.trainer.dpo_trainer", "DPOTrainer", **(given | attributes))
    leaf = torch.tensor(policy, requires_grad=True)
    prompt = np.zeros((len(mask), 1), np.int64)
    inputs = {
        "input_ids": torch.ones(mask.shape[0], mask.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.tensor(np.hstack([prompt + 1, mask])),
        "completion_mask": torch.tensor(np.hstack([prompt, mask])),
    }
    loss = trainer._compute_loss(lambda **kwargs: outputs(leaf), inputs, False)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def ours(objective: Objective, rows: Rows, policy: np.ndarray, reference: np.ndarray) -> tuple[Any, Any]:
    """The same by the step's own functions: the vocabulary matrix is the identity, so that states are logits."""
    options = {"pairs": PAIRS, "cap": None, "ld_alpha": objective.ld_alpha}
    matrix, rows = jnp.eye(tiny.VOCABULARY), jax.tree.map(jnp.asarray, rows)

    def loss(logits: jax.Array) -> jax.Array:
        sums = response_logprobs(logits, matrix, rows, **options, squares=objective.use_weighting)
        other = response_logprobs(jnp.asarray(reference), matrix, rows, **options)
        scores = Scores(sums.logprobs, None, sums.tokens, whole=sums.whole, log_squares=sums.log_squares)
        return pair_metrics(objective, scores, Scores(other.logprobs, None, other.tokens))["loss"].mean()

    return jax.value_and_grad(loss)(jnp.asarray(policy))


LENGTHS = [
    ("sigmoid", {"name": "dpo"}),
    ("sigmoid_norm", {"name": "sigmoid_norm", "beta": 5.0}),
    ("ipo", {"name": "ipo_mean"}),
    ("robust", {"name": "robust", "label_smoothing": 0.1}),
    ("hinge", {"name": "hinge"}),
    ("exo_pair", {"name": "exo_pair", "label_smoothing": 0.1}),
    ("discopop", {"name": "discopop"}),
    ("apo_down", {"name": "apo_down"}),
    ("apo_zero", {"name": "apo_zero"}),
    ("nca_pair", {"name": "nca_pair"}),
    ("bco_pair", {"name": "bco_pair"}),
    ("sppo_hard", {"name": "sppo_hard"}),
    ("aot", {"name": "aot"}),
    ("aot_unpaired", {"name": "aot_unpaired"}),
]
OF_PAIRS = [case for case in LENGTHS if case[0] not in ("aot", "aot_unpaired", "hinge")]
"""Losses of ranks have no weights, and TRL's hinge with weights raises: it changes in place what its gradient needs."""


def both(torch: Any, seed: int, theirs: str, section: dict[str, Any], **options: Any) -> None:  # noqa: F811
    rows, policy, reference = world(seed)
    attributes = {"loss_types": [theirs]} | {key: section[key] for key in ("beta", "label_smoothing") if key in section}
    expected = trl(torch, rows, policy, reference, **attributes, **options)
    compare(ours(objective_of(section | options), rows, policy, reference), expected)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
@pytest.mark.parametrize(("theirs", "section"), LENGTHS, ids=words)
def test_length_desensitisation(torch, float64, theirs, section, ld_alpha):  # noqa: F811
    both(torch, 0, theirs, section, ld_alpha=ld_alpha)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("theirs", "section"), OF_PAIRS, ids=words)
def test_weights_of_pairs(torch, float64, theirs, section, seed):  # noqa: F811
    both(torch, seed, theirs, section, use_weighting=True)


def test_lengths_and_weights_together(torch, float64):  # noqa: F811
    """The weights are of the whole responses."""
    both(torch, 2, "sigmoid", {"name": "dpo"}, use_weighting=True, ld_alpha=0.3)


def test_a_weighted_sum(torch, float64):  # noqa: F811
    """MPO's, and one with numbers that TRL's terms share, lengths and weights."""
    rows, policy, reference = world(3)
    terms = [{"name": "dpo", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}]
    expected = trl(torch, rows, policy, reference, loss_types=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2])
    compare(ours(objective_of({"name": "mixed", "terms": terms}), rows, policy, reference), expected)
    smooth = {"label_smoothing": 0.1}
    terms = [{"name": "robust", "weight": 0.5, **smooth}, {"name": "exo_pair", "weight": 2.0, **smooth}]
    terms += [{"name": "sigmoid_norm", "weight": 0.3}]
    options = {"ld_alpha": 0.3, "use_weighting": True}
    types = {"loss_types": ["robust", "exo_pair", "sigmoid_norm"], "loss_weights": [0.5, 2.0, 0.3]}
    expected = trl(torch, rows, policy, reference, **types, **smooth, **options)
    compare(ours(objective_of({"name": "mixed", "terms": terms, **options}), rows, policy, reference), expected)
