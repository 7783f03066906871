"""The heads of Wang et al., Revisiting Locally Supervised Learning (InfoPro, 2021): '1c2f', '0c1f', and with a decoder.

    1c2f    maps → 3×3 convolution, BatchNorm, ReLU → mean over pixels → fully connected, ReLU → fully connected
    0c1f    maps → mean over pixels → fully connected                       (greedy supervised learning in the paper)

The convolution has stride 2 and doubles the channels; on maps of at most 8×8 pixels (a CIFAR network's last group) it keeps
both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..errors import InvalidChoice, choose
from ..infopro_loss import TASKS, InfoProLoss, weights_at
from ..losses import Loss
from .decoders import decoder
from .of_chain import OfChain
from .reading import mean_row
from .spec import HeadSpec, Kind, at_least_one, channels, convolution

if TYPE_CHECKING:
    from ..chain import Chain

SMALL = 8  # pixels a side, from which on the convolution keeps the map's size
DECODED = 12  # hidden channels of the decoder
EMBEDDED = 128  # entries of the embedding that samples are contrasted by


@dataclass(frozen=True)
class ConvolutionsAndDenseHead(HeadSpec):
    """`convolutions` × [3×3 convolution, BatchNorm, ReLU], mean over pixels, `dense` fully connected layers, ReLU between.

    Vectors and tokens have no space to convolve over: there only the fully connected layers are left (sequences are averaged
    first). `hidden`: width between fully connected layers; under a budget it and the convolutions' channels shrink alike.
    """

    convolutions: int = 1
    dense: int = 2
    hidden: int = 128

    smallest: ClassVar[int] = 4

    def __post_init__(self) -> None:
        at_least_one(self.name, dense=self.dense, hidden=self.hidden)
        if self.convolutions < 0:
            raise InvalidChoice(f"A head cannot have convolutions={self.convolutions}; give 0 or more.")

    @property
    def name(self) -> str:
        return f"{self.convolutions}c{self.dense}f"

    def paper_width(self, features: Tensor) -> int | None:
        convolves = self.convolutions > 0 and features.dim() == 4
        return self.hidden if convolves or self.dense > 1 else None

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        trunk: list[nn.Module] = []
        inputs = paper = channels(features)
        side = min(features.shape[2:]) if kind == "maps" else 0
        for _ in range(self.convolutions if kind == "maps" else 0):
            keeps = side <= SMALL
            paper, side = (paper, side) if keeps else (2 * paper, (side + 1) // 2)
            narrow = max(1, round(paper * width / self.hidden))
            trunk += convolution(inputs, narrow, kernel=3, stride=1 if keeps else 2)
            inputs = narrow
        trunk += mean_row(kind)
        for _ in range(self.dense - 1):
            trunk += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*trunk, nn.Linear(inputs, outputs))


@dataclass(frozen=True)
class InfoProHead(OfChain):
    """A '1c2f' head for the task and a decoder for the network's input; output (what the task judges, reconstruction).

    Args:
        task: "softmax": class scores and cross-entropy. "contrast": an embedding of 128 entries and supervised contrast.
        lambda1, lambda2: weights of reconstruction and task at the first local stage; lambda1_last, lambda2_last: at the last
            local one, linear in between. See infopro_loss.weights_at for what None means.
        temperature: τ of the contrast.

    A stage with λ1 = 0 has no decoder. Under a budget the decoder's hidden channels shrink with the task's.
    """

    task: str = "softmax"
    lambda1: float | None = None
    lambda2: float | None = None
    lambda1_last: float | None = None
    lambda2_last: float | None = None
    temperature: float = 0.07

    def __post_init__(self) -> None:
        choose("task", self.task, TASKS)
        weights_at(self._given, 0.0, 1)
        InfoProLoss(1.0, 1.0, self.task, self.temperature)  # checks them

    @property
    def name(self) -> str:
        return "infopro"

    @property
    def _given(self) -> tuple[float | None, float | None, float | None, float | None]:
        return self.lambda1, self.lambda2, self.lambda1_last, self.lambda2_last

    def at(self, chain: Chain, stage: int) -> HeadSpec:
        """Raises InvalidChoice for a network of whole numbers (tokens): they are no intensities to reconstruct."""
        x, local = chain.example(), len(chain.layout.rows) - 1
        lambda1, lambda2 = weights_at(self._given, chain.layout.depth(stage) / max(1, local - 1), local + 1)
        if lambda1 and not x.is_floating_point():
            raise InvalidChoice(
                f"InfoPro reconstructs the network's input, which must be numbers such as pixels; this network reads {x.dtype} "
                "(tokens?). Use another local rule, such as dgl, or reconstruct nothing: lambda1=0, lambda2=1."
            )
        return _Reconstructing(InfoProLoss(lambda1, lambda2, self.task, self.temperature), tuple(x.shape[1:]))


@dataclass(frozen=True)
class _Reconstructing(HeadSpec):
    """The same for one stage. `sample`: shape of the network's input without the batch."""

    judge: InfoProLoss
    sample: tuple[int, ...]

    smallest: ClassVar[int] = ConvolutionsAndDenseHead.smallest
    needs: ClassVar[str] = "one label per sample to contrast samples"

    @property
    def name(self) -> str:
        return "infopro"

    def paper_width(self, features: Tensor) -> int | None:
        return ConvolutionsAndDenseHead().paper_width(features)

    def reads(self, kind: Kind) -> bool:
        return kind != "tokens" or self.judge.task == "softmax"

    def loss(self) -> Loss:
        return self.judge  # type: ignore[return-value]  # it is given the input, too

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        task_head = ConvolutionsAndDenseHead()
        entries = EMBEDDED if self.judge.task == "contrast" else outputs
        task = task_head.layers(features, kind, entries, width)  # drawn first: without a decoder it is the '1c2f' head
        if not self.judge.lambda1:
            return TaskAndInput(task, None)
        hidden = max(1, round(DECODED * width / task_head.hidden))
        return TaskAndInput(task, decoder(features, self.sample, hidden))


class TaskAndInput(nn.Module):
    """h → (task(h), decoder(h)), the second None without a decoder."""

    def __init__(self, task: nn.Module, decoder: nn.Module | None) -> None:
        super().__init__()
        self.task, self.decoder = task, decoder

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.task(h), None if self.decoder is None else self.decoder(h)
