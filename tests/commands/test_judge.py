"""sr-dpo judge against a server on loopback: verdicts, both orders, bad endpoints, resume, intervals, no secrets."""

import contextlib
import gzip
import json
import re
import signal
import socket
import threading
import time

import numpy as np
import pytest
import yaml
from fake_endpoint import completion, serve, shown, slowly

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.judge import endpoint as client
from sr_dpo_jax.commands.judge import settings as judge_settings
from sr_dpo_jax.commands.judge.endpoint import Verdict, parse
from sr_dpo_jax.commands.judge.files import read_answers, read_questions
from sr_dpo_jax.commands.judge.outcomes import Comparison, share, summary
from sr_dpo_jax.commands.judge.settings import Bootstrap
from sr_dpo_jax.errors import UsageError

KEY = "sk-very-secret-0123456789"
QUICK = {"timeout_s": 5.0, "malformed_wait_s": 0.01, "bootstrap": {"resamples": 200}}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_files(tmp_path, questions=4, two_turns=2):
    """Writes MT-Bench questions, the last ones with one turn; A's answers say good, B's bad."""
    asked = [
        {
            "question_id": 80 + n,
            "category": ["math", "writing"][n % 2],
            "turns": [f"question {n}", f"follow-up {n}"][: 2 if n < two_turns else 1],
            **({"reference": [f"reference {n}.1", f"reference {n}.2"]} if n == 0 else {}),
        }
        for n in range(questions)
    ]
    write(tmp_path / "questions.jsonl", asked)
    a = [{"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["good", "good"]}]} for q in asked]
    b = [{"id": str(q["question_id"]), "turns": ["bad", "bad"]} for q in asked]
    return write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)


def judge(tmp_path, url, *, a=None, b=None, **settings):
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(QUICK | settings), encoding="utf-8")
    arguments = ["judge", str(a or tmp_path / "a.jsonl"), str(b or tmp_path / "b.jsonl"), "--model", "judge"]
    arguments += ["--questions", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "out.json")]
    return main([*arguments, "--base-url", url, "--judge-config", str(tmp_path / "judge.yaml")])


def result(tmp_path):
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


def by_content(request, before):
    return "They differ.\n\n**Verdict: " + ("A**" if shown(request) == ("good", "bad") else "B**")


