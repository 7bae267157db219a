"""PEFT adapter directories <-> the adapters of a decoder, both ways.

    adapter_config.json          rank r, lora_alpha, target_modules
    adapter_model.safetensors    for each module lora_A.weight [r, inputs] and lora_B.weight [outputs, r]

Where a family keeps several matrices in one module, such as GPT-NeoX's query_key_value, the decoder has an adapter for
each of n. As one module they are an adapter of rank n·r with the A's stacked and the B's on a block diagonal, which is
how they are written; its own alpha keeps the scale. Read is that form too, and one A of rank r that serves all of them.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import ADAPTERS, TARGETS, Lora
from sr_dpo_jax.weights.directory import ModelDirectory
from sr_dpo_jax.weights.families import Tensor
from sr_dpo_jax.weights.files import ADAPTER_CONFIG, FLOATS, read_json, refuse_escape
from sr_dpo_jax.weights.layout import blocks_of, file_shape, flatten

ADAPTER_WEIGHTS = "adapter_model.safetensors"
UNDERSTOOD = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
"""Fields of adapter_config.json that are read here."""
WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_pattern", "lora_dropout", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
)
"""Fields that change nothing of what adapters compute once they are trained: the file says where they stand."""
NEUTRAL = (None, False, "none", [], {})
"""The values with which any other field asks for nothing."""
OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts for which PEFT changes the weights of the base too."""


@dataclasses.dataclass(frozen=True)
class AdapterDirectory:
    """A PEFT directory that holds LoRA adapters."""

    path: Path
    fields: Mapping[str, Any]
    """adapter_config.json."""
    digest: str
    """The sha256 (hex) of the numbers, and of the fields that take part in what they compute."""

    def scale_of(self, module: str) -> tuple[int, float]:
        """Gives rank and scale of a module; a name in a pattern stands for all modules whose names end with it."""

        def of(pattern: str, default: float) -> float:
            found = self.fields.get(pattern) or {}
            return next((value for name, value in found.items() if f".{module}".endswith(f".{name}")), default)

        rank, alpha = of("rank_pattern", self.fields["r"]), of("alpha_pattern", self.fields["lora_alpha"])
        return int(rank), alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of the family that has adapters: one row of the family's table."""

    tensor: Tensor
    params: tuple[str, ...]
    """Those of the row's matrices that have an adapter, by path."""

    def name(self, layer: int) -> str:
        return self.tensor.name.removesuffix(".weight").format(layer=layer)

    def file_name(self, layer: int, factor: str) -> str:
        return f"base_model.model.{self.name(layer)}.lora_{factor.upper()}.weight"


def open_adapter(path: str) -> AdapterDirectory:
    """Opens a PEFT directory and reads its configuration.

    Raises:
      UsageError: it is no directory of LoRA adapters, or one that needs more than two thin matrices a module.
    """
    directory = Path(path)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        refuse_escape(directory, name)
        if not (directory / name).is_file():
            raise UsageError(
                f"lora.start={path}: has no {name}; give a PEFT directory with safetensors, as sr-dpo export or PEFT's "
                "save_pretrained writes it"
            )
    fields = read_json(directory / ADAPTER_CONFIG)
    if reason := _fault(fields):
        raise UsageError(f"{directory / ADAPTER_CONFIG}: {reason}")
    digest = hashlib.sha256(json.dumps({key: fields.get(key) for key in UNDERSTOOD}, sort_keys=True).encode())
    digest.update((directory / ADAPTER_WEIGHTS).read_bytes())
    return AdapterDirectory(directory, fields, digest.hexdigest())


