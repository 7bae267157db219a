"""Losses against hand numbers, against TRL's and the reference code base's values, and against NumPy in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_dpo_jax import losses

# Two pairs: log-probs under policy and reference, and lengths (reference/peers_torch.md, fixture F).
CHOSEN, REFERENCE_CHOSEN, CHOSEN_TOKENS = np.array([-3.0, -5.0]), np.array([-3.5, -4.6]), np.array([3, 2])
REJECTED, REFERENCE_REJECTED, REJECTED_TOKENS = np.array([-4.0, -2.5]), np.array([-3.8, -2.9]), np.array([2, 4])
CHOSEN_RATIO, REJECTED_RATIO = CHOSEN - REFERENCE_CHOSEN, REJECTED - REFERENCE_REJECTED
MARGIN = CHOSEN_RATIO - REJECTED_RATIO
AUGMENTED = np.array([0.3, -1.1])


def ipo_mean(beta: float) -> jax.Array:
    """TRL's IPO, on log-ratios averaged over tokens: the objective table gives `ipo` such a margin."""
    return losses.ipo(jnp.asarray(CHOSEN_RATIO / CHOSEN_TOKENS - REJECTED_RATIO / REJECTED_TOKENS), beta=beta)


@pytest.mark.parametrize(
    ("name", "loss", "expected", "mean"),
    [
        ("sigmoid", lambda m: losses.dpo(m, beta=0.1), [0.6587595555, 0.7339469673], 0.6963532614),
        ("sigmoid .01", lambda m: losses.dpo(m, beta=0.01), [0.6896533055, 0.6971551805], 0.6934042430),
        (
            "cDPO",
            lambda m: losses.dpo(m, beta=0.1, label_smoothing=0.1),
            [0.6657595555, 0.7259469673],
            0.6958532614,
        ),
        ("ipo summed", lambda m: losses.ipo(m, beta=0.1), [18.49, 33.64], 26.065),
        ("ipo mean", lambda m: ipo_mean(0.1), [22.4044444444, 28.09], 25.2472222222),
        ("ipo mean .01", lambda m: ipo_mean(0.01), [2473.4044444444, 2530.09], 2501.7472222222),
        ("ipo summed .01", lambda m: losses.ipo(m, beta=0.01), [2430.49, 2580.64], 2505.565),
    ],
)
def test_values_of_other_implementations(float64, name, loss, expected, mean):
    value = np.asarray(loss(jnp.asarray(MARGIN)))
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(value.mean(), mean, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_refined_losses_against_numpy(float64, beta, lam):
    rng = np.random.default_rng(7)
    margin, augmented = rng.normal(0, 30, 200), rng.normal(0, 30, 200)
    logit = beta * margin - lam * beta * augmented
    dpo = np.log1p(np.exp(-np.abs(logit))) + np.maximum(-logit, 0)
    ipo = (margin - lam * beta * augmented - 0.5 / beta) ** 2
    given = (jnp.asarray(margin), jnp.asarray(augmented))
    np.testing.assert_allclose(losses.sr_dpo(*given, beta=beta, lam=lam), dpo, rtol=1e-12)
    np.testing.assert_allclose(losses.sr_ipo(*given, beta=beta, lam=lam), ipo, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(losses.refinement(given[1], beta=beta), beta * augmented, rtol=1e-15)


def test_refinement_has_beta_in_ipo_too(float64):
    """m = 3, m̂ = 2, β = 0.5, λ = 1: Δ = 1 and 1/(2β) = 1, so (3 − 1 − 1)² = 1; without its β the loss would be 0."""
    assert losses.sr_ipo(jnp.array([3.0]), jnp.array([2.0]), beta=0.5, lam=1.0)[0] == 1.0


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(log_sigmoid(x))


def smoothed(x: np.ndarray, share: float) -> np.ndarray:
    return -(1 - share) * log_sigmoid(x) - share * log_sigmoid(-x)


def exo(x: np.ndarray, share: float) -> np.ndarray:
    """KL of two distributions over two responses, term by term."""
    policy, labels = np.stack([sigmoid(x), sigmoid(-x)]), np.array([[1 - share], [share]])
    return (policy * (np.stack([log_sigmoid(x), log_sigmoid(-x)]) - np.log(labels))).sum(axis=0)


def discopop(x: np.ndarray, tau: float) -> np.ndarray:
    gate = sigmoid(x / tau)
    return -log_sigmoid(x) * (1 - gate) + np.exp(-x) * gate


Formula = Callable[..., np.ndarray]
OF_A_MARGIN: dict[str, tuple[dict[str, float], Formula]] = {
    "dpo": ({"label_smoothing": 0.1}, lambda m, shift, beta: smoothed(beta * m - shift, 0.1)),
    "robust": (
        {"label_smoothing": 0.2},
        lambda m, shift, beta: (
            (0.8 * -log_sigmoid(beta * m - shift) - 0.2 * -log_sigmoid(-(beta * m - shift))) / (1 - 2 * 0.2)
        ),
    ),
    "hinge": ({}, lambda m, shift, beta: np.maximum(0, 1 - (beta * m - shift))),
    "ipo": ({}, lambda m, shift, beta: (m - shift - 1 / (2 * beta)) ** 2),
    "exo_pair": ({"label_smoothing": 1e-3}, lambda m, shift, beta: exo(beta * m - shift, 1e-3)),
    "discopop": ({"tau": 0.05}, lambda m, shift, beta: discopop(beta * m - shift, 0.05)),
    "simpo": ({"gamma": 0.7}, lambda m, shift, beta: -log_sigmoid(beta * m - shift - 0.7)),
    "orpo": ({}, lambda m, shift, beta: -beta * log_sigmoid(m - shift)),
}
"""Losses of one margin: their numbers, and the loss of m, λΔ and β in NumPy."""
OF_TWO: dict[str, tuple[dict[str, float], Formula]] = {
    "apo_down": ({}, lambda a, b, shift, beta: sigmoid(beta * a) + 1 - sigmoid(beta * (a - b) - shift)),
    "aot": (
        {"label_smoothing": 0.1},
        lambda a, b, shift, beta: smoothed(np.sort(beta * a - shift) - np.sort(beta * b), 0.1),
    ),
    "aot_unpaired": (
        {"label_smoothing": 0.1},
        lambda a, b, shift, beta: smoothed(np.sort(beta * a - shift) - np.sort(beta * b), 0.1),
    ),
    "apo_zero": ({}, lambda a, b, shift, beta: 1 - sigmoid(beta * a) + sigmoid(beta * b)),
    "nca_pair": (
        {},
        lambda a, b, shift, beta: -log_sigmoid(beta * a) - (log_sigmoid(-beta * a) + log_sigmoid(-beta * b)) / 2,
    ),
    "bco_pair": ({}, lambda a, b, shift, beta: -log_sigmoid(beta * a) - log_sigmoid(-beta * b)),
    "sppo_hard": ({}, lambda a, b, shift, beta: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2),
}
"""Losses of two arrays: r⁺ and r⁻, or of aot d and d_ref; those below the first three take no Δ."""
UNSHIFTED = ("apo_zero", "nca_pair", "bco_pair", "sppo_hard")
NUMPY = OF_A_MARGIN | OF_TWO
SHIFTED = [name for name in NUMPY if name not in UNSHIFTED]


def drawn(name: str, pairs: int = 200, scale: float = 20.0) -> list[np.ndarray]:
    """The arrays of a loss, Δ last where it takes one."""
    rng = np.random.default_rng(5)
    count = 1 + (name in OF_TWO) + (name not in UNSHIFTED)
    return [rng.normal(0, scale, pairs) for _ in range(count)]


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("name", NUMPY)
def test_every_loss_against_numpy(float64, name, beta):
    """Plain and with Δ."""
    numbers, formula = NUMPY[name]
    function, arrays = getattr(losses, name), drawn(name)
    given = [jnp.asarray(array) for array in arrays]
    if name in UNSHIFTED:
        expected = formula(*arrays, None, beta)
        np.testing.assert_allclose(function(*given, beta=beta, **numbers), expected, rtol=1e-10, atol=1e-12)
        return
    for lam in (0.3, 1.0):
        expected = formula(*arrays[:-1], lam * arrays[-1], beta)
        found = function(*given, beta=beta, lam=lam, **numbers)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    expected = formula(*arrays[:-1], 0.0, beta)
    np.testing.assert_allclose(function(*given[:-1], beta=beta, **numbers), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NUMPY)
def test_every_gradient_against_differences(float64, name):
    """Central differences agree with jax.grad for the log-ratios; for Δ they are not 0, and jax.grad is."""
    numbers, _ = NUMPY[name]
    given = [jnp.asarray(array) for array in drawn(name, pairs=6, scale=4.0)]
    keywords: dict[str, Any] = {"beta": 0.3, **numbers} | ({} if name in UNSHIFTED else {"lam": 0.7})

    def total(*arrays: jax.Array) -> jax.Array:
        return getattr(losses, name)(*arrays, **keywords).sum()

    step, seen = 1e-5, []
    gradients = jax.grad(total, argnums=tuple(range(len(given))))(*given)
    for place, gradient in enumerate(gradients):
        for pair in range(6):
            more, less = (
                total(*(array + sign * step * jnp.eye(6)[pair] * (place == at) for at, array in enumerate(given)))
                for sign in (1, -1)
            )
            difference = (more - less) / (2 * step)
            if name in SHIFTED and place == len(given) - 1:
                assert gradient[pair] == 0.0
                seen.append(abs(difference))
            else:
                np.testing.assert_allclose(gradient[pair], difference, rtol=1e-6, atol=1e-8)
    assert name in UNSHIFTED or max(seen) > 1e-2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SHIFTED)
def test_lam_zero_is_every_plain_loss_bit_for_bit(name, compiled):
    numbers, _ = NUMPY[name]
    arrays = [jnp.asarray(np.append(array, [0.0, -0.0, 3e3, -3e3]), jnp.float32) for array in drawn(name)]
    wrap = jax.jit if compiled else lambda function: function

    def total(lam: float | None) -> Any:
        keywords = {} if lam is None else {"lam": lam}
        return lambda *given: (
            (loss := getattr(losses, name)(*given, beta=0.1, **keywords, **numbers)).sum(),
            loss,
        )

    (_, with_zero), gradient = wrap(jax.value_and_grad(total(0.0), has_aux=True))(*arrays)
    (_, without), plain_gradient = wrap(jax.value_and_grad(total(None), has_aux=True))(*arrays[:-1])
    assert np.asarray(with_zero).tobytes() == np.asarray(without).tobytes()
    assert np.asarray(gradient).tobytes() == np.asarray(plain_gradient).tobytes()


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_loss_is_finite_at_extremes(name, sign):
    """In float32, thousands of nats apart: the gated exponential of DiscoPOP too, where TRL's is not a number."""
    numbers, _ = NUMPY[name]
    arrays = [sign * jnp.array([4000.0, 30.0], jnp.float32), *[-sign * jnp.ones(2, jnp.float32)] * (name in OF_TWO)]
    value, gradient = jax.value_and_grad(lambda m: getattr(losses, name)(m, *arrays[1:], beta=0.5, **numbers).sum())(
        arrays[0]
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.999])
def test_divergences_against_numpy(float64, alpha):
    """f′ of each divergence, from its own f by central differences, up to the constant that makes it 0 at t = 1."""
    ratio, step = np.linspace(-6, 6, 25), 1e-6
    generators = {
        ("reverse_kl", None): lambda t: t * np.log(t) - t,
        ("forward_kl", None): lambda t: t - np.log(t),
        ("js_divergence", None): lambda t: t * np.log(t) - (t + 1) * np.log((t + 1) / 2),
    }
    if alpha:
        generators["alpha_divergence", alpha] = lambda t: (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1))
    for (divergence, number), function in generators.items():
        found = losses.divergence_score(jnp.asarray(ratio), divergence=divergence, alpha=number)
        step_of = step * np.exp(ratio)
        expected = (function(np.exp(ratio) + step_of) - function(np.exp(ratio) - step_of)) / (2 * step_of)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4, err_msg=divergence)
        assert losses.divergence_score(jnp.zeros(1), divergence=divergence, alpha=number)[0] == 0.0
    for limit, same_as in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        found = losses.divergence_score(jnp.asarray(ratio), divergence="alpha_divergence", alpha=limit)
        np.testing.assert_allclose(found, losses.divergence_score(jnp.asarray(ratio), divergence=same_as), rtol=1e-12)


