"""Conversations in the manner of each family's chat template, against the template's own text of the whole."""

import itertools
import json
import math
import shutil

import pytest
import toy_tokenizers as toy
from runs import make_config, metrics_of
from transformers import GPTNeoXConfig, LlamaConfig

from sr_dpo_jax.cli import main
from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair
from sr_dpo_jax.data.tokens import PairEncoder, PairTokens, load_tokenizer, uses_bos
from sr_dpo_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("same_programs")

P = "Please be useful. Query:"
FAMILIES = tuple(toy.CHAT_FAMILIES)
SYSTEM_REFUSED = {"gemma2"}
SYSTEM_UNPLACED = {"mistral"}
"""These templates leave the system message out once a response follows."""
WRITES_OWN_SYSTEM = {"llama31", "qwen25"}
TURNS = ("How is the sky?", "It is blue.", "And at night?")


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    loaded = {}

    def tokenizer_of(name):
        if name not in loaded:
            loaded[name] = load_tokenizer(str(toy.chat_tokenizer(tmp_path_factory.mktemp(name), name)))
        return loaded[name]

    return tokenizer_of


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = [Message(role, text) for role, text in zip(itertools.cycle(["user", "assistant"]), contents, strict=False)]
    return (Message("system", system), *turns) if system else tuple(turns)


def encode(tokenizer, prompt, chosen="A yes.", rejected="No, no.", p=P) -> PairTokens | BadRow:
    (result,) = PairEncoder(tokenizer, augmentation_prompt=p).encode([Pair("0", "a", 1, prompt, chosen, rejected)])
    return result


def whole_ids(tokenizer, prompt, response: str, before_user: str = "") -> list[int]:
    """The oracle: the template's text of the whole, tokenised as one text, up to and with its last EOS."""
    messages = [{"role": message.role, "content": message.content} for message in prompt]
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = before_user + first["content"]
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
    starts_with_bos = text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not starts_with_bos)["input_ids"]
    eos = tokenizer.eos_token_id
    after_response = max(number for number, token in enumerate(ids) if tokenizer.decode([token]).strip())
    ids = ids[: after_response + 1]
    return ids if ids[-1] == eos else [*ids, eos]


