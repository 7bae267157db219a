"""sr-dpo lm-eval against lm-evaluation-harness's own hf model: the same requests, per example, and the same scores."""

import json
import subprocess
import sys

import jax
import pytest
import yaml
from runs import BOS_FAMILIES, FAMILIES, REPOSITORY, make_config, make_pairs, model_directory, preference_file
from torch_models import random_weights
from toy_tokenizers import CHATML

from sr_dpo_jax.cli import main
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import train

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("same_programs")]

FLOAT32 = ["model.dtype=float32", "batch.row_multiple=8", "generation.slots=8", "batch.pairs_per_step=16"]
CONTEXT_TOKENS = 96


@pytest.fixture(autouse=True)
def needed():
    pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three task files of the three kinds, on local data; few-shot prompts and texts are longer than the context."""
    root = tmp_path_factory.mktemp("tasks")
    pairs = make_pairs(40, seed=5)
    rows = []
    for number, pair in enumerate(pairs):
        choices = [" " + pair["rejected"].strip(), " " + pair["chosen"].strip(), "", " no"]
        choices[2] = choices[1] + " and more"
        text = " ".join(other["prompt"] + other["chosen"] for other in pairs[number : number + 1 + number % 4])
        rows.append({"q": pair["prompt"] + " " * (number % 3), "choices": choices, "gold": number % 4, "text": text})
    rows[0]["text"] = "a"
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    for name, part in (("test", rows[:20]), ("train", rows[20:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    files = {name: str(root / f"{name}.jsonl") for name in ("test", "train")}
    common["dataset_kwargs"] = {"data_files": files, "cache_dir": str(root / "cache")}
    means = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "exact_match")
    ]
    asked = {"doc_to_text": "{{q}}", "fewshot_split": "train", "doc_to_choice": "{{choices}}"}
    choice = {"task": "toy_choice", "output_type": "multiple_choice", "doc_to_target": "gold", **asked}
    generation = {"until": ["e ", "\n"], "max_gen_toks": 20, "do_sample": False}
    write = {"task": "toy_write", "output_type": "generate_until", "generation_kwargs": generation}
    write |= {"doc_to_text": "{{q}}", "fewshot_split": "train", "doc_to_target": "{{choices[1]}}"}
    rolling = {"task": "toy_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    rolling["metric_list"] = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    for task in (
        {**choice, "metric_list": means[:2], "num_fewshot": 2},
        {**write, "metric_list": means[2:], "num_fewshot": 1},
        {**rolling, "doc_to_target": "{{text}}"},
        {**write, "task": "toy_code", "metric_list": means[2:], "unsafe_code": True},
    ):
        (root / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")
    return root


TASKS = ("toy_choice", "toy_rolling", "toy_write")


def run_harness(lm, tasks, **options):
    """Results and, by task, what the model said to every request."""
    from lm_eval.evaluator import evaluate

    from sr_dpo_jax.commands.lm_eval.command import load_tasks

    loaded = load_tasks(dict.fromkeys(TASKS), tasks)
    found = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True, **options)
    said = {}
    for name, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        said[name] = [(sample["arguments"], sample["resps"]) for sample in samples]
    return found["results"], said


def compare(ours, theirs):
    (our_results, our_said), (their_results, their_said) = ours, theirs
    greedy = set()
    for name in TASKS:
        for (our_arguments, our_answers), (their_arguments, their_answers) in zip(
            our_said[name], their_said[name], strict=True
        ):
            assert our_arguments == their_arguments
            for (one,), (other,) in zip(our_answers, their_answers, strict=True):
                if name == "toy_choice":
                    assert one[0] == pytest.approx(other[0], abs=1e-3)
                    assert one[1] == other[1]
                    greedy.add(one[1])
                elif name == "toy_rolling":
                    assert one == pytest.approx(other, abs=1e-3, rel=1e-5)
                else:
                    assert one == other
    for name in TASKS:
        assert our_results[name].keys() == their_results[name].keys()
        for metric, value in their_results[name].items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert our_results[name][metric] == expected, (name, metric)
    return greedy


def hf_model(directory):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)


def our_model(directory, *overrides):
    from sr_dpo_jax.commands.lm_eval.command import read_config
    from sr_dpo_jax.commands.lm_eval.mesh_lm import MeshLM
    from sr_dpo_jax.train.setup import read_model, set_up

    config = read_config(str(directory), [*FLOAT32, *overrides])
    model_files, tokenizer = read_model(config)
    setup = set_up(config, model_files)
    return MeshLM(setup, setup.latest_params()[0], tokenizer)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2"])
def test_every_request_is_answered_as_by_the_hf_model(tmp_path, tasks, family):
    """The models have a BOS token or none, and windows; prompts are cut to the context; the mesh is 4 × 2."""
    import torch

    fields = {"max_position_embeddings": CONTEXT_TOKENS, **FAMILIES[family]}
    directory = model_directory(tmp_path / "model", family, **fields)
    random_weights(torch, directory)
    ours = our_model(directory, "mesh.fsdp=4", "mesh.tensor=2")
    theirs = hf_model(directory)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    assert (ours.tok_encode("a cat")[0] == ours.tokenizer.bos_token_id) == (family in BOS_FAMILIES)
    for text in ("a cat", f"{ours.tokenizer.decode(ours.prefix_token_id)}a cat", "", "  sky "):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        if text:
            assert ours._encode_pair(text, " blue") == theirs._encode_pair(text, " blue")
    compare(run_harness(ours, tasks), run_harness(theirs, tasks))
    ((_, step), *more) = ours._scorer._compiled
    assert step._cache_size() == 1 and len(more) <= 1  # one shape a kind of request


def test_the_chat_template_is_applied_as_by_the_hf_model(tmp_path, tasks, capsys):
    import torch

    directory = model_directory(tmp_path / "model", max_position_embeddings=4 * CONTEXT_TOKENS)
    random_weights(torch, directory)
    command = ["lm-eval", str(directory), *FLOAT32, "--tasks", "toy_choice", "--include-path", str(tasks)]
    assert main([*command, "--apply-chat-template"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    ours, theirs = (run_harness(model(directory), tasks, apply_chat_template=True) for model in (our_model, hf_model))
    compare(ours, theirs)
    assert all("<|im_start|>" in arguments[0][0] for arguments, _ in ours[1]["toy_choice"])
    output = tmp_path / "out.json"
    assert main([*command, "--apply-chat-template", "--output", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["apply_chat_template"] is True
    for metric, value in theirs[0]["toy_choice"].items():
        if "," in metric and "stderr" not in metric:
            assert result["results"]["toy_choice"][metric] == pytest.approx(value, rel=1e-4), metric


def test_greedy_continuations_are_flagged_as_by_the_hf_model(tmp_path):
    """Continuations that the hf model itself generates, whole, cut, and with a changed end; and empty contexts."""
    import torch
    from lm_eval.api.instance import Instance

    directory = model_directory(tmp_path / "model", max_position_embeddings=CONTEXT_TOKENS)
    random_weights(torch, directory)
    ours, theirs = our_model(directory), hf_model(directory)
    contexts = [pair["prompt"] for pair in make_pairs(12, seed=8)]
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}

    def instances(kind, arguments):
        return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]

    written = theirs.generate_until(instances("generate_until", [(context, options) for context in contexts]))
    assert ours.generate_until(instances("generate_until", [(context, options) for context in contexts])) == written
    asked = [(context, text) for context, text in zip(contexts, written, strict=True) if text]
    asked += [(context, text + " zz") for context, text in asked] + [("", " the sky"), ("", "a")]
    expected = theirs.loglikelihood(instances("loglikelihood", asked))
    found = ours.loglikelihood(instances("loglikelihood", asked))
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert {flag for _, flag in found} == {True, False}
    for (one, _), (other, _) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("lora", [None, {"rank": 8, "alpha": 64.0}], ids=["all weights", "adapters"])
def test_a_run_gives_what_its_export_gives(tmp_path, tasks, capsys, lora):
    """The command on a run directory against the hf model on `sr-dpo export` of it, and not on the base model."""
    import torch

    directory = model_directory(tmp_path / "model", max_position_embeddings=CONTEXT_TOKENS)
    random_weights(torch, directory)
    data = preference_file(tmp_path / "pairs.jsonl", 16)
    config = make_config(
        tmp_path, directory, data, model={"init": "pretrained"}, optimizer={"learning_rate": 1e-2}, seed=3, lora=lora
    )
    assert main(["lm-eval", config.output_dir, "--tasks", "toy_choice", "--include-path", str(tasks)]) == 2
    assert train(config) == 0
    merged = [] if lora is None else ["--merge", "--dtype", "float32"]
    assert main(["export", config.output_dir, str(tmp_path / "exported"), *merged]) == 0
    output = tmp_path / "out.json"
    arguments = ["lm-eval", config.output_dir, *FLOAT32, "--tasks", ",".join(TASKS), "--include-path", str(tasks)]
    assert main([*arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    results, _ = run_harness(hf_model(tmp_path / "exported"), tasks)
    base, _ = run_harness(hf_model(directory), tasks)
    for name in TASKS:
        for metric, value in results[name].items():
            if "," in metric and not metric.split(",")[0].endswith("_stderr"):
                assert result["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    perplexity = "byte_perplexity,none"
    assert base["toy_rolling"][perplexity] != pytest.approx(results["toy_rolling"][perplexity], rel=1e-3)
    assert result["step"] == 2 and result["n-shot"] == {"toy_choice": 2, "toy_rolling": 0, "toy_write": 1}
    assert "toy_choice" in capsys.readouterr().out


WITHOUT_TORCH = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] == "torch" else find_spec(name, *more)
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
"""
"""Hides torch from a process, as on a machine where it is not installed."""