def test_divergences_at_extremes():
    for divergence, alpha in (("forward_kl", None), ("js_divergence", None), ("alpha_divergence", 0.3)):
        score = lambda ratio, d=divergence, a=alpha: losses.divergence_score(ratio, divergence=d, alpha=a)  # noqa: E731
        value, gradient = jax.value_and_grad(lambda ratio, f=score: f(ratio).sum())(jnp.array([3e3, -3e3], jnp.float32))
        assert np.isfinite(value) and np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="no such divergence"):
        losses.divergence_score(jnp.zeros(1), divergence="alpha_divergence")


def test_log_odds(float64):
    mean = jnp.array([-20.0, -3.0, -0.5, -1e-4])
    np.testing.assert_allclose(losses.log_odds(mean), np.log(np.exp(mean) / (1 - np.exp(mean))), rtol=1e-10)
    value, gradient = jax.value_and_grad(lambda a: losses.log_odds(a).sum())(jnp.array([0.0, -4000.0], jnp.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_robust_is_unbiased(float64):
    """Its mean over labels of which a share ε is flipped is the DPO loss of the true label."""
    margin, numbers = jnp.asarray(drawn("robust")[0]), {"beta": 0.1, "label_smoothing": 0.2}
    mean = 0.8 * losses.robust(margin, **numbers) + 0.2 * losses.robust(-margin, **numbers)
    np.testing.assert_allclose(mean, losses.dpo(margin, beta=0.1), rtol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("refined", "plain"), [(losses.sr_dpo, losses.dpo), (losses.sr_ipo, losses.ipo)])
def test_lam_zero_is_the_plain_loss_bit_for_bit(refined, plain, compiled):
    rng = np.random.default_rng(3)
    margin = jnp.asarray(np.concatenate([rng.normal(0, 40, 999), [0.0, -0.0, 4000, -4000]]), jnp.float32)
    augmented = jnp.asarray(rng.normal(0, 40, margin.size), jnp.float32)
    wrap = jax.jit if compiled else lambda function: function
    with_zero = wrap(lambda m, a: refined(m, a, beta=0.1, lam=0.0))(margin, augmented)
    without = wrap(lambda m: plain(m, beta=0.1))(margin)
    assert np.asarray(with_zero).tobytes() == np.asarray(without).tobytes()
    gradient = wrap(jax.grad(lambda m, a: refined(m, a, beta=0.1, lam=0.0).sum()))(margin, augmented)
    plain_gradient = wrap(jax.grad(lambda m: plain(m, beta=0.1).sum()))(margin)
    assert np.asarray(gradient).tobytes() == np.asarray(plain_gradient).tobytes()


@pytest.mark.parametrize("loss", [losses.sr_dpo, losses.sr_ipo])
def test_no_gradient_through_the_refinement(float64, loss):
    """The loss does depend on m̂, as finite differences show, and jax.grad still gives exactly 0 for it."""

    def total(margin: jax.Array, augmented: jax.Array) -> jax.Array:
        return loss(margin, augmented, beta=0.1, lam=0.3).sum()

    given, step = (jnp.asarray(MARGIN), jnp.asarray(AUGMENTED)), 1e-5
    by_margin, by_augmented = jax.grad(total, argnums=(0, 1))(*given)
    assert np.array_equal(by_augmented, [0.0, 0.0])
    for pair in range(2):
        nudge = step * jnp.eye(2)[pair]
        difference = (total(given[0], given[1] + nudge) - total(given[0], given[1] - nudge)) / (2 * step)
        assert abs(difference) > 1e-3
        difference = (total(given[0] + nudge, given[1]) - total(given[0] - nudge, given[1])) / (2 * step)
        np.testing.assert_allclose(by_margin[pair], difference, rtol=1e-7)


def test_gradient_of_the_log_probabilities(float64):
    """Pair A: ∂loss/∂log π(y⁺) = −β·σ(−β·m) = −0.0482507, the opposite for y⁻; Sr-DPO: β·m − λΔ for β·m."""

    def loss(chosen: jax.Array, rejected: jax.Array, lam: float) -> jax.Array:
        margin = (chosen - REFERENCE_CHOSEN) - (rejected - REFERENCE_REJECTED)
        return losses.sr_dpo(margin, jnp.asarray(AUGMENTED), beta=0.1, lam=lam).sum()

    by_chosen, by_rejected = jax.grad(loss, argnums=(0, 1))(jnp.asarray(CHOSEN), jnp.asarray(REJECTED), 0.0)
    np.testing.assert_allclose([by_chosen[0], by_rejected[0]], [-0.0482507, 0.0482507], atol=5e-8)
    by_chosen, by_rejected = jax.grad(loss, argnums=(0, 1))(jnp.asarray(CHOSEN), jnp.asarray(REJECTED), 0.5)
    weight = 0.1 / (1 + np.exp(0.1 * MARGIN - 0.5 * 0.1 * AUGMENTED))
    np.testing.assert_allclose(by_chosen, -weight, rtol=1e-12)
    np.testing.assert_allclose(by_rejected, weight, rtol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_at_extreme_margins(sign):
    margin = sign * jnp.array([4000.0, 4000.0], jnp.float32)
    opposite = -margin
    expected = 0.0 if sign > 0 else 400.0
    np.testing.assert_allclose(losses.dpo(margin, beta=0.1), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.sr_dpo(margin, opposite, beta=0.1, lam=1.0), 2 * expected, rtol=1e-6)
    np.testing.assert_allclose(losses.ipo(margin, beta=0.1), (sign * 4000 - 5) ** 2, rtol=1e-6)
    for loss in (
        lambda m: losses.dpo(m, beta=0.1),
        lambda m: losses.dpo(m, beta=0.1, label_smoothing=0.1),
        lambda m: losses.sr_dpo(m, opposite, beta=0.1, lam=1.0),
        lambda m: losses.sr_ipo(m, opposite, beta=0.1, lam=1.0),
    ):
        value, gradient = jax.value_and_grad(lambda m, loss=loss: loss(m).sum())(margin)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_where_policy_equals_reference(beta):
    zero = jnp.zeros(3, jnp.float32)
    for loss in (
        losses.dpo(zero, beta=beta),
        losses.dpo(zero, beta=beta, label_smoothing=0.2),
        losses.sr_dpo(zero, zero, beta=beta, lam=0.7),
    ):
        np.testing.assert_allclose(loss, np.log(2), rtol=1e-7)
    for loss in (losses.ipo(zero, beta=beta), losses.sr_ipo(zero, zero, beta=beta, lam=0.7)):
        np.testing.assert_allclose(loss, 1 / (4 * beta**2), rtol=1e-6)


def test_swapping_the_responses_and_smoothing(float64):
    margin = jnp.asarray(MARGIN)
    both = losses.dpo(margin, beta=0.1), losses.dpo(-margin, beta=0.1)
    smoothed = losses.dpo(margin, beta=0.1, label_smoothing=0.3)
    np.testing.assert_allclose(smoothed, 0.7 * both[0] + 0.3 * both[1], rtol=1e-14)
    np.testing.assert_allclose(both[1] - both[0], 0.1 * MARGIN, rtol=1e-12)


def test_one_float32_loss_per_pair_and_sft():
    margin = jnp.asarray(MARGIN, jnp.float32)
    for loss in (
        losses.dpo(margin, beta=0.1),
        losses.ipo(margin, beta=0.1),
        losses.sr_dpo(margin, margin, beta=0.1, lam=0.5),
        losses.sr_ipo(margin, margin, beta=0.1, lam=0.5),
    ):
        assert loss.shape == (2,) and loss.dtype == jnp.float32
    assert losses.sft(jnp.array([-3.0, -5.0])).tolist() == [3.0, 5.0]
