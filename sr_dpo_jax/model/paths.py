"""Which way attention is computed: by platform, device and model."""

import importlib.util
import logging

import jax
from jax.sharding import Mesh

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import DENSE, AttentionPath
from sr_dpo_jax.model.splash import splash_path
from sr_dpo_jax.model.tiled import tiled_path

log = logging.getLogger(__name__)


def attention_name(name: str, mesh: Mesh, architecture: Architecture) -> str:
    """What model.attention comes to on these devices, for this model."""
    if name != "auto":
        return name
    device = mesh.devices.flat[0]
    match device.platform:
        case "tpu":
            return "splash"
        case "cpu":
            return "tiled"
        case "gpu" if _runs_triton(device) and architecture.attention_cap is None:
            if importlib.util.find_spec("tokamax"):
                return "triton"
            log.warning("model.attention=auto is dense here: the fused kernels need pip install 'sr_dpo_jax[cuda]'")
    return "dense"


def _runs_triton(device: jax.Device) -> bool:
    """Whether this is an NVIDIA GPU of the Ampere generation or newer; an AMD one has no number there."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability.replace(".", "", 1).isdigit() and float(capability) >= 8


def attention_path(name: str, mesh: Mesh, *, row_axes: tuple[str, ...], head_axes: tuple[str, ...]) -> AttentionPath:
    """The path of that name, as `attention_name` gives it.

    Args:
      name: dense, tiled, splash or triton.
      mesh: the device mesh.
      row_axes, head_axes: mesh axes that rows and heads are sharded over.

    Raises:
      UsageError: it does not run on these devices, or what it needs is not installed.
    """
    device, axes = mesh.devices.flat[0], {"row_axes": row_axes, "head_axes": head_axes}
    match name:
        case "tiled":
            return tiled_path(mesh, **axes)
        case "splash" if device.platform == "tpu":
            return splash_path(mesh, **axes, interpret=False)
        case "splash":
            raise UsageError(f"model.attention=splash: a kernel for TPUs, here is {device.platform}; set it to auto")
        case "triton" if _runs_triton(device):
            return _triton_path(mesh, **axes)
        case "triton":
            raise UsageError(
                "model.attention=triton: kernels for NVIDIA GPUs of compute capability 8.0 or more, here is "
                f"{device.device_kind}; set it to auto"
            )
    return DENSE


def _triton_path(mesh: Mesh, **axes: tuple[str, ...]) -> AttentionPath:
    try:
        from sr_dpo_jax.model.triton import triton_path
    except ImportError as missing:
        raise UsageError(
            f"model.attention=triton: {missing.name} is not installed; pip install 'sr_dpo_jax[cuda]'"
        ) from missing
    return triton_path(mesh, **axes)
