"""Configuration: what is read, what is refused, and that a refusal says where, what and how to mend it."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_dpo_jax.config import schema
from sr_dpo_jax.config.load import config_from_dict, load_config
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.config.section import Section
from sr_dpo_jax.config.yaml_text import dump, parse
from sr_dpo_jax.errors import UsageError

SMALLEST = {
    "output_dir": "runs/a",
    "model": {"path": "EleutherAI/pythia-70m"},
    "data": {"path": "train.jsonl"},
    "objective": {"name": "sr_dpo", "lam": 0.3},
}


def smallest(**sections) -> dict:
    """The smallest configuration with these sections merged over it; a key of None is taken out."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALLEST.items()}
    for name, value in sections.items():
        if isinstance(value, dict):
            merged[name] = {key: item for key, item in (merged.get(name, {}) | value).items() if item is not ...}
        elif value is ...:
            del merged[name]
        else:
            merged[name] = value
    return merged


def write(tmp_path, text: str):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(raw: dict) -> str:
    with pytest.raises(UsageError) as error:
        config_from_dict(raw, where="run.yaml")
    return str(error.value)


def best(metric: str, **sections) -> dict:
    """A run with two held-out sets that chooses by this metric."""
    data = {"eval_path": "a.jsonl", "eval_sets": {"b": {"path": "b.jsonl"}}}
    return {"data": data, "train": {"eval_every_steps": 5}, "checkpoint": {"best_metric": metric}} | sections


DPO = {"name": "dpo", "lam": ...}


def test_the_paper_is_the_default():
    config = config_from_dict(SMALLEST, where="run.yaml")
    assert (config.objective.beta, config.optimizer.learning_rate, config.optimizer.warmup_steps) == (0.1, 5e-7, 150)
    assert (config.optimizer.name, config.optimizer.schedule, config.optimizer.max_grad_norm) == (
        "rmsprop",
        "constant",
        10.0,
    )
    assert (config.data.max_length, config.data.max_prompt_length, config.batch.pairs_per_step) == (512, 256, 64)
    assert config.refinement.prompt.startswith("Please generate a response with a usefulness rating of 100")
    assert config.data.path[0].path == "train.jsonl" and config.data.path[0].weight == 1.0


