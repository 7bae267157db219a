"""Makes the objects that a command works with from its configuration: data, model on the mesh, objective.

In `train` only this file, `prepare.py` and `loop.py` read the configuration; everything below them takes arrays and
numbers. Data is read and checked before any device is touched.

Next: `data/dataset.py`, which reads the pairs.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.config.schema import Config, Source
from sr_dpo_jax.data import dataset
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.model_ends import end_tokens
from sr_dpo_jax.data.pipeline import Packing
from sr_dpo_jax.data.plan import Limits, Plan
from sr_dpo_jax.data.read import read_pairs
from sr_dpo_jax.data.rows import Naming
from sr_dpo_jax.data.tokenizer_fit import require_fit
from sr_dpo_jax.data.tokens import load_tokenizer, tokenizer_digest
from sr_dpo_jax.durable.checkpoint import PARAMS, Checkpoints
from sr_dpo_jax.durable.files import json_digest
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.generation.decode import Sampling
from sr_dpo_jax.generation.generator import Settings
from sr_dpo_jax.model.adapter import Lora, adapter_weights, join, split
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.model.kernels.check import wrong_kernel
from sr_dpo_jax.parallel.mesh import make_mesh, row_shards
from sr_dpo_jax.parallel.processes import keep_compiled, largest, require_same, start_distributed
from sr_dpo_jax.train.identity import require_same_base, shared_facts
from sr_dpo_jax.train.knowledge import settled_by
from sr_dpo_jax.train.objective import OBJECTIVES, Objective, Refinement
from sr_dpo_jax.train.program import Program, Work, make_program, plan_training, work_of
from sr_dpo_jax.train.samples import Samples
from sr_dpo_jax.train.scored_set import ScoredSet, make_scored_set
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights.adapters import open_adapter
from sr_dpo_jax.weights.adapters import require_fit as require_adapter
from sr_dpo_jax.weights.placement import PlacedModel, abstract_params, place_model, require_int8

log = logging.getLogger(__name__)


def read_model(config: Config) -> tuple[weights.ModelDirectory, PreTrainedTokenizerBase]:
    """Reads architecture and tokenizer of model.path, which must fit each other; touches no device.

    Weights that are to be read are checked too.
    """
    pretrained = config.model.init == "pretrained"
    require_int8(lora_of(config))
    directory = weights.open_directory(config.model.path, revision=config.model.revision, weights=pretrained)
    tokenizer = load_tokenizer(str(directory.path))
    require_fit(tokenizer, directory.path, vocabulary_tokens=directory.architecture.vocabulary_tokens)
    if pretrained:
        weights.check(directory, abstract_params(directory.architecture))
    if config.lora is not None and config.lora.start is not None:
        form = lora_of(config)
        require_adapter(open_adapter(config.lora.start), directory, abstract_params(directory.architecture, form), form)
    return directory, tokenizer


def read_reference(config: Config, tokenizer: PreTrainedTokenizerBase) -> weights.ModelDirectory | None:
    """Reads and checks the model of reference.path; touches no device. None where the model at the start is it.

    Raises:
      UsageError: nothing needs a reference, its tokenizer is not that of model.path, or its files are at fault.
    """
    section = config.reference
    if section.path is None:
        return None
    _require_use(config)
    with _named_reference():
        directory = weights.open_directory(section.path, revision=section.revision)
        own = load_tokenizer(str(directory.path))
        if tokenizer_digest(own) != tokenizer_digest(tokenizer):
            raise UsageError(
                f"reference.path={section.path}: its tokenizer or chat template is not that of the model, "
                f"{config.model.path}, which makes the ids that it would score; choose a reference of the same "
                "tokenizer, or copy the tokenizer's files where they mean the same"
            )
        require_fit(own, directory.path, vocabulary_tokens=directory.architecture.vocabulary_tokens)
        weights.check(directory, abstract_params(directory.architecture))
    return directory


def _require_use(config: Config) -> None:
    """Refuses a reference.path that nothing would read."""
    if not objective_of(config).wants_scores:
        raise UsageError(
            f"reference.path={config.reference.path}: objective.name={config.objective.name} needs no reference, and "
            "none judges; remove it"
        )


@contextlib.contextmanager
def _named_reference() -> Iterator[None]:
    """Makes errors of opening a model name the keys of the reference."""
    try:
        yield
    except UsageError as error:
        said = str(error).replace("model.path", "reference.path").replace("model.revision", "reference.revision")
        raise UsageError(said) from error


def read_training(config: Config, tokenizer: PreTrainedTokenizerBase, architecture: Architecture) -> TokenizedPairs:
    """Reads the training pairs, with p where the objective compares two responses; one without Δ does not insist."""
    data, instructions = config.data, {**_instructions(config), "p_needed": objective_of(config).scored_with_p}
    return read_pairs_of(config, data.path, data.split, tokenizer, architecture, **instructions)


def read_held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, architecture: Architecture
) -> dict[str, TokenizedPairs]:
    """Reads every held-out set, under the name that its metrics begin with: `eval` or `eval/NAME`."""
    read = partial(read_pairs_of, config, tokenizer=tokenizer, architecture=architecture, **_instructions(config))
    return {
        name: read(held_out.path, held_out.split, format=held_out.format, first_pairs=held_out.pairs)
        for name, held_out in config.data.held_out
    }


def read_pairs_of(
    config: Config,
    sources: Sequence[Source],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    *,
    instruction: str | None,
    format: str | None = None,
    **options: Any,
) -> TokenizedPairs:
    """Reads pairs with p, the `instruction`, by the keys of `data`; `format` is data.format unless given.

    `options` are further arguments of `data.read.read_pairs`.
    """
    section = config.data
    return read_pairs(
        [dataset.Source(source.path, source.weight, source.revision) for source in sources],
        tokenizer,
        architecture,
        augmentation_prompt=instruction,
        format=format or section.format,
        split=split,
        **options,
        max_length=section.max_length,
        max_prompt_length=section.max_prompt_length,
        prompt_truncation=section.prompt_truncation,
        max_bad_rows=section.max_bad_rows,
        cache_dir=config.cache_path,
        naming=Naming(dict(section.columns), section.ignored_columns),
    )


def _instructions(config: Config) -> dict[str, Any]:
    section = config.refinement
    if not OBJECTIVES[config.objective.name].needs_rejected:
        return {"instruction": None}
    return {"instruction": section.prompt, "against": section.against}


def generation_settings(
    config: Config, directory: weights.ModelDirectory, tokenizer: PreTrainedTokenizerBase
) -> Settings:
    """Gives the section `generation` as numbers, with the tokens that end a response."""
    section = config.generation
    sampling = Sampling(section.temperature, section.top_k, section.top_p, end_tokens(tokenizer, directory.path))
    return Settings(sampling, section.slots, section.max_new_tokens, section.stop)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration made into objects: the model on the mesh, the packing of rows and the objective."""

    config: Config
    model: PlacedModel
    packing: Packing
    objective: Objective

    @cached_property
    def reference(self) -> PlacedModel:
        """The model that is the frozen reference: that of reference.path, or the model at the start.

        Raises:
          UsageError: nothing needs it; or it is to stay on the mesh, and its architecture is not the policy's.
        """
        section, model = self.config.reference, self.model
        if section.path is None:
            return model
        _require_use(self.config)
        with _named_reference():
            directory = weights.open_directory(section.path, revision=section.revision, weights=False)
        alike = directory.architecture == model.architecture
        if self.online and not alike:
            raise UsageError(
                f"reference.mode=online: the model of reference.path={section.path} has another architecture than that "
                f"of {self.config.model.path}; set reference.mode=cached"
            )
        return place_model(
            directory,
            model.mesh,
            dtype=model.dtype.name,
            param_dtype=model.param_dtype.name,
            remat=self.config.model.remat,
            attention=model.attention if alike else self.config.model.attention,
            seed=self.config.seed,
            drawn=False,
            frozen=True,
        )

    @property
    def other_reference(self) -> dict[str, Any] | None:
        """The path, commit and digest of a reference that is not the model at the start, for the manifest."""
        section, model = self.config.reference, self.reference
        if model is self.model:
            return None
        return {"path": section.path, "revision": model.directory.revision, "digest": model.digest}

    @property
    def online(self) -> bool:
        """The reference stays on the mesh."""
        return self.objective.kind.needs_reference and self.config.reference.mode == "online"

    def scored_set(self, name: str, pairs: TokenizedPairs, **options: Any) -> ScoredSet:
        """Makes a scored set of this configuration; `options` as for `make_scored_set`."""
        cache_dir = self.config.cache_path
        options = {"cache_dir": cache_dir, "reference": self.reference} | options
        return make_scored_set(name, pairs, self.model, self.packing, self.objective, **options)

    def plan(self, pairs: TokenizedPairs, held_out: Sequence[TokenizedPairs]) -> Plan:
        """Plans all steps of training."""
        seed, epochs = self.config.seed, self.config.train.epochs
        attention = self.model.attention
        return plan_training(
            self.packing.limits, self.objective, pairs, held_out, seed=seed, epochs=epochs, attention=attention
        )

    def program(self, plan: Plan) -> Program:
        """Makes the train step for the steps of a plan."""
        optimizer = self.config.optimizer.model_dump()
        return make_program(
            self.model, self.objective, optimizer, pairs=plan.shape.pairs, total_steps=self.total_steps(plan)
        )

    def total_steps(self, plan: Plan) -> int:
        """Counts the steps that are taken: those of the plan, or fewer by train.max_steps."""
        return min(len(plan), self.config.train.max_steps or len(plan))

    def samples(
        self, eval_sets: Mapping[str, TokenizedPairs], tokenizer: PreTrainedTokenizerBase, params: Params
    ) -> Samples | None:
        """Makes the sampler of held-out prompts, where train.samples asks for one."""
        count, config = self.config.train.samples, self.config
        if not count:
            return None
        settings = generation_settings(config, self.model.directory, tokenizer)
        return Samples(self.model, eval_sets, tokenizer, params, count=count, seed=config.seed, settings=settings)

    def settled(self, table: Mapping[str, Any] | None) -> "Setup":
        """Gives the setup with the λ of a run's record in place of `objective.lam: auto`."""
        return dataclasses.replace(self, objective=settled_by(table, self.objective))

    def settled_at(self, step: int) -> "Setup":
        """Gives the setup with the λ that the run had at this step."""
        if not self.objective.unsettled or not step:
            return self.settled(None)
        with Checkpoints(self.config.output_dir, read_only=True) as checkpoints:
            return self.settled(checkpoints.restore_position(step).get("knowledge"))

    def latest_params(self, base: Params | None = None, *, best: bool = False) -> tuple[Params, int]:
        """Restores the parameters of the latest (or `best`) checkpoint of output_dir, and gives its step.

        Without a checkpoint gives `base` or else the base weights, and step 0. Raises UsageError where the run has no
        best checkpoint, or processes find another one under its name.
        """
        config = self.config
        if best or largest((Path(config.output_dir) / "checkpoints").is_dir()):  # each process sees its own disk
            with Checkpoints(config.output_dir, read_only=True, strict=config.checkpoint.strict) as checkpoints:
                step = checkpoints.best() if best else checkpoints.newest_good(prefix=PARAMS)
                if step is not None:
                    place = str(checkpoints.directory / str(step))
                    require_same({place: json_digest(checkpoints.restore_position(step))})
                    return self._restored(checkpoints, step, base), step
        return self.model.base_params() if base is None else base, 0

    def _restored(self, checkpoints: Checkpoints, step: int, base: Params | None) -> Params:
        """Restores the parameters of a step, beside the base where they are adapters."""
        config, (trained, frozen) = self.config, split(self.model.shapes)
        shapes = {name: leaf.shape for name, leaf in flatten_dict(trained, sep=".").items()}
        if frozen is not None:
            facts = {"lora": config.lora.model_dump(), "weights_digest": self.model.base_digest}
            require_same_base(checkpoints, step, **facts)
        checkpoints.check_params(shapes, step=step)
        if frozen is not None:
            frozen = split(self.model.base_params() if base is None else base)[1]
        return join(checkpoints.restore_params(trained, step=step), frozen)

    def work(self, pairs: TokenizedPairs) -> Work:
        """Counts what the pairs cost."""
        model, of_adapters = self.model, adapter_weights(self.model.shapes)
        return work_of(
            model.architecture, self.packing, self.objective, pairs, online=self.online, adapter_weights=of_adapters
        )


