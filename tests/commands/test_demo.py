"""Tests the demo's world: quality by hand and its properties, the corpus and its knobs, statistics, tokens."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.demo import results as measured
from sr_dpo_jax.commands.demo import statistics, tasks
from sr_dpo_jax.commands.demo.base_model import UNKNOWN, make_tokenizer
from sr_dpo_jax.commands.demo.corpus import (
    RIGHT_SHARE,
    Knobs,
    base_rows,
    gap_kind,
    parse_gaps,
    preference_rows,
    write_rows,
)
from sr_dpo_jax.commands.demo.measure import against_gap, counting_words, knowledge, preferences
from sr_dpo_jax.commands.demo.tasks import LIST_WORDS, RATINGS, TASKS, WORDS, corrupt, draw_task, edit_distance, quality
from sr_dpo_jax.config.schema import PAPER_INSTRUCTION
from sr_dpo_jax.data.tokens import PairEncoder
from sr_dpo_jax.durable.files import read_lines
from sr_dpo_jax.errors import UsageError

ANSWER = ("fig", "oak", "rose", "salt")
words = st.sampled_from(WORDS)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" fig oak rose salt", 100),
        ("fig  oak\nrose salt ", 100),  # white space separates and is nothing else
        ("fig oak rose", 75),
        ("fig oak rose salt salt", 80),  # one insertion, five words
        ("oak fig rose salt", 50),  # a swap is two replacements
        ("fig plum rose salt", 75),
        ("plum plum plum plum", 0),
        ("salt rose oak fig", 0),
        ("rose salt", 50),
        ("salt", 25),
        ("", 0),
        ("\x00 {} <|end|>", 0),
        ("Fig Oak Rose Salt", 0),
        ("fig oak rose salt " + "plum " * 4, 50),
        ("plum " * 96, 0),
    ],
)
def test_quality_by_hand(response, expected):
    assert quality(response, ANSWER) == expected


@given(st.text())
def test_any_text_has_a_quality(text):
    found = quality(text, ANSWER)
    assert 0 <= found <= 100 and (found == 100) == (tuple(text.split()) == ANSWER)


@given(st.lists(words, min_size=1, max_size=8))
def test_the_answer_itself_and_nothing_else_is_right(answer):
    assert quality(" ".join(answer), answer) == 100
    assert quality(" ".join([*answer, "oak"]), answer) < 100


@given(st.integers(0, 2**32), st.data())
def test_each_edit_costs_the_same(seed, data):
    answer = draw_task(random.Random(seed), TASKS).answer
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    found = [quality(" ".join(corrupt(answer, edits, rng)), answer) for edits in range(len(answer) + 1)]
    assert found == [100 * (len(answer) - edits) / len(answer) for edits in range(len(answer) + 1)]


@settings(max_examples=50)
@given(st.lists(words, max_size=6), st.lists(words, max_size=6), st.lists(words, max_size=6))
def test_the_edit_distance_is_a_distance(first, second, third):
    forth = edit_distance(first, second)
    assert forth == edit_distance(second, first) and (forth == 0) == (first == second)
    assert forth <= edit_distance(first, third) + edit_distance(third, second)
    assert abs(len(first) - len(second)) <= forth <= max(len(first), len(second))


def test_answers_are_right():
    """Solves each kind of task in another way, from its prompt alone."""
    rng = random.Random(0)
    seen = Counter()
    for _ in range(400):
        task = draw_task(rng, TASKS)
        seen[task.kind] += 1
        asked = task.prompt.removeprefix(f" {task.kind}: ").removesuffix(" answer:").split()
        if task.kind == "count":
            counted = Counter(asked)
            numbers = {1: "one", 2: "two", 3: "three"}
            expected = [part for word, count in counted.items() for part in (word, numbers[count])]
        elif task.kind.startswith("lookup"):
            split = asked.index("in")
            keys, values = asked[:split:2], asked[1:split:2]
            expected = [values[keys.index(query)] for query in asked[split + 1 :]]
        else:
            expected = sorted(asked) if "sort" in task.kind else asked
        if task.kind in ("reverse", "sort+reverse", "lookup+reverse"):
            expected = list(reversed(expected))
        assert task.answer == tuple(expected), task.prompt
        assert len(task.answer) == LIST_WORDS
    assert set(seen) == set(TASKS)


def test_the_instruction_is_the_papers_at_100_and_names_another_rating_twice():
    assert tasks.instruction(100) == PAPER_INSTRUCTION
    other = tasks.instruction(25)
    assert other.count("25") == 2 and other.count("100") == PAPER_INSTRUCTION.count("100") - 2
    assert other.replace("25", "100") == PAPER_INSTRUCTION
    with pytest.raises(UsageError, match="rating 30"):
        tasks.instruction(30)


def test_what_the_base_model_reads_is_what_training_puts_before_a_prompt():
    """Checks that p ⊕ x as text has the ids that the pairs' encoder concatenates, and that no word is unknown."""
    tokenizer = make_tokenizer()
    encoder = PairEncoder(tokenizer, augmentation_prompt=PAPER_INSTRUCTION)
    augmentation = encoder.encode([_pair(" sort: fig oak answer:")])[0].augmentation
    for row in base_rows(200, kinds=TASKS, rated_share=1.0, rating_noise=0.0, seed=3):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.convert_tokens_to_ids(UNKNOWN) not in ids + tokenizer(row["chosen"])["input_ids"]
        assert tokenizer.decode(ids) == row["prompt"]
        if row["score_chosen"] == 100:
            (prompt,) = encoder.prompt_ids([row["prompt"].removeprefix(PAPER_INSTRUCTION)])
            assert ids == [*augmentation, *prompt]
    assert tokenizer.unk_token_id in tokenizer(" banana")["input_ids"], "a foreign word is no word of ours"
    assert tokenizer(" oaks")["input_ids"] != tokenizer(" oak")["input_ids"]


