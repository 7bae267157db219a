"""Eight CPU devices and no network, set before anything imports jax; and fixtures that several files use."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit what the session has set
    _KEPT = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    # Tests compile far longer than they compute: LLVM's optimisations are off, which halves their time.
    _FAST_COMPILE = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    os.environ["XLA_FLAGS"] = " ".join([*_FAST_COMPILE, *_KEPT, "--xla_force_host_platform_device_count=8"])
    # Runs of the same shapes compile once a session, also those in processes of their own.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sr_dpo_jax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest


@pytest.fixture
def float64():
    """64-bit jax arrays for the length of one test."""
    with jax.enable_x64(True):
        yield
