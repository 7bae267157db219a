"""Generation: slots do not matter, sampling draws from the right distribution, and a killed command goes on."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from runs import model_directory, raw_config
from toy_tokenizers import ZEPHYR

from sr_dpo_jax.cli import main
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.generation.decode import Sampling, draw, make_programs, make_state

pytestmark = pytest.mark.usefixtures("same_programs")

SEPARATED = {"response": "a\u2028b\u0085c", "response_tokens": 5, "finish_reason": "end"}
GREEDY = Sampling(0.0, None, None, end_tokens=(0,))


def prompts_file(path, count, **more):
    rng = np.random.default_rng(0)
    words = ["sort", "the", "words", "blue", "cat", "sky", "please"]
    lines = [{"prompt": " ".join(rng.choice(words, rng.integers(1, 9))), **more} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def command(tmp_path, model, prompts, output, **generation):
    raw = raw_config(tmp_path, model, tmp_path / "no_data.jsonl", generation=generation)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return ["generate", str(tmp_path / "config.yaml"), "--prompts", str(prompts), "--output", str(output)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("generate") / "model")


def responses(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_slots_and_order_do_not_matter(model, tmp_path, temperature):
    """19 prompts through 8 slots, with refills, and through 24: the same responses, in the order of the file."""
    prompts = prompts_file(tmp_path / "prompts.jsonl", 19, tag="x")
    outputs = []
    for slots in (8, 24):
        output = tmp_path / f"{slots}.jsonl"
        assert (
            main(command(tmp_path, model, prompts, output, slots=slots, max_new_tokens=20, temperature=temperature))
            == 0
        )
        outputs.append(responses(output))
    assert outputs[0] == outputs[1]
    assert [line["id"] for line in outputs[0]] == [str(number) for number in range(19)]
    assert all(line["tag"] == "x" and 0 < line["response_tokens"] <= 20 for line in outputs[0])
    assert len({line["response"] for line in outputs[0]}) > 5
    assert {line["finish_reason"] for line in outputs[0]} <= {"end", "length"}


def test_a_killed_command_goes_on(model, tmp_path, monkeypatch, capsys):
    prompts, output = prompts_file(tmp_path / "prompts.jsonl", 12), tmp_path / "out.jsonl"
    settings = {"slots": 8, "max_new_tokens": 8, "temperature": 0.7}
    assert main(command(tmp_path, model, prompts, tmp_path / "golden.jsonl", **settings)) == 0
    from sr_dpo_jax.generation import generator as generate

    respond = generate.Generator.respond

    def killed_after_five(self, params, wanted):
        for number, result in enumerate(respond(self, params, wanted)):
            if number == 5:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate.Generator, "respond", killed_after_five)
        main(command(tmp_path, model, prompts, output, **settings))
    partial = tmp_path / "out.jsonl.partial"
    assert not output.exists() and len(partial.read_text().splitlines()) == 6
    # What Python takes for ends of lines stands within texts too; and the last line is cut short by the kill.
    kept = partial.read_text() + json.dumps({"index": 11, "turn": 0, **SEPARATED}, ensure_ascii=False) + "\n"
    partial.write_text(kept + '{"index": 10, "resp', encoding="utf-8")

    assert main(command(tmp_path, model, prompts, output, **(settings | {"max_new_tokens": 9}))) == 2
    assert "other prompts, weights or generation settings" in capsys.readouterr().err
    whole_lines = partial.read_text(encoding="utf-8")
    for damage in ('"index"', '"turn"', "{"):
        partial.write_text(whole_lines.replace(damage, "\0" * len(damage)), encoding="utf-8")
        assert main(command(tmp_path, model, prompts, output, **settings)) == 2
        assert f"{partial}: damaged" in capsys.readouterr().err
    partial.write_text(whole_lines, encoding="utf-8")
    asked = []
    monkeypatch.setattr(
        generate.Generator,
        "respond",
        lambda self, params, wanted: asked.extend(wanted) or respond(self, params, wanted),
    )
    assert main(command(tmp_path, model, prompts, output, **settings)) == 0
    assert len(asked) == 6
    *ours, last = responses(output)
    assert ours == responses(tmp_path / "golden.jsonl")[:-1] and not partial.exists()
    assert last["response"] == SEPARATED["response"]


def test_responses_beyond_a_rope_that_changes_with_length_are_refused(tmp_path, capsys):
    """Up to that length they are given, although the cache is rounded up beyond it."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    short = model_directory(tmp_path / "model", "llama", max_position_embeddings=32, rope_parameters=rope)
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "sort the cat"}\n', encoding="utf-8")
    assert main(command(tmp_path, short, prompts, output, slots=8, max_new_tokens=120)) == 2
    said = capsys.readouterr().err
    assert "generation.max_new_tokens=120: the longest prompt has" in said and "beyond 32" in said
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")], "nothing is in the way"
    assert main(command(tmp_path, short, prompts, output, slots=8, max_new_tokens=4)) == 0


