"""From configuration to the objects that every command needs: data, mesh, model, parameters, feeds.

The configuration ends here: what is made below takes arrays and numbers. Data is read and checked before any device
is touched.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.config.schema import Config, Source
from sr_dpo_jax.data import dataset, tokens
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed, Pairs, StepSource, local_rows
from sr_dpo_jax.data.plan import Plan
from sr_dpo_jax.data.tokenizer_fit import require_embedded, require_fit
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import DENSE, AttentionPath
from sr_dpo_jax.model.decoder import Constrain, Decoder
from sr_dpo_jax.model.paths import attention_name, attention_path
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.parallel import processes
from sr_dpo_jax.train.reference import ReferenceScores, cache_files
from sr_dpo_jax.train.train_step import Objective, Params, initialise
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights.read import load_params

log = logging.getLogger(__name__)


def objective_of(config: Config) -> Objective:
    section = config.objective
    return Objective(section.name, section.beta, section.lam or 0.0, section.label_smoothing)


@dataclasses.dataclass(frozen=True)
class Assembly:
    """What a command works with; parameters are made when asked for."""

    config: Config
    directory: weights.ModelDirectory
    mesh: Mesh
    graph: nnx.GraphDef
    abstract: Any
    """Tree of abstract nnx parameters."""
    param_shardings: Params
    attention: str
    """What `model.attention` comes to: the name of a path of `model/paths.py`."""

    @property
    def micro_batches(self) -> int:
        return self.config.batch.accumulation_steps

    @property
    def rows_multiple(self) -> int:
        return meshes.row_shards(self.mesh) * self.micro_batches

    @cached_property
    def base_digest(self) -> str:
        """Digest of the weights that training starts from and that the reference keeps."""
        if self.config.model.init == "pretrained":
            return weights.weights_digest(self.directory)
        config_json = (self.directory.path / "config.json").read_bytes()
        drawn = f" random {self.config.seed}".encode()
        return hashlib.sha256(config_json + drawn).hexdigest()

    @property
    def param_shapes(self) -> Params:
        """Shapes and types of the parameters."""
        dtype = jnp.dtype(self.config.model.param_dtype)
        return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, dtype), nnx.to_pure_dict(self.abstract))

    def base_params(self) -> Params:
        """The weights of model.path, or drawn from the seed, sharded on the mesh, in model.param_dtype."""
        dtype = jnp.dtype(self.config.model.param_dtype)
        if self.config.model.init == "pretrained":
            return load_params(self.directory, self.abstract, self.param_shardings, dtype=dtype)
        make = _decoder_maker(self.config, self.directory, attention=DENSE, constrain=meshes.constrain(self.mesh))
        return initialise(lambda: nnx.to_pure_dict(nnx.state(make())), self.param_shardings)

    def frozen(self, params: Params) -> Params:
        """A copy of the parameters to keep on the mesh as online reference, in model.dtype."""
        return reference_copy(params, jnp.dtype(self.config.model.dtype))

    def reference_scores(self, pairs: TokenizedPairs, plan: Plan, *, augmented: bool) -> ReferenceScores:
        """The frozen reference's scores of a data set, as far as the cache has them."""
        files = cache_files(
            self.config.cache_path,
            pairs,
            weights_digest=self.base_digest,
            dtype=f"{self.config.model.dtype} {self.config.model.param_dtype}",
            augmented=augmented,
        )
        return ReferenceScores(files, plan, self.feed(pairs, plan, augmented=augmented), len(pairs.offsets))

    def feed(
        self,
        pairs: Pairs,
        plan: Plan,
        *,
        augmented: bool,
        with_rejected: bool = True,
        reference: np.ndarray | None = None,
    ) -> Feed:
        """The steps of a plan as batches for this mesh."""
        rows = plan.shape.rows // self.micro_batches
        shape = (self.micro_batches, rows, plan.shape.row_length)
        row_sharding = meshes.sharding(self.mesh, ("steps", "rows", None), shape, "batch.plain.tokens")
        source = StepSource(
            pairs,
            plan,
            micro_batches=self.micro_batches,
            local_rows=local_rows(row_sharding, self.micro_batches, rows),
            with_rejected=with_rejected,
            augmented=augmented,
            row_multiple=self.config.batch.row_multiple,
        )
        return Feed(source, rows, row_sharding, meshes.replicated(self.mesh), reference)


def reference_copy(params: Params, dtype: jnp.dtype) -> Params:
    """A copy of the parameters in `dtype`, the type that the model computes in.

    Norms stay as they are: they are applied in float32, all else is cast to `dtype` where it is used, so the copy gives
    the same numbers as the original.
    """

    def narrow(path: Any, param: jax.Array) -> jax.Array:
        is_norm = any("norm" in key.key for key in path)
        return jnp.array(param, dtype=param.dtype if is_norm else dtype, copy=True)

    return jax.tree.map_with_path(narrow, params)


