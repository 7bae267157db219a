"""Typed, frozen run configuration: defaults < YAML file < `section.key=value` overrides.

This file holds every key there is, its type, its default and its meaning; `config/objectives.py` those of the section
`objective`. Nothing else in the package fills in a default, and the core functions take arrays and numbers, never this
object. Imports no jax, so that a bad configuration is refused before any device is touched.

Next: `train/setup.py`, which makes a run out of a configuration.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainSerializer, Tag

from sr_dpo_jax.config.objectives import Objective
from sr_dpo_jax.config.section import NonNegative, NonNegativeRate, Positive, Rate, Section, only_what_says_something
from sr_dpo_jax.config.yaml_text import dump

PAPER_INSTRUCTION = (
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is "
    "the minimum. Query:"
)
"""The instruction p of arXiv:2405.21040, section 3.2.2."""


class Model(Section):
    path: str
    """A Hugging Face directory or hub name, which holds the tokenizer. It is also the reference, unless
    reference.path names another."""
    revision: str | None = None
    """Pin of a hub name; a 40-digit commit for a run that must be reproducible."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` draws the weights from `seed` and reads nothing but `config.json` and the tokenizer."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matmuls. Norms, softmax and log-probs are float32 whatever it is."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained parameters and of the optimizer's moments. A frozen reference is kept in `dtype`.
    bfloat16 parameters lose every update below about 1/256 of their value, as the paper's learning rate gives."""
    remat: Literal["none", "dots", "full"] = "none"
    """The backward pass recomputes nothing, all but the matmuls, or whole layers."""
    attention: Literal["auto", "dense", "tiled", "splash", "triton"] = "auto"
    """The way to compute attention; all give the same numbers to float order, and the log says which it is. `splash`
    is a TPU kernel and `tiled` plain JAX for CPUs; both skip what no token sees. `triton` is tokamax's fused kernels
    for NVIDIA GPUs (extra `cuda`, Ampere or newer), which keep no scores in memory but skip nothing, and take no model
    with capped scores; `dense` computes all of a row and runs anywhere. `auto` is splash on TPUs, tiled on CPUs, triton
    on the GPUs and models that it takes, else dense. Splash takes rows of at most 32,768 tokens, p included."""


class Source(Section):
    path: str
    """A file, a pattern such as `data/*.jsonl`, a directory, or a hub name; see the page of `data`."""
    weight: Rate = 1.0
    """An epoch draws each pair of this source this often: 0.5 takes a fresh half each time, 2 takes each pair twice."""
    revision: str | None = None
    """Pin of a hub name."""


def _as_sources(value: Any) -> Any:
    """A bare path stands for one source of weight 1, alone or within a list."""
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return tuple({"path": item} if isinstance(item, str) else item for item in value)
    return value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]


Format = Literal["hh_rlhf", "ultrafeedback", "preference", "sft"]
ONE_RESPONSE: tuple[Format, ...] = ("sft",)
"""The formats whose rows have one response, which no objective can compare with another."""
Column = Literal[
    "id",
    "system",
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "messages",
    "score_chosen",
    "score_rejected",
    "tools",
    "chat_template_kwargs",
]
if TYPE_CHECKING:
    Columns = tuple[tuple[str, str], ...]
else:
    Columns = Annotated[
        dict[Column, Annotated[str, Field(min_length=1)]],
        AfterValidator(lambda columns: tuple(sorted(columns.items()))),
        PlainSerializer(dict, return_type=dict),
    ]


class EvalSet(Section):
    path: Sources
    """A path, or a list of paths, without weights."""
    format: Format | None = None
    """Null: that of `data.format`."""
    split: str = "test"
    """Split of a hub data set; files have none."""
    pairs: Positive | None = None
    """Evaluates the first pairs, this many; null takes all."""


if TYPE_CHECKING:
    EvalSets = tuple[tuple[str, EvalSet], ...]
else:
    EvalSets = Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")], EvalSet],
        AfterValidator(lambda sets: tuple(sets.items())),  # frozen like all else
        PlainSerializer(lambda sets: {name: one.model_dump(mode="json") for name, one in sets}, return_type=dict),
    ]


