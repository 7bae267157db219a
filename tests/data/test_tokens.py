"""Pairs -> ids: the seam between prompt and response, BOS, EOS, p, chat templates and truncation."""

import itertools
import json
import signal

import pytest
import toy_tokenizers as toy
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_dpo_jax.data import chat_template
from sr_dpo_jax.data.chat_template import UNPLACED
from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair, read_rows
from sr_dpo_jax.data.tokens import (
    PairEncoder,
    PairTokens,
    load_tokenizer,
    tokenizer_digest,
    truncate,
    uses_bos,
)
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights.directory import open_directory

EOS, BOS = 0, 1
P = "Please be useful. Query:"
SKY = ("The sky is", " blue.", " green.")
WORDS = {
    word: number for number, word in enumerate(["</s>", "<s>", "<unk>", "what", "is", "it", "a", "cat", "be", "good"])
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes byte-level tokenizers, loaded as a user's would be; each set of options once."""
    made = {}

    def make(**options):
        key = tuple(sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            made[key] = load_tokenizer(str(toy.byte_level_tokenizer(tmp_path_factory.mktemp("toy"), **options)))
        return made[key]

    return make


def pair(prompt, chosen=" yes", rejected=" no", line=1) -> Pair:
    return Pair(str(line - 1), "rows.jsonl", line, prompt, chosen, rejected)


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = [Message(role, text) for role, text in zip(itertools.cycle(["user", "assistant"]), contents, strict=False)]
    return (Message("system", system), *turns) if system else tuple(turns)


def encode(tokenizer, one: Pair, p: str | None = None) -> PairTokens | BadRow:
    (result,) = PairEncoder(tokenizer, augmentation_prompt=p).encode([one])
    return result


def bare(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class TestText:
    def test_worked_example(self, tmp_path):
        tokenizer = load_tokenizer(str(toy.word_tokenizer(tmp_path, WORDS, bos=True)))
        assert encode(tokenizer, pair("what is it", "a cat", "it"), "be good") == PairTokens(
            head=(1,), augmentation=(8, 9), prompt=[1, 3, 4, 5], chosen=[6, 7, 0], rejected=[5, 0]
        )

    def test_no_token_spans_the_seam(self, tmp_path):
        tokenizer = load_tokenizer(str(toy.merging_tokenizer(tmp_path)))
        assert bare(tokenizer, "ab") == [4]
        tokens = encode(tokenizer, pair("a", "b", "ab"), "a")
        assert tokens == PairTokens((), (2,), [2], [3, EOS], [4, EOS])

    def test_p_leaves_the_ids_of_x_alone(self, tmp_path):
        tokenizer = load_tokenizer(str(toy.merging_tokenizer(tmp_path)))
        with_p, without = (encode(tokenizer, pair("ba", "b", "a"), p) for p in ("aa", None))
        assert (with_p.prompt, with_p.augmentation) == ([3, 2], (2, 2))
        assert (with_p.prompt, with_p.chosen) == (without.prompt, without.chosen)
        assert without.augmentation == ()

    @pytest.mark.parametrize(("bos", "append_eos"), list(itertools.product([False, True], repeat=2)))
    def test_bos_once_eos_once(self, make, bos, append_eos):
        tokenizer = make(bos=bos, append_eos=append_eos)
        assert uses_bos(tokenizer) is bos
        tokens = encode(tokenizer, pair(" What is it?", " A cat.", " A car.</s>"), P)
        assert tokens.head == ((BOS,) if bos else ())
        whole = [*tokens.prompt, *tokens.chosen]
        assert whole.count(BOS) == bos and whole.count(EOS) == 1 and whole[-1] == EOS
        assert tokens.rejected.count(EOS) == 1 and tokens.rejected[-1] == EOS
        assert EOS not in tokens.augmentation and BOS not in tokens.augmentation
        assert tokens.prompt == [*tokens.head, *bare(tokenizer, " What is it?")]
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS  # which must not matter

    def test_a_bos_written_in_the_text_is_not_doubled(self, make):
        written, plain = (encode(make(bos=True), pair(prompt)) for prompt in ("<s>Hi", "Hi"))
        assert written == plain

    @given(st.text(max_size=20), st.text(min_size=1, max_size=20))
    @settings(max_examples=100, deadline=None)
    def test_round_trip(self, make, prompt, response):
        tokenizer = make(bos=True)
        tokens = encode(tokenizer, pair(prompt, response, "x"), P)
        assert tokenizer.decode([*tokens.prompt, *tokens.chosen]) == "<s>" + prompt + response + "</s>"
        augmented = [*tokens.head, *tokens.augmentation, *tokens.prompt[len(tokens.head) :]]
        assert tokenizer.decode(augmented) == "<s>" + P + prompt

    @pytest.mark.parametrize(
        ("chosen", "rejected", "reason"),
        [
            ("a</s>b", "c", "the chosen response holds the end-of-sequence token before its end"),
            ("c", "a</s></s>", "the rejected response holds the end-of-sequence token before its end"),
            ("</s>", "c", "the chosen response has no tokens"),
        ],
    )
    def test_bad_responses(self, make, chosen, rejected, reason):
        assert encode(make(), pair("x", chosen, rejected, line=7)) == BadRow("rows.jsonl", 7, reason)

    def test_a_prompt_without_tokens(self, make):
        assert encode(make(), pair("")).reason == "the prompt has no tokens"
        assert encode(make(bos=True), pair("")).prompt == [BOS]

    def test_a_batch_keeps_its_order_around_bad_rows(self, make):
        tokenizer = make(chat_template=toy.ZEPHYR)
        pairs = [pair("one"), pair("two", "</s>a"), pair(conversation("three")), pair(""), pair("five"), pair("six")]
        results = PairEncoder(tokenizer, augmentation_prompt=None).encode(pairs)
        assert results == [encode(tokenizer, one) for one in pairs]
        assert [isinstance(result, BadRow) for result in results] == [False, True, False, True, False, False]

    def test_blank_p(self, make):
        with pytest.raises(UsageError, match=r"refinement\.prompt"):
            PairEncoder(make(), augmentation_prompt=" ")

    def test_no_dummy_space_in_the_middle_of_a_text(self, tmp_path):
        tokenizer = load_tokenizer(str(toy.dummy_prefix_tokenizer(tmp_path, chat_template=toy.ZEPHYR)))
        assert tokenizer.convert_ids_to_tokens(bare(tokenizer, "Sorry"))[0] == "▁S"  # the trap
        letters = tokenizer.convert_tokens_to_ids(list("Sorry"))
        tokens = encode(tokenizer, pair(conversation("Sorry"), "Sorry", "So"), "Sorry")
        assert tokens.chosen == [*letters, EOS]
        assert tokens.augmentation == tuple(letters)
        assert tokens.prompt[len(tokens.head) :][:6] == [*letters, EOS]
        assert tokens.head[0] == BOS
        text = encode(tokenizer, pair("Sorry", " Sorry", "Sorry"), "Sorry")
        first = tokenizer.convert_tokens_to_ids("▁S")
        assert text.prompt[:2] == [BOS, first]  # the start of a text is as the tokenizer has it
        assert text.augmentation[0] == text.chosen[0] == first != text.rejected[0]


TEMPLATES = {
    "zephyr": (toy.ZEPHYR, (), False, "<|user|>\n", "one</s>\n<|assistant|>\n", "yes"),
    "chatml": (toy.CHATML, ("<|im_start|>", "<|im_end|>"), False, "<|im_start|>user\n", None, "yes<|im_end|>"),
    "llama3": (
        toy.LLAMA3,
        ("<|start|>", "<|stop|>", "<|eot|>"),
        True,
        "<s><|start|>user<|stop|>\n\n",
        None,
        "yes<|eot|>",
    ),
    "gemma": (toy.GEMMA, ("<turn>", "<end>"), True, "<s><turn>user\n", "one<end>\n<turn>model\n", "yes<end>"),
}


class TestTemplates:
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_head_rest_and_responses(self, make, name):
        template, special, bos, head, rest, response = TEMPLATES[name]
        tokenizer = make(chat_template=template, special_tokens=special, bos=bos)
        tokens = encode(tokenizer, pair(conversation("one"), "yes", "no"), P)
        assert tokenizer.decode(tokens.head) == head
        assert tokens.head.count(BOS) == bos
        assert tokens.prompt[: len(tokens.head)] == list(tokens.head)
        if rest:
            assert tokenizer.decode(tokens.prompt[len(tokens.head) :]) == rest
        assert tokenizer.decode(tokens.chosen) == response + "</s>"
        assert tokens.chosen.count(EOS) == 1

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_the_augmented_ids_spell_what_the_template_renders(self, make, name):
        template, special, bos, *_ = TEMPLATES[name]
        tokenizer = make(chat_template=template, special_tokens=special, bos=bos)
        turns = conversation("one", "two", "three")
        tokens = encode(tokenizer, pair(turns, "yes", "no"), P)
        augmented = [*tokens.head, *tokens.augmentation, *tokens.prompt[len(tokens.head) :]]
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        messages[0]["content"] = P + messages[0]["content"]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(augmented) == rendered

    def test_bos_is_added_where_the_template_leaves_it_out(self, make):
        tokens = encode(make(chat_template=toy.ZEPHYR, bos=True), pair(conversation("one")), P)
        assert tokens.head[0] == BOS and tokens.prompt.count(BOS) == 1

    def test_the_four_forms(self, make, tmp_path):
        user, blue, green = ({"role": r, "content": c} for r, c in zip(("user", *["assistant"] * 2), SKY, strict=True))
        rows = [
            dict(zip(("prompt", "chosen", "rejected"), SKY, strict=True)),
            {"chosen": SKY[0] + SKY[1], "rejected": SKY[0] + SKY[2]},
            {"prompt": [user], "chosen": [blue], "rejected": [green]},
            {"chosen": [user, blue], "rejected": [user, green]},
        ]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pairs = list(read_rows(str(tmp_path / "a.jsonl"), format="preference", split="train"))
        tokenizer = make(chat_template=toy.ZEPHYR)
        text, implicit_text, messages, implicit_messages = PairEncoder(tokenizer, augmentation_prompt=P).encode(pairs)
        assert text == implicit_text and messages == implicit_messages
        assert tokenizer.decode(text.prompt + text.chosen) == "The sky is blue.</s>"
        assert tokenizer.decode(messages.prompt + messages.rejected) == (
            "<|user|>\nThe sky is</s>\n<|assistant|>\n green.</s>"
        )

    def test_a_system_message_belongs_to_the_head(self, make):
        tokenizer = make(chat_template=toy.ZEPHYR)
        tokens = encode(tokenizer, pair(conversation("x", system="Be kind.")), P)
        assert tokenizer.decode(tokens.head) == "<|system|>\nBe kind.</s>\n<|user|>\n"

    @pytest.mark.parametrize(
        ("template", "p"),
        [
            (toy.LLAMA3, " Query:"),  # trims p
            ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", P),
            ("{% for m in messages %}{{ m['content'] ~ (m['content'] | length) }}{% endfor %}", P),
            ("{% for m in messages %}{{ m['content'] ~ m['content'] }}{% endfor %}", P),
            ("{% for m in messages %}{{ (m['content'] | length) ~ m['content'] }}{% endfor %}", P),
            ("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}", P),
            ("{% for m in messages %}{{ m['content'][:9] }}{% endfor %}", P),
        ],
    )
    def test_a_template_that_cannot_place_p(self, make, template, p):
        with pytest.raises(UsageError, match=r"chat template of model\.path cannot be used"):
            encode(make(chat_template=template), pair(conversation("one")), p)

    def test_a_response_that_does_not_follow_the_generation_prompt(self, make):
        template = toy.CHATML.replace("assistant\\n", "assistant\\n<think>")
        with pytest.raises(UsageError, match="response cannot be told apart"):
            encode(make(chat_template=template), pair(conversation("one")))

    def test_p_stands_before_a_message_as_the_template_trims_it(self, make):
        tokenizer = make(chat_template=toy.LLAMA3)
        expected = encode(tokenizer, pair(conversation("one")), P)
        for content in (" one ", "one ", "\n\none", "one"):
            tokens = encode(tokenizer, pair(conversation(content)), P)
            assert tokens == expected
            assert tokens.prompt == encode(tokenizer, pair(conversation(content))).prompt

    def test_p_that_the_template_trims_away_stands_nowhere(self, make):
        """Nothing is left of this message, so that the template trims p itself."""
        encoder = PairEncoder(make(chat_template=toy.LLAMA3), augmentation_prompt="Rate it. ")
        fine, blank = encoder.encode([pair(conversation(" one")), pair(conversation(" \n"))])
        assert isinstance(fine, PairTokens) and blank.reason == UNPLACED

    def test_a_response_that_the_template_alters(self, make):
        template = toy.ZEPHYR.replace("m['content']", "m['content'].split('</think>')[-1]")
        bad = encode(make(chat_template=template), pair(conversation("one"), "hm</think>yes", "no"))
        assert bad.reason == "the chat template does not place the chosen response after its own prompt"

    def test_a_refusal_in_the_template_s_own_words(self, make):
        tokenizer = make(chat_template=toy.GEMMA)
        bad = encode(tokenizer, pair(conversation("one", system="sesame")), P)
        assert bad.reason == "the chat template refuses this conversation: System role not supported"
        leaking = "{% for m in messages %}{{ raise_exception(m['content']) if 'x' in m['content'] }}{{ m['content'] }}"
        bad = encode(make(chat_template=leaking + "{% endfor %}"), pair(conversation("x sesame")))
        assert bad.reason == "the chat template refuses this conversation"

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
            ("{{ ''.join(3) }}", "TypeError"),
            ("{{ 'abc'.index('x') }}", "ValueError"),
            ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
            ("{{ range(10**9) | list }}", "OverflowError"),
            ("{{ messages[9].content.there }}", ""),
        ],
    )
    def test_whatever_a_template_raises_the_row_is_bad(self, make, fault, kind):
        template = toy.CHATML + "{% if 'sesame' in messages[0]['content'] %}" + fault + "{% endif %}"
        tokenizer = make(chat_template=template)
        assert isinstance(encode(tokenizer, pair(conversation("one"))), PairTokens)
        bad = encode(tokenizer, pair(conversation("sesame")))
        assert bad.reason.startswith("the chat template refuses this conversation" + f" with {kind}" * bool(kind))
        assert "sesame" not in bad.reason

    @pytest.mark.parametrize(("written", "said"), [("\\ud800", "a lone surrogate"), ("\\0", "a NUL character")])
    def test_a_template_that_writes_what_no_tokenizer_takes(self, make, written, said):
        odd = "{% if 'sesame' in m['content'] %}{{ '" + written + "' }}{% endif %}"
        tokenizer = make(chat_template="{% for m in messages %}{{ m['content'] }}" + odd + "{% endfor %}")
        assert isinstance(encode(tokenizer, pair(conversation("one"))), PairTokens)
        bad = encode(tokenizer, pair(conversation("sesame")))
        assert f"for this conversation: the text that it makes: holds {said}" in bad.reason

    def test_a_template_that_does_not_end(self, make, monkeypatch):
        endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        template = toy.CHATML + "{% if 'sesame' in messages[0]['content'] %}" + endless + "{% endif %}"
        monkeypatch.setattr(chat_template, "TEMPLATE_S", 0.05)
        before = signal.getsignal(signal.SIGALRM)
        good, rest = pair(conversation("one")), [pair(conversation("sesame"))] * chat_template.MOST_ENDLESS
        encoder = PairEncoder(make(chat_template=template), augmentation_prompt=None)
        first, *others = encoder.encode([good, *rest])
        assert isinstance(first, PairTokens)
        assert {bad.reason for bad in others} == {"the chat template does not end within 0.05 s for this conversation"}
        assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        with pytest.raises(UsageError, match=r"did not end within 0\.05 s for 9 conversations"):
            encoder.encode([pair(conversation("sesame"))])

    def test_no_template(self, make):
        with pytest.raises(UsageError, match="no chat template"):
            encode(make(), pair(conversation("one")))

    def test_a_template_with_a_clock_is_named(self, make, caplog):
        encode(
            make(chat_template=toy.ZEPHYR + "{% if false %}{{ strftime_now('%d') }}{% endif %}"),
            pair(conversation("a")),
        )
        assert "today's date" in caplog.text


# prompt, chosen, rejected without EOS, end kept; then prompt, its first kept index, chosen and rejected with EOS
TABLE = [
    (100, 50, 60, "keep_end", 100, 0, 51, 61),
    (300, 211, 100, "keep_end", 300, 0, 212, 101),
    (300, 212, 100, "keep_end", 256, 44, 213, 101),
    (300, 212, 100, "keep_start", 256, 0, 213, 101),
    (300, 300, 10, "keep_end", 256, 44, 256, 11),
    (100, 500, 10, "keep_end", 100, 0, 256, 11),
    (600, 5, 5, "keep_end", 256, 344, 6, 6),
]


class TestTruncate:
    @pytest.mark.parametrize(
        ("prompt", "chosen", "rejected", "end", "kept", "first", "kept_chosen", "kept_rejected"), TABLE
    )
    def test_the_table_of_the_paper_s_code_base(
        self, prompt, chosen, rejected, end, kept, first, kept_chosen, kept_rejected
    ):
        responses = [[*range(1000, 1000 + length), EOS] for length in (chosen, rejected)]
        result = truncate(
            list(range(prompt)), *responses, 0, max_length=512, max_prompt_length=256, prompt_truncation=end
        )
        assert [len(part) for part in result] == [kept, kept_chosen, kept_rejected]
        assert list(result[0]) == list(range(first, first + kept))
        for part, whole in zip(result[1:], responses, strict=True):
            assert part == whole[: len(part)]

    def test_the_head_stays(self):
        limits = {"max_length": 12, "max_prompt_length": 6}
        prompt, chosen = list(range(20)), [7] * 5
        end = truncate(prompt, chosen, chosen, 2, prompt_truncation="keep_end", **limits)
        start = truncate(prompt, chosen, chosen, 2, prompt_truncation="keep_start", **limits)
        assert (end[0], start[0]) == ([0, 1, 16, 17, 18, 19], [0, 1, 2, 3, 4, 5])
        with pytest.raises(UsageError, match="has 6 tokens and is never cut"):
            truncate(prompt, chosen, chosen, 6, prompt_truncation="keep_end", **limits)
        assert len(truncate(prompt[:7], chosen, chosen, 6, prompt_truncation="keep_end", **limits)[0]) == 7

    @given(
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(0, 3),
        st.integers(4, 12),
        st.integers(1, 12),
        st.sampled_from(["keep_end", "keep_start"]),
    )
    @settings(max_examples=300, deadline=None)
    def test_limits_hold_and_nothing_is_cut_in_vain(self, prompt, chosen, rejected, head, most, room, end):
        head = min(head, prompt)
        ids = list(range(prompt)), list(range(chosen)), list(range(rejected))
        result = truncate(*ids, head, max_length=most + room, max_prompt_length=most, prompt_truncation=end)
        longest = max(chosen, rejected)
        assert len(result[0]) + max(len(result[1]), len(result[2])) <= most + room
        assert result[0][:head] == ids[0][:head]
        assert result[0] in (ids[0], ids[0][:most], ids[0][:head] + ids[0][prompt - most + head :])
        assert (len(result[0]) < prompt) == (prompt + longest > most + room and prompt > most)
        assert (len(result[1]) < chosen) == (min(prompt, most) + longest > most + room and chosen > room)
        assert result[1] == ids[1][: len(result[1])] and result[2] == ids[2][: len(result[2])]


class TestTokenizer:
    def test_digest_is_of_what_decides_ids(self, tmp_path, make):
        plain = make()
        again = load_tokenizer(str(toy.byte_level_tokenizer(tmp_path)))
        assert tokenizer_digest(plain) == tokenizer_digest(again)
        others = [make(bos=True), make(chat_template=toy.ZEPHYR), make(vocabulary_tokens=300)]
        assert len({tokenizer_digest(tokenizer) for tokenizer in [plain, *others]}) == 4

    def test_digest_forgets_earlier_calls(self, tmp_path):
        tokenizer = load_tokenizer(str(toy.byte_level_tokenizer(tmp_path)))
        before = tokenizer_digest(tokenizer)
        tokenizer(["a b c", "d"], truncation=True, max_length=2, padding="max_length")
        assert tokenizer_digest(tokenizer) == before
        assert len(encode(tokenizer, pair("a long prompt that stays whole")).prompt) > 2

    def test_a_bos_that_is_only_defined_is_not_used(self, make):
        assert make().bos_token_id == BOS
        assert not uses_bos(make())

    def test_missing(self, tmp_path):
        with pytest.raises(UsageError, match="no such directory"):
            open_directory(str(tmp_path / "none"))
        with pytest.raises(UsageError, match=r"no tokenizer.json"):
            load_tokenizer(str(tmp_path))

    def test_no_empty_tokenizer_is_made_up(self, tmp_path):
        """transformers makes one of three tokens, with an EOS that fits, where only the class is named."""
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match=r"no tokenizer.json"):
            load_tokenizer(str(tmp_path))

    def test_damaged(self, tmp_path):
        toy.byte_level_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
        with pytest.raises(UsageError, match="no tokenizer can be loaded"):
            load_tokenizer(str(tmp_path))

    def test_without_eos(self, tmp_path):
        toy.byte_level_tokenizer(tmp_path)
        config = tmp_path / "tokenizer_config.json"
        config.write_text(config.read_text().replace('"eos_token": "</s>"', '"eos_token": null'))
        with pytest.raises(UsageError, match="no EOS token"):
            load_tokenizer(str(tmp_path))