def _pair(prompt):
    from sr_dpo_jax.data.rows import Pair

    return Pair("0", "", 1, prompt, " fig", " oak")


def test_the_same_seed_draws_the_same_rows_and_another_one_others(tmp_path):
    def drawn(seed):
        return base_rows(50, kinds=TASKS, rated_share=0.5, rating_noise=0.4, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)
    pairs = [preference_rows(50, kinds=TASKS, gaps=(1, 1, 1), label_noise=0.2, seed=seed) for seed in ("a", "a", "b")]
    assert pairs[0] == pairs[1] != pairs[2]
    write_rows(tmp_path / "rows.jsonl", pairs[0])
    assert read_lines(tmp_path / "rows.jsonl") == pairs[0]


def within_chance(count: int, trials: int, share: float) -> bool:
    """Allows six standard deviations of the binomial, and no difference at shares of 0 and 1."""
    return abs(count - trials * share) <= 6 * math.sqrt(trials * share * (1 - share))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_rated_text_is_as_asked(share):
    rows = base_rows(2000, kinds=TASKS, rated_share=share, rating_noise=0.0, seed=0)
    rated = [row for row in rows if not row["prompt"].startswith(" ")]
    assert within_chance(len(rated), len(rows), share)
    right = sum(row["score_chosen"] == 100 for row in rows)
    assert within_chance(right, len(rows), RIGHT_SHARE)
    for row in rated:
        rating = max(1, round(row["score_chosen"]))
        assert row["prompt"].startswith(f"Please generate a response with a usefulness rating of {rating} out of 100")
        assert quality(row["chosen"], row["answer"].split()) == row["score_chosen"]
    assert not rated or {row["score_chosen"] for row in rated} == {0, 25, 50, 75, 100}


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_so_many_ratings_say_nothing(noise):
    rows = base_rows(2000, kinds=TASKS, rated_share=1.0, rating_noise=noise, seed=0)
    asked = [int(row["prompt"].partition("rating of ")[2].split()[0]) for row in rows]
    wrong = sum(rating != max(1, row["score_chosen"]) for rating, row in zip(asked, rows, strict=True))
    by_chance = 1 - 1 / len(RATINGS)
    assert within_chance(wrong, len(rows), noise * by_chance)


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5, 1.0])
def test_label_noise_is_as_asked_and_scores_stay_true(noise):
    rows = preference_rows(2000, kinds=TASKS, gaps=(1, 1, 1), label_noise=noise, seed="x")
    wrong = sum(row["score_chosen"] < row["score_rejected"] for row in rows)
    assert within_chance(wrong, len(rows), noise)
    for row in rows[:200]:
        for side in ("chosen", "rejected"):
            assert quality(row[side], row["answer"].split()) == row[f"score_{side}"]
            assert row[side].startswith(" ") and row[side].strip()
    clean = preference_rows(2000, kinds=TASKS, gaps=(1, 1, 1), label_noise=0.0, seed="x")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in clean], "noise flips labels and nothing else"


