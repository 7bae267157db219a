"""Optimizers against a second writing of PyTorch's in NumPy, and against PyTorch itself; schedules against numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sr_dpo_jax.train.optim import OPTIMIZERS, make_schedule

PEAK, UPDATES = 5e-2, 5
NAMES = ("embedding", "scale", "query_bias")
"""Parameters as the decoder names them: one matrix, a norm's scale and a bias."""


def constant_schedule():
    return make_schedule(name="constant", learning_rate=PEAK, warmup_steps=2, total_steps=10)


def rates() -> list[float]:
    return [PEAK / 3, 2 * PEAK / 3, PEAK, PEAK, PEAK]


def optimizer(
    name: str, *, max_grad_norm: float = 1e9, weight_decay: float = 0.0, first_moment_dtype: str | None = None
) -> optax.GradientTransformation:
    numbers = {"weight_decay": weight_decay, "b1": 0.8, "b2": 0.95, "first_moment_dtype": first_moment_dtype}
    return OPTIMIZERS[name](constant_schedule(), max_grad_norm=max_grad_norm, **(numbers if name == "adamw" else {}))


def start_and_gradients() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Gradients from 1e-9 to 10: at the small end epsilon decides, and where it stands."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (4, 6), "scale": (2, 6), "query_bias": (2, 3, 2)}

    def gradient(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=shape) * 10.0 ** rng.uniform(-9, 1, shape)

    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return start, [{name: gradient(shape) for name, shape in shapes.items()} for _ in range(UPDATES)]


def run(transformation: optax.GradientTransformation, start, gradients) -> dict[str, np.ndarray]:
    params = {name: jnp.asarray(value) for name, value in start.items()}
    state, update = transformation.init(params), jax.jit(transformation.update)
    for gradient in gradients:
        updates, state = update({name: jnp.asarray(value) for name, value in gradient.items()}, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(value) for name, value in params.items()}


def numpy_rmsprop(start, gradients) -> dict[str, np.ndarray]:
    params = {name: value.copy() for name, value in start.items()}
    square = {name: np.zeros_like(value) for name, value in start.items()}
    for rate, gradient in zip(rates(), gradients, strict=True):
        for name, g in gradient.items():
            square[name] = 0.99 * square[name] + 0.01 * g * g
            params[name] -= rate * g / (np.sqrt(square[name]) + 1e-8)
    return params


def numpy_adamw(start, gradients, *, decay: float, decayed: set[str]) -> dict[str, np.ndarray]:
    params = {name: value.copy() for name, value in start.items()}
    first = {name: np.zeros_like(value) for name, value in start.items()}
    second = {name: np.zeros_like(value) for name, value in start.items()}
    for count, (rate, gradient) in enumerate(zip(rates(), gradients, strict=True), 1):
        for name, g in gradient.items():
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            if name in decayed:
                params[name] *= 1 - rate * decay
            mean, spread = first[name] / (1 - 0.8**count), second[name] / (1 - 0.95**count)
            params[name] -= rate * mean / (np.sqrt(spread) + 1e-8)
    return params


def assert_same_moves(ours, expected, start) -> None:
    """The moves agree, not only the parameters; the schedule is float32, hence 1e-6."""
    for name in start:
        moves = ours[name] - start[name], expected[name] - start[name]
        np.testing.assert_allclose(*moves, rtol=1e-6, atol=2e-8, err_msg=name)


def test_rmsprop_is_that_of_torch_in_numpy(float64):
    start, gradients = start_and_gradients()
    assert_same_moves(run(optimizer("rmsprop"), start, gradients), numpy_rmsprop(start, gradients), start)


def test_the_first_rmsprop_step_by_hand(float64):
    """v = 0.01·g², so the step is lr·g/(0.1·|g| + 1e-8): 10·lr for a large gradient, far less for g = 1e-8."""
    for gradient, expected in ((2.0, 10.0), (-2.0, -10.0), (1e-8, 1e-8 / 1.1e-8)):
        given = {"embedding": np.array([gradient])}
        moved = run(optimizer("rmsprop"), {"embedding": np.zeros(1)}, [given])["embedding"][0]
        np.testing.assert_allclose(moved, -expected * PEAK / 3, rtol=1e-6)


def test_adamw_decays_matrices_only(float64):
    start, gradients = start_and_gradients()
    ours = run(optimizer("adamw", weight_decay=0.3), start, gradients)
    assert_same_moves(ours, numpy_adamw(start, gradients, decay=0.3, decayed={"embedding"}), start)


@pytest.mark.parametrize("family", list(tiny.ARCHITECTURES))
def test_what_decays_in_a_real_model(family):
    """With gradients of zero, only decay moves anything: every matrix and no norm or bias, stacked or not."""
    model = tiny.build(tiny.ARCHITECTURES[family], tiny.make_mesh())
    params = model.params()
    transformation = optimizer("adamw", weight_decay=0.5)
    zeros = jax.tree.map(np.zeros_like, params)
    moves = jax.jit(lambda p: transformation.update(zeros, transformation.init(p), p)[0])(params)
    paths = jax.tree.leaves_with_path(jax.device_get(moves))
    moved = {jax.tree_util.keystr(path, simple=True, separator=".") for path, move in paths if move.any()}
    attention = {f"layers.attention.{name}" for name in ("query", "key", "value", "output")}
    matrices = {"embedding", "layers.mlp.up", "layers.mlp.down", *attention}
    assert moved == matrices | ({"unembedding"} if family == "gpt_neox" else {"layers.mlp.gate"})


