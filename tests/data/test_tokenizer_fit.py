"""A tokenizer that does not belong to the model is refused, with every reason at once."""

import json

import pytest
import toy_tokenizers as toy
from runs import make_config, model_directory, preference_file

from sr_dpo_jax.data.tokenizer_fit import misfits, require_fit
from sr_dpo_jax.data.tokens import load_tokenizer
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.setup import read_model, read_pairs_of

EOS, BOS = 0, 1
NEITHER = {"eos_token_id": None, "bos_token_id": None}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizers: 1 puts BOS before text, 0 does not."""
    return {bos: load_tokenizer(str(toy.byte_level_tokenizer(tmp_path_factory.mktemp("t"), bos=bos))) for bos in (0, 1)}


def problems(tmp_path, tokenizer, config, generation=None, vocabulary_tokens=384):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return misfits(tokenizer, tmp_path, vocabulary_tokens=vocabulary_tokens)


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": EOS, "bos_token_id": BOS}, None),
        ({"eos_token_id": [7, EOS]}, None),
        ({"eos_token_id": 7}, {"eos_token_id": [8, EOS]}),
        ({"eos_token_id": 7}, {"eos_token_id": EOS}),
        ({}, {"eos_token_id": EOS}),
        (NEITHER, None),
        ({}, {}),
    ],
)
def test_what_fits(tmp_path, tokenizers, config, generation):
    assert problems(tmp_path, tokenizers[True], config, generation) == []


@pytest.mark.parametrize(
    ("config", "generation", "named"),
    [
        ({"eos_token_id": 7}, None, "[7]"),
        ({"eos_token_id": [7, 9]}, None, "[7, 9]"),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 8]}, "[7, 8, 9]"),
        ({}, {"eos_token_id": 9}, "[9]"),
    ],
)
def test_another_eos(tmp_path, tokenizers, config, generation, named):
    (problem,) = problems(tmp_path, tokenizers[True], config, generation)
    assert f"EOS token '</s>' has id 0, but config.json and generation_config.json say eos_token_id={named}" in problem
    assert "correct eos_token in tokenizer_config.json" in problem


def test_another_bos_matters_only_where_it_is_used(tmp_path, tokenizers):
    (problem,) = problems(tmp_path, tokenizers[True], {"bos_token_id": 5})
    assert "BOS token '<s>', id 1, but config.json says bos_token_id=5" in problem
    assert problems(tmp_path, tokenizers[False], {"bos_token_id": 5}) == []


def test_ids_beyond_the_embedding(tmp_path, tokenizers):
    tokenizer = tokenizers[False]
    largest = max(tokenizer.get_vocab().values())
    assert problems(tmp_path, tokenizer, NEITHER, vocabulary_tokens=largest + 1) == []
    (problem,) = problems(tmp_path, tokenizer, NEITHER, vocabulary_tokens=largest)
    assert f"token id {largest}, but config.json says vocab_size={largest}" in problem


def test_all_at_once(tmp_path, tokenizers):
    assert len(problems(tmp_path, tokenizers[True], {"eos_token_id": 7, "bos_token_id": 5}, vocabulary_tokens=9)) == 3
    with pytest.raises(UsageError) as error:
        require_fit(tokenizers[True], tmp_path, vocabulary_tokens=9)
    for word in ("the tokenizer does not fit the model", "vocab_size=9", "eos_token_id=[7]", "bos_token_id=5"):
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_generation_config(tmp_path, tokenizers, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"generation_config\.json: .*restore the file"):
        problems(tmp_path, tokenizers[False], {})


def test_a_run_refuses_before_it_reads_data(tmp_path):
    model = model_directory(tmp_path / "model", "llama", eos_token_id=9)
    config = make_config(tmp_path, model, preference_file(tmp_path / "data.jsonl", 1))
    with pytest.raises(UsageError, match=r"the tokenizer does not fit the model:\n  its EOS token"):
        read_model(config)


def with_image_token(directory):
    """A tokenizer as Gemma 3's, whose last added token has no row in the embedding of the text-only models."""
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(directory)
    return tokenizer.convert_tokens_to_ids("<image>")


def test_an_added_token_beyond_the_embedding_is_refused_where_it_is_used(tmp_path):
    model = model_directory(tmp_path / "model", "gemma3_text", vocabulary_tokens=320, head_dim=8)
    beyond = with_image_token(model)
    assert beyond == 320
    data = preference_file(tmp_path / "pairs.jsonl", 8)
    config = make_config(tmp_path, model, data)
    directory, tokenizer = read_model(config)

    def read(p):
        return read_pairs_of(config, config.data.path, "train", tokenizer, directory.architecture, instruction=p)

    assert len(read("Be good: ")) == 8
    with pytest.raises(UsageError, match=r"refinement.prompt holds the added token of id 320"):
        read("Be <image>: ")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[5] |= {"rejected": rows[5]["rejected"] + "<image>"}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=r"pairs\.jsonl:6: holds the added token of id 320"):
        read("Be good: ")


def test_an_eos_token_beyond_the_embedding(tmp_path):
    model = model_directory(tmp_path / "model", eos_token_id=None, bos_token_id=None)
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    (problem,) = misfits(tokenizer, model, vocabulary_tokens=320)
    assert "it has token id 320, but config.json says vocab_size=320" in problem
