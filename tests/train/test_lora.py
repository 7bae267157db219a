"""Training of LoRA adapters: the base never changes, the reference is the model without them, resume is exact."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from runs import make_config, metrics_of, model_directory, preference_file, state_of, without_times
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.export import export
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train import loop
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.setup import read_model

LORA = {"rank": 4, "alpha": 8.0}
pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    model_directory(root / "model", "llama", num_key_value_heads=2)
    preference_file(root / "train.jsonl", 40)
    preference_file(root / "held_out.jsonl", 6, seed=3)
    return root


def config_of(world, root, **sections):
    return make_config(root, world / "model", world / "train.jsonl", **{"lora": LORA, **sections})


def copied(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def watched(monkeypatch):
    """The job of a run, and its base and adapters as they were before the first step."""
    seen, prepare = {}, loop.prepare

    def tried(*arguments, **options):
        job, state = prepare(*arguments, **options)
        seen.update(job=job, base=copied(job.base), start=copied(state.params))
        return job, state

    monkeypatch.setattr(loop, "prepare", tried)
    return seen


def stored_params(config):
    """What the latest checkpoint holds of the parameters, by path."""
    stored = {name.replace("']['", ".").strip("[']"): array for name, array in state_of(config.output_dir).items()}
    return {name.removeprefix("params."): array for name, array in stored.items() if name.startswith("params.")}


def same(ours, theirs):
    ours, theirs = (flatten_dict(tree, sep=".") for tree in (ours, theirs))
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("cached", "float32"),
        ("online", "bfloat16"),
        pytest.param("online", "float32", marks=pytest.mark.slow),
        pytest.param("cached", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_margins_begin_at_zero_and_the_base_stays(world, tmp_path, monkeypatch, mode, dtype):
    seen = watched(monkeypatch)
    config = config_of(world, tmp_path, reference={"mode": mode}, model={"dtype": dtype})
    assert train(config) == 0
    first, *_, last = metrics_of(config.output_dir)
    assert first["margin"] == first["augmented/margin"] == 0.0 and last["margin"] != 0.0
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert same(jax.device_get(seen["job"].base), seen["base"])
    assert stored_params(config).keys() == flatten_dict(seen["start"], sep=".").keys()
    types = {path: leaf.dtype.name for path, leaf in flatten_dict(seen["base"], sep=".").items()}
    assert {name for path, name in types.items() if "norm" not in path} == {dtype}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(seen["start"])} == {"float32"}


def test_at_learning_rate_zero_no_byte_changes(world, tmp_path, monkeypatch):
    """2e-37 is the smallest rate that a configuration takes; an update of it vanishes beside any weight but 0."""
    seen = watched(monkeypatch)
    optimizer = {"name": "adamw", "learning_rate": 2e-37, "warmup_steps": 0}
    config = config_of(world, tmp_path, optimizer=optimizer, train={"max_steps": 1}, lora={**LORA, "init": "zero_b"})
    assert train(config) == 0
    stored = stored_params(config)
    for name, start in flatten_dict(seen["start"], sep=".").items():
        assert np.abs(stored[name] - start).max() <= (1e-36 if name.endswith(".b") else 0)
    assert same(jax.device_get(seen["job"].base), seen["base"])


@pytest.mark.parametrize("name", ["sft", pytest.param("simpo", marks=pytest.mark.slow)])
def test_objectives_without_a_reference_train_adapters(world, tmp_path, monkeypatch, name):
    seen = watched(monkeypatch)
    config = config_of(world, tmp_path, objective={"name": name, "lam": None})
    assert train(config) == 0
    assert np.isfinite([line["loss"] for line in metrics_of(config.output_dir)]).all()
    ended = stored_params(config)
    moved = {path: np.abs(ended[path] - start).max() for path, start in flatten_dict(seen["start"], sep=".").items()}
    assert min(moved.values()) > 0 and same(copied(seen["job"].base), seen["base"])


def test_a_run_in_two_parts_is_the_run_in_one(world, tmp_path):
    whole, parts = (config_of(world, tmp_path / name, train={"max_steps": 4}) for name in ("whole", "parts"))
    assert train(whole) == 0
    assert train(parts.model_copy(update={"train": parts.train.model_copy(update={"max_steps": 2})})) == 0
    assert train(parts) == 0
    ours, theirs = state_of(parts.output_dir), state_of(whole.output_dir)
    assert ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert without_times(metrics_of(parts.output_dir)) == without_times(metrics_of(whole.output_dir))


@pytest.mark.parametrize("changed", [None, {**LORA, "rank": 5}, {**LORA, "alpha": 9.0}], ids=["none", "rank", "alpha"])
def test_a_checkpoint_of_other_adapters_is_refused(world, tmp_path, changed):
    config = config_of(world, tmp_path, train={"max_steps": 1})
    assert train(config) == 0
    allowed = changed == {**LORA, "alpha": 9.0}
    said = r"lora\.alpha: 8\.0 -> 9\.0" if allowed else r"lora\.rank: 4 -> "
    with pytest.raises(UsageError, match=said) as refused:
        train(config_of(world, tmp_path, lora=changed))
    assert str(refused.value).endswith("--allow-change lora.alpha" if allowed else "or choose another output_dir")


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def tuned(request, tmp_path_factory):
    """A run on weights from a file, whose adapters are exported both ways; GPT-NeoX keeps three matrices in one."""
    root = tmp_path_factory.mktemp(request.param)
    fields = {"num_key_value_heads": 2} if request.param == "llama" else {}
    model_directory(root / "drawn", request.param, **fields)
    preference_file(root / "train.jsonl", 40)
    preference_file(root / "held_out.jsonl", 6, seed=3)
    drawn = make_config(root / "first", root / "drawn", root / "train.jsonl", train={"max_steps": 1})
    assert train(drawn) == 0
    export(root / "first" / "run", root / "model")
    samples = {"train": {"samples": 2}, "generation": {"max_new_tokens": 8, "slots": 8}}
    config = on_weights(root, root / "lora", lora=LORA, **samples)
    assert train(config) == 0
    export(root / "lora" / "run", root / "adapter")
    export(root / "lora" / "run", root / "merged", merge=True)
    return root


def on_weights(root, out, model="model", **sections):
    data = {"eval_path": str(root / "held_out.jsonl")}
    section = {"path": str(root / model), "init": "pretrained"}
    return make_config(out, root / model, root / "train.jsonl", model=section, data=data, **sections)


def measured(config):
    return {key: value for key, value in metrics_of(config.output_dir)[-1].items() if "logps" in key}


def test_merged_weights_give_the_numbers_of_the_adapters(tuned):
    ours = measured(on_weights(tuned, tuned / "lora"))
    merged = on_weights(tuned, tuned / "eval", model="merged", objective={"name": "sft", "lam": None})
    assert main(["eval", str(written_config(tuned / "eval", merged))]) == 0
    theirs = json.loads((tuned / "eval" / "run" / "eval.json").read_text())
    assert theirs["eval/logps/chosen"] == pytest.approx(ours["eval/logps/chosen"], rel=1e-5)


def test_responses_are_those_of_merged_weights(tuned, tmp_path):
    """`sr-dpo generate` with the adapters of a run, and samples while it trained."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "reverse: a b {n}"}}\n' for n in range(3)))
    few = {"generation": {"max_new_tokens": 8, "slots": 8}}
    adapted = on_weights(tuned, tuned / "lora", lora=LORA, **few)
    merged = on_weights(tuned, tmp_path / "merged", model="merged", **few)
    texts = []
    for name, config in (("adapted", adapted), ("merged", merged)):
        path, out = written_config(tmp_path / name, config), tmp_path / f"{name}.jsonl"
        assert main(["generate", str(path), "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(out)]) == 0
        texts.append(out.read_text())
    assert texts[0] == texts[1] and texts[0].count("response_tokens") == 3
    samples = [json.loads(line) for line in (tuned / "lora" / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and all(line["step"] == 5 for line in samples)


def written_config(root, config):
    root.mkdir(exist_ok=True)
    (root / "config.yaml").write_text(config.to_yaml())
    return root / "config.yaml"


def test_training_goes_on_from_a_peft_directory(tuned, tmp_path, monkeypatch):
    """The reference is the model with the adapters on: margins begin at 0, at the log-probs that training had reached;
    and an export before any update has their very bytes."""
    seen = watched(monkeypatch)
    form = {**LORA, "start": str(tuned / "adapter")}
    config = on_weights(tuned, tmp_path, lora=form, optimizer={"learning_rate": 2e-37}, train={"max_steps": 1})
    assert train(config) == 0
    last, first = stored_params(on_weights(tuned, tuned / "lora")), flatten_dict(seen["start"], sep=".")
    assert all(last[name].tobytes() == value.tobytes() for name, value in first.items())
    # 0 to a rounding: exactly so with the flags of a run, and not with those that make the tests compile faster.
    assert metrics_of(config.output_dir)[0]["margin"] == pytest.approx(0, abs=2e-6)
    assert measured(config) == pytest.approx(measured(on_weights(tuned, tuned / "lora")), rel=1e-6)
    export(tmp_path / "run", tmp_path / "adapter")
    file = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / file).read_bytes() == (tuned / "adapter" / file).read_bytes()


def test_weights_that_are_drawn_can_have_adapters_from_a_file(tuned, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    form = {**LORA, "start": str(tuned / "adapter")}
    config = make_config(tmp_path, tuned / "drawn", tuned / "train.jsonl", lora=form, train={"max_steps": 1})
    assert train(config) == 0
    given, held = stored_params(on_weights(tuned, tuned / "lora")), flatten_dict(seen["start"], sep=".")
    assert all(given[name].tobytes() == value.tobytes() for name, value in held.items())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": 5}, r"set lora\.rank=4 lora\.alpha=8 lora\.rslora=false"),
        ({"targets": ["query", "value"]}, r"lora\.targets=\[query,key,value,output"),
        ({"start": "nowhere"}, "has no adapter_config.json"),
    ],
)
def test_a_start_of_another_form_is_refused(tuned, tmp_path, changed, said):
    form = {**LORA, "start": str(tuned / "adapter"), **changed}
    with pytest.raises(UsageError, match=said):
        read_model(on_weights(tuned, tmp_path, lora=form))


def test_targets_that_a_family_has_not_are_refused(world, tmp_path):
    """Else no adapter would be there, and all weights would be trained."""
    model_directory(tmp_path / "model", "gpt_neox")
    config = make_config(tmp_path, tmp_path / "model", world / "train.jsonl", lora={"targets": ["gate"]})
    with pytest.raises(UsageError, match=r"lora\.targets=\[gate\]: gpt_neox has none of them; choose from query"):
        train(config)


def test_targets_stand_in_one_order(world, tmp_path):
    config = config_of(world, tmp_path, lora={"targets": ["up", "query", "up"]})
    assert config.lora.targets == ("query", "up")


def test_adapters_stand_beside_the_weights_that_they_were_trained_with(tuned, tmp_path):
    """`sr-dpo eval` and a merge with other weights, another scale, other targets, or without adapters."""
    shutil.copytree(tuned / "lora" / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    file = written_config(tmp_path, on_weights(tuned, tmp_path, lora=LORA))
    assert main(["eval", str(file)]) == 0
    export(tuned / "lora" / "run", tmp_path / "other", merge=True)
    other = f"model.path={tmp_path / 'other'}"
    for override in ("lora.alpha=80", "lora.targets=[query]", "lora.rank=5", "lora=null", other):
        assert main(["eval", str(file), override]) == 2, override
    (tmp_path / "run" / "config.yaml").write_text(config.replace(str(tuned / "model"), str(tmp_path / "other")))
    with pytest.raises(UsageError, match=r"trained with other weights or in another form:\n  model\.path: "):
        export(tmp_path / "run", tmp_path / "out", merge=True)


def test_a_part_of_a_fused_module_comes_back(tuned, tmp_path):
    """GPT-NeoX has one module for three matrices; with adapters of some, their rows alone are in the file."""
    form = {**LORA, "targets": ["query", "value"]}
    assert train(on_weights(tuned, tmp_path, lora=form, train={"max_steps": 2})) == 0
    export(tmp_path / "run", tmp_path / "adapter")
    still = {"optimizer": {"learning_rate": 2e-37}, "train": {"max_steps": 1}}
    start = {**form, "start": str(tmp_path / "adapter")}
    assert train(on_weights(tuned, tmp_path / "again", lora=start, **still)) == 0
    export(tmp_path / "again" / "run", tmp_path / "second")
    ours, given = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("second", "adapter"))
    assert ours.keys() == given.keys() and all(ours[name].tobytes() == given[name].tobytes() for name in given)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("name", "missing"),
        ("shape", r"is \(\(.*\), 'F32'\), and should be"),
        ("type", "in one of F16"),
        ("empty", "missing"),
    ],
)
def test_a_file_of_adapters_that_does_not_fit_is_refused(tuned, tmp_path, damage, said):
    shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    match damage:
        case "name":
            tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        case "shape":
            tensors[first] = tensors[first].reshape(-1)
        case "type":
            tensors[first] = tensors[first].astype(np.int32)
        case "empty":
            tensors = {}
    save_file(tensors, file)
    with pytest.raises(UsageError, match=said):
        read_model(on_weights(tuned, tmp_path, lora={**LORA, "start": str(tmp_path / "adapter")}))


