"""Steps of tiny models on ten pairs in eight rows, with a reference that some other model might be."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from sr_dpo_jax.batch import Batch
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.train_step import make_train_step

PAIRS, ROWS = 10, 8
OBJECTIVE = Objective("sr_dpo", {"beta": 0.1, "lam": 0.3})
MESHES = {"fsdp 8": (1, 8, 1), "fsdp 4 x tensor 2": (1, 4, 2), "2 x 2 x 2": (2, 2, 2)}
OPTIMIZER = optax.sgd(lambda _: 0.05, momentum=0.9)
"""Its updates are proportional to gradients; RMSprop's would blow up the rounding of gradients that are zero."""


@cache
def pairs_and_rows() -> tuple[list[tiny.Pair], list[int], np.ndarray]:
    rng = np.random.default_rng(4)
    lengths = [tuple(rng.integers(1, 5, 3)) for _ in range(PAIRS)]
    row_of = [0, 1, 2, 3, 4, 5, 6, 0, 3, 3]  # row 7 is empty
    return tiny.random_pairs(rng, lengths), row_of, rng.integers(0, tiny.VOCABULARY, 4).astype(np.int32)


def make_batch(micro_batches: int = 1, reference: np.ndarray | None = None) -> Batch:
    pairs, row_of, p = pairs_and_rows()
    sizes = {"micro_batches": micro_batches, "rows": ROWS // micro_batches, "scored": 24}
    plain = tiny.pack(pairs, row_of, row_length=36, **sizes)
    augmented = tiny.pack(pairs, row_of, row_length=40, prefix=p, **sizes)
    scores = (None, None) if reference is None else (reference[..., 0], reference[..., 1])
    return Batch(plain, augmented, *scores)


@cache
def reference_scores() -> np.ndarray:
    """Gives the log-probs that some other model might give."""
    return np.random.default_rng(8).normal(-12, 4, (PAIRS, 2, 2)).astype(np.float32)


def compile_step(model: tiny.Model, optimizer: Any = OPTIMIZER, objective: Objective = OBJECTIVE) -> Any:
    return make_train_step(
        model.graph,
        optimizer,
        lambda step: jnp.asarray(step, jnp.float32),
        objective,
        pairs=PAIRS,
        mesh=model.mesh,
        abstract=model.abstract_state(optimizer),
    )


@cache
def two_steps(
    family: str, shape: tuple[int, int, int], micro_batches: int = 1, dtype: str = "float32"
) -> tuple[list[dict], Any, str]:
    """Metrics of two updates, the parameters after them, and the compiled program."""
    mesh = tiny.make_mesh(*shape)
    model = tiny.build(tiny.ARCHITECTURES[family], mesh, dtype=dtype)
    state, batch = model.state(OPTIMIZER), tiny.place(make_batch(micro_batches, reference_scores()), mesh)
    step = compile_step(model).lower(state, None, None, batch).compile()
    metrics = []
    for _ in range(2):
        state, of_step = step(state, None, None, batch)
        metrics.append(jax.device_get(of_step))
    return metrics, jax.device_get(state.params), step.as_text()


def assert_same_training(ours: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(ours[0], expected[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, rtol=tolerance, atol=1e-6, err_msg=name)
    for (path, leaf), mine in zip(jax.tree.leaves_with_path(expected[1]), jax.tree.leaves(ours[1]), strict=True):
        error = np.abs(mine - leaf).max() / np.abs(leaf).max()
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"