@pytest.mark.parametrize(("norm", "factor"), [(5.0, 1.0), (10.0, 1.0), (40.0, 0.25)])
def test_clipping_by_the_global_norm(float64, norm, factor):
    """The norm is over all parameters together. Two updates, as RMSprop's first step does not see the scale."""
    start = {"embedding": np.zeros((2, 2)), "scale": np.zeros(3)}
    first = {"embedding": np.full((2, 2), 0.3 * norm), "scale": np.array([0.8 * norm, 0.0, 0.0])}
    np.testing.assert_allclose(np.sqrt(sum((g**2).sum() for g in first.values())), norm)
    second = {name: np.full_like(value, 1.5) for name, value in start.items()}
    clipped = run(optimizer("rmsprop", max_grad_norm=10.0), start, [first, second])
    scaled = {name: factor * value for name, value in first.items()}
    expected = run(optimizer("rmsprop"), start, [scaled, second])
    for name in start:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-6)


def test_warm_up_of_the_paper():
    """Warm-up 150, peak 5e-7: updates 1, 150 and 151, counted from 1, and flat from there on."""
    schedule = make_schedule(name="constant", learning_rate=5e-7, warmup_steps=150, total_steps=2500)
    values = [float(schedule(update - 1)) for update in (1, 150, 151, 152, 2500, 10_000)]
    expected = [3.3112583e-9, 4.9668874e-7, 5e-7, 5e-7, 5e-7, 5e-7]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.2, 0.4, 0.8, 1.0, 0.75, 0.5, 0.0, 0.0]),
        ("cosine", [0.2, 0.4, 0.8, 1.0, (1 + 0.5**0.5) / 2, 0.5, 0.0, 0.0]),
    ],
)
def test_schedules_by_hand(name, expected):
    """Warm-up of 4 updates, 12 in all: update numbers from 0 at the start, the peak, a quarter, half and the end."""
    schedule = make_schedule(name=name, learning_rate=3.0, warmup_steps=4, total_steps=12)
    values = [float(schedule(step)) for step in (0, 1, 3, 4, 6, 8, 12, 20)]
    np.testing.assert_allclose(values, 3.0 * np.array(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_no_warm_up_and_a_warm_up_longer_than_the_run(name):
    schedule = make_schedule(name=name, learning_rate=1.0, warmup_steps=0, total_steps=4)
    assert float(schedule(0)) == 1.0
    schedule = make_schedule(name=name, learning_rate=1.0, warmup_steps=9, total_steps=4)
    np.testing.assert_allclose([float(schedule(step)) for step in range(4)], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def run_torch(make, start, gradients) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    theirs = make(torch, params)
    for rate, gradient in zip(rates(), gradients, strict=True):
        for group in theirs.param_groups:
            group["lr"] = rate
        for name, value in gradient.items():
            params[name].grad = torch.tensor(value)
        theirs.step()
    return {name: value.detach().numpy() for name, value in params.items()}


@pytest.mark.parity
def test_rmsprop_against_torch(float64):
    start, gradients = start_and_gradients()
    expected = run_torch(lambda torch, params: torch.optim.RMSprop(params.values(), lr=PEAK), start, gradients)
    assert_same_moves(run(optimizer("rmsprop"), start, gradients), expected, start)


@pytest.mark.parity
def test_adamw_against_torch(float64):
    start, gradients = start_and_gradients()

    def make(torch, params):
        groups = [
            {"params": [params["embedding"]], "weight_decay": 0.3},
            {"params": [params["scale"], params["query_bias"]], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=PEAK, betas=(0.8, 0.95), eps=1e-8)

    ours = run(optimizer("adamw", weight_decay=0.3), start, gradients)
    assert_same_moves(ours, run_torch(make, start, gradients), start)


def test_a_first_moment_in_bfloat16():
    """Half its memory, the second moment as it was, and updates within bfloat16's rounding of the full ones."""
    start, gradients = start_and_gradients()
    gradients = [{name: np.abs(value) for name, value in gradient.items()} for gradient in gradients]
    state = optimizer("adamw", first_moment_dtype="bfloat16").init({k: jnp.asarray(v) for k, v in start.items()})
    adam = next(
        part for part in jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "mu")) if hasattr(part, "mu")
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    narrow = run(optimizer("adamw", first_moment_dtype="bfloat16"), start, gradients)
    full = run(optimizer("adamw"), start, gradients)
    for name in NAMES:
        moved = np.abs(full[name] - start[name]).max()
        assert 0 < np.abs(narrow[name] - full[name]).max() < 2**-6 * moved