def test_stop_strings_end_a_response_before_them(model, tmp_path):
    prompts, whole = prompts_file(tmp_path / "prompts.jsonl", 8), tmp_path / "whole.jsonl"
    assert main(command(tmp_path, model, prompts, whole, slots=8, max_new_tokens=24)) == 0
    text = responses(whole)[0]["response"]
    stop = text[len(text) // 2 :][:3]
    assert main(command(tmp_path, model, prompts, tmp_path / "cut.jsonl", slots=8, max_new_tokens=24, stop=[stop])) == 0
    for cut, full in zip(responses(tmp_path / "cut.jsonl"), responses(whole), strict=True):
        assert cut["response"] == full["response"].split(stop)[0]
        assert cut["finish_reason"] == ("stop" if stop in full["response"] else full["finish_reason"])


def test_turns_are_answered_one_after_another(model, tmp_path, monkeypatch):
    """The second answer is that to the whole conversation so far; a killed command goes on between turns too."""
    from sr_dpo_jax.generation import generator as generate

    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    (chat / "chat_template.jinja").write_text(ZEPHYR, encoding="utf-8")
    questions = [["sort the words", "and again"], ["a cat", "blue", "why"], ["the sky"]]
    asked = [{"question_id": 81 + n, "category": "x", "turns": turns} for n, turns in enumerate(questions)]
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    arguments = command(tmp_path, chat, prompts, tmp_path / "answers.jsonl", slots=8, max_new_tokens=12)
    respond = generate.Generator.respond

    turns_begun = []

    def killed_in_turn_two(self, params, wanted):
        turns_begun.append(wanted)
        for prompt, response in respond(self, params, wanted):
            yield prompt, response
            if len(turns_begun) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate.Generator, "respond", killed_in_turn_two)
        main(arguments)
    assert main(arguments) == 0
    answers = responses(tmp_path / "answers.jsonl")
    assert [line["id"] for line in answers] == ["81", "82", "83"]
    assert [len(line["choices"][0]["turns"]) for line in answers] == [2, 3, 1]
    assert all(line["turns"] == turns for line, turns in zip(answers, questions, strict=True))
    assert [len(line["finish_reason"]) for line in answers] == [2, 3, 1]

    whole = []
    for line in answers:
        said = [text for pair in zip(line["turns"], line["choices"][0]["turns"], strict=True) for text in pair]
        roles = ["user", "assistant"] * len(said)
        messages = [{"role": role, "content": text} for role, text in zip(roles, said[:-1], strict=False)]
        whole.append({"messages": messages})
    prompts.write_text("".join(json.dumps(line) + "\n" for line in whole), encoding="utf-8")
    assert main(command(tmp_path, chat, prompts, tmp_path / "last.jsonl", slots=8, max_new_tokens=12)) == 0
    for line, last in zip(answers, responses(tmp_path / "last.jsonl"), strict=True):
        assert line["choices"][0]["turns"][-1] == last["response"]


