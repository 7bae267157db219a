"""Rope parameters of a transformers config -> rotary frequencies, computed once on the host in float64.

The scalings and their parameters are those that transformers defines in `modeling_rope_utils`. Linear scaling, YaRN
(arXiv:2309.00071) and Llama 3's are functions of the config alone. Dynamic NTK and LongRoPE change the frequencies with
the length of the text; the frequencies here are exact up to the length where they change, and longer data is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Rope

SUPPORTED = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@np.errstate(all="ignore")  # numbers that are not finite are refused at the end, by the file's name
def rope_of(parameters: Mapping[str, Any], *, head_dim: int, context_tokens: int, where: str) -> Rope:
    """Computes the frequencies of one kind of layers.

    Args:
      parameters: a config's `rope_parameters`, or one layer type's part of it.
      head_dim: D; `partial_rotary_factor` is the share of it that turns.
      context_tokens: the config's `max_position_embeddings`.
      where: names the file in errors.

    Raises:
      UsageError: the scaling is not supported, or its numbers make no sense.
    """
    name = parameters.get("rope_type", "default")
    theta, rotary_dims = float(parameters["rope_theta"]), int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    plain = theta ** -(np.arange(0, rotary_dims, 2, dtype=np.float64) / rotary_dims)
    scale, exact_positions = 1.0, None
    match name:
        case "default":
            frequencies = plain
        case "linear":
            frequencies = plain / parameters["factor"]
        case "dynamic":
            frequencies, exact_positions = plain, context_tokens
        case "llama3":
            frequencies = _llama3(plain, parameters)
        case "yarn":
            frequencies, scale = _yarn(plain, theta, parameters, context_tokens)
        case "longrope":
            exact_positions = parameters["original_max_position_embeddings"]
            factors = np.asarray(parameters["short_factor"], np.float64)
            if factors.shape != plain.shape:
                raise UsageError(
                    f"{where}: rope_parameters.short_factor has {factors.size} numbers, but a head has {len(plain)} "
                    "frequencies; restore the file"
                )
            frequencies = plain / factors
            scale = _longrope_scale(parameters, context_tokens)
        case _:
            raise UsageError(
                f"{where}: rope_parameters.rope_type={name!r} is not supported; supported: {', '.join(SUPPORTED)}"
            )
    if not (np.isfinite([*frequencies, scale]).all() and (frequencies > 0).all()):
        raise UsageError(
            f"{where}: rope_parameters={dict(parameters)} give no finite positive frequencies; correct them"
        )
    return Rope(tuple(frequencies.tolist()), scale, exact_positions)


def _llama3(plain: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates between them."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * plain / (2 * np.pi)
    kept_share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept_share + (1 - kept_share) / parameters["factor"])


def _yarn(
    plain: np.ndarray, theta: float, parameters: Mapping[str, Any], context_tokens: int
) -> tuple[np.ndarray, float]:
    """Computes YaRN's frequencies and scale (arXiv:2309.00071, section 3.2)."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters["factor"] if parameters["factor"] is not None else context_tokens / original

    def dimension_with(turns: float) -> float:
        return 2 * len(plain) * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_with(parameters.get("beta_fast") or 32), dimension_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(plain) - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    frequencies = plain * (1 - ramp) + plain / factor * ramp
    scale = parameters.get("attention_factor")
    if scale is None:
        one, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scale = _yarn_scale(factor, one) / _yarn_scale(factor, all_dims) if one and all_dims else _yarn_scale(factor)
    return frequencies, float(scale)


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_scale(parameters: Mapping[str, Any], context_tokens: int) -> float:
    """Computes LongRoPE's factor on queries and keys (arXiv:2402.13753), which holds for short texts too."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or context_tokens / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