def test_a_judge_that_prefers_content_gives_wins(tmp_path, capsys):
    write_files(tmp_path)
    with serve(by_content) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
        assert judge(tmp_path, endpoint.url, a=tmp_path / "b.jsonl", b=tmp_path / "a.jsonl") == 0
    assert len(endpoint.requests) == 12  # 6 turns in both orders; the second command asks the same, so nothing
    total = result(tmp_path)["total"]
    assert (total["win"], total["tie"], total["lose"], total["unusable"]) == (0, 0, 6, 0)
    assert total["shares"]["lose"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert total["position_bias_rate"] == 0
    categories = result(tmp_path)["categories"]
    assert {name: part["lose"] for name, part in categories.items()} == {"math": 3, "writing": 3}
    assert {turn: part["comparisons"] for turn, part in result(tmp_path)["turns"].items()} == {"1": 4, "2": 2}
    printed = capsys.readouterr().out
    assert "100% [100, 100]" in printed and "math" in printed and "turn 2" in printed


def test_what_is_asked(tmp_path):
    """Each turn is asked in both orders; the second turn shows the first; a reference is shown where there is one."""
    write_files(tmp_path, questions=2, two_turns=1)
    with serve(by_content) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
    texts = [request["messages"][-1]["content"] for request in endpoint.requests]
    assert len(texts) == len(set(texts)) == 6
    second = [text for text in texts if "follow-up 0" in text]
    assert len(second) == 2 and all("question 0" in text and "reference 0.2" in text for text in second)
    first = [text for text in texts if "question 0" in text and "follow-up 0" not in text]
    assert len(first) == 2 and all("reference 0.1" in t and "reference 0.2" not in t for t in first)
    assert not any("reference" in text for text in texts if "question 1" in text)
    assert {request["model"] for request in endpoint.requests} == {"judge"}
    assert {request["temperature"] for request in endpoint.requests} == {0.0}


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_that_prefers_a_position_gives_ties(tmp_path, place):
    write_files(tmp_path)
    with serve(lambda request, before: f"Verdict: {place}") as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
    total = result(tmp_path)["total"]
    assert (total["win"], total["tie"], total["lose"]) == (0, 6, 0)
    assert total["position_bias_rate"] == 1
    assert (total["always_first"], total["always_second"]) == ((6, 0) if place == "A" else (0, 6))


def test_rate_limits_errors_drops_and_bad_bodies_are_retried(tmp_path):
    """Every request fails in its own way at first, and none is lost."""
    write_files(tmp_path)
    ways = [(429, {"Retry-After-Ms": "20"}), (503, {"Retry-After-Ms": "5"}), None]
    ways += [b"{ not json", b'{"choices": []}', b'"text"', "no verdict in here", "Verdict: A\nVerdict: B"]
    failed = {}

    def answer(request, before):
        with endpoint.lock:
            way = failed.setdefault(json.dumps(request["messages"]), ways[len(failed) % len(ways)])
        return way if before == 0 else by_content(request, before)

    with serve(answer) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
    assert (result(tmp_path)["total"]["win"], result(tmp_path)["total"]["unusable"]) == (6, 0)
    assert len(endpoint.requests) == 24


def test_retry_after_is_waited_for(tmp_path):
    import time

    write_files(tmp_path, questions=1, two_turns=0)
    arrived = []

    def answer(request, before):
        arrived.append((before, time.monotonic()))
        return (429, {"Retry-After": "1"}) if before == 0 else by_content(request, before)

    with serve(answer) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
    first, again = ([at for before, at in arrived if before == n] for n in (0, 1))
    assert min(again) - min(first) >= 1


def test_time_outs_are_retried(tmp_path):
    write_files(tmp_path, questions=1, two_turns=0)
    with serve(lambda request, n: slowly(0.0 if n else 2.5, by_content(request, n))) as endpoint:
        assert judge(tmp_path, endpoint.url, timeout_s=1.0) == 0
    assert result(tmp_path)["total"]["win"] == 1 and len(endpoint.requests) >= 4


def endless(seconds):
    """A body that never ends, in small parts."""
    yield b"{"
    while True:
        time.sleep(seconds)
        yield b"  "


def large():
    yield from [b" " * 2**20] * 600


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda: endless(0.1), "last: nothing within 0.5 s"),
        (lambda: (500, {"Retry-After-Ms": "1"}), "last: HTTP 500"),
        (lambda: (429, {"Retry-After-Ms": "1"}), "last: HTTP 429"),
        (lambda: None, "last: no connection"),
    ],
    ids=["slow", "500", "429", "closed"],
)
def test_an_endpoint_that_gives_no_reply_is_one_error(tmp_path, capsys, answer, told):
    """Two attempts, each with its limit of time, which the message names, and no third."""
    write_files(tmp_path, questions=1, two_turns=0)
    with serve(lambda request, before: answer()) as endpoint:
        assert judge(tmp_path, endpoint.url, timeout_s=0.5, retries=1) == 1
    err = capsys.readouterr().err
    assert f"gave no reply in 2 attempts ({told})" in err and "Traceback" not in err
    assert 2 <= len(endpoint.requests) <= 2 * endpoint.distinct


HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"