def _fault(fields: Mapping[str, Any]) -> str | None:
    """Says why a configuration of PEFT's does not describe plain LoRA adapters; None where it does."""
    if fields.get("peft_type") != "LORA":
        return f"peft_type={fields.get('peft_type')!r} is not supported, only LORA; train a LoRA adapter"
    for field, value in fields.items():
        if field not in UNDERSTOOD + WITHOUT_EFFECT and value not in NEUTRAL:
            return f"{field}={value!r} is not supported; train an adapter without it"
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(OF_THE_BASE):
        return f"init_lora_weights={start!r} changes the base's weights; save it with PEFT's conversion to plain LoRA"
    numbers = [fields.get("r"), fields.get("lora_alpha")]
    for pattern in ("rank_pattern", "alpha_pattern"):
        named = fields.get(pattern) or {}
        if not isinstance(named, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in named):
            return f"{pattern} has more in it than names of modules; give each module a name of its own there"
        numbers += named.values()
    if not all(type(number) in (int, float) and 0 < number < 10**6 for number in numbers):
        return "r, lora_alpha and their patterns must be numbers above 0 and below a million; restore the file"
    return None


def modules_of(directory: ModelDirectory, lora: Lora) -> tuple[Module, ...]:
    """Lists the modules of a family that have adapters, in the order of its table."""
    modules = []
    for tensor in directory.tensors:
        matrices = tensor.name.endswith(".weight") and tensor.name.startswith(("model.layers", "gpt_neox.layers"))
        params = tuple(param for param in tensor.params if matrices and param.rpartition(".")[2] in lora.targets)
        if params:
            modules.append(Module(tensor, params))
    return tuple(modules)


def require_fit(adapter: AdapterDirectory, directory: ModelDirectory, abstract: Any, lora: Lora) -> None:
    """Refuses adapters of another rank, scale or place than the configuration asks for; reads headers alone.

    Args:
      adapter, directory, abstract, lora: as for `read_adapters`.

    Raises:
      UsageError: names what differs, and the keys that would fit.
    """
    file_name, layers = adapter.path / ADAPTER_WEIGHTS, range(directory.architecture.layers)
    with _opened(adapter) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        held = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    every, chosen = (modules_of(directory, form) for form in (dataclasses.replace(lora, targets=TARGETS), lora))
    there = [module for module in every if any(module.file_name(layer, "a") in held for layer in layers)]
    rank, alpha = adapter.fields["r"], adapter.fields["lora_alpha"]
    rslora = bool(adapter.fields.get("use_rslora", False))
    same_places = {module.tensor for module in there} == {module.tensor for module in chosen}
    if there and ((rank, float(alpha), rslora) != (lora.rank, lora.alpha, lora.rslora) or not same_places):
        targets = [name for name in TARGETS if any(p.endswith(f".{name}") for module in there for p in module.params)]
        form = f"lora.rank={rank} lora.alpha={alpha:g} lora.rslora={str(rslora).lower()}"
        raise UsageError(
            f"lora.start={adapter.path}: is of another form than the section lora asks for; to use it set {form} "
            f"'lora.targets=[{','.join(targets)}]', or fewer of them where it was trained with fewer"
        )
    expected = {
        module.file_name(layer, factor): _shape_of(adapter, module, layer, factor, flatten(abstract))
        for module in chosen
        for layer in layers
        for factor in "ab"
    }
    wrong = [f"{name}: has no place in the model" for name in held.keys() - expected.keys()]
    for name, shape in expected.items():
        if name not in held:
            wrong.append(f"{name}: missing")
        elif held[name][0] != shape or held[name][1] not in FLOATS:
            wrong.append(f"{name}: is {held[name]}, and should be {shape} in one of {', '.join(FLOATS)}")
    if wrong:
        listed = "\n  ".join(sorted(wrong)[:10])
        raise UsageError(f"{file_name}: does not fit model.path and {ADAPTER_CONFIG}:\n  {listed}\nTrain a new one")


def _shape_of(
    adapter: AdapterDirectory, module: Module, layer: int, factor: str, flat: Mapping[str, Any]
) -> tuple[int, int]:
    outputs, inputs = file_shape(blocks_of(module.tensor, flat))
    rank, _ = adapter.scale_of(module.name(layer))
    return (rank, inputs) if factor == "a" else (outputs, rank)