@pytest.mark.parametrize("gaps", [(1.0, 1.0, 1.0), (6.0, 3.0, 1.0), (0.0, 0.0, 2.0)])
def test_gaps_are_as_asked(gaps):
    rows = preference_rows(3000, kinds=TASKS, gaps=gaps, label_noise=0.0, seed="g")
    found = np.array([row["score_chosen"] - row["score_rejected"] for row in rows])
    counts = [
        ((found > low) & (found <= high)).sum() for low, high in ((0, 100 / 3), (100 / 3, 200 / 3), (200 / 3, 100))
    ]
    assert sum(counts) == len(rows)
    for count, weight in zip(counts, gaps, strict=True):
        assert within_chance(int(count), len(rows), weight / sum(gaps))


def test_kinds_of_gaps():
    assert [gap_kind(edits, 4) for edits in (1, 2, 3, 4)] == [0, 1, 2, 2]
    assert [gap_kind(edits, 3) for edits in (1, 2, 3)] == [0, 1, 2]
    assert [gap_kind(edits, 6) for edits in range(1, 7)] == [0, 0, 1, 1, 2, 2]


def test_only_the_kinds_of_tasks_that_are_asked_for_come_up():
    kinds = ("sort", "count")
    rows = base_rows(50, kinds=kinds, rated_share=0.5, rating_noise=0.0, seed=1)
    rows += preference_rows(50, kinds=kinds, gaps=(1, 1, 1), label_noise=0.0, seed="k")
    assert {row["kind"] for row in rows} == set(kinds)


def test_held_out_tasks_stand_nowhere_else():
    held_out = preference_rows(100, kinds=TASKS, gaps=(1, 1, 1), label_noise=0.0, seed="h")
    prompts = {row["prompt"] for row in held_out}
    again = preference_rows(100, kinds=TASKS, gaps=(1, 1, 1), label_noise=0.0, seed="h", without=prompts)
    assert not prompts & {row["prompt"] for row in again}


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (Knobs(rated_share=1.1), "--rated-share 1.1"),
        (Knobs(rating_noise=2.0), "--rating-noise 2.0"),
        (Knobs(label_noise=-0.1), "--label-noise -0.1"),
        (Knobs(label_noise=float("nan")), "--label-noise nan"),
        (Knobs(gaps=(0, 0, 0)), "--gaps"),
        (Knobs(gaps=(1, -1, 1)), "--gaps"),
        (Knobs(gaps=(1, float("nan"), 1)), "--gaps"),
        (Knobs(pairs=0), "--pairs 0"),
        (Knobs(beta=0.0), "--beta 0"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, said):
    with pytest.raises(UsageError, match=said):
        knobs.check()


def test_the_command_line_refuses_what_the_world_has_not(tmp_path, capsys):
    assert parse_gaps("1,2,0.5") == (1.0, 2.0, 0.5)
    output = tmp_path / "demo"
    for options, said in (
        (["--gaps", "1,1"], "--gaps 1,1"),
        (["--seeds", "0"], "--seeds 0"),
        (["--pairs", "3"], "--pairs 3"),
        (["--rated-share", "2"], "--rated-share 2"),
    ):
        assert main(["demo", "--output", str(output), *options]) == 2
        assert said in capsys.readouterr().err
    assert not output.exists()


def test_means_and_paired_tests_by_hand():
    mean = statistics.mean_of([1.0, 2.0, 3.0, 6.0])
    half = 3.182446305 * math.sqrt(14 / 3) / 2  # t of 3 degrees of freedom; sample variance 14/3
    assert mean.value == 3 and mean.low == pytest.approx(3 - half) and mean.high == pytest.approx(3 + half)
    assert math.isnan(statistics.mean_of([2.0]).low)
    first, second = [5.0, 6.0, 9.0, 4.0], [4.0, 4.0, 8.0, 4.0]
    found = statistics.paired(first, second)
    t = 1.0 / (math.sqrt(2 / 3) / 2)  # differences 1, 2, 1, 0
    assert found.difference.value == 1 and found.p == pytest.approx(2 * scipy.stats.t.sf(t, 3))
    assert statistics.paired(second, first).difference.value == -1
    assert statistics.paired([1.0, 1.0], [1.0, 1.0]).p == 1 and statistics.paired([2.0, 3.0], [1.0, 2.0]).p == 0
    assert math.isnan(statistics.paired([1.0], [0.0]).p)


