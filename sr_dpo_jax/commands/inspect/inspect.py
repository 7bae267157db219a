"""`sr-dpo inspect MODEL`: what a person wants to know of a model before a run.

Touches no device and reads no weights beyond the headers of their files, unless a digest is asked for. Memory is
counted from the same optimizer state and the same sharding table as a run's.

Next: `inspection_print.py`, which prints it.
"""

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data.rows import BadRow, Message, Pair
from sr_dpo_jax.data.tokenizer_fit import misfits
from sr_dpo_jax.data.tokens import PairEncoder, load_tokenizer, uses_bos
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.train.optim import OPTIMIZERS
from sr_dpo_jax.train.state import state_shapes, state_shardings
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights import hub
from sr_dpo_jax.weights.files import INDEX, ONLY_SAFETENSORS, other_weights, read_headers, weight_files
from sr_dpo_jax.weights.hub import Header
from sr_dpo_jax.weights.placement import abstract_params, reference_copy

PARTS = ("embedding", "attention", "mlp", "norms", "unembedding")
PARAM_DTYPES = ("float32", "bfloat16")
NOT_FETCHED = (
    "the numbers of the weights, and whether their files are whole: of a hub name only the headers of the files are "
    "fetched; --digest fetches all"
)


@dataclasses.dataclass(frozen=True)
class Files:
    """The weight files, as their headers describe them."""

    files: int
    tensors: dict[str, int]
    """How many there are of each type, named as safetensors does."""
    tensor_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    tokens: int
    """Entries of the vocabulary, added tokens included."""
    largest_id: int
    special_tokens: dict[str, tuple[str, int] | None]
    """eos, bos and pad: the token and its id; None where there is none."""
    bos_before_text: bool
    chat_template: bool


@dataclasses.dataclass(frozen=True)
class Placement:
    """Whether p stands verbatim before x in one form of prompt, with the example "Hello" → "Hi" as evidence."""

    reason: str | None
    """Why not; None where it does."""
    head_tokens: int = 0
    augmentation_tokens: int = 0
    """Tokens of p."""
    head: str = ""
    """What stands before p."""
    rest: str = ""
    """What follows p up to the response."""
    response: str = ""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a chip for one type of the parameters. Neither activations nor the batch are counted."""

    parameters_bytes: int
    gradients_bytes: int
    """One copy, in the type that micro-batches are added up in."""
    moments_bytes: dict[str, int]
    """State of each optimizer."""
    online_reference_bytes: int
    """The frozen reference in bfloat16, norms as the parameters; none is kept with reference.mode=cached."""

    def total_bytes(self, optimizer: str, *, online: bool) -> int:
        reference = self.online_reference_bytes if online else 0
        return self.parameters_bytes + self.gradients_bytes + self.moments_bytes[optimizer] + reference


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that is found; `dataclasses.asdict` is what --json writes."""

    path: str
    family: str
    architecture: dict[str, Any]
    parameters: dict[str, int]
    """How many there are in each part; those of no known part stand under their own names."""
    has_weights: bool | None
    """Whether there are files of weights that a run would read; None where that is not known."""
    weights: Files | None
    """None where there are none, where they do not fit, or where they were not looked at."""
    digest: str | None
    """sha256 of config.json and weight files, if asked for."""
    tokenizer: TokenizerFacts | None
    placements: dict[str, Placement]
    """By form: text, chat, chat with a system message, chat of several turns."""
    mesh: dict[str, int]
    memory: dict[str, Memory]
    """By type of the parameters; empty where they do not divide over the mesh."""
    not_looked_at: tuple[str, ...]
    """What a run would look at besides."""
    problems: tuple[str, ...]
    """All that a run would refuse."""