class Data(Section):
    path: Sources
    """A path, or a list of paths and of {path, weight, revision}. Without weights each pair comes once an epoch. A path
    is a file, a pattern such as `data/*.jsonl`, a directory or a hub name."""
    eval_path: Sources | None = None
    """Held-out pairs for `sr-dpo eval` and for evaluation while training, without weights."""
    eval_pairs: Positive | None = None
    """Evaluates the first pairs of `eval_path`, this many; null takes all."""
    eval_sets: EvalSets = ()
    """More held-out sets, a mapping of name -> {path, format, split, pairs}; the metrics of each stand under
    `eval/NAME/`. A name begins with a letter and has a-z, 0-9, _ and - in it."""
    format: Format = "hh_rlhf"
    columns: Columns = ()
    """The names that columns have in all these files where they are not ours, as in {prompt: question}."""
    ignored_columns: tuple[str, ...] = ()
    """Columns that stay unread although their names say that they belong to the prompt, such as `system`."""
    split: str = "train"
    """Split of a hub data set; files have none."""
    eval_split: str = "test"
    max_length: Positive = 512
    """Most tokens of prompt + longer response, end-of-sequence included; p is not counted and never cut."""
    max_prompt_length: Positive = 256
    """A prompt is cut to this where `max_length` is passed; responses are then cut to the difference of the two."""
    prompt_truncation: Literal["keep_end", "keep_start"] = "keep_end"
    """The end of a cut prompt that stays. The newest turn stands at the end."""
    max_bad_rows: NonNegative = 0
    """More unusable rows than this are refused, in `path` and again in each held-out set; fewer are skipped."""

    @property
    def held_out(self) -> tuple[tuple[str, EvalSet], ...]:
        """The held-out sets, each behind the name that its metrics begin with: `eval`, or `eval/NAME`."""
        unnamed: tuple[tuple[str, EvalSet], ...] = ()
        if self.eval_path is not None:
            unnamed = (("eval", EvalSet(path=self.eval_path, split=self.eval_split, pairs=self.eval_pairs)),)
        return (*unnamed, *((f"eval/{name}", one) for name, one in self.eval_sets))


class Refinement(Section):
    prompt: str | None = PAPER_INSTRUCTION
    """The instruction p. Trains sr_*, and measures augmented accuracy in every evaluation; null measures none."""
    form: Literal["margin", "contrast"] = "margin"
    """What Δ of sr_* is. `margin`: β times the augmented margin, as in the paper. `contrast`: how much more p raises
    the log-prob of the chosen response than that of the rejected one, in nats, with no β and no reference subtracted.
    """
    judge: Literal["policy", "reference", "ratings"] = "policy"
    """Whose judgement Δ is. `policy`: its own, in every step, from rows with p. `reference`: that of the reference,
    the model at the start unless reference.path names another, scored once, so that a step costs what one without
    refinement costs; for a contrast. `ratings`: the ratings of the rows, as ODPO has it (arXiv:2402.10571)."""
    against: str | None = None
    """A second instruction p′, such as one that asks for a low rating: a contrast is then between p and p′. Null:
    between p and no instruction."""
    offset: Literal["log", "linear"] = "log"
    """With `judge: ratings`, Δ is α·log of the difference of the two ratings, or α times it."""
    alpha: Rate = 1.0
    """The α of `judge: ratings`."""


Target = Literal["query", "key", "value", "output", "gate", "up", "down"]