def test_round_trip(tmp_path):
    raw = smallest(
        data={"path": ["a.jsonl", {"path": "b.parquet", "weight": 0.5}], "eval_path": "c.jsonl"},
        refinement={"prompt": 'Größe: "100"\n# no comment, x: y'},
        optimizer={"learning_rate": 3e-5, "name": "adamw", "weight_decay": 1},
        mesh={"fsdp": 4, "tensor": -1},
        train={"max_steps": 7, "eval_every_steps": 2},
    )
    config = config_from_dict(raw, where="run.yaml")
    path = write(tmp_path, config.to_yaml())
    assert load_config(path) == config
    assert load_config(path).to_yaml() == config.to_yaml()
    assert set(yaml.safe_load(config.to_yaml())) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5e-7", 5e-7), ("4E-4", 4e-4), ("1e3", 1000.0), ("+2.5e-06", 2.5e-6), ("1", 1.0), (".5", 0.5)],
)
def test_numbers(tmp_path, text, expected):
    """YAML 1.1, and so PyYAML, takes 5e-7 for a string."""
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + f"optimizer:\n  learning_rate: {text}\n")
    value = load_config(path).optimizer.learning_rate
    assert value == expected and isinstance(value, float)
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    assert load_config(path, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == expected


def test_strings_that_look_like_numbers_stay_strings(tmp_path):
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    assert load_config(path, ["output_dir='5e-7'"]).output_dir == "5e-7"
    assert load_config(path, ["model.revision=e5a1"]).model.revision == "e5a1"


def test_held_out_sets(tmp_path):
    """In their order, frozen, each with its own path, split, format and number of pairs; a file reads back the same."""
    sets = {
        "helpful": {"path": ["a.jsonl", {"path": "b/c", "revision": "main"}], "split": "dev", "pairs": 50},
        "as_uf-2": {"path": "c.parquet", "format": "ultrafeedback"},
    }
    path = write(tmp_path, yaml.safe_dump(smallest(data={"eval_path": "d.jsonl", "eval_sets": sets}), sort_keys=False))
    config = load_config(
        path, ["data.eval_sets.more.path=e.jsonl", "data.eval_sets.helpful.pairs=7", "data.eval_split=valid"]
    )
    assert hash(config) is not None and load_config(write(tmp_path, config.to_yaml())) == config
    held_out = [
        (name, [source.path for source in one.path], one.split, one.format, one.pairs)
        for name, one in config.data.held_out
    ]
    assert held_out == [
        ("eval", ["d.jsonl"], "valid", None, None),
        ("eval/helpful", ["a.jsonl", "b/c"], "dev", None, 7),
        ("eval/as_uf-2", ["c.parquet"], "test", "ultrafeedback", None),
        ("eval/more", ["e.jsonl"], "test", None, None),
    ]
    assert config_from_dict(SMALLEST, where="x").data.held_out == ()


@pytest.mark.parametrize(
    ("metric", "mode", "objective"),
    [
        ("eval/rewards/accuracies", "max", {}),
        ("eval/b/loss", "min", {}),
        ("eval/refinement", "max", {}),
        ("eval/b/loss_per_token", "min", {"name": "sft", "lam": ...}),
    ],
)
def test_what_may_choose_the_best_checkpoint(metric, mode, objective):
    sections = best(metric, objective=objective)
    sections["checkpoint"]["best_mode"] = mode
    sections["train"]["early_stopping_patience"] = 2
    assert config_from_dict(smallest(**sections), where="x").checkpoint.best_metric == metric


def test_overrides(tmp_path):
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    config = load_config(
        path,
        [
            *("seed=3", "objective.lam=1", "data.path=[x.jsonl, y.jsonl]", "model.revision=null"),
            *("refinement.prompt='a: b'", "train.max_steps=5", "mesh.fsdp=2", "output_dir=a=b", "seed=4"),
        ],
    )
    assert config.seed == 4 and config.objective.lam == 1.0 and config.train.max_steps == 5
    assert [source.path for source in config.data.path] == ["x.jsonl", "y.jsonl"]
    assert config.refinement.prompt == "a: b"
    assert config.mesh.fsdp == 2 and config.output_dir == "a=b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["'seed'", "section.key=value"]),
        ("=3", ["section.key=value"]),
        ("output_dir.x=3", ["output_dir.x", "output_dir is a value, not a section"]),
        ("optimizer.learning_rate=[1", ["optimizer.learning_rate", "not valid YAML"]),
        ("optimizer.learning_rat=1", ["optimizer.learning_rat", "did you mean learning_rate?"]),
        ("trian.epochs=1", ["trian", "did you mean train?"]),
    ],
)
def test_bad_overrides(tmp_path, override, words):
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    with pytest.raises(UsageError) as error:
        load_config(path, [override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("value", ["!!int abc", "!!float abc", "[" * 3000])
def test_yaml_values_that_pyyaml_itself_fails_on(tmp_path, value):
    with pytest.raises(UsageError, match="output_dir"):
        load_config(write(tmp_path, yaml.safe_dump(SMALLEST)), [f"output_dir={value}"])


@pytest.mark.parametrize("value", ["2020-01-01", "2020-13-45"])
def test_dates_stay_text(tmp_path, value):
    config = load_config(write(tmp_path, yaml.safe_dump(SMALLEST)), [f"model.revision={value}"])
    assert config.model.revision == value


def test_a_key_that_asks_for_nothing_may_stand_anywhere(tmp_path):
    """Null takes a key away, and a resolved file of a run from before the unions, with all keys, loads as it did."""
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    plain = load_config(path, ["objective.name=dpo", "objective.lam=null"])
    assert "lam" not in plain.to_yaml() and plain == load_config(write(tmp_path, plain.to_yaml()))
    before = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.0, "first_moment_dtype": None}
    resolved = smallest(objective={"label_smoothing": 0.0}, optimizer=before)
    assert config_from_dict(resolved, where="before") == config_from_dict(SMALLEST, where="x")


def test_frozen():
    config = config_from_dict(SMALLEST, where="run.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.learning_rate = 1.0
    with pytest.raises(TypeError):
        config.data.path[0] = "x"
    assert hash(config) == hash(config_from_dict(SMALLEST, where="elsewhere"))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"output_dir": ...}, ["output_dir: missing", "output_dir=..."]),
        ({"model": {"path": ...}}, ["model.path: missing", "model.path=..."]),
        ({"objective": {"nmae": "dpo"}}, ["objective.nmae: no such key", "did you mean name?"]),
        ({"optimiser": {}}, ["optimiser: no such key", "did you mean optimizer?"]),
        ({"train": {"zzz": 1}}, ["train.zzz: no such key", "known here: epochs, max_steps"]),
        ({"data": {"path": [{"path": "a", "wieght": 2}]}}, ["data.path.0.wieght", "did you mean weight?"]),
        ({"data": {"path": [{"weight": 2}]}}, ["data.path.0.path: missing"]),
        ({"data": {"path": []}}, ["data.path=", "at least 1"]),
        ({"data": {"path": 3}}, ["data.path=3"]),
        ({"data": {"path": [{"path": "a", "weight": 0}]}}, ["data.path.0.weight=0", "greater than 0"]),
        ({"seed": "1"}, ["seed='1'", "valid integer"]),
        ({"seed": 1.5}, ["seed=1.5", "integer"]),
        ({"seed": True}, ["seed=True", "valid integer"]),
        ({"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
        ({"model": "pythia"}, ["model='pythia'"]),
        ({"model": {"path": 3}}, ["model.path=3", "valid string"]),
        ({"model": {"dtype": "float16"}}, ["model.dtype='float16'", "'bfloat16' or 'float32'"]),
        (
            {"objective": {"name": "srdpo"}},
            ["objective.name='srdpo'", "did you mean sr_dpo? choose one of sft, [sr_]dpo, [sr_]sigmoid_norm, "],
        ),
        (
            {"objective": {"name": "sr_apo_zero"}},
            [
                "objective.name='sr_apo_zero': apo_zero has no refined form, as its loss has no margin",
                "choose apo_zero",
            ],
        ),
        ({"objective": {"beta": 0}}, ["objective.beta=0", "greater than 0"]),
        ({"objective": {"beta": math.nan}}, ["objective.beta=nan", "finite"]),
        ({"optimizer": {"learning_rate": math.inf}}, ["optimizer.learning_rate=inf", "finite"]),
        ({"optimizer": {"learning_rate": "5e-7"}}, ["optimizer.learning_rate='5e-7'", "valid number"]),
        ({"objective": {"lam": -1}}, ["objective.lam=-1", "greater than or equal to 0"]),
        # between keys
        ({"output_dir": "gs://bucket/run"}, ["output_dir=gs://bucket/run", "mount the bucket"]),
        ({"objective": {"name": ...}}, ["objective.name: missing", "set it to one of sft, [sr_]dpo"]),
        ({"objective": {"lam": ...}}, ["objective.lam: missing", "objective.lam=..."]),
        (
            {"objective": {"name": "dpo"}},
            ["objective.lam=0.3: dpo does not take it; remove it, or choose sr_dpo"],
        ),
        (
            {"objective": {"name": "nca_pair"}},
            ["objective.lam=0.3: only sr_dpo, sr_sigmoid_norm, ", "take it; remove it, or choose one of them"],
        ),
        ({"refinement": {"prompt": None}}, ["refinement.prompt is empty", "sr_dpo needs"]),
        ({"refinement": {"prompt": ""}}, ["refinement.prompt is empty"]),
        (
            {"objective": {"name": "sft", "lam": ..., "beta": 0.2}},
            ["objective.beta=0.2: only [sr_]dpo, [sr_]sigmoid_norm"],
        ),
        ({"objective": {"gamma": 0.1}}, ["objective.gamma=0.1: only [sr_]simpo take it"]),
        (
            {"objective": {"name": "sr_cpo", "divergence": "forward_kl"}},
            ["objective.divergence='forward_kl': only [sr_]dpo"],
        ),
        (
            {"objective": {"name": "sr_exo_pair", "label_smoothing": 0}},
            ["objective.label_smoothing=0", "greater than 0"],
        ),
        (
            {"objective": {"name": "sr_aot"}, "batch": {"accumulation_steps": 2}},
            ["batch.accumulation_steps=2: objective.name=sr_aot sorts over all pairs", "set it to 1"],
        ),
        (
            {"objective": {"divergence": "alpha_divergence"}},
            ["objective.divergence=alpha_divergence: set objective.divergence_alpha"],
        ),
        (
            {"objective": {"divergence": "forward_kl", "divergence_alpha": 0.5}},
            ["objective.divergence_alpha=0.5: is for objective.divergence=alpha_divergence", "remove it"],
        ),
        (
            {"optimizer": {"weight_decay": 0.1}},
            ["optimizer.weight_decay=0.1: only adamw takes it; remove"],
        ),
        (
            {"optimizer": {"name": "adam"}},
            ["optimizer.name='adam': not known; did you mean adamw? choose one of rmsprop"],
        ),
        ({"optimizer": {"learning_rte": 1.0}}, ["optimizer.learning_rte: no such key; did you mean learning_rate?"]),
        (
            {"data": {"max_prompt_length": 512}},
            ["data.max_prompt_length=512", "data.max_length=512", "lower the first or raise the second"],
        ),
        ({"train": {"eval_every_steps": 5}}, ["train.eval_every_steps=5", "set data.eval_path"]),
        ({"train": {"samples": 2}}, ["train.samples=2", "set data.eval_path or data.eval_sets"]),
        ({"data": {"eval_sets": {"Held Out": {"path": "a"}}}}, ["data.eval_sets.Held Out", "should match pattern"]),
        ({"data": {"eval_sets": {"a/b": {"path": "a"}}}}, ["data.eval_sets.a/b", "should match pattern"]),
        ({"data": {"eval_sets": {"a": {"split": "test"}}}}, ["data.eval_sets.a.path: missing"]),
        (
            {"data": {"eval_sets": {"a": {"path": "b", "splt": "test"}}}},
            ["data.eval_sets.a.splt", "did you mean split?"],
        ),
        (
            {"data": {"eval_sets": {"a": {"path": {"path": "b", "pth": 1}}}}},
            ["data.eval_sets.a.path.0.pth", "mean path?"],
        ),
        ({"data": {"eval_sets": ["a"]}}, ["data.eval_sets=['a']"]),
        ({"data": {"eval_sets": {"rewards": {"path": "a"}}}}, ["data.eval_sets.rewards", "name of a metric"]),
        ({"train": {"early_stopping_patience": 3}}, ["train.early_stopping_patience=3", "set checkpoint.best_metric"]),
        (
            {"train": {"early_stopping_min_delta": 0.5}},
            ["early_stopping_min_delta=0.5", "set train.early_stopping_patience"],
        ),
        ({"checkpoint": {"best_mode": "min"}}, ["checkpoint.best_mode=min", "set checkpoint.best_metric"]),
        ({"checkpoint": {"best_metric": "eval/loss"}}, ["checkpoint.best_metric=eval/loss", "set data.eval_path"]),
        (best("eval/los"), ["checkpoint.best_metric=eval/los", "choose one of eval/loss, ", "eval/b/margin"]),
        (best("eval/c/loss"), ["checkpoint.best_metric=eval/c/loss", "no evaluation of this run gives it"]),
        (
            best("eval/augmented/margin", refinement={"prompt": None}, objective=DPO),
            ["eval/augmented/margin", "gives it"],
        ),
        (best("eval/b/margin", train={}), ["only the end of the run is evaluated", "set train.eval_every_steps"]),
        (best("eval/b/loss"), ["checkpoint.best_mode=max: would choose the highest eval/b/loss", "set it to min"]),
        *(
            (
                best(f"eval/{measure}") | {"checkpoint": {"best_metric": f"eval/{measure}", "best_mode": "min"}},
                [f"checkpoint.best_mode=min: would choose the lowest eval/{measure}", "set it to max"],
            )
            for measure in ("rewards/accuracies", "augmented/accuracies", "rewards/margins", "margin", "b/margin")
        ),
        (
            {"data": {"eval_path": ["a", {"path": "b", "weight": 0.5}]}},
            ["data.eval_path.1.weight=0.5", "every held-out pair is evaluated once", "remove it"],
        ),
        (
            {"data": {"eval_sets": {"b": {"path": [{"path": "b", "weight": 2}]}}}},
            ["data.eval_sets.b.path.0.weight=2", "remove it"],
        ),
        ({"distributed": {"process_id": 0}}, ["distributed.process_id", "distributed.coordinator_address"]),
        ({"mesh": {"replica": -1}}, ["mesh=", "at most one of them is -1"]),
        ({"mesh": {"tensor": 0}}, ["mesh=", "sizes are positive"]),
    ],
)
def test_refusals_name_the_key_and_the_remedy(sections, words):
    message = refusal(smallest(**sections))
    assert message.startswith("run.yaml: 1 problem(s)\n  ")
    for word in words:
        assert word in message