def inspect_model(path: str, *, revision: str | None, mesh: Mapping[str, int], prompt: str, digest: bool) -> Inspection:
    """Reads config, tokenizer and headers of a model.

    Args:
      path: a Hugging Face directory or hub name.
      revision: pin of a hub name.
      mesh: sizes of replica, fsdp and tensor.
      prompt: the instruction p.
      digest: whether the weights are read whole for their sha256, and fetched for that; else their headers are enough.

    Raises:
      UsageError: there is no such model, or its architecture is not supported. Whatever else is wrong is a problem of
        the result.
    """
    directory = weights.open_directory(path, revision=revision, weights=digest)
    params = abstract_params(directory.architecture)
    problems: list[str] = []
    has_weights, files, not_looked_at = _look_at_weights(path, directory, params, problems)
    tokenizer = _collecting(problems, load_tokenizer, str(directory.path))
    if tokenizer is not None:
        vocabulary_tokens = directory.architecture.vocabulary_tokens
        fit = _collecting(problems, misfits, tokenizer, directory.path, vocabulary_tokens=vocabulary_tokens)
        problems += [f"the tokenizer does not fit the model: {problem}" for problem in fit or ()]
    return Inspection(
        path=str(directory.path),
        family=directory.model_type,
        architecture=dataclasses.asdict(directory.architecture),
        parameters=_parts(params),
        has_weights=has_weights,
        weights=files,
        digest=weights.weights_digest(directory) if digest and files is not None else None,
        tokenizer=_tokenizer_facts(tokenizer) if tokenizer is not None else None,
        placements=_placements(tokenizer, prompt) if tokenizer is not None else {},
        mesh=dict(mesh),
        memory=_memory(params, meshes.abstract_mesh(**mesh), problems),
        not_looked_at=not_looked_at,
        problems=tuple(problems),
    )


