"""Orbax checkpoints of a run: parameters, optimizer state, step, data position and configuration, saved asynchronously.

    checkpoints/<step>/state      arrays, sharded as on the mesh
    checkpoints/<step>/position   JSON: where the data goes on
    checkpoints/<step>/config     JSON: the resolved configuration

A step counts optimizer updates done. Orbax writes to a temporary name and renames, so a directory that is there is
whole.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train_step import Params, TrainState
from sr_dpo_jax.weights.layout import flatten, unflatten


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
      output_dir: the run directory.
      keep: how many of the newest stay; None keeps all.
      read_only: refuses to write, and makes no directory.
    """

    def __init__(self, output_dir: str | Path, *, keep: int | None = None, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=not read_only, read_only=read_only)
        self._directory = Path(output_dir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def latest(self) -> int | None:
        """The highest step that is committed, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, *, position: dict[str, Any], config: dict[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background; an earlier failed save raises here."""
        self._manager.check_for_errors()
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)),
                position=ocp.args.JsonSave(position),
                config=ocp.args.JsonSave(config),
            ),
        )
        if not saved:
            raise RuntimeError(f"{self._directory}: Orbax declined to save step {step}")

    def restore(self, abstract: TrainState, *, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """State and data position of `step`, or of the latest.

        Args:
          abstract: shapes, types and shardings of the state; any mesh will do.

        Raises:
          UsageError: the step is not there, or its arrays have other shapes than the configured model.
        """
        step = self.existing(step)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(_as_dict(abstract)), position=ocp.args.JsonRestore()
        )
        with _shape_errors(self._directory / str(step)):
            restored = self._manager.restore(step, args=arguments)
        return TrainState(**restored["state"]), restored["position"]

    def restore_params(self, shapes: Params, shardings: Params, *, step: int | None = None) -> Params:
        """The parameters of `step`, or of the latest; the optimizer's state is not read.

        Raises:
          UsageError: the step is not there, or its parameters have other shapes.
        """
        step = self.existing(step)
        wanted = jax.tree.map(
            lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), shapes, shardings
        )
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), wanted
        )
        arguments = ocp.args.PyTreeRestore(
            item={"params": wanted}, restore_args={"params": restore_args}, partial_restore=True
        )
        with _shape_errors(self._directory / str(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        return restored["state"]["params"]

    def check_params(self, shapes: Mapping[str, tuple[int, ...]], *, step: int) -> None:
        """Compares the parameters of a step, without reading them, with the shapes that a model has by path.

        Raises:
          UsageError: parameters are missing, extra or of other shapes; all are named.
        """
        path = self._directory / str(step)
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path / "state").item_metadata.tree
        held = {name: tuple(leaf.shape) for name, leaf in flatten(tree["params"]).items()}
        wrong = [
            f"{name}: {held.get(name, 'missing')}, the model has {shapes.get(name, 'no such parameter')}"
            for name in sorted(held.keys() | shapes.keys())
            if held.get(name) != shapes.get(name)
        ]
        if wrong:
            raise UsageError(
                "\n  ".join([f"{path}: not of the configured model; restore config.yaml or model.path", *wrong])
            )

    def read_params(self, names: Sequence[str], *, step: int) -> dict[str, np.ndarray]:
        """Some parameters of a step, whole and in host memory, by path; nothing else is read and no device is used."""
        wanted = unflatten(dict.fromkeys(names, 0))
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(
            item={"params": wanted}, restore_args={"params": restore_args}, partial_restore=True
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        return flatten(restored["state"]["params"])

    def finish(self, step: int) -> None:
        """Waits for all writes; raises unless the checkpoint of `step` is committed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.reload()
        if step not in self._manager.all_steps():
            raise RuntimeError(f"{self._directory}: the checkpoint of step {step} was not committed")
        self._manager.close()

    def close(self) -> None:
        self._manager.close()

    def existing(self, step: int | None) -> int:
        """The step itself, or the latest for None; raises UsageError where it is not there."""
        step = self.latest if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise UsageError(f"{self._directory}: no checkpoint of step {step}; there are {self._manager.all_steps()}")
        return step


@contextlib.contextmanager
def _shape_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"{path}: does not fit the configured model or optimizer ({error}); restore the configuration it was made "
            "with, or choose another output_dir"
        ) from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "optimizer_state": state.optimizer_state}


def abstract_state(shapes: TrainState, shardings: TrainState) -> TrainState:
    """Shapes and types of a state with the shardings it is to be restored on."""
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), shapes, shardings
    )
