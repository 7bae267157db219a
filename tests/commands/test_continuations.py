"""Continuations scored in packed rows: each as if it ran alone, one compiled shape for all lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import model_directory

from sr_dpo_jax.commands.lm_eval.continuations import ContinuationScorer, Request
from sr_dpo_jax.config.load import config_for_model
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.generation.cache import Cache, advance, cache_shape
from sr_dpo_jax.train.setup import read_model, set_up


@pytest.fixture(scope="module", params=["gpt_neox", "gemma2"])
def setup(request, tmp_path_factory):
    windows = {"sliding_window": 20, "num_key_value_heads": 2, "head_dim": 12} if request.param == "gemma2" else {}
    directory = model_directory(tmp_path_factory.mktemp("continuations") / "model", request.param, **windows)
    overrides = ["model.init=random", "model.dtype=float32", "batch.row_length=128", "batch.row_multiple=8"]
    overrides += ["batch.pairs_per_step=16", "mesh.fsdp=4", "mesh.tensor=2"]
    config = config_for_model(str(directory), overrides)
    return set_up(config, read_model(config)[0])


@pytest.fixture(scope="module")
def params(setup):
    """Far from uniform predictions, so that the likeliest token is clear."""
    return jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 5 * leaf, setup.model.base_params())


def requests(rng, count):
    lengths = rng.integers(1, 40, (count, 2))
    return [Request(*(rng.integers(2, 320, length).tolist() for length in pair)) for pair in lengths]


def logprobs_alone(setup, params, wanted):
    """log softmax `[4, 80, V]` of four sequences, one in each row, by the road that generation takes."""
    tokens = np.zeros((4, 80), np.int32)
    for row, request in zip(tokens, wanted, strict=True):
        ids = request.context + request.continuation
        row[: len(ids)] = ids

    def forward(params, tokens):
        decoder = nnx.merge(setup.model.graph, params)
        shape = cache_shape(decoder.architecture, slots=4, positions=80)
        cache = Cache(jnp.zeros(shape), jnp.zeros(shape))
        hidden, _ = advance(decoder, cache, tokens, jnp.zeros(4, jnp.int32))
        return hidden, decoder.vocabulary_matrix

    hidden, matrix = (np.asarray(array, np.float64) for array in jax.jit(forward)(params, tokens))
    logits, cap = hidden @ matrix.T, setup.model.architecture.logit_cap
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_each_as_if_it_ran_alone(setup, params):
    """And a continuation of the likeliest tokens is greedy, one that differs from it in a single token is not."""
    rng = np.random.default_rng(0)
    asked = requests(rng, 30)
    chosen = [asked[number] for number in (0, 7, 13, 29)]
    for place in range(2):  # makes the first tokens of each continuation greedy
        likeliest = logprobs_alone(setup, params, chosen).argmax(axis=-1)
        for number, request in enumerate(chosen):
            request.continuation[place:] = [int(likeliest[number, len(request.context) - 1 + place])]
    shorter = [Request(request.context, request.continuation[:1]) for request in chosen]
    changed = [Request(request.context, [request.continuation[0], 2]) for request in chosen]
    every = [*asked, *shorter, *changed]
    logprobs, greedy = ContinuationScorer(setup.model, setup.packing, params).scores(every, title="test")
    assert greedy.sum() >= 8
    for of_four in (chosen, shorter, changed):
        expected = logprobs_alone(setup, params, of_four)
        for request, of_request in zip(of_four, expected, strict=True):
            start, ids = len(request.context) - 1, request.continuation
            of_tokens = of_request[start : start + len(ids)]
            number = every.index(request)
            assert logprobs[number] == pytest.approx(of_tokens[np.arange(len(ids)), ids].sum(), abs=1e-4)
            assert greedy[number] == (of_tokens.argmax(axis=-1) == ids).all()
    assert not greedy[[every.index(request) for request in changed]].any()


def test_nothing_is_compiled_after_the_first_shape(setup, params):
    rng = np.random.default_rng(2)
    scorer = ContinuationScorer(setup.model, setup.packing, params)
    scorer.scores([*requests(rng, 50), Request([5] * 40, [6] * 40)], title="test")
    for count in (1, 33, 70):
        logprobs, _ = scorer.scores(requests(rng, count), title="test")
        assert logprobs.shape == (count,) and (logprobs < 0).all()
    ((_, step),) = scorer._compiled
    assert step._cache_size() == 1
    scorer.scores([Request([5] * 150, [6])], title="test")  # longer than batch.row_length
    assert len(scorer._compiled) == 2
    assert scorer.scores([], title="test")[0].shape == (0,)


def test_sequences_beyond_a_rope_that_changes_with_length_are_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    directory = model_directory(tmp_path / "model", "llama", max_position_embeddings=32, rope_parameters=rope)
    config = config_for_model(str(directory), ["model.init=random"])
    setup = set_up(config, read_model(config)[0])
    with pytest.raises(UsageError, match="a request has 33 tokens; beyond 32"):
        ContinuationScorer(setup.model, setup.packing, None).scores([Request([1] * 30, [2] * 3)], title="test")