def test_all_problems_at_once():
    message = refusal(smallest(seed="x", objective={"nmae": 1}, output_dir=...))
    assert message.startswith("run.yaml: 3 problem(s)")
    assert message.count("\n") == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", ["not valid YAML"]),
        ("- 1\n- 2\n", ["holds list, not a mapping"]),
        ("", ["holds NoneType, not a mapping"]),
        ("!!python/object/apply:os.getcwd []", ["not valid YAML"]),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="name an existing YAML file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read the configuration"):
        load_config(tmp_path / "binary.yaml")


def test_every_key_says_what_it_is():
    """Each section is strict and frozen, and no key is a bare dict that would let anything through."""
    sections = [Config, *(value for value in vars(schema).values() if isinstance(value, type))]
    sections = [section for section in sections if issubclass(section, Section) and section is not Section]
    assert len(sections) >= 12
    for section in sections:
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"] and section.model_config["strict"]


KEYS = sorted({*Config.model_fields, "path", "name", "lam", "beta", "weight", "learning_rate", "fsdp", "prompt"})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=3)
    | st.sampled_from(["sr_dpo", "dpo", "bfloat16", "a.jsonl"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5) | st.integers() | st.none(), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(raw=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), VALUES, max_size=6), whole=st.booleans())
def test_nothing_but_usage_errors(raw, whole):
    """Any nested mapping, alone or over a valid configuration, is taken or refused in words."""
    try:
        assert isinstance(config_from_dict(SMALLEST | raw if whole else raw, where="x"), Config)
    except UsageError as error:
        assert str(error).startswith("x: ")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    key=st.sampled_from(["seed", "output_dir", "objective.beta", "data.path", "mesh", "a..b", "."])
    | st.text(max_size=8),
    value=st.text(st.sampled_from("0123456789-_.:eE+[]{}!&*#'\" ,abtx\n") | st.characters(), max_size=12),
)
def test_no_override_raises_anything_else(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    path.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    try:
        load_config(path, [f"{key}={value}"])
    except UsageError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("010", 10),
        ("0o10", 8),
        ("0x1f", 31),
        ("-7", -7),
        ("5e-7", 5e-7),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("~", None),
        ("", None),
        ("True", True),
        ("'010'", "010"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse(f"key: {text}", where="x")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["yes", "010", "5e-7", "1:30", "0o7", "<<", "1_000", "=", "null", "2020-01-01"])
def test_text_is_read_back_as_text(text):
    assert parse(dump({"key": text, "keys": {text: [text]}}), where="x") == {"key": text, "keys": {text: [text]}}


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nobjective: {name: dpo}\nseed: 2\n", "seed stands twice, again in line 3"),
        ("objective: {name: dpo}\nobjective: {name: ipo}\n", "objective stands twice, again in line 2"),
        ("train:\n  epochs: 1\n  max_steps: 2\n  epochs: 3\n", "train.epochs stands twice, again in line 4"),
        ("a: &a [1, *a]\n", "a.1 is an alias of what it stands in"),
        ("a: &a {b: *a}\n", "a.b is an alias of what it stands in"),
        (BOMB, "stands for more than 10,000 values"),
        ('output_dir: "a\\ud800b"\n', "output_dir: holds U\\+D800"),
        ('output_dir: "runs/\\0x"\n', "output_dir: holds U\\+0000"),
        ('"\\0": 1\n', "holds U\\+0000"),
        ("output_dir: a\0b\n", "not valid YAML: character 14"),
        ("train: {max_steps: !!bool abc}\n", "train.max_steps: is not of the type that its tag says, bool"),
        ("train: {max_steps: !!int 1:30}\n", "train.max_steps: is not of the type that its tag says, int"),
        ("train: {max_steps: !!timestamp abc}\n", "train.max_steps: not valid YAML here: a tag"),
        ("train: !!set {a, b}\n", "train: not valid YAML here: a tag"),
        ("data: {path: !!binary aGk=}\n", "data.path: not valid YAML here: a tag"),
        (f"seed: {'9' * 5000}\n", "seed: a number of 5000 characters"),
    ],
)
def test_yaml_that_says_two_things_or_too_much_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse(text, where="run.yaml")