def read_adapters(
    adapter: AdapterDirectory, directory: ModelDirectory, abstract: Any, lora: Lora
) -> dict[str, np.ndarray]:
    """Reads all adapters into host memory, stacked over the layers, by their paths in the tree of parameters.

    Args:
      adapter: from `open_adapter`.
      directory: the base model, whose table names the modules.
      abstract: tree of abstract nnx parameters, with adapters.
      lora: their form.

    Raises:
      UsageError: they do not fit `lora` or the model, or a number is not finite.
    """
    require_fit(adapter, directory, abstract, lora)
    flat, found = flatten(abstract), {}
    with _opened(adapter) as file:
        for module in modules_of(directory, lora):
            layers = []
            for layer in range(directory.architecture.layers):
                where = f"{adapter.path}: {module.name(layer)}"
                a, b = (_finite(file, module.file_name(layer, factor), adapter.path) for factor in "ab")
                rank, scale = adapter.scale_of(module.name(layer))
                if not math.isclose(scale, lora.scale, rel_tol=1e-9) or rank not in (lora.rank, _rank(module, lora)):
                    raise UsageError(
                        f"{where} has rank {rank} and scale {scale:g}; lora.rank={lora.rank} and lora.alpha="
                        f"{lora.alpha:g} ask for {_rank(module, lora)} and {lora.scale:g}: set lora.targets to the "
                        "matrices that it was trained for, or train a new adapter"
                    )
                layers.append(_own(module, a, b, flat, lora, where=where))
            for path in layers[0]:
                found[path] = np.stack([of_layer[path] for of_layer in layers])
    return found


def load_adapters(
    adapter: AdapterDirectory, directory: ModelDirectory, abstract: Any, lora: Lora, shapes: Any
) -> dict[str, Any]:
    """Reads adapters onto the mesh, with the types and shardings of `shapes`; otherwise as `read_adapters`."""
    arrays, flat = read_adapters(adapter, directory, abstract, lora), flatten(shapes)
    placed = {}
    for path, leaf in flat.items():
        whole = arrays[path].astype(leaf.dtype)
        placed[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, whole.__getitem__)
    return unflatten_dict(placed, sep=".")


