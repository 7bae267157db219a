"""Sample responses of held-out prompts: whose, in which order, and the same for the same parameters."""

import pytest
from runs import model_directory, preference_file, tiny_setup

from sr_dpo_jax.train.setup import read_held_out

pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model, data = model_directory(root / "model"), preference_file(root / "train.jsonl", 16, seed=1)
    sets = {"two": {"path": str(preference_file(root / "two.jsonl", 2, seed=2))}}
    options = {
        "data": {"eval_path": str(data), "eval_sets": sets},
        "train": {"samples": 3},
        "generation": {"max_new_tokens": 6, "temperature": 0.9},
    }
    setup, _, tokenizer = tiny_setup(root, model, data, **options)
    held_out = read_held_out(setup.config, tokenizer, setup.model.architecture)
    params = setup.model.base_params()
    return setup, held_out, tokenizer, params


def test_the_first_prompts_of_every_set_in_order(made):
    setup, held_out, tokenizer, params = made
    steps = []
    lines = setup.samples(held_out, tokenizer, params).responses(params, lambda: steps.append(1))
    places = [("eval", "0"), ("eval", "1"), ("eval", "2"), ("eval/two", "0"), ("eval/two", "1")]
    assert [(line["set"], line["id"]) for line in lines] == places
    for line in lines:
        pairs = held_out[line["set"]]
        assert line["prompt"] == tokenizer.decode(pairs.pair(int(line["id"]))[0])
        assert line["finish_reason"] in ("end", "length") and line.keys() == {
            "set", "id", "prompt", "response", "finish_reason"
        }  # fmt: skip
    assert len(steps) == 5


def test_the_same_parameters_respond_the_same(made):
    setup, held_out, tokenizer, params = made
    one, other = (setup.samples(held_out, tokenizer, params).responses(params, lambda: None) for _ in range(2))
    assert one == other and len({line["response"] for line in one}) > 1


def test_without_samples_there_is_no_sampler(made, tmp_path):
    setup, held_out, tokenizer, params = made
    none = tiny_setup(tmp_path, setup.model.directory.path, setup.config.data.path[0].path)[0]
    assert none.samples(held_out, tokenizer, params) is None
