"""The mesh changes where numbers live and not what they are: every test here runs on eight CPU devices."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec

from sr_dpo_jax.batch import Batch
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.optim import OPTIMIZERS
from sr_dpo_jax.train.train_step import make_score_step, make_train_step

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
    """Of the log-probabilities that some other model might give."""
    return np.random.default_rng(8).normal(-12, 4, (PAIRS, 2, 2)).astype(np.float32)


def compile_step(model: tiny.Model, optimizer: Any = OPTIMIZER) -> Any:
    return make_train_step(
        model.graph,
        optimizer,
        lambda step: jnp.asarray(step, jnp.float32),
        OBJECTIVE,
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
    step = compile_step(model).lower(state, None, batch).compile()
    metrics = []
    for _ in range(2):
        state, of_step = step(state, None, batch)
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


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("family", list(tiny.ARCHITECTURES))
def test_every_parameter_has_a_sharding(family, shape):
    mesh = meshes.make_mesh(**dict(zip(("replica", "fsdp", "tensor"), shape, strict=True)))
    assert mesh.devices.shape == shape
    model = tiny.build(tiny.ARCHITECTURES[family], mesh)
    shardings = jax.tree.leaves_with_path(model.shardings)
    shapes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(model.shapes)}
    assert len(shardings) == len(shapes) == {"gpt_neox": 20, "llama": 11, "gemma": 15}[family]
    for path, sharding in shardings:
        local = sharding.shard_shape(shapes[path])
        if path[-1].key in ("embedding", "unembedding", "query", "key", "value", "output", "gate", "up", "down"):
            assert np.prod(local) * shape[1] * shape[2] == np.prod(shapes[path])
    query = model.shardings["layers"]["attention"]["query"].spec
    assert query == PartitionSpec(None, ("fsdp",), ("tensor",), None)


@pytest.mark.parametrize(
    ("name", "extra"),
    [("rmsprop", {}), ("adamw", {"weight_decay": 0.1, "b1": 0.9, "b2": 0.999, "first_moment_dtype": None})],
)
def test_moments_lie_where_their_parameters_lie(name, extra):
    model = tiny.build(tiny.NEOX, tiny.make_mesh(1, 4, 2))
    optimizer = OPTIMIZERS[name](lambda step: 0.1, max_grad_norm=1.0, **extra)
    state = model.state(optimizer)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim]
    params = jax.tree.leaves(state.params)
    assert len(moments) == len(params) * (1 if name == "rmsprop" else 2)
    for moment, param in zip(moments, params * 2, strict=False):
        assert moment.shape == param.shape and moment.sharding.is_equivalent_to(param.sharding, param.ndim)


def test_initialisation_does_not_depend_on_the_mesh():
    drawn = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = tiny.make_mesh(*shape)
        model = tiny.build(tiny.LLAMA, mesh)
        drawn.append(
            meshes.initialise(mesh, lambda model=model: nnx.to_pure_dict(nnx.state(model.make())), model.shardings)
        )
    assert drawn[1]["embedding"].sharding.num_devices == 8
    for one, eight in zip(*map(jax.tree.leaves, drawn), strict=True):
        np.testing.assert_array_equal(one, eight)


def test_unknown_axes_and_sizes_that_do_not_divide():
    mesh = tiny.make_mesh(1, 4, 2)
    with pytest.raises(UsageError, match=r"layers\.novel: logical axis 'wing' is not in the sharding table"):
        meshes.sharding(mesh, ("layers", "wing"), (2, 8), "layers.novel")
    with pytest.raises(UsageError, match=r"layers\.query: axis 'embed' of size 6 does not divide over fsdp = 4"):
        meshes.sharding(mesh, ("embed", None), (6, 8), "layers.query")
    with pytest.raises(ValueError, match="2 logical axes"):
        meshes.sharding(mesh, ("embed", None), (8,), "x")


@pytest.mark.parametrize(
    ("shape", "changed", "words"),
    [
        ((1, 8, 1), {"hidden": 36}, ["['embedding']", "'table'", "size 36", "fsdp × tensor = 8", "mesh.fsdp"]),
        ((1, 1, 8), {"mlp": 40}, ["['layers']['attention']['key']", "'kv_heads'", "size 2", "tensor = 8"]),
    ],
)
def test_a_model_that_does_not_divide_names_the_parameter(shape, changed, words):
    with pytest.raises(UsageError) as error:
        tiny.build(dataclasses.replace(tiny.LLAMA, **changed), tiny.make_mesh(*shape))
    for word in words:
        assert word in str(error.value)


def test_mesh_sizes():
    assert meshes.make_mesh(replica=1, fsdp=-1, tensor=2).shape == {"replica": 1, "fsdp": 4, "tensor": 2}
    assert meshes.row_shards(meshes.make_mesh(replica=2, fsdp=-1, tensor=2)) == 4
    for sizes in ({"fsdp": 3}, {"fsdp": 4}, {"fsdp": -1, "tensor": 3}, {"fsdp": 16}):
        with pytest.raises(UsageError, match="does not make up 8 devices"):
            meshes.make_mesh(**({"replica": 1, "fsdp": 1, "tensor": 1} | sizes))


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as laying out a mesh asks for; 4 × 2 chips a slice, 8 a host."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def process_index(self) -> int:
        return self.slice_index


def test_only_replicas_span_slices():
    chips = [Chip(8 * n + 2 * x + y, n, (x, y, 0)) for n in range(2) for x in range(4) for y in range(2)]
    mesh = meshes.make_mesh(replica=2, fsdp=-1, tensor=2, devices=chips)
    assert mesh.shape == {"replica": 2, "fsdp": 4, "tensor": 2}
    for number, replica in enumerate(mesh.devices):
        assert {chip.slice_index for chip in replica.flat} == {number}
    four = meshes.make_mesh(replica=4, fsdp=4, tensor=1, devices=chips)
    assert [[chip.slice_index for chip in replica.flat] for replica in four.devices] == [[0] * 4] * 2 + [[1] * 4] * 2
    with pytest.raises(UsageError, match=r"mesh\.replica=1: the devices form 2 slices.*multiple of 2"):
        meshes.make_mesh(replica=1, fsdp=16, tensor=1, devices=chips)


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("gpt_neox", "fsdp 8"),
        ("llama", "fsdp 4 x tensor 2"),
        pytest.param("llama", "2 x 2 x 2", marks=pytest.mark.slow),  # the next test has this mesh too
    ],
)
def test_eight_devices_train_as_one(family, mesh):
    one, eight = two_steps(family, (1, 1, 1)), two_steps(family, MESHES[mesh])
    assert one[0][0]["loss"] != one[0][1]["loss"]
    assert_same_training(eight, one)
    assert "all-reduce" in eight[2] and "all-reduce" not in one[2]
    assert "all-to-all" not in eight[2]


def test_eight_devices_train_as_one_with_two_kinds_of_layers(float64):
    """In float64: with a norm on both sides of every matmul, float32 rounding alone grows to 5e-5 of the gradient."""
    one = two_steps("gemma", (1, 1, 1), dtype="float64")
    eight = two_steps("gemma", MESHES["2 x 2 x 2"], dtype="float64")
    assert_same_training(eight, one, 1e-10)
    assert "all-to-all" not in eight[2]


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_changes_nothing(micro_batches):
    assert_same_training(two_steps("llama", (1, 1, 1), micro_batches), two_steps("llama", (1, 1, 1)))


def test_metrics_by_hand():
    """Those of the first step, from the scores of the score step and a mean over pairs in NumPy."""
    model = tiny.build(tiny.LLAMA, tiny.make_mesh())
    scores = make_score_step(model.graph, pairs=PAIRS, mesh=model.mesh)(model.params(), make_batch())
    reference, (metrics, *_) = reference_scores().astype(np.float64), two_steps("llama", (1, 1, 1))[0]
    pairs, _, _ = pairs_and_rows()
    assert scores.tokens.tolist() == [[len(chosen), len(rejected)] for _, chosen, rejected in pairs]
    plain, augmented = np.asarray(scores.plain, np.float64), np.asarray(scores.augmented, np.float64)
    ratio, augmented_ratio = plain - reference[..., 0], augmented - reference[..., 1]
    margin, judged = ratio[:, 0] - ratio[:, 1], augmented_ratio[:, 0] - augmented_ratio[:, 1]
    expected = {
        "loss": np.logaddexp(0, -0.1 * margin + 0.3 * 0.1 * judged),
        "rewards/chosen": 0.1 * ratio[:, 0],
        "rewards/rejected": 0.1 * ratio[:, 1],
        "rewards/margins": 0.1 * margin,
        "rewards/accuracies": margin > 0,
        "logps/chosen": plain[:, 0],
        "logps/rejected": plain[:, 1],
        "margin": margin,
        "augmented/margin": judged,
        "augmented/accuracies": judged > 0,
        "refinement": 0.1 * judged,
    }
    assert metrics.keys() == expected.keys() | {"grad_norm", "learning_rate", "skipped"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value.mean(), rtol=2e-5, err_msg=name)


def test_online_and_cached_reference_and_one_compilation():
    """The reference is another model: its scores cached or made in the step are the same, and it never changes."""
    mesh = tiny.make_mesh(1, 4, 2)
    model = tiny.build(tiny.LLAMA, mesh)
    reference = model.params(seed=9)
    before = jax.device_get(reference)
    batch = tiny.place(make_batch(), mesh)
    scores = jax.device_get(make_score_step(model.graph, pairs=PAIRS, mesh=mesh)(reference, batch))
    cached_batch = tiny.place(make_batch(reference=np.stack([scores.plain, scores.augmented], axis=-1)), mesh)
    online_step, cached_step = compile_step(model), compile_step(model)
    online, cached = model.state(OPTIMIZER), model.state(OPTIMIZER)
    for _ in range(3):
        online, online_metrics = online_step(online, reference, batch)
        cached, cached_metrics = cached_step(cached, None, cached_batch)
        for name, value in cached_metrics.items():
            np.testing.assert_allclose(online_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert online_step._cache_size() == cached_step._cache_size() == 1
    assert int(online.step) == 3
    for mine, theirs in zip(jax.tree.leaves(online.params), jax.tree.leaves(cached.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(jax.device_get(reference)), jax.tree.leaves(before), strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_a_vocabulary_that_no_axis_divides(float64):
    """29 tokens, five more than the tokenizer has: the same scores on every mesh, and the five share in the softmax."""
    architecture = dataclasses.replace(tiny.LLAMA, vocabulary_tokens=29)
    scored = {}
    for name, shape in {"one": (1, 1, 1), **MESHES}.items():
        mesh = tiny.make_mesh(*shape)
        model = tiny.build(architecture, mesh, dtype="float64")
        step = make_score_step(model.graph, pairs=PAIRS, mesh=mesh)
        scored[name] = jax.device_get(step(model.params(), tiny.place(make_batch(), mesh)).plain)
    for name, plain in scored.items():
        np.testing.assert_allclose(plain, scored["one"], rtol=1e-10, err_msg=name)
    alone = jax.device_get(model.params())  # on the last mesh; without the five rows the rest has more probability
    small = tiny.build(tiny.LLAMA, tiny.make_mesh(), dtype="float64")
    cut = jax.device_put({**alone, "embedding": alone["embedding"][: tiny.VOCABULARY]}, small.shardings)
    less = make_score_step(small.graph, pairs=PAIRS, mesh=small.mesh)(cut, make_batch()).plain
    assert (np.asarray(less) > scored["one"]).all()
