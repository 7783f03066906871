"""Forward-mode differentiation through the body of a stage: Jacobian-vector products, several at once.

    ẏ_s = (∂f/∂x) ẋ_s                          `push`: S tangents of the input, one torch.vmap over torch.func.jvp
    ẏ   = (∂f/∂θ) θ̇                            `push_weights`: one tangent for some of the parameters
    ẏ   = (∂f/∂x) ẋ + (∂f/∂θ) θ̇                `push_both`; `forward_along` in the same pass as y itself

f body, x (B, …) input, θ parameters. All but the last are a second run of the forward: it must find the random state of the
first one (dropout), and it uses the batch's own statistics in BatchNorm without counting them again. No graph is left.

Under autocast a norm of a half-precision input runs in its weights' precision: PyTorch would give it a tangent of another type
than its output, which the next layer refuses. What forward mode cannot do is said in a sentence. Attention runs through
PyTorch's math kernel here, since its fused ones have no forward mode (pytorch#117629); a result may differ from the fused
kernel's by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .batch import at_least_two
from .costs import untouched
from .dropout import InOrder
from .errors import InvalidChoice
from .modes import statistics_kept


def push(body: nn.Module, x: Tensor, tangents: Tensor) -> Tensor:
    """Tangents (S, *y.shape) of the output from tangents (S, *x.shape) of the input. Raises InvalidChoice."""
    with _prepared(body):
        return vmap(lambda tangent: jvp(body, (x,), (tangent,))[1], randomness="same")(tangents)


def push_weights(body: nn.Module, x: Tensor, tangents: Mapping[str, Tensor]) -> Tensor:
    """The tangent of the output (*y.shape) from tangents of some parameters, by name. Raises InvalidChoice."""
    here = {name: p for name, p in body.named_parameters() if name in tangents}
    with _prepared(body):
        return jvp(lambda changed: functional_call(body, changed, (x,)), (here,), (dict(tangents),))[1]


def push_both(body: nn.Module, x: Tensor, tangent: Tensor, tangents: Mapping[str, Tensor]) -> Tensor:
    """The tangent of the output from one of the input and some of the parameters. Raises InvalidChoice."""
    here = {name: p for name, p in body.named_parameters() if name in tangents}
    with _prepared(body):
        return jvp(
            lambda changed, moved: functional_call(body, changed, (moved,)), (here, x), (dict(tangents), tangent)
        )[1]


def forward_along(
    body: nn.Module, x: Tensor, tangent: Tensor | None, tangents: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The output and its tangent in one pass, which is the forward itself: statistics count it. Raises InvalidChoice."""
    with _prepared(body, counted=True), forward_ad.dual_level():
        weights = {
            name: forward_ad.make_dual(p, tangents[name]) for name, p in body.named_parameters() if name in tangents
        }
        moved = x if tangent is None else forward_ad.make_dual(x, tangent)
        found, along = forward_ad.unpack_dual(functional_call(body, weights, (moved,)))
        return found, torch.zeros_like(found) if along is None else along


class _NormsInOneType(TorchFunctionMode):
    """Context manager: a norm whose input has a lower precision than its weights reads the input in theirs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.batch_norm, F.instance_norm, F.group_norm) and args:
            x, *others = args
            if x.is_cuda and function is F.group_norm:  # there autocast itself brings all of it to float32
                return function(*args, **kwargs)
            kinds = [one.dtype for one in (*others, *kwargs.values()) if isinstance(one, Tensor)]
            if any(kind.itemsize > x.dtype.itemsize for kind in kinds if kind.is_floating_point):
                wide = max(kinds, key=lambda kind: kind.itemsize)
                return function(x.to(wide), *others, **kwargs).to(x.dtype)
        return function(*args, **kwargs)


@contextlib.contextmanager
def _prepared(body: nn.Module, counted: bool = False) -> Iterator[None]:
    """No graph, no fused attention, no statistics but if `counted`; what has no forward mode is named in a sentence."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    half = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    norms = _NormsInOneType() if half else contextlib.nullcontext()
    kept = contextlib.nullcontext() if counted else statistics_kept(body.modules())
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), kept, InOrder(), norms:
            yield
    except (NotImplementedError, RuntimeError) as error:
        if (sentence := _refused(error, body)) is None:
            raise
        raise InvalidChoice(sentence) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_SIGNS = ("forward AD", "vmap", "functorch", "jvp", "forward mode", "forward-mode")


def _refused(error: Exception, body: nn.Module) -> str | None:
    """What the user can do about an error of forward mode; None if it is another one."""
    text = str(error)
    if not any(sign in text for sign in _SIGNS):
        return None
    recurrent = [name for name, part in body.named_modules() if isinstance(part, (nn.LSTM, nn.GRU, nn.RNN))]
    culprit = f"{recurrent[0]} (an LSTM, GRU or RNN)" if recurrent else text.split(" that does not support")[0][:200]
    return (
        f"Forward mode cannot pass through a part of this network: {culprit}. Take mode='two-backward', which gives the same "
        "numbers by ordinary backward passes, or replace that part (torch.nn.GRUCell, an attention without its own kernel, …)."
    )


def check_forward_mode(body: nn.Module, x: Tensor, where: str, weights: bool) -> None:
    """Raises InvalidChoice if no tangent can be pushed through the body, of its input or, with `weights`, of any weight that is
    trained. `x`: an example of its input."""
    try:
        with untouched(body):
            x = at_least_two(x)
            if weights:
                learning = {name: torch.zeros_like(p) for name, p in body.named_parameters() if p.requires_grad}
                push_weights(body, x, learning)
            if x.is_floating_point():
                push(body, x, torch.zeros_like(x)[None])
            _check_that_it_can_be_run_again(body, x)
    except InvalidChoice as refused:
        raise InvalidChoice(f"{where}: {refused}") from refused


def _check_that_it_can_be_run_again(body: nn.Module, x: Tensor) -> None:
    """Raises InvalidChoice if a forward depends on what the one before it has left in a buffer; BatchNorm's does not."""
    before = [buffer.clone() for buffer in _buffers(body)]
    if x.is_meta or not before:
        return
    with torch.no_grad():
        torch.manual_seed(0)
        first = body(x)
        if all(map(torch.equal, before, _buffers(body))):
            return
        torch.manual_seed(0)
        again = body(x)
    if not torch.allclose(first, again, rtol=0.0, atol=0.0, equal_nan=True):
        raise InvalidChoice(
            "Its output depends on a buffer that its own forward changes (as with spectral_norm), but forward mode runs a "
            "forward again and must find it as it was. Take mode='two-backward', or evaluation mode for that part."
        )


def _buffers(body: nn.Module) -> list[Tensor]:
    """Those that are there now, but for BatchNorm's."""
    parts = [part for part in body.modules() if not isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return [x for part in parts for x in part._buffers.values() if x is not None]


def couples_samples(body: nn.Module, x: Tensor) -> bool:
    """Whether, in its present mode, one sample's output depends on another one, as with BatchNorm (one that is frozen, in
    evaluation mode, mixes nothing). `x`: some samples; of tokens or without values only BatchNorm is looked for."""
    x = at_least_two(x)
    if not x.is_floating_point() or x.is_meta:
        return any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in body.modules())
    with untouched(body), torch.no_grad(), statistics_kept(body.modules()):
        moved = x.clone()
        moved[1:] += 1 + moved[1:].flip(-1)
        outputs = []
        for one in (x, moved):
            torch.manual_seed(0)
            outputs.append(body(one)[0])
        return not torch.equal(*outputs)
