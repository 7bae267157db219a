"""Looks at a model before a run: architecture, parameters, weight files, tokenizer, where p stands, memory a chip.

No device is touched, and of the weights only the headers of their files are read, unless a digest is asked for. Memory
is counted from the optimizer state and the sharding table that a run uses.

Next: `commands/inspect/show.py`, which prints the result.
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

from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair
from sr_dpo_jax.data.tokenizer_fit import misfits
from sr_dpo_jax.data.tokens import PairEncoder, load_tokenizer, uses_bos
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import Lora, split
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.train.optim import OPTIMIZERS
from sr_dpo_jax.train.state import abstract_state
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights import hub
from sr_dpo_jax.weights.files import INDEX, ONLY_SAFETENSORS, other_weights, read_headers, weight_files
from sr_dpo_jax.weights.hub import Header
from sr_dpo_jax.weights.layout import flatten
from sr_dpo_jax.weights.placement import abstract_params, reference_copy

PARTS = ("embedding", "attention", "mlp", "norms", "unembedding")
PARAM_DTYPES = ("float32", "bfloat16")
LORA = Lora(rank=16, alpha=32.0)
"""The adapters whose memory is shown: those that `lora: {}` asks for."""
NOT_FETCHED = (
    "the numbers of the weights, and whether their files are whole: of a hub name only the headers of the files are "
    "fetched; --digest fetches all"
)


@dataclasses.dataclass(frozen=True)
class Files:
    """The weight files, as their headers describe them."""

    files: int
    tensors: dict[str, int]
    """The number of tensors of each type, named as safetensors does."""
    tensor_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Says whether p can stand verbatim before x in one form of prompt, and shows it for "Hello" → "Hi"."""

    reason: str | None
    """The reason why it cannot; None where it can."""
    head_tokens: int = 0
    augmentation_tokens: int = 0
    head: str = ""
    """The text before p."""
    rest: str = ""
    """The text from p to the response."""
    response: str = ""


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes of a run's state on each chip, for one type of the parameters; activations and batch not counted."""

    parameters_bytes: int
    gradients_bytes: int
    """One copy of the gradients, in the type that micro-batches are added up in."""
    moments_bytes: dict[str, int]
    """The state of each optimizer."""
    online_reference_bytes: int
    """The frozen reference in bfloat16, its norms in the type of the parameters; none with reference.mode=cached."""
    lora_bytes: int
    """All of it where adapters of LORA are trained with AdamW beside a base in bfloat16, whatever the reference."""

    def total_bytes(self, optimizer: str, *, online: bool) -> int:
        """Sums up all of it, with one optimizer; the reference counts where it is `online`."""
        reference = self.online_reference_bytes if online else 0
        return self.parameters_bytes + self.gradients_bytes + self.moments_bytes[optimizer] + reference


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that is known of a model; --json writes these fields under their names."""

    path: str
    family: str
    architecture: dict[str, Any]
    parameters: dict[str, int]
    """The number of parameters of each part; one that belongs to no known part stands under its own name."""
    has_weights: bool | None
    """There are weight files that a run would read; None where that is not known."""
    weights: Files | None
    """The weight files; None where there are none, where they do not fit, or where they were not looked at."""
    digest: str | None
    """The sha256 of config.json and the weight files, where it was asked for."""
    tokenizer: dict[str, Any] | None
    """The numbers of tokens and of the largest id, the special tokens, BOS and chat template; None where none fits."""
    placements: dict[str, Placement]
    """The place of p by form of prompt: text, chat, chat with a system message, chat of several turns."""
    mesh: dict[str, int]
    memory: dict[str, Memory]
    """The memory by type of the parameters; empty where they do not divide over the mesh."""
    not_looked_at: tuple[str, ...]
    """The parts that a run would look at and this command did not."""
    problems: tuple[str, ...]
    """The reasons for which a run would refuse the model."""


def inspect_model(path: str, *, revision: str | None, mesh: Mapping[str, int], prompt: str, digest: bool) -> Inspection:
    """Reads config, tokenizer and headers of a model.

    Args:
      path: a Hugging Face directory or hub name.
      revision: the revision to which a hub name is pinned.
      mesh: the sizes of replica, fsdp and tensor.
      prompt: the instruction p.
      digest: whether to fetch and read the weights whole for their sha256; else only their headers are read.

    Returns:
      All that was found; whatever a run would refuse is in its `problems`.

    Raises:
      UsageError: there is no such model, or its architecture is not supported.
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
        memory=_memory(directory.architecture, params, meshes.abstract_mesh(**mesh), problems),
        not_looked_at=not_looked_at,
        problems=tuple(problems),
    )


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh from a text such as `replica=1,fsdp=8,tensor=1`; an axis that is not named has size 1.

    Raises:
      UsageError: an unknown name, a name twice, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(replica|fsdp|tensor)=([1-9][0-9]*)", part)
        if match is None or match[1] in sizes:
            raise UsageError(
                f"--mesh {text}: {part!r} does not fit; give sizes such as replica=1,fsdp=8,tensor=1, each once"
            )
        sizes[match[1]] = int(match[2])
    return {"replica": 1, "fsdp": 1, "tensor": 1} | sizes