def pair_sizes(pairs: TokenizedPairs, *, with_rejected: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each pair takes in a row, and how many of them are scored, each `[N]`."""
    scored = pairs.chosen_tokens + (pairs.rejected_tokens if with_rejected else 0)
    return pairs.prompt_tokens + scored, scored


def read_data(
    config: Config,
    sources: Sequence[Source],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    *,
    augmentation_prompt: str | None,
    format: str | None = None,
    first_pairs: int | None = None,
) -> TokenizedPairs:
    """Reads, checks and tokenises `sources`, with p where it is used, and keeps `first_pairs`; touches no device.

    Without a `format` that of data.format holds.

    Raises:
      UsageError: unusable rows, sequences longer than those for which the model's rotary embedding is known, or ids
        that the model does not have.
    """
    pairs = dataset.prepare(
        [dataset.Source(source.path, source.weight, source.revision) for source in sources],
        tokenizer,
        format=format or config.data.format,
        split=split,
        augmentation_prompt=augmentation_prompt,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        prompt_truncation=config.data.prompt_truncation,
        max_bad_rows=config.data.max_bad_rows,
        cache_dir=config.cache_path,
    )
    report = pairs.report
    log.info(
        "%s: %d pairs of %d rows; skipped %d bad; truncated %d prompts and %d responses; "
        "%d pairs of two equal responses, %d that came before",
        ", ".join(source.path for source in sources),
        report.pairs,
        report.rows,
        len(report.bad_rows),
        report.truncated_prompts,
        report.truncated_responses,
        report.identical_pairs,
        report.duplicate_pairs,
    )
    if first_pairs is not None:
        pairs = dataset.first(pairs, first_pairs)
    _check_lengths(architecture, pairs)
    require_embedded(pairs, vocabulary_tokens=architecture.vocabulary_tokens)
    return pairs


def read_held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, architecture: Architecture
) -> dict[str, TokenizedPairs]:
    """Every held-out set as `read_data` reads it, under what its metrics' names begin with: `eval` or `eval/NAME`."""
    p = config.refinement.prompt if config.objective.name != "sft" else None
    return {
        name: read_data(
            config,
            one.path,
            one.split,
            tokenizer,
            architecture,
            augmentation_prompt=p,
            format=one.format,
            first_pairs=one.pairs,
        )
        for name, one in config.data.held_out
    }


def _check_lengths(architecture: Architecture, pairs: TokenizedPairs) -> None:
    longest = int((pairs.prompt_tokens + np.maximum(pairs.chosen_tokens, pairs.rejected_tokens)).max())
    longest += len(pairs.augmentation)
    require_exact_positions(
        architecture,
        longest,
        what=f"the longest sequence has {longest} tokens, {len(pairs.augmentation)} of them p",
        remedy="lower data.max_length",
    )
    if longest > architecture.context_tokens:
        log.warning(
            "the longest sequence has %d tokens with p, but model.path was made for %d (max_position_embeddings)",
            longest,
            architecture.context_tokens,
        )


def require_exact_positions(architecture: Architecture, longest_tokens: int, *, what: str, remedy: str) -> None:
    """Refuses texts beyond the length up to which the model's rotary frequencies are those of every length.

    Raises:
      UsageError: `what` is too long, and the remedy.
    """
    limits = [kind.rope.exact_positions for kind in architecture.kinds if kind.rope.exact_positions is not None]
    if limits and longest_tokens > min(limits):
        raise UsageError(
            f"{what}; beyond {min(limits)} the rope scaling of model.path gives every length other frequencies, which "
            f"neither a packed row nor a cache of keys can have; {remedy}"
        )


def read_model(config: Config) -> tuple[weights.ModelDirectory, PreTrainedTokenizerBase]:
    """Architecture and tokenizer of model.path, which must fit each other; touches no device.

    Weights that are to be read are checked too.
    """
    pretrained = config.model.init == "pretrained"
    directory = weights.open_directory(config.model.path, revision=config.model.revision, weights=pretrained)
    tokenizer = tokens.load_tokenizer(str(directory.path))
    require_fit(tokenizer, directory.path, vocabulary_tokens=directory.architecture.vocabulary_tokens)
    if pretrained:
        weights.check(directory, abstract_params(config, directory))
    return directory, tokenizer


def abstract_params(config: Config, directory: weights.ModelDirectory) -> Any:
    """Tree of abstract nnx parameters: shapes, types and logical axes; touches no device."""
    make = _decoder_maker(config, directory, attention=DENSE, constrain=lambda array, axes: array)
    return nnx.state(nnx.eval_shape(make))


def assemble(config: Config, directory: weights.ModelDirectory) -> Assembly:
    """Starts the devices: joins the processes, makes the mesh, checks the shardings of all parameters."""
    processes.start_distributed(**config.distributed.model_dump())
    return assemble_on(meshes.make_mesh(**config.mesh.model_dump()), config, directory)


def assemble_on(mesh: Mesh, config: Config, directory: weights.ModelDirectory) -> Assembly:
    """The same on a mesh that is there already, be it of devices that are described and not present."""
    model = (directory.architecture, jnp.dtype(config.model.dtype))
    name = attention_name(config.model.attention, mesh, *model)
    axes = {"row_axes": meshes.TABLE["rows"], "head_axes": meshes.TABLE["heads"]}
    attention = attention_path(name, mesh, *model, **axes)
    make = _decoder_maker(config, directory, attention=attention, constrain=meshes.constrain(mesh))
    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = nnx.to_pure_dict(meshes.param_shardings(mesh, abstract))
    log.info(
        "%s on %s: %s parameters, attention %s, activations %s",
        directory.model_type,
        " × ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        f"{sum(np.prod(shape) for _, shape in weights.iterate_shapes(abstract)):,}",
        attention.name,
        config.model.dtype,
    )
    return Assembly(config, directory, mesh, graph, abstract, shardings, attention.name)


def _decoder_maker(
    config: Config, directory: weights.ModelDirectory, *, attention: AttentionPath, constrain: Constrain
) -> Callable[[], Decoder]:
    def make() -> Decoder:
        return Decoder(
            directory.architecture,
            dtype=jnp.dtype(config.model.dtype),
            param_dtype=jnp.dtype(config.model.param_dtype),
            remat=config.model.remat,
            attention=attention,
            constrain=constrain,
            rngs=nnx.Rngs(config.seed),
        )

    return make