@contextlib.contextmanager
def raw_server(send):
    """A server that sends bytes of any kind to whoever connects; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve_all():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve_one, args=server.accept()[:1], daemon=True).start()

        def serve_one(connection):
            with connection, contextlib.suppress(OSError):
                connection.recv(2**16)
                for part in send():
                    connection.sendall(part)

        threading.Thread(target=serve_all, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def endless_headers(first, part):
    yield first
    while True:
        time.sleep(0.1)
        yield part


@pytest.mark.parametrize(
    ("first", "part"), [(HEAD + b"X: ", b"a"), (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n")], ids=["slow", "103"]
)
def test_headers_without_end_are_one_error(tmp_path, capsys, first, part):
    write_files(tmp_path, questions=1, two_turns=0)
    started = time.monotonic()
    with raw_server(lambda: endless_headers(first, part)) as url:
        assert judge(tmp_path, url, timeout_s=0.5, retries=0) == 1
    assert "(last: nothing within 0.5 s)" in capsys.readouterr().err and time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (b"Content-Encoding: gzip\r\n", gzip.compress(completion("Verdict: A") + b" " * 2**23, mtime=0)),
        (b"Content-Encoding: gzip, gzip\r\n", gzip.compress(gzip.compress(completion("Verdict: A"), mtime=0), mtime=0)),
        (b"Content-Type: text/plain; charset=zlib\r\n", b"hello"),
        (b"Content-Type: text/plain; charset=rot13\r\n", b"hello"),
    ],
    ids=["packed", "packed twice", "a codec that fails", "a codec of text"],
)
def test_a_body_that_unpacks_to_no_reply_is_malformed(tmp_path, capsys, headers, body):
    write_files(tmp_path, questions=1, two_turns=0)
    with raw_server(lambda: [HEAD, headers, b"Content-Length: %d\r\n\r\n" % len(body), body]) as url:
        assert judge(tmp_path, url, malformed_retries=0) == 2
    assert "{'malformed reply': 2}" in capsys.readouterr().err


def test_a_proxy_of_the_environment_is_asked(tmp_path, monkeypatch):
    """The endpoint has no address that this machine knows; the fake one stands for the proxy."""
    write_files(tmp_path, questions=1, two_turns=0)
    with serve(by_content) as endpoint:
        monkeypatch.setenv("HTTP_PROXY", endpoint.url.removesuffix("/v1"))
        assert judge(tmp_path, "http://judge.invalid/v1", retries=0) == 0
    assert len(endpoint.requests) == 2


def test_nobody_at_the_address_is_one_error(tmp_path, capsys):
    write_files(tmp_path, questions=1, two_turns=0)
    assert judge(tmp_path, "http://127.0.0.1:9/v1", retries=1) == 1
    assert "(last: no connection)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        large,
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xff\xfe",
        b"[]",
        completion("Verdict: C"),
        completion("\n" * 150_000),
    ],
    ids=["large", "nested", "nested objects", "no text", "no object", "no verdict", "too long"],
)
def test_a_body_that_is_no_reply_is_malformed(tmp_path, capsys, body):
    write_files(tmp_path, questions=1, two_turns=0)
    with serve(lambda request, before: body() if callable(body) else body) as endpoint:
        assert judge(tmp_path, endpoint.url, malformed_retries=0) == 2
    assert "{'malformed reply': 2}" in capsys.readouterr().err


def test_half_a_character_in_a_reply_is_kept(tmp_path):
    write_files(tmp_path, questions=1, two_turns=0)
    with serve(lambda request, before: completion("\ud800\nVerdict: A")) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
        assert judge(tmp_path, endpoint.url) == 0
    assert len(endpoint.requests) == 2


class Hangs(Exception):
    """A search has not ended in so much time of the processor."""


@contextlib.contextmanager
def stopped_after(cpu_seconds):
    """Python's regular expressions let signals in, and this timer stands still while other processes run."""

    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


LONG = 1_000_000
"""Characters at which what is linear takes a part of a second, and what is quadratic hours."""