def save_adapters(
    arrays: Mapping[str, np.ndarray],
    directory: ModelDirectory,
    abstract: Any,
    out: Path,
    *,
    lora: Lora,
    base: str,
    revision: str | None,
    dtype: np.dtype,
) -> None:
    """Writes adapters as PEFT reads them.

    Args:
      arrays: adapters by path, stacked over the layers.
      directory: the base model, whose table names the modules.
      abstract: tree of abstract nnx parameters, with adapters.
      out: an existing directory.
      lora: their form.
      base: the name of the base model for adapter_config.json.
      revision: the commit of a base that is a hub name, else None.
      dtype: the type of the numbers in the file.

    Raises:
      UsageError: a number is not finite in `dtype`.
    """
    flat, tensors, fused = flatten(abstract), {}, {}
    for module in modules_of(directory, lora):
        count = len(module.params)
        if len(module.tensor.params) > 1:
            fused[module.name(0).rpartition(".")[2]] = count
        for layer in range(directory.architecture.layers):
            own = {path: arrays[path][layer] for param in module.params for path in _paths(param).values()}
            for factor, array in zip("ab", _as_one_module(module, own, flat, lora), strict=True):
                name, narrowed = module.file_name(layer, factor), array.astype(dtype)
                if not np.isfinite(narrowed).all():
                    raise UsageError(f"{name}: holds numbers that are not finite in {dtype}; choose another --step")
                tensors[name] = np.ascontiguousarray(narrowed)
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    alpha_grows = math.sqrt if lora.rslora else float
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha if lora.alpha % 1 else int(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({module.name(0).rpartition(".")[2] for module in modules_of(directory, lora)}),
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {name: alpha_grows(count) * lora.alpha for name, count in fused.items()},
    }
    (out / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def merged(
    groups: Iterator[dict[str, np.ndarray]], arrays: Mapping[str, np.ndarray], lora: Lora
) -> Iterator[dict[str, np.ndarray]]:
    """Adds s·A·B to each matrix that has an adapter, in float32, one group of the base's parameters at a time.

    Args:
      groups: from `weights.read.read_groups`, in float32.
      arrays: adapters by path, stacked over the layers.
      lora: their form.
    """
    for group in groups:
        for param, weight in group.items():
            paths = _paths(param)
            if paths["a"] in arrays:
                for layer in range(len(weight)):
                    a, b = (np.asarray(arrays[path][layer], np.float32) for path in paths.values())
                    weight[layer] += np.float32(lora.scale) * np.tensordot(a, b, axes=1)
        yield group


def _rank(module: Module, lora: Lora) -> int:
    """Gives the rank of a module that holds the adapters of all its matrices."""
    return len(module.params) * lora.rank


def _paths(param: str) -> dict[str, str]:
    """Gives the paths of the two factors of a matrix's adapter."""
    part, _, name = param.rpartition(".")
    return {factor: f"{part}.{ADAPTERS}.{name}.{factor}" for factor in "ab"}


def _as_one_module(
    module: Module, own: Mapping[str, np.ndarray], flat: Mapping[str, Any], lora: Lora
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the two factors of a module, A `[n·r, inputs]` and B `[outputs, n·r]`, from the adapters of one layer."""
    some = own[_paths(module.params[0])["a"]]
    rank, count = lora.rank, len(module.params)
    outputs, inputs = file_shape(blocks_of(module.tensor, flat))
    a, b = np.empty((count * rank, inputs), some.dtype), np.zeros((outputs, count * rank), some.dtype)
    for number, param in enumerate(module.params):
        columns = slice(number * rank, (number + 1) * rank)
        factors = _paths(param)
        a[columns] = own[factors["a"]].reshape(inputs, rank).T
        b[_row_numbers(module, param, flat), columns] = own[factors["b"]].reshape(rank, -1).T
    return a, b


def _own(
    module: Module, a: np.ndarray, b: np.ndarray, flat: Mapping[str, Any], lora: Lora, *, where: str
) -> dict[str, np.ndarray]:
    """Makes the adapters of one layer from the two factors of a module; the inverse of `_as_one_module`."""
    rank, found, rest = lora.rank, {}, b.copy()
    for number, param in enumerate(module.params):
        own_columns = slice(number * rank, (number + 1) * rank)
        columns = own_columns if len(a) == _rank(module, lora) else slice(None)
        rows = _row_numbers(module, param, flat)
        factors, shapes = _paths(param), {factor: flat[path].shape[1:] for factor, path in _paths(param).items()}
        found[factors["a"]] = a[columns].T.reshape(shapes["a"])
        found[factors["b"]] = b[rows, columns].T.reshape(shapes["b"])
        rest[rows, columns] = 0
    if rest.any():
        raise UsageError(
            f"{where}: lora_B is not a block for each of {', '.join(module.params)}, so it is not an adapter of each; "
            "set lora.targets to the matrices that it was trained for"
        )
    return found


def _row_numbers(module: Module, param: str, flat: Mapping[str, Any]) -> np.ndarray:
    """Gives the rows of a module's matrix that hold a parameter's outputs, in the parameter's own order."""
    (block,) = [block for block in blocks_of(module.tensor, flat) if param in block.own_axes]
    outer = block.dimensions[0]
    own_axes = {name: tuple(axis for axis in axes if axis in outer) for name, axes in block.own_axes.items()}
    of_rows = dataclasses.replace(block, dimensions=(outer,), own_axes=own_axes)
    whole = {axis: (0, block.sizes[axis]) for axis in outer}
    return of_rows.parts(np.arange(block.start, block.stop), whole)[param].reshape(-1)


def _opened(adapter: AdapterDirectory) -> Any:
    try:
        return safe_open(adapter.path / ADAPTER_WEIGHTS, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{adapter.path / ADAPTER_WEIGHTS}: damaged or unreadable safetensors file ({error}); fetch it again"
        ) from error


def _finite(file: Any, name: str, path: Path) -> np.ndarray:
    values = file.get_tensor(name)
    if not np.isfinite(values).all():
        raise UsageError(
            f"{path / ADAPTER_WEIGHTS}: {name} holds numbers that are not finite; the file is damaged, or training "
            "broke it: fetch it again, or train a new adapter"
        )
    return values
