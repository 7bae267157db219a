"""What a row hands to the chat template beside its messages: tools, arguments, names, an own system message."""

import json

import pytest
import toy_tokenizers as toy

from sr_dpo_jax.data.messages import checked_messages
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Naming, Pair, read_rows
from sr_dpo_jax.data.tokens import PairEncoder, load_tokenizer

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system{% for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role + ' ' + m.name | default('') + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant \\n' }}{% endif %}"
)
THREE_ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"city": "string", "unit": None}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "get_weather", "arguments": "Rome"}}],
}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
ROW = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No"}]}


@pytest.fixture
def encoded(tmp_path):
    """Encodes one row by a template; gives the tokenizer and the tokens, or the reason why it is bad."""

    def encode(template, row, *, instruction="Be kind.", naming=None):
        (tmp_path / "row.jsonl").write_text(json.dumps(row))
        family = toy.CHAT_FAMILIES["qwen3"]
        directory = toy.byte_level_tokenizer(
            tmp_path / "model", chat_template=template, special_tokens=family.special_tokens, eos_token=family.eos_token
        )
        tokenizer = load_tokenizer(str(directory))
        options = {} if naming is None else {"naming": naming}
        (pair,) = read_rows(str(tmp_path / "row.jsonl"), format="preference", split="train", **options)
        if isinstance(pair, Pair):
            (pair,) = PairEncoder(tokenizer, augmentation_prompt=instruction).encode([pair])
        return tokenizer, pair.reason if isinstance(pair, BadRow) else pair

    return encode


def ids_of(tokenizer, messages, **options):
    """The ids of a conversation as transformers renders and tokenises it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_those_of_transformers(encoded, as_text):
    row = {**ROW, "tools": json.dumps([TOOL]) if as_text else [TOOL]}
    tokenizer, tokens = encoded(WITH_TOOLS, row)
    tool = json.loads(json.dumps(TOOL).replace(', "unit": null', ""))  # a table gives every row the keys of all others
    assert tokens.prompt == ids_of(tokenizer, [USER], tools=[tool], add_generation_prompt=True)
    _, without = encoded(WITH_TOOLS, ROW)
    assert len(without.prompt) < len(tokens.prompt) and len(without.head) < len(tokens.head)


def test_calls_and_names_are_those_of_transformers(encoded):
    result = {"role": "tool", "name": "get_weather", "content": "18 C"}
    row = {**ROW, "prompt": [USER, CALL, result]}
    tokenizer, tokens = encoded(WITH_TOOLS, row)
    expected = [USER, {**CALL, "content": ""}, result]
    assert tokens.prompt == ids_of(tokenizer, expected, add_generation_prompt=True)
    assert "get_weather" in tokenizer.decode(tokens.prompt)


def test_arguments_of_the_template_are_those_of_transformers(encoded):
    """`enable_thinking=False` opens and closes a block of thought in the prompt."""
    tokenizer, tokens = encoded(toy.QWEN3, {**ROW, "chat_template_kwargs": {"enable_thinking": False}})
    assert tokens.prompt == ids_of(tokenizer, [USER], enable_thinking=False, add_generation_prompt=True)
    _, plain = encoded(toy.QWEN3, ROW)
    assert len(plain.prompt) < len(tokens.prompt)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tools": [TOOL]}, "tools: the chat template does not write them for this conversation"),
        ({"prompt": [USER, CALL, USER]}, "tool_calls: the chat template does not write them for this conversation"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template is no argument of a template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize is no argument of a template"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "eos_token is no argument of a template"),
    ],
)
def test_what_a_template_does_not_take_is_refused(encoded, row, said):
    _, reason = encoded(toy.CHATML, {**ROW, **row})
    assert said in reason


@pytest.mark.parametrize("role", ["developer", "tool"])
def test_a_role_that_a_template_passes_over_is_refused(encoded, role):
    """Templates such as Zephyr's write nothing of them, so that the prompt would be another one in silence."""
    message = {"role": role, "content": "Be brief."}
    prompt = [message, USER] if role == "developer" else [USER, ANSWER, message]
    _, reason = encoded(THREE_ROLES, {**ROW, "prompt": prompt})
    assert reason == f"the chat template leaves out the message of the {role}"
    _, tokens = encoded(toy.CHATML, {**ROW, "prompt": prompt})
    assert not isinstance(tokens, str)


def test_users_of_other_names_each_have_their_head(encoded, tmp_path):
    tokenizer, _ = encoded(WITH_TOOLS, ROW)
    encoder = PairEncoder(tokenizer, augmentation_prompt="Be kind.")
    for name in ("Ann", "Bob"):
        user = {**USER, "name": name}
        pair = Pair("0", "f", 1, checked_messages([user], "prompt"), "Yo", "No")
        (tokens,) = encoder.encode([pair])
        assert tokens.prompt == ids_of(tokenizer, [user], add_generation_prompt=True)


def test_a_column_of_system_messages_stands_first(encoded):
    """Beside a conversation it is a message of it; beside text there is no place, and it is not dropped."""
    tokenizer, tokens = encoded(toy.CHATML, {**ROW, "system": "Be brief."})
    system = {"role": "system", "content": "Be brief."}
    assert tokens.prompt == ids_of(tokenizer, [system, USER], add_generation_prompt=True)
    ignored = Naming({}, ["system"])
    _, without = encoded(toy.CHATML, {**ROW, "system": "Be brief."}, naming=ignored)
    assert without.prompt == ids_of(tokenizer, [USER], add_generation_prompt=True)


def test_columns_of_other_names(encoded):
    named = {"question": [USER], "better": [ANSWER], "worse": [ANSWER | {"content": "No"}], "prompt": "unread"}
    naming = Naming({"prompt": "question", "chosen": "better", "rejected": "worse"})
    _, tokens = encoded(toy.CHATML, named, naming=naming)
    _, expected = encoded(toy.CHATML, ROW)
    assert tokens == expected


def test_text_in_parts_is_one_text(encoded):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    _, tokens = encoded(toy.CHATML, {**ROW, "prompt": [{"role": "user", "content": parts}]})
    _, expected = encoded(toy.CHATML, ROW)
    assert tokens == expected