def test_no_torch_is_needed(tmp_path, tasks):
    """The command in a process that has no torch, with a limit."""
    directory, output = model_directory(tmp_path / "model", max_position_embeddings=CONTEXT_TOKENS), tmp_path / "o.json"
    arguments = ["lm-eval", str(directory), "model.init=random", *FLOAT32, "--tasks", ",".join(TASKS)]
    arguments += ["--include-path", str(tasks), "--limit", "3", "--output", str(output)]
    run = f"from sr_dpo_jax.cli import main\nassert main({arguments!r}) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH + run], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {name: count["effective"] for name, count in result["n-samples"].items()} == dict.fromkeys(TASKS, 3)


def test_the_papers_tasks_exist_with_their_metrics():
    """The harness lists the tasks and their metrics without fetching their data."""
    from lm_eval.tasks import TaskManager

    from sr_dpo_jax.commands.lm_eval.command import PAPER

    manager = TaskManager()
    for task, (_, metric_and_filter) in PAPER.items():
        assert task in manager.all_tasks
        path = manager.task_index[task].yaml_path
        metric, _, filtered = metric_and_filter.partition(",")
        text = path.read_text(encoding="utf-8")
        included = [path.parent / line.split()[1] for line in text.splitlines() if line.startswith("include:")]
        text += "".join(other.read_text(encoding="utf-8") for other in included)
        assert f"metric: {metric}\n" in text
        assert filtered == "none" or f'name: "{filtered}"' in text
    results = {task: {metric: 0.1 * number} for number, (task, (_, metric)) in enumerate(PAPER.items())}
    from sr_dpo_jax.commands.lm_eval.command import paper_table

    assert paper_table(results)["average"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tasks", "toy_chioce"], "did you mean toy_choice"),
        (["--tasks", "toy_choice,"], "an empty name"),
        (["--tasks", "toy_code"], "task toy_code: runs code that the model writes"),
        (["--tasks", "toy_choice", "--num-fewshot", "-1"], "must be at least 0"),
        (["--tasks", "toy_choice", "--limit", "0"], "must be at least 1"),
        (["--paper", "--num-fewshot", "3"], "--paper has its own counts"),
        (["--tasks", "toy_choice", "--output", "/no/such/place.json"], "name a file"),
        (["model.dtyp=float32", "--tasks", "toy_choice"], "did you mean dtype"),
    ],
)
def test_bad_options_are_named(tmp_path, tasks, capsys, options, told):
    assert main(["lm-eval", str(tmp_path), *options, "--include-path", str(tasks)]) == 2
    assert told in capsys.readouterr().err