@pytest.mark.parametrize(
    "text",
    ["\n" * LONG, "*" * LONG, "Verdict: A" + "*" * LONG + "x", "verdict:" + " " * LONG, "verdict " * (LONG // 8)],
    ids=["lines", "stars", "stars behind a verdict", "blanks behind a verdict", "verdicts"],
)
def test_the_pattern_is_linear(text, monkeypatch):
    """A quadratic one does not end."""
    pattern = judge_settings.load(None, model="judge", base_url=None).verdict_pattern
    monkeypatch.setattr(client, "MOST_CHARACTERS", 2 * LONG)
    with stopped_after(cpu_seconds=60):
        assert parse(pattern, text) is None


def test_a_quadratic_pattern_would_be_stopped():
    # At the full length a pattern lets signals in only every few seconds.
    with pytest.raises(Hangs), stopped_after(cpu_seconds=0.2):
        re.findall("[*]*verdict", "*" * (LONG // 10))


@pytest.mark.parametrize("key", ["sk-ü", "sk-\n1"])
def test_a_key_that_no_header_can_hold_is_named(tmp_path, capsys, monkeypatch, key):
    write_files(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert judge(tmp_path, "http://127.0.0.1:9/v1") == 2
    err = capsys.readouterr().err
    assert "OPENAI_API_KEY: holds characters that no HTTP header can" in err and "sk-" not in err


def test_malformed_verdicts_are_unusable_and_never_guessed(tmp_path, capsys):
    """Question 81 never gets a verdict in one order: it is counted, left out of the shares, and asked again later."""
    write_files(tmp_path)

    def answer(request, before):
        if "question 1" in request["messages"][-1]["content"] and shown(request) == ("bad", "good"):
            return "Both are fine. I prefer A, or maybe B."
        return by_content(request, before)

    with serve(answer) as endpoint:
        assert judge(tmp_path, endpoint.url, malformed_retries=1) == 0
    total = result(tmp_path)["total"]
    assert (total["win"], total["tie"], total["lose"], total["unusable"]) == (4, 0, 0, 2)
    assert total["unusable_reasons"] == {"malformed reply": 2} and total["shares"]["win"]["value"] == 1
    assert len(endpoint.requests) == 12 + 2
    assert "2 of 12 requests gave no verdict: malformed reply" in capsys.readouterr().out
    with serve(by_content) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
    assert len(endpoint.requests) == 2 and result(tmp_path)["total"]["win"] == 6


def test_a_refused_request_is_unusable_but_a_run_without_any_verdict_fails(tmp_path, capsys):
    write_files(tmp_path)
    with serve(
        lambda r, n: (400, {}) if "question 3" in r["messages"][-1]["content"] else by_content(r, n)
    ) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
    assert result(tmp_path)["total"]["unusable_reasons"] == {"HTTP 400": 2}
    (tmp_path / "out.json.replies.jsonl").unlink()
    with serve(lambda request, before: "What a day.") as endpoint:
        assert judge(tmp_path, endpoint.url, malformed_retries=0) == 2
    assert "not one of 6 comparisons has a verdict" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "told"), [(401, "refuses the key in OPENAI_API_KEY"), (404, "no model 'judge'")])
def test_a_refusal_stops_at_once(tmp_path, capsys, status, told):
    write_files(tmp_path)
    with serve(lambda request, before: (status, {})) as endpoint:
        assert judge(tmp_path, endpoint.url, concurrency=2) == 2
    assert told in capsys.readouterr().err and len(endpoint.requests) <= 2
    assert not (tmp_path / "out.json").exists()


def test_resume_asks_only_for_what_is_missing(tmp_path, capsys):
    """The endpoint dies after five replies; a cut-off line in the cache is dropped; another model asks anew."""
    write_files(tmp_path)
    answered = []

    def dies(request, before):
        if len(answered) == 5:
            return (500, {"Retry-After-Ms": "1"})
        answered.append(request)
        return by_content(request, before)

    with serve(dies) as endpoint:
        assert judge(tmp_path, endpoint.url, concurrency=1, retries=1) == 1
    assert "gave no reply in 2 attempts (last: HTTP 500)" in capsys.readouterr().err
    replies = tmp_path / "out.json.replies.jsonl"
    assert len(replies.read_text().splitlines()) == 5
    replies.write_text(replies.read_text() + '{"key": "12", "repl')
    with serve(by_content) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
        assert len(endpoint.requests) == 7
        assert judge(tmp_path, endpoint.url) == 0
        assert len(endpoint.requests) == 7
        assert judge(tmp_path, endpoint.url, request={"temperature": 0.5}) == 0
        assert len(endpoint.requests) == 19
    assert result(tmp_path)["total"]["win"] == 6


def test_no_more_requests_at_once_than_allowed(tmp_path):
    write_files(tmp_path, questions=6, two_turns=6)
    with serve(lambda request, n: slowly(0.05, by_content(request, n))) as endpoint:
        assert judge(tmp_path, endpoint.url, concurrency=3) == 0
    assert 1 < endpoint.most_at_once <= 3 and len(endpoint.requests) == 24


def test_the_key_is_in_no_log_cache_or_output(tmp_path, capsys, caplog):
    """The key reaches the endpoint and stands nowhere else, even where the endpoint repeats it in its errors."""
    import logging

    write_files(tmp_path)
    caplog.set_level(logging.INFO)
    for status in (400, 401, 404, 500):
        with serve(lambda request, before, status=status: (status, {"Retry-After-Ms": "1"})) as endpoint:
            judge(tmp_path, endpoint.url, retries=1)
        assert f"Bearer {KEY}" in {headers.get("authorization") for headers in endpoint.headers}
    with serve(by_content) as endpoint:
        assert judge(tmp_path, endpoint.url) == 0
    written = [path.read_text() for path in tmp_path.iterdir()]
    out, err = capsys.readouterr()
    assert err.count("sr-dpo judge:") == 4
    for text in (*written, out, err, caplog.text):
        assert KEY not in text and "secret" not in text


def test_a_missing_key_and_a_missing_model_are_named(tmp_path, capsys, monkeypatch):
    write_files(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge(tmp_path, "http://127.0.0.1:9/v1") == 2
    assert "OPENAI_API_KEY: not set" in capsys.readouterr().err
    arguments = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    more = ["--questions", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "out.json")]
    assert main(["judge", *arguments, *more]) == 2
    assert "give --model NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"propmts": {}}, "propmts: Extra inputs"),
        ({"prompts": {"one_turn": "Compare $answer_a, $answer_b"}}, "prompts.one_turn: must hold"),
        ({"prompts": {"reference": "costs 5 $"}}, "a \\$ that starts no field"),
        ({"verdict_pattern": "(A|B"}, "not a regular expression"),
        ({"verdict_pattern": "A|B"}, "has 0 groups"),
        ({"request": {"n": 3}}, "request.n: is set by sr-dpo itself"),
        ({"concurrency": 0}, "concurrency: Input should be greater than 0"),
    ],
)
def test_bad_settings_are_named(tmp_path, changed, told):
    path = tmp_path / "judge.yaml"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    with pytest.raises(UsageError, match=told):
        judge_settings.load(path, model="judge", base_url=None)


def test_prompts_can_be_changed(tmp_path):
    """A user sets other prompts and another verdict; answers may hold texts that look like fields."""
    write_files(tmp_path, questions=1, two_turns=0)
    write(tmp_path / "a.jsonl", [{"id": "80", "response": "costs $5, $answer_b {question}"}])
    prompts = {"one_turn": "Q $question R $reference 1: $answer_a 2: $answer_b"}

    def answer(request, before):
        return "=> B" if re.search("1: bad 2: costs", request["messages"][-1]["content"]) else "=> A"

    with serve(answer) as endpoint:
        assert judge(tmp_path, endpoint.url, prompts=prompts, verdict_pattern="=> (A|B|tie)") == 0
    assert result(tmp_path)["total"]["win"] == 1
    texts = [request["messages"][-1]["content"] for request in endpoint.requests]
    assert all("costs $5, $answer_b {question}" in text for text in texts)


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("Verdict: A", "A"),
        ("so\nverdict: b.", "B"),
        ("**Verdict: tie**", "tie"),
        ("Verdict: **B**", "B"),
        ("> Verdict: [[A]]", "A"),
        ("Verdict: A\nSo:\nVerdict: A", "A"),
        ("Verdict: A\nVerdict: B", None),
        ("Verdict: A or B", None),
        ("Verdict: Both", None),
        ("The verdict: A is better, but not by much", None),
        ("A", None),
        ("", None),
    ],
)
def test_verdicts_are_found_or_there_is_none(reply, choice):
    settings = judge_settings.load(None, model="judge", base_url=None)
    assert parse(settings.verdict_pattern, reply) == choice


