"""Checkpoints: tensors as safetensors, everything else as JSON; nothing is ever unpickled.

    PATH/LATEST                                  the name of the newest complete checkpoint
    PATH/step-000000120.0/manifest.json          configuration and progress of the run
    PATH/step-000000120.0/example.safetensors    the chain's example batch
    PATH/step-000000120.0/replica-0-stage-2.safetensors, .json      one shard per worker

A checkpoint is written into a folder aside, synced, then renamed, and only then named in LATEST: an interruption at any
moment leaves the previous one valid. The newest two are kept.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import BadCheckpoint
from .sharding import put

FORMAT = 2
_KEEP = 2


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; tensors inside are put into `tensors` and named. Raises BadCheckpoint for what cannot be written."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, tuple):
        return {"tuple": [pack(part, f"{name}.{k}", tensors) for k, part in enumerate(value)]}
    if isinstance(value, list):
        return [pack(part, f"{name}.{k}", tensors) for k, part in enumerate(value)]
    if isinstance(value, Mapping):
        return {"map": [[key, pack(part, f"{name}.{key}", tensors)] for key, part in value.items()]}
    raise BadCheckpoint(
        f"{name} is a {type(value).__name__}; only numbers, words, tensors and containers can be saved."
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(packed, list):
        return [unpack(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, inside),) = packed.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "tuple":
        return tuple(unpack(part, tensors) for part in inside)
    return {key: unpack(part, tensors) for key, part in inside}


def shard_name(replica: int, stage: int) -> str:
    """The name of a worker's shard."""
    return f"replica-{replica}-stage-{stage}"


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError if it cannot be written (no room, no right to)."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"it could not be written ({error})", str(file)) from error


class Writer:
    """Writes one checkpoint aside; `commit` makes it the newest. Used as a context manager, it cleans up on failure.

    Several processes write into one folder aside: the chief's, whose number the others are given as `owner`. Only the chief
    makes it, commits it and cleans up.
    """

    def __init__(self, path: str | Path, step: int, owner: int | None = None) -> None:
        self._root = Path(path)
        self._name = f"step-{step:09d}"
        self._chief = owner is None
        self._aside = self._root / f".{self._name}.{os.getpid() if owner is None else owner}"

    @property
    def there(self) -> bool:
        """Whether the folder aside is to be seen from here."""
        return self._aside.is_dir()

    def __enter__(self) -> Writer:
        if not self._chief:
            return self
        for left in self._root.glob(".step-*"):  # of processes that were killed while they saved
            if not _alive(int(left.suffix[1:])):
                shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._chief:
            shutil.rmtree(self._aside, ignore_errors=True)

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `name`.safetensors. Tensors are copied to the CPU; shared storages are written apart."""
        file = self._aside / f"{name}.safetensors"
        save_tensors(file, {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()})
        _sync(file)

    def json(self, name: str, value: Any) -> None:
        """Write `name`.json."""
        file = self._aside / f"{name}.json"
        file.write_text(json.dumps(value, indent=1))
        _sync(file)

    def commit(self) -> Path:
        """Rename into place, point LATEST at it, forget the oldest."""
        _sync(self._aside)
        again = [_age(folder)[1] for folder in self._root.glob(f"{self._name}.*")]
        # the same step saved again gets a name of its own: never touch what LATEST may name
        final = self._root / f"{self._name}.{max(again, default=-1) + 1}"
        self._aside.rename(final)
        pointer = self._root / f".LATEST.{os.getpid()}"
        pointer.write_text(final.name)
        _sync(pointer)
        pointer.replace(self._root / "LATEST")
        _sync(self._root)
        others = sorted((folder for folder in self._root.glob("step-*") if folder != final), key=_age)
        for old in others[: 1 - _KEEP]:
            shutil.rmtree(old, ignore_errors=True)
        return final


class Reader:
    """Reads the newest complete checkpoint under PATH (or PATH itself, if it is one). Raises BadCheckpoint."""

    def __init__(self, path: str | Path) -> None:
        root = Path(path)
        if not root.exists():
            raise BadCheckpoint(f"There is no checkpoint at {root}: no such folder.")
        self.path = root if (root / "manifest.json").exists() else _newest(root)
        self.manifest = self.json("manifest")
        if self.manifest.get("format") != FORMAT:
            raise BadCheckpoint(
                f"{self.path} has checkpoint format {self.manifest.get('format')}, this version reads {FORMAT}."
            )

    def has(self, name: str) -> bool:
        """Whether there are tensors of that name."""
        return (self.path / f"{name}.safetensors").exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors."""
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except Exception as error:  # safetensors raises its own kinds for truncated and foreign files
            raise BadCheckpoint(f"{file} cannot be read ({error}); the checkpoint is damaged.") from error

    def json(self, name: str) -> Any:
        """The value of `name`.json."""
        file = self.path / f"{name}.json"
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{file} cannot be read ({error}); the checkpoint is damaged or incomplete.") from error


def _newest(root: Path) -> Path:
    """The folder LATEST names; should that be missing, the newest complete one."""
    pointer = root / "LATEST"
    named = root / pointer.read_text().strip() if pointer.exists() else None
    if named is not None and (named / "manifest.json").exists():
        return named
    complete = [folder for folder in sorted(root.glob("step-*"), key=_age) if (folder / "manifest.json").exists()]
    if not complete:
        raise BadCheckpoint(f"{root} holds no complete checkpoint.")
    return complete[-1]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _age(folder: Path) -> tuple[int, int]:
    """(step, how often it had been saved before) from a folder's name."""
    step, _, again = folder.name.removeprefix("step-").partition(".")
    return int(step), int(again or 0)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def same_dtype(mine: Tensor, theirs: Tensor, name: str) -> None:
    """Raises BadCheckpoint unless both have one shape and dtype."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        raise BadCheckpoint(
            f"{name} is {tuple(theirs.shape)} {theirs.dtype} in the checkpoint but {tuple(mine.shape)} {mine.dtype} here."
        )


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors by name. Raises BadCheckpoint unless both have the same names, shapes and dtypes."""
    if target.keys() != source.keys():
        odd = sorted(target.keys() ^ source.keys())[:5]
        raise BadCheckpoint(f"The checkpoint of {where} does not fit: {odd} are only on one side.")
    for name, x in target.items():
        same_dtype(x, source[name], name)
        put(x, source[name])