def set_up(
    config: Config, directory: weights.ModelDirectory, read: Mapping[str, Any] | None = None, *, has_cache: bool = True
) -> Setup:
    """Starts the devices: joins the processes, which must agree, makes the mesh, lays the model out on it.

    Args:
      config: the configuration.
      directory: of the model.
      read: digests of all else that the command has read, by the key that names it.
      has_cache: whether the configuration has a place for compiled programs; that of a bare model has none.

    Raises:
      UsageError: the processes cannot be joined or differ in configuration, files or versions; or no mesh can be made.
    """
    start_distributed(**config.distributed.model_dump())
    if has_cache:
        keep_compiled(config.cache_path)
    require_same({**shared_facts(config.model_dump(mode="json"), directory), **(read or {})})
    setup = set_up_on(make_mesh(**config.mesh.model_dump()), config, directory)
    model = setup.model
    if "reference.path" in (read or {}) and setup.reference.architecture != model.architecture:
        judge = setup.reference
        wrong = wrong_kernel(judge.attention, judge.mesh, judge.architecture, judge.dtype)
        if wrong is not None:
            raise UsageError(f"reference.path={config.reference.path}: {wrong}; set model.attention=dense")
    wrong = wrong_kernel(model.attention, model.mesh, model.architecture, model.dtype)
    if wrong is None:
        return setup
    if config.model.attention != "auto":
        raise UsageError(f"model.attention={config.model.attention}: {wrong}; set it to dense")
    log.warning("model.attention=auto is dense here: %s", wrong)
    dense = config.model.model_copy(update={"attention": "dense"})
    return set_up_on(model.mesh, config.model_copy(update={"model": dense}), directory)


