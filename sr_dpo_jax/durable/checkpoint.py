"""Orbax checkpoints of a run: state, data position and configuration, saved asynchronously and verified.

    checkpoints/<step>/state      arrays, sharded as on the mesh
    checkpoints/<step>/position   JSON: next step, identity of the run, software, reference digests, selection
    checkpoints/<step>/config     JSON: the resolved configuration
    checkpoints/<step>/digests    the digests that `integrity.py` compares all of it with

`<step>` is the number of planned steps done. Orbax writes to a temporary name and renames; then, still in the
background, the files are read back and compared with what was on the devices, and only that makes them a checkpoint.
Older ones are deleted after that and not before, the best one never before a better one is verified. A directory that
is damaged, cut short or foreign is never deleted, at most renamed.
"""

import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from sr_dpo_jax.durable import integrity
from sr_dpo_jax.durable.belonging import DELETED, reading, run_id_of, steps_named, stored_position, stranger
from sr_dpo_jax.durable.files import clear_way, write_text
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.parallel.processes import largest, on_leader

log = logging.getLogger(__name__)

GOOD, UNVERIFIED, DAMAGED = range(3)
PARAMS = "params."
CONDEMNED = ".deleting"
REPLACED = ".replaced"  # a verified step that is saved again, with its evaluation
LEDGER = "last_verified"
"""The file that names the newest verified step. If it names a step but no usable checkpoint is left, the run refuses to
start, since starting at step 0 would hide the loss."""
MOST_STEPS = 1024
"""The most checkpoints, the newest, that process 0 reports to the others; a broadcast has a fixed size."""
Params = Any


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run directory. In a run of several processes all of them make the same calls.

    Args:
      output_dir: the run directory.
      keep: how many of the newest verified ones stay, besides the best; None keeps all.
      read_only: refuses to write, and makes no directory.
      strict: a damaged checkpoint is refused instead of passed over for an older one.

    A step that was copied to another number, or from another run than `run_id`, is named in the log and never loaded,
    counted or a reason to delete another.
    """

    def __init__(
        self, output_dir: str | Path, *, keep: int | None = None, read_only: bool = False, strict: bool = False
    ):
        self.directory = Path(output_dir).absolute() / "checkpoints"
        self.run_id = run_id_of(Path(output_dir))
        self._keep, self._read_only, self._strict = keep, read_only, strict
        self._leader = jax.process_index() == 0
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = ThreadPoolExecutor(1, "verify")
        self._pending: tuple[int, Future[None]] | None = None
        self._best: int | None = None
        self._failures = 0
        if not read_only:
            on_leader(self._tidy)

    def _tidy(self) -> None:
        """Makes the directory, and ends what a kill has left half done in it."""
        clear_way(self.directory, directory=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        for half_deleted in steps_named(self.directory, CONDEMNED):
            shutil.rmtree(half_deleted)
        for half_written in self.directory.glob(f".{LEDGER}.*"):
            half_written.unlink(missing_ok=True)
        self._settle_replaced(restore=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for a save under way, except where one of several processes fails: it might wait for a dead one."""
        if kind is None or jax.process_count() == 1:
            self.close()

    def newest_good(self, *, prefix: str = "") -> int | None:
        """Finds the highest step whose bytes are those that were saved; None where nothing was ever saved whole.

        Damaged steps are set aside on the way.

        Args:
          prefix: only arrays whose names begin so are checked: PARAMS where the optimizer's state is not read.

        Raises:
          UsageError: no checkpoint is usable although one was damaged or once verified, or with `strict` the newest is
            damaged.
        """
        damaged, steps = [], self._listing()
        for step in steps:
            verdict, reason = self._judge(step, prefix)
            if verdict == GOOD:
                return step
            path = self.directory / str(step)
            if largest(not path.exists()):
                raise UsageError(f"{path}: {DELETED}")
            log.warning("%s: passed over: %s", path, reason)
            if verdict == DAMAGED:
                damaged.append(step)
                if self._strict:
                    raise UsageError(
                        f"{path}: {reason}; checkpoint.strict=true refuses to go back to an older one: restore the "
                        "directory, or set it to false"
                    )
                self._set_aside(step, "damaged")
        if damaged or largest((self.directory / LEDGER).exists()):
            raise UsageError(
                f"{self.directory}: none of the checkpoints {steps} can be used (reasons above); restore one from a "
                "copy, or choose another output_dir to start again"
            )
        return None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        position: dict[str, Any],
        config: dict[str, Any],
        best: int | None = None,
    ) -> None:
        """Copies the state off the devices, and writes and verifies it in the background.

        Args:
          step: steps of the plan done.
          state: arrays by name, among them `params`.
          position: JSON that the next start reads: next step, identity, software, reference digests, selection.
          config: the resolved configuration, JSON.
          best: the step of the best checkpoint so far: older ones than `keep` are deleted once this is verified, but
            not that one.
        """
        if self._pending is not None:
            raise RuntimeError("call await_save() before the next save")
        self._best = best
        path, tree = self.directory / str(step), dict(state)
        if path.exists():
            self._make_way(step)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), position=ocp.args.JsonSave(position), config=ocp.args.JsonSave(config)
        )
        try:
            self._checkpointer.save(path, args=arguments)
        except (OSError, ValueError, RuntimeError) as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            self._pending = step, failed
            return
        shards = integrity.host_shards(tree)
        self._pending = step, self._background.submit(self._verify, step, shards)

    def poll_save(self) -> bool:
        """Takes in the result of the save under way if it has ended; True where the state must be saved again.

        Called after every step. Raises as `await_save`.
        """
        return self._pending is not None and self._pending[1].done() and self.await_save()

    def await_save(self) -> bool:
        """Waits until the save under way is verified or has failed; True where the state must be saved again.

        Raises:
          RunError: it failed for the second time in a row, held values that are not finite, was the best checkpoint,
            whose state is gone by now, or failed in a run of several processes: these cannot agree on a retry, so the
            run is to be started again.
        """
        if self._pending is None:
            return False
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is None:
            self._failures = 0
            return False
        self._failures += 1
        message = f"{self.directory}: saving step {step} failed ({type(error).__name__}: {_first_line(error)})"
        hopeless = step == self._best or isinstance(error, FloatingPointError)
        if self._failures > 1 or jax.process_count() > 1 or hopeless:
            raise RunError(
                f"{message}; the checkpoints before it are untouched, and the same command goes on from them"
            )
        log.error("%s; trying once more", message)
        return True

    def restore(self, abstract: Mapping[str, Any], *, step: int) -> dict[str, Any]:
        """Restores the state of a step that `newest_good` or `existing` gave.

        Args:
          abstract: shapes, types and shardings of the state by name; any mesh will do.

        Raises:
          UsageError: its arrays have other shapes than the configured model.
        """
        return self._read(step, "state", ocp.args.StandardRestore(dict(abstract)))

    def restore_position(self, step: int) -> dict[str, Any]:
        """Reads the position alone, as `save` was given it."""
        return self._read(step, "position", ocp.args.JsonRestore())

    def restore_params(self, abstract: Params, *, step: int) -> Params:
        """Restores the parameters alone, as `restore` does; the optimizer's state is not read."""
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype),
            abstract,
        )
        return self._read_params(step, abstract, restore_args)

    def check_params(self, shapes: Mapping[str, tuple[int, ...]], *, step: int) -> None:
        """Compares the parameters of a step, without reading them, with the shapes that a model has by path.

        Raises:
          UsageError: parameters are missing, extra or of other shapes; all are named.
        """
        path = self.directory / str(step)
        # A checkpointer would look for a whole step's metadata there, and warn that there is none.
        with reading(path), contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            tree = handler.metadata(path / "state").tree
        held = {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree["params"], sep=".").items()}
        wrong = [
            f"{name}: {held.get(name, 'missing')}, the model has {shapes.get(name, 'no such parameter')}"
            for name in sorted({name for name, _ in held.items() ^ shapes.items()})
        ]
        if wrong:
            raise UsageError(
                "\n  ".join([f"{path}: not of the configured model; restore config.yaml or model.path", *wrong])
            )

    def read_params(self, names: Sequence[str], *, step: int) -> dict[str, np.ndarray]:
        """Reads some parameters of a step by path, whole and into host memory; uses no device."""
        wanted = unflatten_dict(dict.fromkeys(names, 0), sep=".")
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        return flatten_dict(self._read_params(step, wanted, restore_args), sep=".")

    def existing(self, step: int | None) -> int:
        """Checks the parameters of a step, or finds the newest good one for None; raises UsageError without one."""
        if step is None:
            step = self.newest_good(prefix=PARAMS)
            if step is not None:
                return step
        there = self._listing()
        if step not in there:
            asked = "" if step is None else f" of step {step}"
            raise UsageError(f"{self.directory}: no checkpoint{asked}; there are {there[::-1]}")
        verdict, reason = self._judge(step, PARAMS)
        if verdict != GOOD:
            raise UsageError(f"{self.directory / str(step)}: {reason}; choose another step of {there[::-1]}")
        return step

    def best(self) -> int:
        """Finds and checks the step of the run's best checkpoint; raises UsageError where there is none."""
        newest = self.existing(None)
        selection = self.restore_position(newest).get("selection")
        if selection is None or selection["step"] is None:
            reason = "was not set" if selection is None else f"{selection['metric']} was never measured, or not finite"
            raise UsageError(
                f"{self.directory}: the run has no best checkpoint (checkpoint.best_metric {reason}); leave out --best"
            )
        return self.existing(selection["step"])

    def finish(self, step: int, *, best: int | None = None) -> None:
        """Waits for the last save; raises RunError unless all processes have verified the checkpoint of `step`.

        `best` is the step of the best checkpoint, which is kept too.
        """
        self.await_save()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints verified")
        if not integrity.is_verified(self.directory / str(step)):
            raise RunError(f"{self.directory}: the checkpoint of step {step} was not verified by all processes")
        if self._leader:
            self._best = best
            self._prune()

    def verified_steps(self) -> list[int]:
        """Lists the steps that all processes verified when they were saved, lowest first."""
        paths = self.directory.iterdir() if self.directory.is_dir() else ()
        verified = [path for path in paths if path.name.isdigit() and integrity.is_verified(path)]
        return sorted(int(path.name) for path in verified if stranger(path, self.run_id) is None)

    def recorded_run_id(self) -> str | None:
        """Gives the run that the newest verified step is of; None where no step says."""
        newest = self.verified_steps()[-1:]
        return stored_position(self.directory / str(newest[0])).get("run_id") if newest else None

    def close(self) -> None:
        self._background.shutdown()
        self._checkpointer.close()

    def _read_params(self, step: int, wanted: Params, restore_args: Any) -> Params:
        """Reads the parameters that `wanted` has, and nothing else of the state."""
        part = {"item": {"params": wanted}, "restore_args": {"params": restore_args}, "partial_restore": True}
        return self._read(step, "state", ocp.args.PyTreeRestore(**part))["params"]

    def _read(self, step: int, item: str, arguments: Any) -> Any:
        path = self.directory / str(step)
        try:
            with reading(path):
                return self._checkpointer.restore(path, args=ocp.args.Composite(**{item: arguments}))[item]
        except ValueError as error:
            raise UsageError(
                f"{path}: does not fit the configured model or optimizer ({error}); restore the configuration it was "
                "made with, or choose another output_dir"
            ) from error

    def _verify(self, step: int, shards: list[tuple[str, integrity.Ranges, np.ndarray]]) -> None:
        """Hashes, waits for the commit, reads back, writes the digests, deletes older steps; runs in the background."""
        path = self.directory / str(step)
        digests = integrity.digest_shards(shards)
        shards.clear()
        self._checkpointer.wait_until_finished()
        integrity.check_shards(path, digests)
        integrity.write(path, digests, process=jax.process_index(), processes=jax.process_count())
        if self._leader:
            self._prune()

    def _judge(self, step: int, prefix: str) -> tuple[int, str]:
        """Gives the verdict that all processes agree on, each having read its share, and a reason."""
        verdict, reason = GOOD, "another process found its part damaged"
        path = self.directory / str(step)
        try:
            integrity.check(path, prefix=prefix, share=(jax.process_index(), jax.process_count()))
            if foreign := stranger(path, self.run_id):
                verdict, reason = UNVERIFIED, foreign
        except integrity.Unverified as error:
            verdict, reason = UNVERIFIED, str(error)
        except integrity.Damaged as error:
            verdict, reason = DAMAGED, str(error)
        return largest(verdict), reason

    def _listing(self) -> list[int]:
        """Lists the steps that have a directory, highest first, as process 0 sees them."""
        steps = np.full(MOST_STEPS, -1)
        if self._leader and self.directory.is_dir():
            numbered = [path for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir()]
            found = sorted((int(path.name) for path in numbered if str(int(path.name)) == path.name), reverse=True)
            steps[: len(found)] = found[:MOST_STEPS]
            names = {path.name for path in self.directory.iterdir()} - {LEDGER, *map(str, found)}
            others = sorted(name for name in names if not (name.startswith(f".{LEDGER}.") or name.endswith(REPLACED)))
            if others:
                log.warning("%s: not checkpoints, ignored: %s", self.directory, ", ".join(others))
        if jax.process_count() > 1:
            steps = np.asarray(multihost_utils.broadcast_one_to_all(steps))
        return [int(step) for step in steps if step >= 0]

    def _make_way(self, step: int) -> None:
        """Renames a step that is saved again; a verified one stays until its successor is verified."""
        path = self.directory / str(step)
        if not integrity.is_verified(path) or stranger(path, self.run_id) is not None:
            self._set_aside(step, "unverified")
        elif self._leader:
            path.rename(path.with_name(path.name + REPLACED))

    def _settle_replaced(self, *, restore: bool) -> None:
        """Deletes replaced steps whose successors are verified; with `restore` gives the others their place back."""
        for replaced in steps_named(self.directory, REPLACED):
            path = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if integrity.is_verified(path):
                shutil.rmtree(replaced)
            elif restore:
                if path.exists():
                    self._set_aside(int(path.name), "unverified")
                replaced.rename(path)

    def _set_aside(self, step: int, why: str) -> None:
        """Renames a directory that is no checkpoint, so that it is never resumed from, counted or deleted."""
        if not self._leader or self._read_only:
            return
        path = self.directory / str(step)
        names = (f"{step}.{why}" + (f"-{number}" if number else "") for number in range(MOST_STEPS))
        aside = next(self.directory / name for name in names if not (self.directory / name).exists())
        path.rename(aside)
        log.warning("%s: kept as %s; delete it when you have no use for it", path, aside.name)

    def _prune(self) -> None:
        self._settle_replaced(restore=False)
        verified = self.verified_steps()
        if verified:
            clear_way(self.directory / LEDGER)
            write_text(self.directory / LEDGER, f"{verified[-1]}\n")
        for step in verified[: -self._keep] if self._keep else []:
            if step != self._best:
                path = self.directory / str(step)
                shutil.rmtree(path.rename(path.with_name(path.name + CONDEMNED)))


def _first_line(error: BaseException) -> str:
    line = str(error).split("\n")[0]
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-140:]}"  # what the system said stands at the end
