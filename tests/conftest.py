"""Eight CPU devices and no network, set before anything imports jax; and fixtures that several files use."""

import gc
import importlib.metadata
import os
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit what the session has set
    _KEPT = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    # Tests compile far longer than they compute. Without LLVM's optimisations that takes half of the time, and less
    # again without fusion emitters, and in one part where 32 parts would be compiled beside each other (another jaxlib
    # may not know these flags, as 0.12 does not know the first, and then ends the process).
    _FAST_COMPILE = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        _FAST_COMPILE += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join([*_FAST_COMPILE, *_KEPT, "--xla_force_host_platform_device_count=8"])
    # The same program is compiled once for all tests and all their processes, also in sessions to come. jax knows a
    # program by its content, its versions and its flags; pytest --cache-clear removes the directory.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled")
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(10**9))  # bytes; the longest unused go first
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that are marked so first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spares the garbage collector what was imported and collected: a tenth of the time of tests went there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def compiled_as_before():
    """What `sr-dpo compile` sets for its own process ends with the test: no compilation cache, the least effort."""
    names = ("jax_enable_compilation_cache", "jax_exec_time_optimization_effort")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


def _on_one_device(make_mesh: Any) -> Any:
    """Lays a mesh that takes all devices over one."""

    def made(*, replica: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
        is_open = sorted((replica, fsdp, tensor)) == [-1, 1, 1]
        devices = jax.devices()[:1] if is_open else None
        return make_mesh(replica=replica, fsdp=fsdp, tensor=tensor, devices=devices)

    return made


@pytest.fixture(scope="session", autouse=True)
def devices_of_runs():
    """In this process, a run whose configuration names no size of the mesh has one device and not eight.

    Its programs are smaller and its checkpoints have fewer shards, and most tests ask nothing that depends on the mesh.
    Those that do name its sizes.
    """
    from sr_dpo_jax.train import setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", _on_one_device(setup.make_mesh))
        yield


@pytest.fixture
def float64():
    """64-bit jax arrays for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def same_programs():
    """Runs of one file share the programs that they have in common."""
    import same_programs as programs

    with programs.shared():
        yield


@pytest.fixture
def programs_anew(same_programs):
    """Every program of this test is traced anew."""
    import same_programs as programs

    with programs.anew():
        yield
