"""Forward-mode differentiation through the body of a stage: Jacobian-vector products, several at once.

    ẏ_s = (∂f/∂x) ẋ_s                          `push`: S tangents of the input, one torch.vmap over torch.func.jvp
    ẏ   = (∂f/∂θ) θ̇                            `push_weights`: one tangent for some of the parameters
    ẏ   = (∂f/∂x) ẋ + (∂f/∂θ) θ̇                `push_both`; `forward_along` in the same pass as y itself

f body, x (B, …) input, θ parameters. All but the last are a second run of the forward: it must find the random state of the
first one (dropout), and it uses the batch's own statistics in BatchNorm without counting them again. No graph is left.

What forward mode cannot do is said in a sentence. Attention runs through PyTorch's math kernel here, since its fused ones have
no forward mode (pytorch#117629); a result may differ from the fused kernel's by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@contextlib.contextmanager
def _prepared(body: nn.Module, counted: bool = False) -> Iterator[None]:
    """No graph, no fused attention, no statistics but if `counted`; what has no forward mode is named in a sentence."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    kept = contextlib.nullcontext() if counted else statistics_kept(body.modules())
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), kept, InOrder():
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


def check_forward_mode(body: nn.Module, x: Tensor, where: str) -> None:
    """Raises InvalidChoice if no tangent can be pushed through the body. `x`: an example of its input."""
    try:
        with untouched(body):
            x = at_least_two(x)
            names = [name for name, p in body.named_parameters() if p.requires_grad][:1]
            push_weights(body, x, {name: torch.zeros_like(body.get_parameter(name)) for name in names})
            if x.is_floating_point():
                push(body, x, torch.zeros_like(x)[None])
    except InvalidChoice as refused:
        raise InvalidChoice(f"{where}: {refused}") from refused


def couples_samples(body: nn.Module, x: Tensor) -> bool:
    """Whether, in its present mode, one sample's output depends on another one, as with BatchNorm (one that is frozen, in
    evaluation mode, mixes nothing). `x`: at least two samples; of tokens or without values only BatchNorm is looked for."""
    if len(x) < 2 or not x.is_floating_point() or x.is_meta:
        return any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in body.modules())
    with untouched(body), torch.no_grad(), statistics_kept(body.modules()):
        moved = x.clone()
        moved[1:] += 1 + moved[1:].flip(-1)
        outputs = []
        for one in (x, moved):
            torch.manual_seed(0)
            outputs.append(body(one)[0])
        return not torch.equal(*outputs)