def _collecting(problems: list[str], read: Any, *arguments: Any, **options: Any) -> Any:
    """Calls `read` and gives its result; None where it raises a UsageError, whose text is added to the problems."""
    try:
        return read(*arguments, **options)
    except UsageError as error:
        problems.append(str(error))
        return None


def _parts(params: Any) -> dict[str, int]:
    """Counts the parameters of each part; norms within attention count as norms."""
    counts = Counter(dict.fromkeys(PARTS, 0))
    for path, param in flatten(params).items():
        part = next((part for part in PARTS if part in path.split(".")), path)
        counts["norms" if "norm" in path else part] += math.prod(param.shape)
    return dict(counts)


def _look_at_weights(
    name: str, directory: weights.ModelDirectory, params: Any, problems: list[str]
) -> tuple[bool | None, Files | None, tuple[str, ...]]:
    """Reads the headers of the weight files; of a hub name nothing more is fetched.

    Gives `Inspection.has_weights`, `weights` and `not_looked_at`, and adds to the problems those of the files.
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
    faults = weights.faults(directory, params, headers, weight_map)
    if faults:
        problems.append(weights.listing(directory, faults))
    return True, None if faults else _files(headers.values()), (NOT_FETCHED,)


def _files(headers: Collection[Header]) -> Files:
    """Sums up the sound headers of files."""
    tensors, sizes = Counter[str](), Counter[str]()
    for header in headers:
        for shape, dtype in header.values():
            bits = re.search(r"\d+", dtype)  # F32, BF16, I64; BOOL takes a byte
            tensors[dtype] += 1
            sizes[dtype] += math.prod(shape) * (int(bits.group()) if bits else 8) // 8
    return Files(len(headers), dict(tensors), dict(sizes))


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    special = {}
    for name in ("eos", "bos", "pad"):
        token = getattr(tokenizer, f"{name}_token")
        special[name] = None if token is None else (token, getattr(tokenizer, f"{name}_token_id"))
    return {
        "tokens": len(tokenizer),
        "largest_id": max(tokenizer.get_vocab().values()),
        "special_tokens": special,
        "bos_before_text": uses_bos(tokenizer),
        "chat_template": tokenizer.chat_template is not None,
    }


def _placements(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Placement]:
    user, answer, system = Message("user", "Hello"), Message("assistant", "Hi"), Message("system", "Be kind.")
    forms: dict[str, str | tuple[Message, ...]] = {"text": "Hello"}
    if tokenizer.chat_template is not None:
        forms["chat"] = (user,)
        forms["chat with a system message"] = (system, user)
        forms["chat of several turns"] = (user, answer, user)
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


def _memory(architecture: Architecture, params: Any, mesh: AbstractMesh, problems: list[str]) -> dict[str, Memory]:
    """Counts the memory for each type of the parameters; none where an axis does not divide over the mesh.

    Every parameter that does not divide is added to the problems.
    """
    before = len(problems)
    for path, param in jax.tree.leaves_with_path(params, is_leaf=lambda node: hasattr(node, "get_metadata")):
        axes, name = param.get_metadata()["axes"], jax.tree_util.keystr(path)
        _collecting(problems, meshes.sharding, mesh, axes, param.shape, name)
    if len(problems) > before:
        return {}
    adapted = abstract_params(architecture, LORA)
    return {name: _memory_of(params, adapted, mesh, jnp.dtype(name)) for name in PARAM_DTYPES}


def _memory_of(params: Any, adapted: Any, mesh: AbstractMesh, dtype: jnp.dtype) -> Memory:
    """Counts the memory of abstract nnx parameters in this type; `adapted` are those with the adapters of LORA."""
    wide = jnp.promote_types(dtype, jnp.float32)
    whole, adapters = _placed(params, mesh, dtype), split(_placed(adapted, mesh, dtype))[0]
    reference = jax.eval_shape(partial(reference_copy, dtype=jnp.dtype("bfloat16")), whole)
    reference = jax.tree.map(lambda shape, param: shape.update(sharding=param.sharding), reference, whole)
    beside = meshes.bytes_a_chip(split(_placed(adapted, mesh, wide))[0]) + meshes.bytes_a_chip(reference)
    return Memory(
        parameters_bytes=meshes.bytes_a_chip(whole),
        gradients_bytes=meshes.bytes_a_chip(_placed(params, mesh, wide)),
        moments_bytes={name: _moments(name, whole, mesh) for name in OPTIMIZERS},
        online_reference_bytes=meshes.bytes_a_chip(reference),
        lora_bytes=meshes.bytes_a_chip(adapters) + _moments("adamw", adapters, mesh) + beside,
    )


def _placed(params: Any, mesh: AbstractMesh, dtype: jnp.dtype) -> Any:
    shardings = nnx.to_pure_dict(meshes.param_shardings(mesh, params))
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, dtype, sharding=where),
        nnx.to_pure_dict(params),
        shardings,
    )


def _moments(name: str, params: Any, mesh: AbstractMesh) -> int:
    numbers = {} if name == "rmsprop" else {"weight_decay": 0.0, "b1": 0.9, "b2": 0.999, "first_moment_dtype": None}
    optimizer = OPTIMIZERS[name](lambda step: 0.0 * step, max_grad_norm=1.0, **numbers)
    return meshes.bytes_a_chip(abstract_state(params, optimizer, mesh).optimizer_state)