def test_a_generation_beyond_a_rope_that_changes_with_length_is_refused(tmp_path):
    from lm_eval.api.instance import Instance

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 2.0, **factors}
    directory = model_directory(tmp_path / "model", "llama", max_position_embeddings=32, rope_parameters=rope)
    ours = our_model(directory, "model.init=random")
    with pytest.raises(UsageError, match=r"max_gen_toks=20: the longest prompt has .* beyond 16"):
        ours.generate_until([Instance("generate_until", {}, ("a cat", {"max_gen_toks": 20, "until": []}), 0)])


def test_the_best_checkpoint_can_be_asked_for(tmp_path, tasks, capsys, monkeypatch):
    """--best takes the parameters that `eval --best` takes, from `latest_params`; a model that is no run has none."""
    from sr_dpo_jax.train.setup import Setup

    directory = model_directory(tmp_path / "model", max_position_embeddings=CONTEXT_TOKENS)
    config = make_config(tmp_path, directory, tmp_path / "pairs.jsonl", model={"init": "random"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    arguments = ["--tasks", "toy_choice", "--include-path", str(tasks)]
    asked = []

    def params(*_, best):
        asked.append(best)
        raise UsageError("stopped here")

    monkeypatch.setattr(Setup, "latest_params", params)
    for options in ([], ["--best"]):
        assert main(["lm-eval", config.output_dir, *arguments, *options]) == 2
    assert asked == [False, True]
    assert main(["lm-eval", str(directory), *arguments, "--best"]) == 2
    assert "is no run" in capsys.readouterr().err


def test_generation_settings_that_are_not_known_are_refused(tmp_path):
    from lm_eval.api.instance import Instance

    directory = model_directory(tmp_path / "model", max_position_embeddings=CONTEXT_TOKENS)
    ours = our_model(directory, "model.init=random")
    for options, told in (({"num_beams": 4}, "num_beams: not supported"), ({"max_gen_toks": 96}, "max_gen_toks=96")):
        with pytest.raises(UsageError, match=told):
            ours.generate_until([Instance("generate_until", {}, ("a cat", options), 0)])
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 5, "max_gen_toks": 8, "until": "q"}
    texts = ours.generate_until([Instance("generate_until", {}, ("a cat", sampled), n) for n in range(8)])
    assert len(set(texts)) > 1
    assert jax.device_count() == 8