def test_what_the_other_commands_say(tuned, tmp_path):
    with pytest.raises(UsageError, match=r"is a PEFT adapter, not a model; to train on from it set lora\.start"):
        read_model(on_weights(tuned, tmp_path, model="adapter"))
    with pytest.raises(UsageError, match="trained no adapters"):
        export(tuned / "first" / "run", tmp_path / "out", merge=True)
    with pytest.raises(UsageError, match=r"lora\.dropout.*is not implemented"):
        on_weights(tuned, tmp_path, lora={**LORA, "dropout": 0.1})
    card = (tuned / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "rank 4, alpha 8 (alpha / rank)" in card
    assert not (tuned / "adapter" / "config.json").exists() and (tuned / "adapter" / "tokenizer.json").exists()
    assert "merged" in (tuned / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("r", "four"),
        ("lora_alpha", 9),
        ("r", True),
        ("rank_pattern", {"^down": 3}),
        ("alpha_pattern", {"layers.1": -1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("of_a_later_version", {"some": 1}),
    ],
)
def test_adapters_that_need_more_are_refused_by_field(tuned, tmp_path, field, value):
    shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    said = {"r": "r, lora_alpha", "lora_alpha": r"lora\.alpha=9", "alpha_pattern": "numbers above 0"}
    with pytest.raises(UsageError, match=said.get(field, field)):
        read_model(on_weights(tuned, tmp_path, lora={**LORA, "start": str(tmp_path / "adapter")}))
