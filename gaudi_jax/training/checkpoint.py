"""Checkpoints of a run: the whole training state, verified when it is read back."""

import dataclasses
import errno
import itertools
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from gaudi_jax.errors import UserError
from gaudi_jax.training.checksums import described
from gaudi_jax.training.mesh import place
from gaudi_jax.training.processes import is_primary, of_all, sum_of_all, wait_for_all
from gaudi_jax.training.workdir import write_atomically

log = logging.getLogger(__name__)

Leaves = dict[str, Any]
SYSTEM_FAILURES = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.ETIMEDOUT),
)


class Restored(NamedTuple):
    """A checkpoint read back.

    Attributes:
        step: steps made when it was saved.
        state: the parts that were asked for, in their structure.
    """

    step: int
    state: dict[str, Any]


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a directory holds a complete checkpoint, damaged or not.

    Example:
        >>> from gaudi_jax.training.checkpoint import has_checkpoint
        >>> has_checkpoint("nowhere")
        False
    """
    with Checkpointer(directory, read_only=True) as checkpoints:
        return bool(checkpoints.steps())


class Checkpointer:
    """Saves and restores training states in a directory, one folder a step (orbax).

    Saves are asynchronous and atomic: a killed save leaves nothing that counts. Every array carries
    a checksum, so that a damaged checkpoint is recognised. A context manager: leaving it waits for
    pending saves.

    Where several processes train together, each saves the parts of the arrays that its devices
    hold, all at the same steps. Restoring, each reads the whole checkpoint and checks it for
    itself, so that none waits for another one's answer; only reading may be done by any of them.

    Args:
        directory: where the checkpoints lie.
        keep: how many of the last ones are kept, beside the best one; at least 1.
        read_only: never write or delete; the directory may be missing.

    Raises:
        UserError: keep is not positive.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from gaudi_jax.training.checkpoint import Checkpointer
        >>> state = {"params": {"kernel": jnp.ones(3)}}
        >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, keep=1) as saver:
        ...     saver.save(10, state)
        ...     saver.wait()
        ...     saver.restore(jax.eval_shape(lambda: state)).step
        10
    """

    def __init__(self, directory: str | Path, *, keep: int = 1, read_only: bool = False):
        if keep < 1:
            raise UserError(f"checkpoint.keep={keep} must be at least 1")
        self._directory = Path(directory).absolute()
        # Orbax's own metrics would do, but a damaged metrics file stops it from opening at all.
        self._scores: dict[int, float] = {}
        self._manager: ocp.CheckpointManager | None = None
        self._reader: ocp.CheckpointManager | None = None
        if not read_only:
            policies = [LatestN(keep), _Best(self._scores)]
            with self._failing_to_write("the directory"):
                self._manager = ocp.CheckpointManager(
                    self._directory,
                    options=ocp.CheckpointManagerOptions(
                        preservation_policy=AnyPreservationPolicy(policies),
                        cleanup_tmp_directories=True,
                        create=True,
                    ),
                )
        self._open_reader()
        for step in self.steps():
            self._scores[step] = self._read_score(step)

    def _open_reader(self) -> None:
        """Opens the directory for this process alone: orbax's readers wait for one another."""
        if self._reader is not None:
            self._reader.close()
        own = jax.process_index()
        if self._directory.is_dir():
            self._reader = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"{own}"
                    ),
                ),
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._manager is None:
            return
        if kind is None:
            self.wait()
            self._manager.close()
        else:  # what went wrong is told already; a save that fails besides must not hide it
            with suppress(Exception):
                self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        manager = self._manager or self._reader
        return [] if manager is None else sorted(manager.all_steps())

    def wait(self) -> None:
        """Waits until pending saves are on disk.

        Raises:
            UserError: one of them could not be written.
        """
        if self._manager is not None:
            with self._failing_to_write("a checkpoint"):
                self._manager.wait_until_finished()

    @contextmanager
    def _failing_to_write(self, what: str) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # other processes, not the disk
            raise
        # Orbax and tensorstore raise many kinds of errors for disks that are full or gone.
        except Exception as error:
            raise UserError(
                f"{what} could not be written in {self._directory} ({_first_line(error)}); make "
                "room or choose another --workdir; run again, it continues from the checkpoint "
                "before"
            ) from error

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        iterator: grain.DatasetIterator | None = None,
        *,
        score: float | None = None,
    ) -> None:
        """Saves a state in the background.

        Args:
            step: steps made so far.
            state: parts of the state by name, each a pytree of arrays.
            iterator: data iterator to resume with it.
            score: what "best" compares, higher is better; None is never the best.

        Raises:
            UserError: this checkpoint or the one before could not be written.
        """
        assert self._manager is not None
        parts = {name: _leaves(part) for name, part in state.items()}
        items: dict[str, Any] = {
            name: ocp.args.StandardSave(leaves) for name, leaves in parts.items() if leaves
        }
        about_leaves = {part: described(leaves, sum_of_all) for part, leaves in parts.items()}
        self._scores[step] = -math.inf if score is None else score
        about = {
            "score": score,
            "leaves": about_leaves,
            "iterator": None if iterator is None else iterator.get_state(),
        }
        text = json.dumps(about)
        items["about"] = ocp.args.JsonSave({"json": text, "crc32": zlib.crc32(text.encode())})
        with self._failing_to_write(f"checkpoint {step}"):
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise RuntimeError(f"step {step} was not saved in {self._directory}")

    def rate(self, step: int, score: float | None) -> None:
        """Gives a checkpoint that was saved without one a score, in a file beside it.

        Raises:
            OSError: it could not be written.
        """
        if score is not None:
            self._scores[step] = score
            if is_primary():
                write_atomically(self._score_file(step), json.dumps(score))

    def _score_file(self, step: int) -> Path:
        return self._directory / f"{step}.score"

    def restore(
        self,
        abstract_state: Mapping[str, Any] | Callable[[int], Mapping[str, Any]],
        iterator: grain.DatasetIterator | None = None,
        *,
        step: int | str | None = None,
    ) -> Restored | None:
        """Reads a checkpoint back.

        Args:
            abstract_state: the wanted parts by name, each a pytree of `jax.ShapeDtypeStruct`, whose
                shardings the arrays get; without one, this process's first device. What was saved
                on some devices may be restored on others. A function gives them for a checkpoint's
                step.
            iterator: data iterator that is set to where it was.
            step: which one; "best" for the one with the highest score; None for the newest that is
                not damaged. A damaged one is named in a warning and passed over (and renamed
                to ``STEP.damaged``, unless reading only).

        Returns:
            The step and the state, or None if there is no checkpoint at all.

        Raises:
            UserError: there is no such step, all are damaged, they hold another structure, or the
                processes of the run do not find the same one.
        """
        if self._manager is not None:
            self._open_reader()
        steps = self.steps()
        if not steps:
            self._check_agreement(-1)
            return None
        if step is not None:
            chosen = self._best(steps) if step == "best" else step
            if chosen not in steps:
                there = ", ".join(map(str, steps))
                raise UserError(f"{self._directory} has no checkpoint {step}; it has {there}")
            steps = [int(chosen)]
        damaged: list[int] = []
        for candidate in reversed(steps):
            wanted = abstract_state(candidate) if callable(abstract_state) else abstract_state
            try:
                state, iterator_state = self._read_twice(candidate, wanted)
            except (UserError, jax.errors.JaxRuntimeError):  # such as a device without room
                raise
            # Orbax and tensorstore raise many kinds of errors for missing or damaged files.
            except Exception as error:
                damaged.append(candidate)
                log.warning("checkpoint %d is damaged (%s)", candidate, _first_line(error))
                continue
            self._check_agreement(candidate)
            if damaged:
                log.warning("using checkpoint %d", candidate)
            self._set_aside(damaged)
            if iterator is not None:
                iterator.set_state(iterator_state)
            return Restored(candidate, state)
        self._check_agreement(-2)
        raise UserError(
            f"every checkpoint in {self._directory} is damaged ({', '.join(map(str, steps))}); "
            "restore them from a copy, or start again with another --workdir"
        )

    def _read_twice(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """As `_read`; what the system could not do is no damage, and may go well a moment later."""
        try:
            return self._read(step, abstract)
        except Exception as error:
            if not _is_failure_of_the_system(error):
                raise
            log.warning("checkpoint %d: %s; reading it again", step, _first_line(error))
        time.sleep(1)
        try:
            return self._read(step, abstract)
        except Exception as error:
            if not _is_failure_of_the_system(error):
                raise
            raise UserError(
                f"checkpoint {step} in {self._directory} cannot be read ({_first_line(error)}); "
                "mend that and run again, or remove the checkpoint to go on from the one before"
            ) from error

    def _read(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The state and the data iterator's state; any error but a UserError means damage."""
        about = self._read_about(step)
        saved = about["leaves"]
        state = {}
        for part, tree in abstract.items():
            wanted = _leaves(tree)
            _check_structure(saved[part], wanted, self._directory / str(step) / part)
            leaves = {}
            if wanted:
                on_host = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
                leaves = self._restore_item(step, part, ocp.args.StandardRestore(on_host))
            for name, about_leaf in described(leaves).items():
                if about_leaf["checksum"] != saved[part][name]["checksum"]:
                    raise ValueError(f"checksum of {part}.{name} does not match")
            ordered = [_placed(leaves[name], leaf.sharding) for name, leaf in wanted.items()]
            state[part] = jax.tree.unflatten(jax.tree.structure(tree), ordered)
        return state, about["iterator"]

    def _read_about(self, step: int) -> dict[str, Any]:
        about = self._restore_item(step, "about", ocp.args.JsonRestore())
        if zlib.crc32(about["json"].encode()) != about["crc32"]:
            raise ValueError("checksum of its description does not match")
        return json.loads(about["json"])

    def _read_score(self, step: int) -> float:
        try:
            score = self._read_about(step)["score"]
            if score is None and self._score_file(step).exists():
                score = json.loads(self._score_file(step).read_text(encoding="utf-8"))
        except Exception:  # damaged: `restore` will say so
            return -math.inf
        return -math.inf if score is None else score

    def _restore_item(self, step: int, name: str, args: Any) -> Any:
        assert self._reader is not None
        return self._reader.restore(step, args=ocp.args.Composite(**{name: args}))[name]

    def _check_agreement(self, step: int) -> None:
        """Checks that all processes of a run found the same step; negative for none."""
        found = [step] if self._manager is None else of_all(step)
        if len(set(found)) > 1:
            names = ", ".join(str(step) if step >= 0 else "none" for step in found)
            raise UserError(
                f"the processes of this run find different checkpoints in {self._directory} "
                f"({names}); give all of them the same --workdir, on a disk that all of them see"
            )

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints: training goes on before them and saves the steps again."""
        if self._manager is None:
            return
        for step in steps if is_primary() else ():
            names = (f"{step}.damaged{number or ''}" for number in itertools.count())
            aside = next(path for name in names if not (path := self._directory / name).exists())
            (self._directory / str(step)).rename(aside)
        wait_for_all("damaged checkpoints are renamed")
        self._manager.reload()

    def _best(self, steps: list[int]) -> int:
        best = _best_step({step: self._scores[step] for step in steps})
        if best is None:
            raise UserError(f"no checkpoint in {self._directory} has a score; ask for a step")
        return best


@dataclasses.dataclass
class _Best(PreservationPolicy):
    """Keeps the checkpoint with the highest score, if any has one."""

    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = _best_step({step: self.scores.get(step, -math.inf) for step in steps})
        return [step == best for step in steps]


def _best_step(scores: Mapping[int, float]) -> int | None:
    """The step with the highest score, the newest of equals; None where none has a score."""
    scored = [step for step, score in scores.items() if score > -math.inf]
    return max(scored, key=lambda step: (scores[step], step), default=None)


def _leaves(tree: Any) -> Leaves:
    """Arrays by readable paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _placed(array: np.ndarray, sharding: Any) -> Array:
    return jnp.asarray(array) if sharding is None else place(array, sharding)


def _is_failure_of_the_system(error: Exception) -> bool:
    """Whether reading failed for another reason than what the files hold."""
    # Tensorstore's errors tell the system's in words only.
    return isinstance(error, MemoryError) or any(
        os.strerror(code) in str(error) for code in SYSTEM_FAILURES
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _check_structure(described: dict[str, Any], wanted: Leaves, path: Path) -> None:
    shapes = {name: (list(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
    saved = {name: (leaf["shape"], leaf["dtype"]) for name, leaf in described.items()}
    differing = sorted(
        name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name)
    )
    if differing:
        raise UserError(
            f"checkpoint {path} holds another model or optimizer: {len(differing)} arrays differ "
            f"({', '.join(differing[:3])}); use the config that it was trained with"
        )
