"""Chooses the way to compute attention by platform, device and model."""

import importlib.util
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import DENSE, AttentionPath
from sr_dpo_jax.model.kernels.tiled import TILED

log = logging.getLogger(__name__)


def attention_name(name: str, mesh: Mesh, architecture: Architecture, dtype: jnp.dtype) -> str:
    """Resolves `model.attention=auto` for these devices and a model with activations of this type."""
    if name != "auto":
        return name
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return {"tpu": "splash", "cpu": "tiled"}.get(device.platform, "dense")
    why_not = _triton_refuses(device, architecture, dtype)
    if why_not is None and dtype != jnp.bfloat16:
        why_not = f"in {dtype} the fused kernels run out of registers"
    if why_not is None and importlib.util.find_spec("tokamax") is None:
        why_not = "the fused kernels need pip install 'sr_dpo_jax[cuda]'"
    if why_not is not None:
        log.warning("model.attention=auto is dense here: %s", why_not)
    return "triton" if why_not is None else "dense"


def _triton_refuses(device: jax.Device, architecture: Architecture, dtype: jnp.dtype) -> str | None:
    """Says why tokamax's kernels do not run, or None; the limits are shared memory, by XLA's compiler for GPUs."""
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "", 1).isdigit() or float(capability) < 8:  # AMD's capability is no number
        return f"the fused kernels are for NVIDIA GPUs of compute capability 8.0 or more, here is {device.device_kind}"
    if architecture.attention_cap is not None:
        return f"the fused kernels have no gradient for scores capped at {architecture.attention_cap:g}"
    of_a_data_centre = capability == "8.0" or capability.startswith(("9.", "10."))
    largest = (256 if of_a_data_centre else 128) // (jnp.dtype(dtype).itemsize // 2)
    if architecture.head_dim > largest:
        return f"the fused kernels take heads of up to {largest} in {dtype} here, not {architecture.head_dim}"
    return None


def attention_path(name: str, mesh: Mesh, architecture: Architecture, dtype: jnp.dtype) -> AttentionPath:
    """Makes the path of that name, which `attention_name` gives.

    Args:
      name: dense, tiled, splash or triton.
      mesh: the device mesh.
      architecture: the model's.
      dtype: the type of its activations.

    Raises:
      UsageError: the path does not run on these devices or for this model, or a package it needs is not installed.
    """
    device = mesh.devices.flat[0]
    match name:
        case "tiled":
            return TILED
        case "splash" if device.platform == "tpu":
            # Imported only here, as Pallas for TPUs takes as long as a fifth of jax itself.
            from sr_dpo_jax.model.kernels.splash import splash_path

            return splash_path(interpret=False)
        case "splash":
            raise UsageError(f"model.attention=splash: a kernel for TPUs, here is {device.platform}; set it to auto")
        case "triton":
            if why_not := _triton_refuses(device, architecture, dtype):
                raise UsageError(f"model.attention=triton: {why_not}; set it to auto")
            return _triton_path()
    return DENSE


def _triton_path() -> AttentionPath:
    try:
        from sr_dpo_jax.model.kernels.triton import triton_path
    except ImportError as missing:
        raise UsageError(
            f"model.attention=triton: {missing.name} is not installed; pip install 'sr_dpo_jax[cuda]'"
        ) from missing
    return triton_path()