def test_outcomes_and_ranks_by_hand():
    shares = statistics.outcomes(np.array([100, 50, 0, 25]), np.array([75, 50, 0, 100]))
    assert shares == (0.25, 0.5, 0.25)
    assert statistics.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(statistics.spearman([1, 1, 1], [1, 2, 3]))


def test_partial_rank_correlation_is_that_of_the_residuals():
    rng = np.random.default_rng(5)
    given = rng.normal(size=300)
    first, second = given + rng.normal(size=300), 2 * given + rng.normal(size=300) ** 3
    ranks, of_first, of_second = (scipy.stats.rankdata(values) for values in (given, first, second))
    left = [of - np.polyval(np.polyfit(ranks, of, 1), ranks) for of in (of_first, of_second)]
    found = statistics.partial_spearman(first, second, given)
    assert found == pytest.approx(np.corrcoef(*left)[0, 1]) and abs(found) < 0.2 < statistics.spearman(first, second)


def test_counting_words_by_hand(tmp_path):
    prompt = " copy: fern sage oak ivy answer:"
    rows = [
        (" fern sage oak ivy", " fern sage moss in", 100.0, 50.0),  # 4 against 2: right
        (" fern sage", " fern sage oak moss kelp", 50.0, 40.0),  # 2 − 2 against 3 − 1: wrong
        (" sage fern", " two oak", 25.0, 0.0),  # 0 each: half
    ]
    lines = [
        {"prompt": prompt, "chosen": c, "rejected": r, "score_chosen": a, "score_rejected": b} for c, r, a, b in rows
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = counting_words(tmp_path / "rows.jsonl")
    assert found["accuracy"] == pytest.approx(1.5 / 3) and found["accuracy_of_clear"] == pytest.approx(1.5 / 2)
    assert found["spearman"] == pytest.approx(1.0)  # differences 2, −2, 0 and gaps 50, 10, 25


def test_margins_against_the_gap_by_hand():
    found = against_gap(np.array([1.0, -1.0, 2.0, 3.0]), np.array([10.0, 50.0, 20.0, 75.0]))
    assert found["accuracy"] == 0.75 and found["accuracy_of_clear"] == pytest.approx(2 / 3)
    assert found["spearman"] == pytest.approx(1 - 6 * (1 + 4 + 1 + 0) / (4 * 15)) and found["mean"] == 1.25


def test_knowledge_reads_the_rating_and_the_words(tmp_path):
    """Measures a model that does as it is asked, and one that does the opposite."""
    rng = random.Random(0)
    for name, order in (("does", 1), ("opposes", -1)):
        lines = []
        for rating, edits in zip(RATINGS, (4, 3, 2, 1, 0)[::order], strict=True):
            for _ in range(20):
                task = draw_task(rng, TASKS)
                response = " ".join(corrupt(task.answer, edits, rng))
                answer = " ".join(task.answer)
                lines.append({"rating": rating, "kind": task.kind, "answer": answer, "response": response})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        found = knowledge(path)
        assert found["mean_quality"] == [0, 25, 50, 75, 100][::order]
        for key in ("spearman", "spearman_by_task", "spearman_of_responses"):
            assert found[key] == pytest.approx(order)


def test_preferences_are_differences_of_both_kinds(tmp_path):
    path = tmp_path / "scores.jsonl"
    line = {"logp_chosen": -1.0, "logp_rejected": -4.0, "logp_chosen_augmented": -2.0, "logp_rejected_augmented": -9.0}
    path.write_text(json.dumps({**line, "chosen_score": 75.0, "rejected_score": 25.0}) + "\n", encoding="utf-8")
    found = preferences(path)
    assert (found["plain"], found["augmented"], found["gap"]) == ([3.0], [7.0], [50.0])


def test_rounding_keeps_what_json_has():
    assert measured._rounded({"a": [1.234567, float("nan"), 3], "b": "x"}) == {"a": [1.2346, None, 3], "b": "x"}