def _in_order(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Gives each target once, in the order of a layer: the same set of them is the same run."""
    return tuple(name for name in get_args(Target) if name in targets)


def _no_dropout(share: float) -> float:
    if share != 0:
        raise ValueError(
            "is not implemented: policy and reference would differ by noise before they differ by training; set it to 0"
        )
    return share


class Reference(Section):
    mode: Literal["cached", "online"] = "cached"
    """`cached` scores the frozen reference once and frees its weights; `online` keeps it on the mesh."""
    path: str | None = None
    """A reference that is not the model at the start, such as the first round's in iterated DPO: a Hugging Face
    directory or hub name with the tokenizer of model.path. Its scores are cached, and it judges, in the place of the
    model's; with `mode: online` it must have the same architecture. Null: the model at the start."""
    revision: str | None = None
    """Pin of a hub name in `path`."""


class Rmsprop(Section):
    """torch.optim.RMSprop with its defaults: decay 0.99, epsilon 1e-8 outside the root."""

    name: Literal["rmsprop"] = "rmsprop"
    learning_rate: Rate = 5e-7
    warmup_steps: NonNegative = 150
    """Linear warm-up: update number n (from 0) is scaled by min(1, (n + 1) / (warmup_steps + 1))."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The warm-up as a share of all steps, rounded; it takes the place of `warmup_steps`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up the rate stays, or falls towards zero, which it would reach one update after the last."""
    max_grad_norm: Rate = 10.0
    """Gradients are clipped to this global norm."""


class Adamw(Rmsprop):
    """AdamW with epsilon 1e-8; the keys of rmsprop, and these."""

    name: Literal["adamw"]  # type: ignore[assignment]
    weight_decay: NonNegativeRate = 0.0
    """Decoupled decay, on matrices only: never on norms and biases."""
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    b2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    first_moment_dtype: Literal["bfloat16"] | None = None
    """The type of the mean of gradients; null: model.param_dtype. bfloat16 saves two bytes a parameter."""


class Lora(Section):
    """LoRA (arXiv:2106.09685): thin matrices beside those of the layers are trained, and the model stays as it is."""

    rank: Positive = 16
    alpha: Rate = 32.0
    """The product of the two matrices is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiplies by alpha / √rank instead (arXiv:2312.03732)."""
    targets: Annotated[tuple[Target, ...], Field(min_length=1), AfterValidator(_in_order)] = get_args(Target)
    """The matrices that get an adapter: by default all of a layer. One that a family lacks, as some have no `gate`, is
    passed over."""
    dropout: Annotated[float, AfterValidator(_no_dropout)] = 0.0
    """Must be 0."""
    init: Literal["zero_a", "zero_b"] = "zero_a"
    """The matrix that is 0 at the start, so that the adapter changes nothing yet; the other is drawn from `seed`. PEFT
    has `zero_b`, which takes learning rates that are larger by about √(inputs / rank)."""
    base: Literal["int8"] | None = None
    """Holds the matrices of the layers in int8, with a scale for each output, in half the bytes of bfloat16 (needs the
    extra `int8`); null: in `model.dtype`."""
    start: str | None = None
    """A PEFT directory: training goes on from its adapters, and the reference is the model with them."""


def _optimizer_name(section: Any) -> Any:
    """Gives the name that decides which keys an optimizer has; without one it is rmsprop."""
    return section.get("name", "rmsprop") if isinstance(section, dict) else getattr(section, "name", None)


Optimizer = Annotated[
    Annotated[Annotated[Rmsprop, Tag("rmsprop")] | Annotated[Adamw, Tag("adamw")], Discriminator(_optimizer_name)],
    only_what_says_something(Rmsprop, Adamw),
]


class Batch(Section):
    pairs_per_step: Positive = 64
    row_length: Positive = 2048
    """Most tokens of a packed row. The plan shortens all rows alike to what the fullest step needs."""
    row_multiple: Positive = 16
    """Row lengths are multiples of this: 16 is a tile of bfloat16 on a TPU. Attention kernels fill up blocks by
    themselves."""
    accumulation_steps: Positive = 1
    """A step's rows pass through the model in this many parts. Changes memory, not the numbers."""


class Mesh(Section):
    replica: int = 1
    """Data-parallel copies of the parameters."""
    fsdp: int = -1
    """Shards of parameters, optimizer state and rows; -1 means all devices that are left."""
    tensor: int = 1
    """Shards of heads and of the MLP."""


class Distributed(Section):
    processes: Positive = 1
    """The number of processes of the run; the start fails if jax.distributed finds another number."""
    coordinator_address: str | None = None
    """host:port of process 0. Null lets jax detect a TPU pod, Slurm or MPI by itself."""
    process_id: NonNegative | None = None
    """This process's number; goes with `coordinator_address`."""
    join_timeout_s: Positive = 300
    """A process waits this long at the start for all others; a run whose processes do not all come ends then."""
    heartbeat_timeout_s: Annotated[int, Field(ge=5)] = 20
    """A process that has been silent for this long is dead, and all others end, to be started again together."""


class Train(Section):
    epochs: Positive = 1
    max_steps: Positive | None = None
    """Stops earlier than `epochs` would; schedules end here too."""
    log_every_steps: Positive = 1
    profile_steps: NonNegative = 0
    """Traces this many steps for XProf, from the third that a process takes, into `output_dir`/profile."""
    eval_every_steps: Positive | None = None
    """Evaluates the held-out sets every this many steps, and always after the last step."""
    samples: NonNegative = 0
    """Each evaluation writes responses to this many prompts of each held-out set, as `generation` says. They go to
    `samples.jsonl`, to TensorBoard and, asked for texts, to the report; never to the console."""
    early_stopping_patience: Positive | None = None
    """The run ends after this many evaluations in a row without a better `checkpoint.best_metric`: its last step is
    saved, the exit code is 0, and the same command does not go on. The learning rate is planned for the whole of
    `epochs` or `max_steps`, so with `linear` and `cosine` it has not come down where the run ends early."""
    early_stopping_min_delta: NonNegativeRate = 0.0
    """A metric counts as better where it exceeds the last one that counted as better by more than this."""
    wandb_project: str | None = None
    """Numbers and this configuration also go to this project of Weights & Biases (`pip install 'sr_dpo_jax[wandb]'`;
    the key comes from WANDB_API_KEY), texts never do. Resuming continues the same W&B run. Only a missing package and a
    missing or wrong key are refused: where W&B cannot be reached, the log says so and the run goes on without it."""
    max_skipped_steps: NonNegative = 10
    """A step whose loss or gradient is not finite changes nothing, and its pairs are written to `skipped.jsonl`. More
    such steps in a row than this end the run with exit code 1."""
    hang_timeout_s: Positive = 1800
    """A step, an evaluation batch or a sample that takes longer ends the process: all stacks are printed, the exit code
    is 1."""


class Generation(Section):
    """Settings of `sr-dpo generate` and `train.samples`."""

    max_new_tokens: Positive = 512
    temperature: NonNegativeRate = 0.0
    """0 takes the likeliest token at each place."""
    top_k: Positive | None = None
    """Draws from this many of the likeliest tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draws from the likeliest tokens that together have this probability."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A response ends before the first of these strings; they are not part of it."""
    slots: Positive = 32
    """Sequences that are continued side by side; a multiple of the devices that share rows."""


class Checkpoint(Section):
    every_steps: Positive = 100
    """The last step is always saved too."""
    keep: Positive = 2
    """The newest verified ones that stay. None is deleted before its successor is verified: leave room for one."""
    best_metric: str | None = None
    """Metric of an evaluation, such as eval/rewards/accuracies: an evaluation that is better than all before it is
    saved at once, and that checkpoint stays beside the newest ones until a better one is verified. Of equal ones the
    first is best. For `--best` of export, eval, generate and lm-eval."""
    best_mode: Literal["max", "min"] = "max"
    """The highest or the lowest `best_metric` is best."""
    save_timeout_s: Positive = 7200
    """The end of a run waits this long for its save, and a save for the one before it: to be written, read back and
    verified. Then the process ends with all stacks and exit code 1."""
    strict: bool = False
    """Refuses to go back to an older checkpoint where a newer one is damaged, and to go on with other versions of the
    libraries than before; both are only said where it is false."""


class Config(Section):
    output_dir: str
    """Holds everything that the run writes; running the same command again resumes from it."""
    cache_dir: str | None = None
    """Tokenised data, reference scores and compiled programs, keyed by content; share it between runs. Null:
    `output_dir`/cache."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: Model
    data: Data
    objective: Objective
    refinement: Refinement = Refinement()
    reference: Reference = Reference()
    lora: Lora | None = None
    """Null: all parameters are trained."""
    optimizer: Optimizer = Rmsprop()
    batch: Batch = Batch()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    generation: Generation = Generation()

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else Path(self.output_dir) / "cache"

    def to_yaml(self) -> str:
        """Writes every key with its value, in the order of this file; `load_config` reads back an equal object."""
        return dump(self.model_dump(mode="json"))
