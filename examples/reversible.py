"""PETRA on a network of your own: couplings of any module that keeps its input's shape, a stage for each few of them.

    python examples/reversible.py

Two streams of 32 units travel as one tensor. The couplings are run backwards, so nothing of them is kept between a forward
and its backward; the first layer and the last are not reversible and keep their inputs.
"""

from __future__ import annotations

import torch
from torch import nn

import unlocked as ul
from unlocked.reversible import Coupling, Split


def block(units: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(units), nn.Linear(units, units), nn.GELU(), nn.Linear(units, units))


def main() -> None:
    torch.manual_seed(0)
    train, test = ul.data.load("digits")
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 32),
        Split(),  # one stream → two
        *(Coupling(block(32)) for _ in range(8)),
        nn.Linear(64, 10),  # reads both
    )
    trainer = ul.Trainer(
        ul.cut(model, stages=4, like=train.samples(torch.arange(2))[0]),
        credit=ul.credit.PETRA(),
        accumulate=4,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9),
    )
    error = ul.callbacks.ReconstructionError(every=20)
    cosine = ul.callbacks.GradientCosine(every=20)
    records = trainer.fit(train, epochs=15, validate=test, callbacks=[error, cosine])
    print(f"test accuracy {100 * records[-1]['validation']['accuracy']:.1f} %")
    print("how far reconstructed inputs were from the true ones, and updates from backpropagation's, at the end:")
    for stage in range(4):
        errors = [record["error"] for record in error.records if record["stage"] == stage]
        cosines = [record["cosine"] for record in cosine.records if record["stage"] == stage]
        shown = f"{errors[-1]:.1e}" if errors else "      –"
        print(f"  stage {stage}: error {shown}, cosine {cosines[-1]:.3f}")


if __name__ == "__main__":
    main()
