"""The mesh changes where numbers live and not what they are: every test here runs on eight CPU devices."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec
from tiny_steps import MESHES, PAIRS, assert_same_training, make_batch, two_steps

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.train.optim import OPTIMIZERS
from sr_dpo_jax.train.train_step import make_score_step


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