@pytest.mark.parametrize(
    ("first", "second", "outcome", "position"),
    [
        ("A", "B", "win", None),
        ("B", "A", "lose", None),
        ("A", "A", "tie", "A"),
        ("B", "B", "tie", "B"),
        ("tie", "tie", "tie", None),
        ("A", "tie", "tie", None),
        ("tie", "A", "tie", None),
        (None, "A", "unusable", None),
        ("B", None, "unusable", None),
    ],
)
def test_outcomes(first, second, outcome, position):
    comparison = Comparison("1", 1, None, Verdict(first), Verdict(second))
    assert (comparison.outcome, comparison.position) == (outcome, position)


def test_the_interval_is_that_of_an_independent_bootstrap():
    """Questions are drawn, not comparisons: 60 questions of one or two turns whose outcomes go together."""
    rng = np.random.default_rng(1)
    turns = rng.integers(1, 3, 60)
    wins = np.where(rng.random(60) < 0.6, turns, 0)
    ours = share(wins.astype(float), turns.astype(float), Bootstrap(resamples=20_000, confidence=0.9, seed=3))
    shares = []
    for _ in range(20_000):
        weights = np.bincount(rng.integers(60, size=60), minlength=60)
        shares.append(weights @ wins / (weights @ turns))
    low, high = np.quantile(shares, [0.05, 0.95])
    assert ours["value"] == wins.sum() / turns.sum()
    assert ours["low"] == pytest.approx(low, abs=0.01) and ours["high"] == pytest.approx(high, abs=0.01)
    drawn_apart = rng.binomial(turns.sum(), ours["value"], 20_000) / turns.sum()
    apart = np.subtract(*np.quantile(drawn_apart, [0.95, 0.05]))
    assert ours["high"] - ours["low"] > 1.15 * apart  # drawing comparisons would give a narrower one
    again = share(wins.astype(float), turns.astype(float), Bootstrap(resamples=20_000, confidence=0.9, seed=3))
    assert again == ours


