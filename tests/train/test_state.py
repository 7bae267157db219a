"""The state of training: shapes, shardings, what a checkpoint holds of it, and how it begins."""

import jax
import numpy as np
import optax
import tiny

from sr_dpo_jax.train.state import TrainState, abstract_state, first_state

OPTIMIZER = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda _: 1.0))


def test_a_state_is_born_on_the_mesh_and_comes_back_from_its_tree():
    mesh = tiny.make_mesh(fsdp=4, tensor=2)
    model = tiny.build(tiny.LLAMA, mesh)
    abstract, params = abstract_state(model.shapes, OPTIMIZER, mesh), model.params()
    state = first_state(abstract, params, OPTIMIZER)
    assert int(state.step) == 0 and state.params is params
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    up, moment = state.params["layers"]["mlp"]["up"], state.optimizer_state[0].mu["layers"]["mlp"]["up"]
    assert moment.sharding.is_equivalent_to(up.sharding, up.ndim) and not np.asarray(moment).any()
    assert moment.addressable_shards[0].data.size == up.size // 8
    assert sorted(state.tree()) == ["optimizer_state", "params", "step"]
    again = TrainState(**state.tree())
    assert jax.tree.structure(again) == jax.tree.structure(state) and again.params is params
