"""`Data`: samples in memory that hand out batches as a pure function of (seed, epoch, replica, batch number)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadData
from . import augment as augmentation
from . import order, views, windows

Batch = tuple[Tensor, Tensor]
Device = torch.device | str | None


@dataclass(frozen=True, eq=False)
class Data:
    """Samples, all in memory.

    - `x`: uint8 images (N, C, H, W); or one uint8 text (bytes,) with `y` None; or other samples (N, …) of a float or
      integer type, which come out as they are.
    - `y`: int64 labels (N, …), or targets (N, …) of a float type. Negative labels: there are none.
    - `classes`: number of classes, or of target columns; 256 for text.
    - `input_shape`: shape of one sample, (C, H, W) or (context,).
    - `mean`, `std`: float32 (C,), normalisation in the units of x: (x − mean) / std. None: no normalisation.
    - `augment`: what happens to training images, see `augment.parse`. With `views+…` (or `simclr`) training batches hold two
      views of every image, see views.py; evaluation batches never do.

    Views of held-out images, changed as in training, are training batches of the same samples:
    `dataclasses.replace(test, augment=train.augment).batches(B, epoch=0, seed=s)`; all but the last len(test) mod B of a
    shuffle of them come.
    """

    x: Tensor
    y: Tensor | None
    classes: int
    name: str
    input_shape: tuple[int, ...]
    mean: Tensor | None = None
    std: Tensor | None = None
    augment: str | None = None

    def __post_init__(self) -> None:
        augmentation.check(augmentation.parse(self.augment), self.input_shape, self.x.dtype, self.augment)

    @property
    def views(self) -> int:
        """Rows of a training batch for each image: 2 if `augment` begins with `views` (or is `simclr`), else 1."""
        return views.parts(self.augment)[0]

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label or a target; a text's are its own bytes."""
        return self.y is None or self.y.is_floating_point() or int(self.y.min()) >= 0

    def __len__(self) -> int:
        """Number of samples; of a text, the number of windows."""
        return windows.count(len(self.x), self.input_shape[0]) if self.y is None else len(self.x)

    def steps(self, batch_size: int, shards: int = 1) -> int:
        """Batches per replica in a training epoch. BadData if there is not a single whole one."""
        return order.steps(len(self), batch_size, shards)

    def samples(self, index: Tensor) -> Batch:
        """The samples number `index` (B,), normalised and not augmented; windows of a text begin at byte 0."""
        index = index.to(self.x.device)
        if self.y is None:
            return windows.cut(self.x, index, self.input_shape[0], 0)
        return self._normalised(self.x[index]), self.y[index]

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int,
        seed: int,
        replica: int = 0,
        shards: int = 1,
        train: bool = True,
        start: int = 0,
        device: Device = None,
    ) -> Iterator[Batch]:
        """Batches (x, y) of `batch_size` samples, from batch number `start` of the epoch on.

        The result is a pure function of the arguments: `start=k` gives what skipping k batches would have left.
        Images come as float32 (B, C, H, W), labels as int64 (B,), text as two int64 (B, context).

        Training: shuffled, augmented, the incomplete last batch dropped. With `shards=1` every replica has its own
        order of the whole set. With `shards=N` the replicas share one order, that of replica 0, and batch b of replica
        r holds its positions (b·N + r)·B … (b·N + r + 1)·B − 1: the N replicas' batches b, one after the other, are
        batch b of `shards=1, replica=0, batch_size=N·B`, augmentation included.
        With `views` 2 a batch of B samples has 2B rows: x[2k] and x[2k + 1] are two views of its sample k, drawn independently,
        and y[2k] = y[2k + 1] is its label.
        The windows of a text begin at an offset drawn for the epoch.

        Evaluation (`train=False`): in order, not augmented, nothing dropped, seed and epoch without effect; shards
        split the batches in the same way, and the last ones may be short or missing.

        `device`: where the batches should be; None leaves them where the data is. Raises BadData at once (not at the
        first batch) for impossible numbers, for example when batch_size · shards exceeds the number of samples.
        """
        begins = order.begins(len(self), batch_size, replica, shards, train)
        if not 0 <= start <= len(begins):
            raise BadData(f"Batch {start} cannot be the first: this epoch has the batches 0 to {len(begins) - 1}.")
        if not train:
            return self._evaluation(begins[start:], batch_size, device)
        moment = order.Moment(seed, epoch, replica if shards == 1 else 0)
        if self.y is None:
            return self._text(begins[start:], batch_size, moment, device)
        return self._training(begins[start:], batch_size, moment, device)

    def to(self, device: torch.device | str) -> Data:
        """The same data with its tensors on `device`; batches are then made there. The numbers drawn stay the same."""
        y, mean, std = (_to(tensor, device) for tensor in (self.y, self.mean, self.std))
        return dataclasses.replace(self, x=self.x.to(device), y=y, mean=mean, std=std)

    def _evaluation(self, begins: range, batch_size: int, device: Device) -> Iterator[Batch]:
        for begin in begins:
            x, y = self.samples(torch.arange(begin, min(begin + batch_size, len(self))))
            yield x.to(device), y.to(device)

    def _text(self, begins: range, batch_size: int, moment: order.Moment, device: Device) -> Iterator[Batch]:
        index = order.permutation(len(self), moment).to(self.x.device)
        offset = windows.offset(len(self.x), self.input_shape[0], moment)
        for begin in begins:
            x, y = windows.cut(self.x, index[begin : begin + batch_size], self.input_shape[0], offset)
            yield x.to(device), y.to(device)

    def _training(self, begins: range, batch_size: int, moment: order.Moment, device: Device) -> Iterator[Batch]:
        assert self.y is not None
        operations, of_each = augmentation.parse(self.augment), self.views
        index = order.permutation(len(self), moment).to(self.x.device)
        drawn = augmentation.drawn(self.augment, len(self), self.input_shape, moment)
        for begin in begins:
            samples = index[begin : begin + batch_size]
            rows = [parameters[begin * of_each : (begin + batch_size) * of_each] for parameters in drawn]
            x = self.x[samples].to(device)  # moved as bytes, before there are views: an eighth of the traffic
            y = self.y[samples].to(device)
            if of_each > 1:
                x, y = x.repeat_interleave(of_each, 0), y.repeat_interleave(of_each, 0)
            x = self._normalised(augmentation.apply(operations, x, rows, normalised=False))
            yield augmentation.apply(operations, x, rows, normalised=True), y

    def _normalised(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.float()
        if self.mean is None or self.std is None:
            return x
        shape = (-1,) + (1,) * (x.dim() - 2)
        return (x - self.mean.to(x.device).view(shape)).div_(self.std.to(x.device).view(shape))


def statistics(x: Tensor) -> Batch:
    """Mean and standard deviation of uint8 samples, float32: (C,) per channel for images (N, C, H, W), else (1,).

    They come exactly from counts of the 256 values; a constant channel gets the deviation 1.
    """
    channels = x.unbind(1) if x.dim() == 4 else [x]
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()
    values = torch.arange(256, dtype=torch.float64, device=x.device)
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    deviation = (share * (values - mean[:, None]).square()).sum(1).sqrt()
    deviation[deviation == 0] = 1
    return mean.float(), deviation.float()


def _to(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