def test_the_summary_of_one_or_no_usable_question_has_no_interval():
    bootstrap = Bootstrap(resamples=100, confidence=0.95, seed=0)
    one = [Comparison("1", turn, None, Verdict("A"), Verdict("B")) for turn in (1, 2)]
    assert summary(one, bootstrap)["shares"]["win"] == {"value": 1.0, "low": None, "high": None}
    none = [Comparison("1", 1, None, Verdict(None, "malformed reply"), Verdict("B"))]
    assert summary(none, bootstrap)["shares"]["win"]["value"] is None
    assert summary(none, bootstrap)["position_bias_rate"] is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"id": 1}, "line 1: missing key 'turns'"),
        ({"id": 1, "turns": ["a", "b", "c"]}, "line 1: turns: expected one or two texts"),
        ({"id": 1, "turns": [""]}, "line 1: turns: expected one or two"),
        ({"id": 1, "turns": ["a", 3]}, r"line 1: turns\[1\]: expected text, got a number"),
        ({"id": True, "text": "a"}, "line 1: id: expected text or an integer"),
        ([1], "line 1: not an object"),
    ],
)
def test_bad_questions_are_named(tmp_path, line, told):
    with pytest.raises(UsageError, match=told):
        read_questions(write(tmp_path / "questions.jsonl", [line]))


def test_answers_must_be_whole_and_question_ids_differ(tmp_path):
    questions = read_questions(write(tmp_path / "q.jsonl", [{"id": 1, "text": "x"}, {"id": 2, "turns": ["x", "y"]}]))
    assert [question.turns for question in questions] == [("x",), ("x", "y")]
    good = [{"id": 2, "turns": ["a", "b"]}, {"id": "1", "response": "c"}, {"id": 9, "response": "z"}]
    assert read_answers(write(tmp_path / "a.jsonl", good), questions) == {"1": ("c",), "2": ("a", "b")}
    with pytest.raises(UsageError, match="1 of 2 questions: has no answer: id 1"):
        read_answers(write(tmp_path / "a.jsonl", good[:1]), questions)
    with pytest.raises(UsageError, match="has fewer answers than turns: id 2"):
        read_answers(write(tmp_path / "a.jsonl", [{"id": 2, "response": "a"}, good[1]]), questions)
    with pytest.raises(UsageError, match="line 2: id 1 again"):
        read_questions(write(tmp_path / "q.jsonl", [{"id": 1, "text": "x"}, {"id": 1, "text": "y"}]))
    with pytest.raises(UsageError, match="choices: expected a list of objects"):
        read_answers(write(tmp_path / "a.jsonl", [{"id": 1, "choices": {}}]), questions)


def test_a_damaged_cache_is_named(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"key": 3}\n')
    with pytest.raises(UsageError, match="damaged"):
        client.Replies(path)