def prompts(name):
    system = {None, "Be kind."} - ({"Be kind."} if name in SYSTEM_REFUSED | SYSTEM_UNPLACED else set())
    for message in sorted(system, key=str):
        yield conversation(TURNS[0], system=message)
        yield conversation(*TURNS, system=message)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_prompt_and_both_responses_are_what_the_whole_text_gives(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    for prompt in prompts(name):
        tokens = encode(tokenizer, prompt)
        for ids, response in ((tokens.chosen, "A yes."), (tokens.rejected, "No, no.")):
            assert [*tokens.prompt, *ids] == whole_ids(tokenizer, prompt, response)


@pytest.mark.parametrize("name", ["phi3", "phi3_first"])
def test_special_tokens_swallow_the_whitespace_that_responses_start_with(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    for user in ("Hello", " \n Hello"):
        prompt = conversation(user)
        tokens = encode(tokenizer, prompt, chosen=" A yes.", rejected="\n\nNo, no.")
        for ids, response in ((tokens.chosen, " A yes."), (tokens.rejected, "\n\nNo, no.")):
            assert [*tokens.prompt, *ids] == whole_ids(tokenizer, prompt, response)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_p_the_ids_spell_the_template_s_text_of_p_and_x(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    # After a special token these put a space before x, and x keeps its ids when p stands between the two.
    seam = " " if name == "phi3" else ""
    for prompt in prompts(name):
        tokens, plain = encode(tokenizer, prompt), encode(tokenizer, prompt, p=None)
        assert (plain.head, plain.prompt, plain.chosen) == (tokens.head, tokens.prompt, tokens.chosen)
        rest = tokens.prompt[len(tokens.head) :]
        spelled = tokenizer.decode([*tokens.head, *tokens.augmentation, *rest, *tokens.chosen])
        assert spelled == tokenizer.decode(whole_ids(tokenizer, prompt, "A yes.", P + seam))
        assert P in spelled and "A yes." in spelled


@pytest.mark.parametrize("name", FAMILIES)
def test_one_bos_and_one_eos(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    family = toy.CHAT_FAMILIES[name]
    assert uses_bos(tokenizer) is family.bos
    for turns in (TURNS[:1], TURNS):
        tokens = encode(tokenizer, conversation(*turns))
        for response in (tokens.chosen, tokens.rejected):
            assert response[-1] == eos and response.count(eos) == 1
            assert bos == eos or bos not in response
        exchanges = len(turns) // 2 + 1
        starts = exchanges if name == "llama2" else int(family.bos or "bos_token" in family.template)
        ends = exchanges - 1 if bos == eos else 0  # EOS of earlier responses
        assert tokens.prompt.count(bos) == starts + ends
        assert bos not in tokens.augmentation and eos not in tokens.augmentation


@pytest.mark.parametrize("name", FAMILIES)
def test_system_messages_stand_in_the_head_or_are_refused(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    tokens = encode(tokenizer, conversation(TURNS[0], system="Be kind."))
    if name in SYSTEM_REFUSED:
        assert tokens.reason == "the chat template refuses this conversation: System role not supported"
    elif name in SYSTEM_UNPLACED:
        assert tokens.reason == "the chat template does not place the chosen response after its own prompt"
    else:
        assert "Be kind." in tokenizer.decode(tokens.head)
    default = tokenizer.decode(encode(tokenizer, conversation(TURNS[0])).head)
    assert ("a toy" in default or "1 June 2024" in default) is (name in WRITES_OWN_SYSTEM)


def test_spaces_after_special_tokens_are_those_of_the_whole_text(tokenizer_of):
    """The trap of the paper's Zephyr: in the whole text `</s>` is followed by a space that no letter stands for."""
    tokenizer = tokenizer_of("zephyr")
    tokens = encode(tokenizer, conversation("Sorry"), "Sorry", "So")
    names = tokenizer.convert_ids_to_tokens(tokens.prompt[len(tokens.head) :])
    assert names[:8] == ["S", "o", "r", "r", "y", "</s>", "▁", "\n"]
    assert tokenizer.convert_ids_to_tokens(tokens.chosen)[0] == "S"
    after_special = encode(tokenizer_of("phi3"), conversation("Sorry"), "Sorry", "So")
    assert tokenizer_of("phi3").convert_ids_to_tokens(after_special.chosen)[0] == "▁S"


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_space_before_x_stays_in_the_head(tokenizer_of, name):
    """The one place where the whole text has other ids: "[INST] Sorry" holds "▁S", and p must fit before the S."""
    tokenizer = tokenizer_of(name)
    tokens, whole = encode(tokenizer, conversation("Sorry")), whole_ids(tokenizer, conversation("Sorry"), "A yes.")
    assert tokenizer.decode([*tokens.prompt, *tokens.chosen]) == tokenizer.decode(whole)
    seam = len(tokens.head)
    assert tokenizer.convert_ids_to_tokens(tokens.prompt[seam - 1 : seam + 1]) == ["▁", "S"]
    assert [*tokens.prompt[: seam - 1], tokenizer.convert_tokens_to_ids("▁S"), *tokens.prompt[seam + 1 :]] == whole[
        : len(tokens.prompt) - 1
    ]


class TestThoughts:
    EMPTY = "<think>\n\n</think>\n\n"

    def test_the_empty_block_of_a_response_without_thought(self, tokenizer_of):
        tokenizer = tokenizer_of("qwen3")
        tokens = encode(tokenizer, conversation("one"))
        assert tokenizer.decode(tokens.chosen) == self.EMPTY + "A yes.<|im_end|>"
        # Prompt and response together are what the model is asked to continue when thinking is switched off.
        messages = [{"role": "user", "content": "one"}]
        asked = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert tokenizer.decode([*tokens.prompt, *tokens.chosen]) == asked + "A yes.<|im_end|>"

    def test_thoughts_are_kept_in_responses_and_dropped_in_earlier_turns(self, tokenizer_of):
        tokenizer = tokenizer_of("qwen3")
        thought = "<think>\nHm.\n</think>\n\n"
        tokens = encode(tokenizer, conversation("one", thought + "two", "three"), thought + "A yes.")
        assert tokenizer.decode(tokens.chosen) == thought + "A yes.<|im_end|>"
        assert "Hm." not in tokenizer.decode(tokens.prompt) and "two" in tokenizer.decode(tokens.prompt)

    def test_a_thought_that_the_template_writes_otherwise_is_refused(self, tokenizer_of):
        bad = encode(tokenizer_of("qwen3"), conversation("one"), "<think>Hm.</think>A yes.")
        assert bad.reason == "the chat template does not place the chosen response after its own prompt"

    def test_a_block_of_thought_that_the_prompt_opens(self, tokenizer_of):
        tokenizer = tokenizer_of("qwen3_thinking")
        tokens = encode(tokenizer, conversation("one"), "<think>\nHm.\n</think>\n\nA yes.", "No, no.")
        assert tokenizer.decode(tokens.prompt).endswith("<|im_start|>assistant\n<think>\n")
        assert tokenizer.decode(tokens.chosen) == "Hm.\n</think>\n\nA yes.<|im_end|>"
        assert tokenizer.decode(tokens.rejected) == "\n</think>\n\nNo, no.<|im_end|>"

    def test_a_response_that_the_template_drops_does_not_count_as_placed(self, tmp_path):
        template = toy.QWEN3_THINKING.replace("parts[-1].lstrip", "parts[-1].replace('think', '').lstrip")
        directory = toy.byte_level_tokenizer(tmp_path, chat_template=template)
        bad = encode(load_tokenizer(str(directory)), conversation("one"), "I think.", "No, no.")
        assert bad.reason == "the chat template does not place the chosen response after its own prompt"


# Whole runs. The template matters here, not the architecture.

VOCABULARY = 512
PAIRS = 8


def chat_model(directory, name):
    toy.chat_tokenizer(directory, name, vocabulary_tokens=VOCABULARY)
    tokenizer = load_tokenizer(str(directory))
    config_class = LlamaConfig if toy.CHAT_FAMILIES[name].bos else GPTNeoXConfig
    config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(directory)
    return directory


def chat_file(path, format):
    """Message-form rows; every third one with an earlier exchange. Returns the conversations with both responses."""
    rows, pairs = [], []
    for number in range(PAIRS):
        earlier = ("Hello.", "Hi.") if number % 3 == 0 else ()
        question = f"Is {number} even?"
        prompt = conversation(*earlier, question)
        responses = ("Yes.", "No.")[:: -1 if number % 2 else 1]
        messages = [{"role": message.role, "content": message.content} for message in prompt]
        sides = [[{"role": "assistant", "content": response}] for response in responses]
        if format == "ultrafeedback":
            rows.append(
                {
                    "prompt": question,
                    "prompt_id": f"row-{number}",
                    "chosen": messages + sides[0],
                    "rejected": messages + sides[1],
                    "score_chosen": 8.0,
                    "score_rejected": 3.5,
                }
            )
        else:
            rows.append({"id": f"row-{number}", "prompt": messages, "chosen": sides[0], "rejected": sides[1]})
        pairs.append((prompt, *responses))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return pairs


def chat_config(tmp_path, name, format):
    pairs = chat_file(tmp_path / "chat.jsonl", format)
    config = make_config(
        tmp_path,
        chat_model(tmp_path / "model", name),
        tmp_path / "chat.jsonl",
        # One shape for all families, so that they share compiled programs.
        data={"format": format, "max_length": 256, "max_prompt_length": 240},
        batch={"pairs_per_step": PAIRS, "row_length": 256, "row_multiple": 256},
        refinement={"prompt": "Be good: "},
        train={"max_steps": 1},
    )
    return config, pairs


def quick(names):
    return [name if name == "qwen25" else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick(FAMILIES))
def test_score_and_train_on_conversations(tmp_path, name):
    format = "ultrafeedback" if FAMILIES.index(name) % 2 else "preference"
    config, pairs = chat_config(tmp_path, name, format)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    output = tmp_path / "scores.jsonl"
    assert main(["score", str(tmp_path / "config.yaml"), "--output", str(output)]) == 0
    tokenizer = load_tokenizer(config.model.path)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"row-{number}" for number in range(PAIRS)]
    for line, (prompt, *responses) in zip(lines, pairs, strict=True):
        for side, response in zip(("chosen", "rejected"), responses, strict=True):
            tokens = len(whole_ids(tokenizer, prompt, response))
            assert line["prompt_tokens"] + line[f"{side}_tokens"] == tokens
            assert line[f"logp_{side}"] < 0 and line[f"logp_{side}"] != line[f"logp_{side}_augmented"]
        assert line.get("chosen_score") == (8.0 if format == "ultrafeedback" else None)
    if name == "qwen25":  # from the ids on, families are no longer told apart
        assert train(config) == 0
        assert metrics_of(config.output_dir)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_turn_that_ends_as_the_model_ends_has_no_other_end(tokenizer_of, tmp_path, name):
    """generation_config.json names the end of a turn; EOS behind it is a pair of tokens that the model never saw."""
    plain = tokenizer_of(name)
    end, eos = plain.convert_tokens_to_ids("<end>"), plain.eos_token_id
    assert end != eos and encode(plain, conversation("Hi")).chosen[-2:] == [end, eos]
    shutil.copytree(plain.name_or_path, tmp_path / name)
    (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, end]}))
    tokenizer = load_tokenizer(str(tmp_path / name))
    for prompt in prompts(name):
        tokens = encode(tokenizer, prompt)
        for ids, response in ((tokens.chosen, "A yes."), (tokens.rejected, "No, no.")):
            assert [*tokens.prompt, *ids] == whole_ids(plain, prompt, response)[:-1]
            assert ids[-1] == end and eos not in ids
    text = encode(tokenizer, "Is it?", chosen=" yes", rejected=" no")
    assert text.chosen[-1] == eos, "text that goes through no template ends with EOS"
    pair = Pair("0", "f", 1, conversation("Hi"), "A<end>yes.", "No.")
    (bad,) = PairEncoder(tokenizer, augmentation_prompt=None).encode([pair])
    assert bad.reason == "the chosen response holds another end token of the model before its end"