def test_nothing_is_compiled_after_the_first_calls(model, tmp_path):
    tiny_model = tiny.build(tiny.GEMMA, tiny.make_mesh(1, 2, 2))
    params = tiny_model.params()
    state = make_state(tiny_model.graph, params, slots=4, positions=24, mesh=tiny_model.mesh)
    read, proceed = make_programs(tiny_model.graph, GREEDY, state, tokens_a_call=3, mesh=tiny_model.mesh)
    rng = np.random.default_rng(0)
    for slots in ([0, 1], [2, 4], [3, 0]):
        prompts, lengths = rng.integers(1, 24, (2, 8)).astype(np.int32), np.array([8, 3], np.int32)
        limits, seeds = np.array([20, 20], np.int32), np.array([1, 2], np.uint32)
        state, _ = read(params, state, prompts, lengths, np.array(slots, np.int32), limits, seeds)
        for _ in range(2):
            state, tokens = proceed(params, state)
            assert tokens.shape == (3, 4)
    assert read._cache_size() == proceed._cache_size() == 1


def by_numpy(logits, temperature, top_k, top_p):
    """The distribution that tokens are drawn from."""
    scaled = np.asarray(logits, np.float64) / temperature
    if top_k is not None:
        scaled[scaled < np.sort(scaled)[-top_k]] = -np.inf
    share = np.exp(scaled - scaled.max())
    share /= share.sum()
    if top_p is not None:
        order = np.argsort(-share)
        kept = order[: np.searchsorted(np.cumsum(share[order]), top_p) + 1]
        share = np.where(np.isin(np.arange(len(share)), kept), share, 0)
    return share / share.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.3, None, 0.7), (0.8, 5, 0.6)],
)
def test_tokens_are_drawn_from_the_right_distribution(temperature, top_k, top_p):
    logits = np.array([2.0, 1.0, 0.5, 0.4, -1.0, -3.0, 1.7, 0.1], np.float32)
    draws = 40_000
    tokens = draw(
        jnp.broadcast_to(logits, (draws, 8)),
        jnp.arange(draws, dtype=jnp.uint32),
        jnp.full(draws, 5, jnp.int32),
        Sampling(temperature, top_k, top_p, end_tokens=(0,)),
    )
    share = np.bincount(tokens, minlength=8) / draws
    expected = by_numpy(logits, temperature, top_k, top_p)
    assert (share[expected == 0] == 0).all()
    np.testing.assert_allclose(share, expected, atol=5 * 0.5 / draws**0.5)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "x"}', "line 1: missing key 'prompt'"),
        ('{"prompt": ""}', "line 1: prompt: empty text"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "line 1: prompt: must end with a user"),
        ('{"turns": ["a", ""]}', "line 1: turns: empty text"),
        ('{"turns": "a"}', "line 1: turns: expected a list"),
        ("{", "line 1: bad JSON"),
        ("", "holds no prompt"),
    ],
)
def test_bad_prompts_are_named(tmp_path, line, reason):
    from sr_dpo_jax.commands.prompts import read_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n" if line else "")
    with pytest.raises(UsageError, match=reason):
        read_prompts(str(path))


def test_a_system_text_stands_before_a_conversation(tmp_path):
    from sr_dpo_jax.commands.prompts import read_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["a", "b"], "system": "Be brief."}')
    (line,) = read_prompts(str(path))
    assert [(message.role, message.content) for message in line.prompt] == [("system", "Be brief."), ("user", "a")]
    path.write_text('{"prompt": "a", "system": "Be brief."}')
    with pytest.raises(UsageError, match="system: a prompt of plain text has no place for it"):
        read_prompts(str(path))


def test_slots_must_divide_over_the_devices(model, tmp_path, capsys):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 3)
    assert main([*command(tmp_path, model, prompts, tmp_path / "out.jsonl", slots=6), "mesh.fsdp=8"]) == 2
    error = capsys.readouterr().err
    assert "generation.slots" in error and "6" in error
    assert jax.device_count() == 8
