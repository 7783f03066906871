"""Train PyTorch networks without backpropagation's locks and without data parallelism's barriers.

    import unlocked as ul
    chain = ul.cut(model, stages=4, like=x)
    trainer = ul.Trainer(chain, credit=ul.credit.DGL(), consensus=ul.consensus.WASH(), replicas=3, optimizer=...)
    trainer.fit(train, epochs=10, validate=test)

Credit decides where a stage's gradient comes from; consensus what happens to it among the replicas; a world what waiting
means.
"""

from typing import TYPE_CHECKING

from .lazy import on_first_use

if TYPE_CHECKING:
    from . import (
        callbacks,
        consensus,
        credit,
        data,
        heads,
        losses,
        mitigation,
        models,
        population,
        probes,
        simulation,
        soups,
        worlds,
    )
    from .allocator import keep_freed_memory
    from .chain import Chain, Stage
    from .cutting import cut
    from .errors import UnlockedError
    from .loop import Interrupted
    from .planning import Plan, plan
    from .residency import OneStage
    from .session import Trainer
    from .timeline import Act, Timeline

__version__ = "0.1.0"

__all__ = [
    "Act",
    "Chain",
    "Interrupted",
    "OneStage",
    "Plan",
    "Stage",
    "Timeline",
    "Trainer",
    "UnlockedError",
    "callbacks",
    "consensus",
    "credit",
    "cut",
    "data",
    "heads",
    "keep_freed_memory",
    "losses",
    "mitigation",
    "models",
    "plan",
    "population",
    "probes",
    "simulation",
    "soups",
    "worlds",
]

_HOMES = {
    "Act": "timeline",
    "Chain": "chain",
    "Interrupted": "loop",
    "OneStage": "residency",
    "Plan": "planning",
    "Stage": "chain",
    "Timeline": "timeline",
    "Trainer": "session",
    "UnlockedError": "errors",
    "cut": "cutting",
    "keep_freed_memory": "allocator",
    "plan": "planning",
}

# `import unlocked` alone does not load torch, so the command line answers at once
__getattr__ = on_first_use(__name__, dict.fromkeys(__all__, "") | _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
