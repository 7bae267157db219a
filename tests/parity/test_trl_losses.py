"""Every loss that TRL has, against TRL's own trainers on the same log-probs: values and gradients.

TRL's code runs as it is, `DPOTrainer._compute_loss` and `get_batch_loss_metrics` of the trainers of CPO and ORPO. Only
the model is ours: it gives log-probs or logits that were drawn, and their gradients are compared.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.train_step import Scores, pair_metrics

pytestmark = pytest.mark.parity

PAIRS, TOKENS, VOCABULARY = 6, 8, 11
TOLERANCE = 1e-6


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="pip install -e '.[parity]'")


def trainer_of(path: str, name: str, **attributes: Any) -> Any:
    """A trainer of TRL with these attributes, whose constructor, which wants a model and data, never ran."""
    kind = getattr(pytest.importorskip(path, reason="pip install -e '.[parity]'"), name)
    trainer = kind.__new__(kind)
    same = lambda values: values  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    for key, value in ({"accelerator": accelerator, "aux_loss_enabled": False} | attributes).items():
        setattr(trainer, key, value)
    return trainer


def objective_of(section: dict[str, Any]) -> Objective:
    base = {"output_dir": "x", "model": {"path": "x"}, "data": {"path": "x"}}
    return Objective.of(**config_from_dict(base | {"objective": section}, where="test").objective.model_dump())


def lengths(rng: np.random.Generator, *, one_length: bool = False) -> np.ndarray:
    """Tokens of the chosen and then of the rejected responses; with `one_length` all chosen ones are equal."""
    drawn = rng.integers(1, TOKENS + 1, 2 * PAIRS)
    if one_length:
        drawn[:PAIRS] = 5
    return drawn


def pairs_of(values: jax.Array) -> jax.Array:
    """`[2B]`, chosen first, to `[B, 2]`."""
    return jnp.stack(jnp.split(values, 2), axis=1)


def compare(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    """Within 1e-6, relative where a number is above 1; `pytest -rP` shows the worst differences."""
    worst = []
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(other).all()
        worst.append(float((np.abs(mine - other) / np.maximum(1, np.abs(other))).max()))
    print(f"worst difference: value {worst[0]:.1e}, gradient {worst[1]:.1e}")
    assert max(worst) < TOLERANCE
    assert np.abs(theirs[1]).max() > 1e-4


def words(value: Any) -> str:
    """The name of a case: its keys with their values."""
    return ",".join(f"{key}={one}" for key, one in value.items()) if isinstance(value, dict) else str(value)


SMOOTHED = {"label_smoothing": 0.1}
DIVERGENCES = (
    ("forward_kl", None, {"f_divergence_type": "forward_kl"}),
    ("js_divergence", None, {"f_divergence_type": "js_divergence"}),
    ("alpha_divergence", 0.3, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
)
OF_DPO: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sigmoid", {"name": "dpo"}, {}),
    ("sigmoid_norm", {"name": "sigmoid_norm", "beta": 5.0}, {"beta": 5.0}),
    ("robust", {"name": "robust", **SMOOTHED}, SMOOTHED),
    ("hinge", {"name": "hinge"}, {}),
    ("ipo", {"name": "ipo_mean"}, {}),
    ("exo_pair", {"name": "exo_pair"}, {"label_smoothing": 1e-3}),
    ("exo_pair", {"name": "exo_pair", **SMOOTHED}, SMOOTHED),
    ("discopop", {"name": "discopop"}, {}),
    ("aot", {"name": "aot"}, {}),
    ("aot", {"name": "aot", **SMOOTHED}, SMOOTHED),
    ("aot_unpaired", {"name": "aot_unpaired", **SMOOTHED}, SMOOTHED),
    ("apo_down", {"name": "apo_down"}, {}),
    ("apo_zero", {"name": "apo_zero"}, {}),
    ("nca_pair", {"name": "nca_pair"}, {}),
    ("bco_pair", {"name": "bco_pair"}, {}),
    ("sppo_hard", {"name": "sppo_hard"}, {}),
]
OF_DPO += [
    (
        theirs,
        section | {"divergence": divergence} | ({} if alpha is None else {"divergence_alpha": alpha}),
        more | given,
    )
    for theirs, section, more in (*OF_DPO[:6], OF_DPO[7])
    for divergence, alpha, given in DIVERGENCES
]


def dpo_of_trl(torch: Any, types: list[str], logps: np.ndarray, reference: np.ndarray, mask: np.ndarray, **attributes):
    """Loss, and its gradient for the log-prob of each token, in the type of `logps`."""
    given = {"beta": 0.1, "label_smoothing": 0.0, "loss_types": types, "loss_weights": [1.0] * len(types)}
    given |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "ld_alpha": None}
    given |= {"use_weighting": False, "precompute_ref_logps": True, "args": SimpleNamespace(discopop_tau=0.05)}
    given |= {"model": SimpleNamespace(training=True), "_metrics": {"train": defaultdict(list)}}
    given |= {"_total_train_tokens": 0, "_tp_size": 1}
    trainer = trainer_of("trl.trainer.dpo_trainer", "DPOTrainer", **(given | attributes))
    leaf = torch.tensor(logps, requires_grad=True)
    zeros = torch.zeros(mask.shape)
    outputs = SimpleNamespace(
        log_probs=leaf * torch.tensor(mask), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    prompt = np.zeros((len(mask), 1), np.int64)
    ref_chosen, ref_rejected = torch.tensor(reference).chunk(2)
    inputs = {
        "input_ids": torch.ones(mask.shape[0], mask.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.tensor(np.hstack([prompt + 1, mask])),
        "completion_mask": torch.tensor(np.hstack([prompt, mask])),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = trainer._compute_loss(lambda **kwargs: outputs, inputs, False)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def ours(section: dict[str, Any], logps: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
    objective, tokens = objective_of(section), pairs_of(jnp.asarray(mask.sum(axis=1)))

    def loss(per_token: jax.Array) -> jax.Array:
        policy = Scores(pairs_of((per_token * mask).sum(axis=1)), None, tokens)
        return pair_metrics(objective, policy, Scores(pairs_of(jnp.asarray(reference)), None, tokens))["loss"].mean()

    return jax.value_and_grad(loss)(jnp.asarray(logps))


def drawn(seed: int, dtype: type, **options: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs of tokens `[2B, TOKENS]`, the reference's of responses `[2B]`, and the mask of tokens."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < lengths(rng, **options)[:, None]).astype(np.int64)
    logps = -rng.gamma(1.0, 1.0, mask.shape)
    reference = (logps * mask).sum(axis=1) + rng.normal(0, 1.5, 2 * PAIRS)
    return logps.astype(dtype), reference.astype(dtype), mask


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("theirs", "section", "attributes"), OF_DPO, ids=words)
def test_a_loss_of_dpo_trainer(torch, float64, theirs, section, attributes, seed):
    """In float64; in float32 where TRL knows no other type, for the divergence of α."""
    single = section.get("divergence") == "alpha_divergence"
    given = drawn(seed, np.float32 if single else np.float64)
    expected = dpo_of_trl(torch, [theirs], *given, **attributes)
    compare(ours(section, *given), expected)


def test_label_smoothing_is_theirs_of_cpo(torch, float64):
    """TRL 1.16 has no cDPO in its DPO trainer, and the same formula in that of CPO."""
    rng = np.random.default_rng(3)
    policy, reference = rng.normal(-20, 3, (2 * PAIRS)), rng.normal(-20, 3, (2 * PAIRS))
    trainer = trainer_of(
        "trl.experimental.cpo", "CPOTrainer", alpha=0.0, beta=0.1, label_smoothing=0.1, loss_type="sigmoid"
    )
    leaf = torch.tensor(policy, requires_grad=True)
    losses, _, _ = trainer.cpo_loss(*(leaf - torch.tensor(reference)).chunk(2))
    losses.mean().backward()
    mask = np.ones((2 * PAIRS, 1), np.int64)
    value, gradient = ours({"name": "dpo", **SMOOTHED}, policy[:, None], reference, mask)
    compare((value, gradient[:, 0]), (losses.mean().item(), leaf.grad.numpy()))


@pytest.mark.parametrize("theirs", ["sigmoid", "hinge", "apo_zero"])
def test_the_term_of_fine_tuning(torch, float64, theirs):
    """TRL takes the mean over the tokens of a batch, and we over those of a pair and then over pairs.

    They are the same where chosen responses are of one length.
    """
    given = drawn(5, np.float64, one_length=True)
    expected = dpo_of_trl(torch, [theirs, "sft"], *given, loss_weights=[1.0, 0.7])
    name = "dpo" if theirs == "sigmoid" else theirs
    compare(ours({"name": name, "sft_weight": 0.7}, *given), expected)


ALONE = [
    ("cpo", "CPOTrainer", {"loss_type": "sigmoid", "cpo_alpha": 1.0}, {"name": "cpo"}),
    (
        "cpo",
        "CPOTrainer",
        {"loss_type": "sigmoid", "cpo_alpha": 0.3, **SMOOTHED},
        {"name": "cpo", "sft_weight": 0.3, **SMOOTHED},
    ),
    (
        "cpo",
        "CPOTrainer",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
        {"name": "simpo", "beta": 2.0, "gamma": 0.5},
    ),
    (
        "cpo",
        "CPOTrainer",
        {"loss_type": "simpo", "cpo_alpha": 0.4, "beta": 2.5, "simpo_gamma": 1.2},
        {"name": "simpo", "beta": 2.5, "gamma": 1.2, "sft_weight": 0.4},
    ),
    ("orpo", "ORPOTrainer", {"beta": 0.3}, {"name": "orpo", "beta": 0.3}),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("package", "kind", "attributes", "section"), ALONE, ids=words)
def test_a_loss_without_reference(torch, float64, package, kind, attributes, section, seed):
    """From logits to loss, so that lengths and the term of fine-tuning are TRL's own. Prompts have one token.

    TRL's ORPO takes that term over the prompt too, which is none of the loss where the prompt is the first token.
    """
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < lengths(rng, one_length=True)[:, None]).astype(np.int64)
    logits, ids = rng.normal(0, 1, (2 * PAIRS, TOKENS + 1, VOCABULARY)), rng.integers(0, VOCABULARY, mask.shape)
    base = {"alpha": 0.0, "beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "is_encoder_decoder": False}
    more = {"pad_token_id": 0, "padding_value": 0}
    trainer = trainer_of(f"trl.experimental.{package}", kind, **(base | more | attributes))
    leaf = torch.tensor(logits, requires_grad=True)
    first = np.ones((2 * PAIRS, 1), np.int64)
    columns = {
        "input_ids": np.hstack([first, ids * mask]),
        "attention_mask": np.hstack([first, mask]),
        "labels": np.hstack([-100 * first, np.where(mask, ids, -100)]),
    }
    batch = {
        f"{side}_{name}": part
        for name, array in columns.items()
        for side, part in zip(("chosen", "rejected"), torch.tensor(array).chunk(2), strict=True)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, metrics = trainer.get_batch_loss_metrics(lambda *a, **k: SimpleNamespace(logits=leaf), batch)
    loss.backward()
    objective, tokens = objective_of(section), pairs_of(jnp.asarray(mask.sum(axis=1)))

    def per_pair(given: jax.Array) -> dict[str, jax.Array]:
        logps = jnp.take_along_axis(jax.nn.log_softmax(given[:, :-1]), ids[..., None], axis=2)[..., 0]
        return pair_metrics(objective, Scores(pairs_of((logps * mask).sum(axis=1)), None, tokens), None)

    mine = jax.value_and_grad(lambda given: per_pair(given)["loss"].mean())(jnp.asarray(logits))
    compare(mine, (loss.item(), leaf.grad.numpy()))
    named = per_pair(jnp.asarray(logits))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert float(named[name].mean()) == pytest.approx(metrics[name], abs=1e-6), name
