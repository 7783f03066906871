"""Train PyTorch networks without backpropagation's locks and without data parallelism's barriers.

    import unlocked as ul
    chain = ul.cut(model, stages=4, like=x)
    trainer = ul.Trainer(chain, credit=ul.credit.DGL(), consensus=ul.consensus.WASH(), replicas=3, optimizer=...)
    trainer.fit(train, epochs=10, validate=test)

Credit decides where a stage's gradient comes from; consensus what happens to it among the replicas; a world what waiting
means.
"""

from . import callbacks, consensus, credit, data, heads, losses, models, worlds
from .chain import Chain, Stage
from .cutting import cut
from .errors import UnlockedError
from .session import Interrupted, Trainer
from .timeline import Act, Timeline

__version__ = "0.1.0"

__all__ = [
    "Act",
    "Chain",
    "Interrupted",
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
    "losses",
    "models",
    "worlds",
]
