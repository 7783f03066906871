"""What goes into a stage, kept in a file while the stages below it no longer change (greedy layer-wise learning).

    first time a sample comes:   x^j = f^{j-1}(… f^1(x)), written to row n of a memory-mapped file; n: the sample's number
    later:                       row n is read, and the stages below do nothing

At the start of every epoch the stages agree on what is there. A fingerprint of the data and of all weights below goes up: a
file of an earlier run with the same one is used, rows whose checksum is wrong left out. Which samples are there comes down. So
every stage, on whichever process, knows for each batch whether it has to compute, without asking again.

Limits: a batch of which one sample is missing is computed whole. Features are those of the batch in which a sample came first;
a batch of another make-up may give other last bits (a matrix product may sum in another order), so training equals that
without the file up to rounding.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Samples
from .chain import Stage
from .consensus.base import Weights
from .data import Data, order
from .errors import InvalidChoice
from .flat import digest
from .residency.files import DamagedFile
from .worker import Place, Worker

if TYPE_CHECKING:
    from .session import Trainer

_THERE = 1 << 32  # in the index: beside the checksum of a row that is there


class FeatureFile:
    """Rows of features by sample number: STEM.rows and STEM.index (checksums), memory-mapped, and STEM.json (their form).

    Args: `stem`: path without an ending. count: rows. A file that is there is used, if it is whole and of so many rows.
    """

    def __init__(self, stem: Path, count: int) -> None:
        self.stem, self._count = stem, count
        self._form: dict[str, Any] | None = None
        self._rows = np.empty((0, 0), np.uint8)
        self._index = np.empty(0, np.uint64)
        self._open()

    @property
    def there(self) -> Tensor:
        """Which rows are there, bool (count,)."""
        return torch.from_numpy(self._index != 0) if self._form else torch.zeros(self._count, dtype=torch.bool)

    def put(self, numbers: Tensor, x: Tensor) -> None:
        """Keep the features x (B, …) of these samples (B,), as far as they are not there yet. Raises DamagedFile: no room."""
        values = x.detach().cpu()
        form = _form(values, self._count)
        if self._form != form:
            self._create(form)
        rows = _bytes_of(values).numpy()
        for number, row in zip(numbers.tolist(), rows):
            if not self._index[number]:
                self._rows[number] = row
                self._index[number] = _THERE | zlib.crc32(row)

    def get(self, numbers: Tensor) -> Tensor:
        """The features (B, …) of these samples (B,). Raises DamagedFile if they are not what was written."""
        assert self._form is not None
        form = self._form
        found = torch.empty(len(numbers), self._rows.shape[1], dtype=torch.uint8)
        np.take(self._rows, numbers.numpy(), axis=0, out=found.numpy())
        for number, row in zip(numbers.tolist(), found.numpy()):
            if self._index[number] != _THERE | zlib.crc32(row):
                raise DamagedFile(
                    f"The features of sample {number} in {self.stem}.rows are damaged: their checksum is another one. Start "
                    "again from the last checkpoint: what is damaged is left out then, and made anew."
                )
        x = found.view(getattr(torch, form["dtype"])).view(-1, *form["shape"])
        return x.contiguous(memory_format=torch.channels_last) if form["channels_last"] else x

    def remove(self) -> None:
        """The files are not needed any more."""
        self._form = None
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [self.stem.with_suffix(suffix) for suffix in (".json", ".rows", ".index")]

    def _open(self) -> None:
        """Take what is there; what does not fit is as good as nothing."""
        described, rows, _ = self._files()
        try:
            form = json.loads(described.read_text())
            width = form["width"]
            if form["count"] != self._count or rows.stat().st_size != self._count * width:
                return
            self._map(width)
        except (OSError, ValueError, KeyError, TypeError):
            return
        self._form = form
        for number in np.flatnonzero(self._index):
            if self._index[number] != _THERE | zlib.crc32(self._rows[number]):
                self._index[number] = 0

    def _create(self, form: dict[str, Any]) -> None:
        described, rows, index = self._files()
        try:
            self.stem.parent.mkdir(parents=True, exist_ok=True)
            self.remove()
            _reserve(rows, self._count * form["width"])
            _reserve(index, self._count * self._index.itemsize)
            self._map(form["width"])
            described.write_text(json.dumps(form))
        except OSError as error:
            if self.stem.parent.is_dir():
                self.remove()
            raise _no_room(self.stem.parent, error) from error
        self._form = form

    def _map(self, width: int) -> None:
        _, rows, index = self._files()
        self._rows = np.memmap(rows, np.uint8, "r+", shape=(self._count, width))
        self._index = np.memmap(index, np.uint64, "r+", shape=(self._count,))


def _reserve(file: Path, size: int) -> None:
    """A file of so many zeros, with room on the disk for all: a mapping that finds none later would end the process."""
    with file.open("wb") as made:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(made.fileno(), 0, size)
        else:
            made.truncate(size)


def _no_room(folder: Path, error: OSError) -> DamagedFile:
    return DamagedFile(f"The features cannot be written to {folder} ({error.strerror}); give cache= another folder.")


def _form(x: Tensor, count: int) -> dict[str, Any]:
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    shape, dtype = list(x.shape[1:]), str(x.dtype).removeprefix("torch.")
    return {"count": count, "width": x[0].nbytes, "shape": shape, "dtype": dtype, "channels_last": last}


def _bytes_of(x: Tensor) -> Tensor:
    """(B, …) as bytes (B, width), in the order of the dimensions."""
    return x.contiguous().flatten(1).view(torch.uint8)


# ---- among the stages --------------------------------------------------------------------------------------------------


class Features:
    """What a stage knows of the file during an epoch; `file` is there at the stage that is trained only."""

    def __init__(self, when: tuple[int, int], there: Tensor, file: FeatureFile | None) -> None:
        self.when, self.file = when, file
        self._there = there.clone()

    def known(self, batch: Batch) -> bool:
        """Whether all samples of the batch are there; they are from now on."""
        numbers = _samples(batch).numbers
        known = bool(self._there[numbers].all())
        self._there[numbers] = True
        return known

    def read(self, worker: Worker, batch: Batch) -> Tensor:
        """The features of the batch, where the worker computes. Raises DamagedFile."""
        assert self.file is not None
        return self.file.get(_samples(batch).numbers).to(worker.device)

    def write(self, batch: Batch, x: Tensor) -> None:
        """Keep them. Raises DamagedFile."""
        assert self.file is not None
        self.file.put(_samples(batch).numbers, x)


def _samples(batch: Batch) -> Samples:
    if batch.samples is None:
        raise InvalidChoice(
            "Features are kept by the number of the sample, which only fit knows; call fit, or leave out cache."
        )
    return batch.samples


async def features_of(worker: Worker, stage: Stage, batch: Batch, weights: Weights, folder: str) -> Features:
    """What is known in this epoch of the input of the stage that is trained (batch.phase); this one is it, or below it."""
    when = (batch.phase, weights.epoch)
    if weights.features is None or weights.features.when != when:
        weights.features = await _agree(worker, stage, batch, weights, Path(folder).expanduser(), when)
    found: Features = weights.features
    return found


async def _agree(
    worker: Worker, stage: Stage, batch: Batch, weights: Weights, folder: Path, when: tuple[int, int]
) -> Features:
    samples = _samples(batch)
    before: Features | None = weights.features
    below = samples.data if worker.first else int(await worker.below.recv("fingerprint"))
    if worker.stage < batch.phase:
        _remove(folder, worker.place)
        worker.at_hand()
        mine = digest([torch.tensor(below), *stage.body.parameters(), *stage.body.buffers()])
        await worker.above.send("fingerprint", torch.tensor(int(mine[:15], 16)))
        there, file = (await worker.above.recv("cached")).bool(), None
    else:
        stem = folder / f"{_name(worker.place)}-{below:015x}"
        kept = before.file if before is not None else None
        if kept is None or kept.stem != stem:
            _remove(folder, worker.place, but=stem)
            kept = FeatureFile(stem, samples.total)
        there, file = kept.there, kept
    if not worker.first:
        await worker.below.send("cached", there.to(torch.uint8))
    return Features(when, there, file)


def _name(place: Place) -> str:
    return f"features-replica-{place.replica}-stage-{place.stage}"


def _remove(folder: Path, place: Place, but: Path | None = None) -> None:
    """Files of this stage's input that are of no use any more."""
    for file in folder.glob(f"{_name(place)}-*"):
        if file.with_suffix("") != but:
            file.unlink(missing_ok=True)