def test_a_section_may_be_shared_by_an_anchor():
    text = "one: &one {a: 1, b: 2}\ntwo: {<<: *one, b: 3}\nthree: *one\n"
    assert parse(text, where="x") == {"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 3}, "three": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1e29", "seed="),
        ("seed=010.5", "seed="),
        ("checkpoint.strict=yes", "checkpoint.strict="),
        ("generation.stop=['']", "generation.stop.0="),
        ('data.path="\\0"', "data.path: holds U\\+0000"),
        ("train.epochs=1:30", "train.epochs="),
        (f"train.epochs={10**400}", "train.epochs="),
        ("objective.lam=1e300", r"objective.lam=1e\+300: .*float32 holds it as 0 or infinity"),
        ("objective.beta=1e-300", r"objective.beta=1e-300: .*give a number from 1e-37 to 3e38"),
        ("objective.lam=.inf", "objective.lam=inf: .*finite"),
        ("objective.beta=.nan", "objective.beta=nan: .*finite"),
        (f"seed={'9' * 400}", "seed="),
    ],
)
def test_a_refusal_of_a_value_names_its_key(tmp_path, override, key):
    with pytest.raises(UsageError, match=key):
        load_config(write(tmp_path, yaml.safe_dump(SMALLEST)), [override])


def test_keys_of_other_kinds_in_the_file_of_a_run_are_passed_over(tmp_path):
    """Runs wrote every key once; in a user's own file one with a value of its own is a slip."""
    text = yaml.safe_dump(SMALLEST | {"objective": {"name": "sft", "beta": 0.5, "lam": 1.0}})
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=r"objective\.beta=0\.5: only \[sr_\]dpo"):
        load_config(path)
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    assert load_config(path).objective.model_dump() == {"name": "sft"}
    with pytest.raises(UsageError, match=r"objective\.lamda: no such key"):
        load_config(path, ["objective.lamda=1"])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"objective": {"name": "sr_dpo"}}, ["objective.lam: missing", "chooses from 0.1, 0.3, 0.5 and 1"]),
        ({"objective": {"name": "dpo", "lamda": 0.1}}, ["objective.lamda: no such key; did you mean lam?"]),
        ({"objective": {"name": "sft", "label_smoothing": False}}, ["objective.label_smoothing=False: only [sr_]dpo"]),
        ({"objective": {"name": "sft", "beta": 0.5}}, ["only [sr_]dpo, ", "[sr_]orpo take it"]),
        ({"optimizer": "adamw"}, ["optimizer='adamw': is no section; write optimizer: {name: ...}"]),
    ],
)
def test_what_another_kind_has_is_said(section, words):
    with pytest.raises(UsageError) as refusal:
        config_from_dict(SMALLEST | section, where="run.yaml")
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"columns": {"prompt": "q", "system": "q"}}, r"data\.columns\.prompt=q: is read as two columns"),
        ({"columns": {"chosen": "rejected"}}, r"data\.columns\.chosen=rejected: is read as two columns"),
        (
            {"columns": {"prompt": "q"}, "ignored_columns": ["q"]},
            r"data\.columns\.prompt=q: is also ignored",
        ),
    ],
)
def test_a_column_is_read_as_one_thing(data, words):
    with pytest.raises(UsageError, match=words):
        config_from_dict(smallest(data=data), where="x")
    swapped = {"columns": {"chosen": "rejected", "rejected": "chosen"}}
    assert config_from_dict(smallest(data=swapped), where="x").data.columns