def set_up_on(mesh: Mesh, config: Config, directory: weights.ModelDirectory) -> Setup:
    """Lays the model out on a mesh that is there already; its devices may be described ones that are not attached."""
    section = config.model
    model = place_model(
        directory,
        mesh,
        dtype=section.dtype,
        param_dtype=section.param_dtype,
        remat=section.remat,
        attention=section.attention,
        seed=config.seed,
        drawn=section.init == "random",
        lora=lora_of(config),
        adapter=None if config.lora is None or config.lora.start is None else open_adapter(config.lora.start),
    )
    batch, micro_batches = config.batch, config.batch.accumulation_steps
    limits = Limits(batch.pairs_per_step, batch.row_length, batch.row_multiple, row_shards(mesh) * micro_batches)
    return Setup(config, model, Packing(mesh, limits, micro_batches), objective_of(config))


def lora_of(config: Config) -> Lora | None:
    """Gives the form of the adapters; None where all parameters are trained."""
    return None if config.lora is None else Lora(**config.lora.model_dump(exclude={"dropout", "start"}))


def objective_of(config: Config) -> Objective:
    """Makes the objective with its numbers, and says how its Δ is made."""
    section = config.refinement
    numbers = section.model_dump(include={"form", "judge", "offset", "alpha"})
    refinement = Refinement(**numbers, against=section.against is not None)
    return Objective.of(refinement=refinement, **config.objective.model_dump())