# ---- what fit does for it ----------------------------------------------------------------------------------------------


def keeps_features(credit: Any) -> bool:
    """Whether this rule keeps what goes into the stage that is trained."""
    return getattr(credit, "cache", None) is not None


def check_cached(trainer: Trainer, data: Any) -> None:
    """Raises InvalidChoice where a sample's features differ from epoch to epoch, or nobody knows its number; DamagedFile for a
    folder that cannot be written to, before a first stage is trained for nothing."""
    reason = None
    if not isinstance(data, Data) or data.y is None:
        reason = "needs one data set of numbered samples; a text is cut elsewhere in every epoch, and domains are several sets."
    elif data.augment is not None:
        reason = f"goes without augmentation, as images change from epoch to epoch; leave out {data.augment!r}."
    elif trainer.regularisers is not None:
        reason = "goes without regularisers, as they change the images of every batch; leave them out."
    elif trainer.consensus.free:
        reason = f"goes with replicas that keep in step; {trainer.consensus.name} lets them run freely."
    elif not trainer.chains[0].layout.plain:
        reason = "goes with one stage at each depth; this network has groups."
    if reason is not None:
        raise InvalidChoice(f"Keeping features (cache=…) {reason}")
    folder = Path(trainer.credit.cache).expanduser()  # type: ignore[attr-defined]  # keeps_features has seen to it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _no_room(folder, error) from error


def fingerprint(trainer: Trainer, data: Data) -> int:
    """Of the samples as stage 0 gets them, and of how it computes."""
    how = torch.tensor(list(f"{trainer.precision} {trainer.device.type}".encode()), dtype=torch.uint8)
    return int(digest([data.x, *(x for x in (data.mean, data.std) if x is not None), how])[:15], 16)


def numbered(
    data: Data, size: int, *, epoch: int, seed: int, replica: int, shards: int, start: int
) -> Iterator[Tensor]:
    """The numbers (B,) of the samples in each batch that `data.batches` gives for the same arguments."""
    index = order.permutation(len(data), order.Moment(seed, epoch, replica if shards == 1 else 0))
    return (index[begin : begin + size] for begin in order.begins(len(data), size, replica, shards, train=True)[start:])


def remove_features(all_weights: Iterable[Weights]) -> None:
    """Training is over: the last file goes."""
    for weights in all_weights:
        if weights.features is not None and weights.features.file is not None:
            weights.features.file.remove()
        weights.features = None