def parse_mesh(text: str) -> dict[str, int]:
    """`replica=1,fsdp=8,tensor=1` -> sizes; those not named are 1.

    Raises:
      UsageError: an unknown name, a name twice, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("replica", "fsdp", "tensor") or name in sizes or not re.fullmatch(r"[1-9][0-9]*", size):
            raise UsageError(
                f"--mesh {text}: {part!r} does not fit; give sizes such as replica=1,fsdp=8,tensor=1, each once"
            )
        sizes[name] = int(size)
    return {"replica": 1, "fsdp": 1, "tensor": 1} | sizes


def _collecting(problems: list[str], read: Any, *arguments: Any, **options: Any) -> Any:
    """The result, or None where the user can fix something: then that is one more problem."""
    try:
        return read(*arguments, **options)
    except UsageError as error:
        problems.append(str(error))
        return None


def _parts(params: Any) -> dict[str, int]:
    """Parameters of each part; norms within attention count as norms."""
    counts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for path, shape in weights.iterate_shapes(params):
        names = path.split(".")
        is_norm = any("norm" in name for name in names)
        part = "norms" if is_norm else next((part for part in PARTS if part in names), path)
        counts[part] += math.prod(shape)
    return dict(counts)


def _look_at_weights(
    name: str, directory: weights.ModelDirectory, params: Any, problems: list[str]
) -> tuple[bool | None, Files | None, tuple[str, ...]]:
    """Whether there are weights, what their headers say, and what was not looked at; of a hub name no more is fetched.

    Args:
      name: the model as the user named it.
      problems: what a run would refuse is added.
    """
    located = _collecting(problems, weight_files, directory.path)
    if located is None:
        return True, None, ()
    paths, weight_map = located
    remote = directory.revision is not None and not all(path.is_file() for path in paths)
    try:
        names = hub.file_names(name, commit=directory.revision) if remote else os.listdir(directory.path)
        some = INDEX in names or any(file.endswith(".safetensors") for file in names)
        if not some and (remote or not hub.unfinished(directory.path)):
            for other in other_weights(names)[:1]:
                problems.append(f"{name}: {other} is not read: {ONLY_SAFETENSORS}, or set model.init=random")
            return False, None, ()
        if not remote:
            fit = _collecting(problems, weights.check, directory, params)
            return True, _files(read_headers(paths).values()) if fit is not None else None, ()
        headers = hub.headers(name, paths, commit=directory.revision)
    except UsageError as error:
        return None, None, (f"the weights: {error}",)
    found = weights.faults(directory, params, headers, weight_map)
    problems += [weights.listing(directory, found)] * bool(found)
    return True, None if found else _files(headers.values()), (NOT_FETCHED,)


def _files(headers: Collection[Header]) -> Files:
    """What sound headers hold, one a file."""
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for header in headers:
        for shape, dtype in header.values():
            bits = re.search(r"\d+", dtype)  # F32, BF16, I64; BOOL takes a byte
            tensors[dtype] += 1
            sizes[dtype] += math.prod(shape) * (int(bits.group()) if bits else 8) // 8
    return Files(len(headers), dict(tensors), dict(sizes))


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    special = {
        name: None if token is None else (token, number)
        for name, token, number in (
            ("eos", tokenizer.eos_token, tokenizer.eos_token_id),
            ("bos", tokenizer.bos_token, tokenizer.bos_token_id),
            ("pad", tokenizer.pad_token, tokenizer.pad_token_id),
        )
    }
    return TokenizerFacts(
        tokens=len(tokenizer),
        largest_id=max(tokenizer.get_vocab().values()),
        special_tokens=special,
        bos_before_text=uses_bos(tokenizer),
        chat_template=tokenizer.chat_template is not None,
    )


def _placements(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Placement]:
    user, turn = Message("user", "Hello"), (Message("user", "Hello"), Message("assistant", "Hi"))
    forms: dict[str, str | tuple[Message, ...]] = {"text": "Hello"}
    if tokenizer.chat_template is not None:
        system = Message("system", "Be kind.")
        forms |= {"chat": (user,), "chat with a system message": (system, user), "chat of several turns": (*turn, user)}
    encoder = PairEncoder(tokenizer, augmentation_prompt=prompt)
    return {name: _placement(tokenizer, encoder, form) for name, form in forms.items()}


def _placement(
    tokenizer: PreTrainedTokenizerBase, encoder: PairEncoder, prompt: str | tuple[Message, ...]
) -> Placement:
    try:
        (tokens,) = encoder.encode([Pair("0", "inspect", 1, prompt, "Hi", "No")])
    except UsageError as error:
        return Placement(str(error))
    if isinstance(tokens, BadRow):
        return Placement(tokens.reason)
    rest = tokens.prompt[len(tokens.head) :]
    texts = [tokenizer.decode(ids) for ids in (tokens.head, rest, tokens.chosen)]
    return Placement(None, len(tokens.head), len(tokens.augmentation), *texts)


def _memory(params: Any, mesh: AbstractMesh, problems: list[str]) -> dict[str, Memory]:
    """Empty where an axis does not divide over the mesh; every such parameter is a problem."""
    found = len(problems)
    for path, param in jax.tree.leaves_with_path(params, is_leaf=lambda node: hasattr(node, "get_metadata")):
        axes, name = param.get_metadata()["axes"], jax.tree_util.keystr(path)
        _collecting(problems, meshes.sharding, mesh, axes, param.shape, name)
    if len(problems) > found:
        return {}
    shardings = nnx.to_pure_dict(meshes.param_shardings(mesh, params))
    return {name: _memory_of(nnx.to_pure_dict(params), shardings, mesh, jnp.dtype(name)) for name in PARAM_DTYPES}


def _memory_of(shapes: Any, shardings: Any, mesh: AbstractMesh, dtype: jnp.dtype) -> Memory:
    def in_dtype(dtype: jnp.dtype) -> Any:
        return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, dtype), shapes)

    params = in_dtype(dtype)
    moments = {}
    for name in OPTIMIZERS:
        numbers = {} if name == "rmsprop" else {"weight_decay": 0.0, "b1": 0.9, "b2": 0.999, "first_moment_dtype": None}
        optimizer = OPTIMIZERS[name](lambda step: 0.0 * step, max_grad_norm=1.0, **numbers)
        state = state_shapes(params, optimizer)
        laid_out = state_shardings(state, shardings, optimizer, mesh)
        moments[name] = _bytes_a_chip(state.optimizer_state, laid_out.optimizer_state)
    reference = jax.eval_shape(partial(reference_copy, dtype=jnp.dtype("bfloat16")), params)
    return Memory(
        parameters_bytes=_bytes_a_chip(params, shardings),
        gradients_bytes=_bytes_a_chip(in_dtype(jnp.promote_types(dtype, jnp.float32)), shardings),
        moments_bytes=moments,
        online_reference_bytes=_bytes_a_chip(reference, shardings),
    )


def _bytes_a_chip(shapes: Any, shardings: Any) -> int:
    sizes = jax.tree.map(
        lambda shape, sharding: math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))
