"""The one table of methods: how each is made at a tiny size, and which laws hold of it.

Adding a method adds one row here; the tests in test_laws.py, test_pairs.py and test_resume.py go through the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.consensus import Consensus
from unlocked.credit import Credit
from unlocked.credit.two_versions import TwoVersions
from unlocked.reversible import Coupling, Split


@dataclass(frozen=True)
class Row:
    """`make`: the rule. Laws: `local` no gradient leaves a stage; `one_stage_is_backprop` J = 1 is backprop bit for bit;
    `phased` trains stages one after the other; `delayed` keeps micro-batches in flight between steps; `equal_replicas` the
    replicas stay equal; `one_at_a_time` a replica has one micro-batch at a time; `one_process` all replicas are in one process;
    `one_is_ordinary` N = 1 is ordinary training; `conserves` Σ_n θ_n of a mix; `averages` now and
    then, whatever the credit is."""

    name: str
    make: Callable[[], Credit | Consensus]
    laws: frozenset[str] = field(default_factory=frozenset)


def _laws(*names: str) -> frozenset[str]:
    return frozenset(names)


ALL_PAIRS = False  # set by conftest.py
LIKE_DGL = (
    *(
        "infopro",
        "infopro-contrast",
        "dgl-auglocal",
        "dgl-man",
        "dgl-shared",
        "async-dgl",
        "gn-dgl",
        "forward-gradient",
    ),
    *("forward-gradient-activity", "forward-gradient-shared", "forward-gradient-two-backward"),
    *("local-forward-gradient", "local-forward-gradient-two-backward"),
    *("mezo", "node-perturbation", "node-perturbation-separate"),
)
MET_BY_THEM = ("all-reduce", "wash")
SECOND_FORMS = (  # of rules that are in the table already: they meet one rule only
    *("forward-gradient-activity", "forward-gradient-two-backward"),
    *("local-forward-gradient-two-backward", "node-perturbation-separate"),
)
SMALL = ul.heads.MLPHead(hidden=6, depth=1)

CREDITS = [
    Row("backprop", ul.credit.Backprop, _laws("one_stage_is_backprop")),
    Row("gpipe", lambda: ul.credit.GPipe(2), _laws()),
    Row("greedy", lambda: ul.credit.Greedy(head=SMALL, budget=None), _laws("local", "one_stage_is_backprop", "phased")),
    Row("dgl", lambda: ul.credit.DGL(head="linear", budget=None), _laws("local", "one_stage_is_backprop")),
    Row("predsim", lambda: ul.credit.PredSim(budget=None), _laws("local", "one_stage_is_backprop")),
    Row("infopro", ul.credit.InfoPro, _laws("local", "one_stage_is_backprop")),
    Row(
        "infopro-contrast",
        lambda: ul.credit.InfoPro("contrast", temperature=0.5),
        _laws("local", "one_stage_is_backprop"),
    ),
    Row(
        "dgl-auglocal",
        lambda: ul.credit.DGL(head=ul.heads.AugLocalHead(2), budget=None),
        _laws("local", "one_stage_is_backprop"),
    ),
    Row(
        "dgl-man",
        lambda: ul.credit.DGL(head=ul.heads.MANHead(0.9, period=2, fresh=False), budget=None),
        _laws("local", "one_stage_is_backprop"),
    ),
    Row(
        "dgl-shared",
        lambda: ul.credit.DGL(head=ul.heads.SharedUnembeddingHead(period=2), budget=None),
        _laws("local", "one_stage_is_backprop"),
    ),
    Row(
        "async-dgl",
        lambda: ul.credit.AsyncDGL(2, policy="uniform", rates="equal", head="linear", budget=None),
        _laws("local", "one_stage_is_backprop"),
    ),
    Row(
        "interlocking0",
        lambda: ul.credit.Interlocking(0, head="linear", budget=None),
        _laws("local", "one_stage_is_backprop"),
    ),
    Row("interlocking1", lambda: ul.credit.Interlocking(1, head=SMALL, budget=None), _laws("one_stage_is_backprop")),
    Row("interlocking2", lambda: ul.credit.Interlocking(2, head=SMALL, budget=None), _laws("one_stage_is_backprop")),
    Row(
        "gn-dgl",
        lambda: ul.credit.GNDGL(head="linear", budget=None, stop_gradient=True, diversity=0.5),
        _laws("local", "one_stage_is_backprop"),
    ),
    Row(
        "forward-gradient",
        lambda: ul.credit.ForwardGradient(scalars="stage", head="linear", budget=None),
        _laws("one_stage_is_backprop"),
    ),
    Row(
        "forward-gradient-activity",
        lambda: ul.credit.ForwardGradient("ntk", "intermediate", "activity", head="linear", budget=None),
        _laws("one_stage_is_backprop"),
    ),
    Row(
        "forward-gradient-shared",
        lambda: ul.credit.ForwardGradient(scalars="shared", head="linear", budget=None),
        _laws("one_stage_is_backprop"),
    ),
    Row(
        "forward-gradient-two-backward",
        lambda: ul.credit.ForwardGradient("fixed-ntk", "local", head="linear", budget=None, mode="two-backward"),
        _laws("one_stage_is_backprop"),
    ),
    Row("mezo", lambda: ul.credit.MeZO(samples=8), _laws()),
    Row("node-perturbation", ul.credit.NodePerturbation, _laws("one_stage_is_backprop")),
    Row(
        "node-perturbation-separate",
        lambda: ul.credit.NodePerturbation(antithetic=True, noise="separate", guess="rademacher"),
        _laws("one_stage_is_backprop"),
    ),
    Row(
        "local-forward-gradient",
        lambda: ul.credit.LocalForwardGradient(head="linear", budget=None),
        _laws("one_stage_is_backprop"),
    ),
    Row(
        "local-forward-gradient-two-backward",
        lambda: ul.credit.LocalForwardGradient("rademacher", groups=2, mode="two-backward", head="linear", budget=None),
        _laws("one_stage_is_backprop"),
    ),
    Row("1f1b", lambda: ul.credit.OneFOneB(2), _laws()),
    Row("pipedream", ul.credit.PipeDream, _laws("one_stage_is_backprop", "delayed")),
    Row("pipedream-2bw", ul.credit.PipeDream2BW, _laws("delayed")),
    Row("cdp-pipeline", ul.credit.CDPPipeline, _laws("one_stage_is_backprop", "delayed")),
    Row("delayed-gradients", ul.credit.DelayedGradients, _laws("one_stage_is_backprop", "delayed")),
    Row("ddg", lambda: ul.credit.DDG(shrink=0.7), _laws("one_stage_is_backprop", "delayed")),
    Row("features-replay", ul.credit.FeaturesReplay, _laws("one_stage_is_backprop", "delayed")),
    Row("fdg", ul.credit.FDG, _laws("one_stage_is_backprop", "delayed")),
    Row("petra", ul.credit.PETRA, _laws("one_stage_is_backprop", "delayed")),
]
CONSENSUS = [
    Row("independent", ul.consensus.Independent, _laws("conserves", "one_is_ordinary")),
    Row("all-reduce", ul.consensus.AllReduce, _laws("equal_replicas", "one_is_ordinary")),
    Row("wash", lambda: ul.consensus.WASH(p=0.3), _laws("conserves", "one_is_ordinary")),
    Row(
        "wash-tensor",
        lambda: ul.consensus.WASH(p=0.3, schedule="increasing", layers="tensor"),
        _laws("conserves", "one_is_ordinary"),
    ),
    Row(
        "wash-opt",
        lambda: ul.consensus.WASH(p=0.3, layers="block", optimizer=True, batchnorm_statistics="shuffle"),
        _laws("conserves", "one_is_ordinary", "averages"),
    ),
    Row(
        "papa",
        lambda: ul.consensus.PAPA(period=2, alpha=0.3),
        _laws("conserves", "one_is_ordinary", "averages"),
    ),
    Row(
        "papa-overlapped",
        lambda: ul.consensus.PAPA(period=4, alpha=0.3, overlap=3, staggered=True),
        _laws("conserves", "one_is_ordinary", "averages"),
    ),
    Row(
        "papa-int8",
        lambda: ul.consensus.PAPA(period=3, alpha=0.3, overlap=2, compression="int8:16"),
        _laws("one_is_ordinary", "averages"),
    ),
    Row("papa-all", lambda: ul.consensus.PAPAAll(epochs=1), _laws("conserves", "one_is_ordinary", "averages")),
    Row("papa-2", lambda: ul.consensus.PAPA2(epochs=1), _laws("conserves", "one_is_ordinary", "averages")),
    Row("btm", lambda: ul.consensus.BTM(shared=1), _laws("conserves", "one_is_ordinary", "averages")),
    Row(
        "local-sgd",
        lambda: ul.consensus.LocalSGD(period=2, shared=3, optimizer_state="average"),
        _laws("conserves", "one_is_ordinary", "averages"),
    ),
    Row(
        "local-sgd-hierarchical",
        lambda: ul.consensus.LocalSGD(hierarchy=((2, 1), (4, 0)), compression="topk:0.3"),
        _laws("averages"),
    ),
    Row("slowmo", lambda: ul.consensus.SlowMo(period=3), _laws("averages")),
    Row("diloco", lambda: ul.consensus.DiLoCo(period=3, outer_lr=0.8, outer_momentum=0.5), _laws("averages")),
    Row(
        "diloco-streaming",
        lambda: ul.consensus.DiLoCo(
            period=4, fragments=2, overlap=3, mixing=0.5, outer_momentum=0.3, compression="bf16"
        ),
        _laws("averages"),
    ),
    Row("co2", lambda: ul.consensus.CO2(period=2, clip=5.0), _laws("averages")),
    Row("easgd", lambda: ul.consensus.EASGD(period=2), _laws("averages")),
    Row("d-psgd", ul.consensus.DPSGD, _laws("conserves", "one_is_ordinary", "averages")),
    Row("sgp", lambda: ul.consensus.SGP(overlap=1), _laws("one_is_ordinary", "averages")),
    Row("gossip", lambda: ul.consensus.Gossip(graph="complete"), _laws("conserves", "one_is_ordinary", "averages")),
    Row(
        "acid",
        lambda: ul.consensus.ACiD(graph="complete", rate=1.5, eta=0.4, alpha_tilde=0.8),
        _laws("conserves", "one_is_ordinary", "averages"),
    ),
    Row("cdp", ul.consensus.CDP, _laws("equal_replicas", "one_at_a_time", "one_is_ordinary")),
    Row("acco", ul.consensus.ACCO, _laws("equal_replicas", "one_at_a_time")),
    Row("wp", ul.consensus.WP, _laws("equal_replicas", "one_at_a_time")),
    Row(
        "cdp-single",
        lambda: ul.consensus.CDP("v1", form="single-device"),
        _laws("equal_replicas", "one_at_a_time", "one_process"),
    ),
]

CONTRASTS = [
    Row("simclr", lambda: ul.credit.SimCLR(dimension=6)),
    Row("dgssl", lambda: ul.credit.DGSSL(projector="0c2f", dimension=6), _laws("local")),
    Row("dgssl-barlow-twins", lambda: ul.credit.DGSSL("barlow-twins", dimension=6), _laws("local")),
    Row("subsampled-simclr", lambda: ul.credit.SubsampledSimCLR(0.2, dimension=6), _laws("local")),
    Row("oracle-simclr", lambda: ul.credit.OracleSimCLR(Oracle(), 0.1, 0.4, dimension=6), _laws("local")),
    Row("dgssl-llm", lambda: ul.credit.DGSSLLLM(0.7, thresholds="batch", dimension=6), _laws("local")),
    Row("dgssl-llm-oracle", lambda: ul.credit.DGSSLLLM(0.8, oracle=Oracle(), by="oracle", dimension=6), _laws("local")),
]
"""Rules that learn from pairs of views: rows 2k and 2k + 1 of `batch()`. Tests of their own go through them."""


def credits(law: str | None = None) -> list[Row]:
    """The credit rules of which a law holds (all, without one)."""
    return [row for row in CREDITS if law is None or law in row.laws]


def consensus_rules(law: str | None = None) -> list[Row]:
    """The consensus rules of which a law holds (all, without one)."""
    return [row for row in CONSENSUS if law is None or law in row.laws]


def allowed_pairs() -> list[tuple[Row, Row]]:
    """The pairs that the slow tests go through: all but those that run no line another pair does not run.

    ddg and features-replay are pipedream and delayed-gradients with a factor (a law in test_delayed.py); delayed rules
    meet WASH by modules only. Rules that average now and then do so after an update, whoever made it (with backprop:
    test_averaging.py, test_averaging_processes.py). Rules whose replicas have one micro-batch at a time refuse delayed ones,
    and see no difference between the others but whether a gradient comes back and whether all stages train. Rules that are dgl
    with other heads, or with one group at every depth, meet only consensus rules that read layers or begin exchanges early.
    """
    rows = [row for row in CREDITS if row.name not in ("ddg", "features-replay")]
    pairs = [(credit, rule) for credit in rows for rule in CONSENSUS]
    pairs = [(credit, rule) for credit, rule in pairs if credit.name not in LIKE_DGL or rule.name in MET_BY_THEM]
    pairs = [(credit, rule) for credit, rule in pairs if credit.name not in SECOND_FORMS or rule.name == "wash"]
    few = {"one_at_a_time": ("backprop", "greedy", "interlocking1"), "averages": ("greedy", "pipedream")}
    for law, names in few.items():
        pairs = [(credit, rule) for credit, rule in pairs if law not in rule.laws or credit.name in names]
    return [(credit, rule) for credit, rule in pairs if not ("delayed" in credit.laws and rule.name == "wash-tensor")]


def some_pairs(part: int, of: int = 4) -> list[tuple[Row, Row]]:
    """A part of the allowed pairs, in which every rule has a partner; all of them with `--all-pairs`.

    What goes wrong with a pair goes wrong with one of its rules, or with the two of them in any world and at any moment. So
    each slow law takes another quarter of the table, by diagonals; its quarter's pairs are tested by the other laws. The laws
    of test_pairs.py alone take all four quarters: every allowed pair is trained, and every rule is in every law and world.
    """
    pairs = allowed_pairs()
    if ALL_PAIRS:
        return pairs
    chosen = [(a, b) for a, b in pairs if (CREDITS.index(a) + CONSENSUS.index(b)) % of == part % of]
    for row in [*CREDITS, *CONSENSUS]:
        mine = [pair for pair in pairs if row in pair]
        if mine and not any(row in pair for pair in chosen):
            chosen.append(mine[part % len(mine)])
    return chosen


def name_of(row: Row) -> str:
    """For pytest's ids."""
    return row.name


def mlp(depth: int = 4, norm: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """`depth` hidden layers of 7 units and a classifier for 3 classes, on vectors of 5; seed 0."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Linear(5 if k == 0 else 7, 7)]
        layers += [nn.BatchNorm1d(7)] if norm else []
        layers += [nn.Tanh()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(7, 3)).to(dtype)


def reversible_mlp(couplings: int = 6, dropout: float = 0.2, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A stem, couplings with BatchNorm and dropout in two streams of 6 units, and a classifier for 3 classes; seed 0."""
    torch.manual_seed(0)
    inside = [
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout)) for _ in range(couplings)
    ]
    return nn.Sequential(nn.Linear(5, 6), Split(), *map(Coupling, inside), nn.Linear(12, 3)).to(dtype)


def batch(size: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (size, 5) and classes (size,)."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=source, dtype=dtype), torch.randint(3, (size,), generator=source)


class Oracle(nn.Module):
    """Projections (B, 4) of the first five entries of anything; counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        columns = torch.randn(5, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return x.flatten(1)[:, :5] @ columns.to(x.dtype)


def data(size: int = 60, seed: int = 0, dtype: torch.dtype = torch.float64) -> ul.data.Data:
    """A small classification set whose classes can be learned."""
    x, _ = batch(size, seed, dtype)
    return ul.data.from_tensors(x, x[:, :3].argmax(1))


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def trainer(credit: Credit, consensus: Consensus | None = None, stages: int = 3, **options: object) -> ul.Trainer:
    """A trainer of the tiny network; `model=` and any argument of Trainer may be given."""
    model = options.pop("model", None) or mlp()
    chain = ul.cut(model, stages, like=batch()[0].to(next(model.parameters()).dtype))
    options.setdefault("optimizer", momentum)
    if isinstance(credit, TwoVersions):  # its rule wants so many micro-batches per update
        options["accumulate"] = max(options.get("accumulate", 1), stages - 1)
    if consensus is not None:
        options["accumulate"] = max(options.get("accumulate", 1), consensus.fewest)
    return ul.Trainer(chain, credit=credit, consensus=consensus, **options)


def state(session: ul.Trainer) -> dict[str, Tensor]:
    """Every tensor of every replica: bodies, heads, buffers."""
    return {
        f"{n}.{name}": x.detach().clone()
        for n, chain in enumerate(session.chains)
        for j, stage in enumerate(chain)
        for name, x in [(f"{j}.{k}", v) for k, v in nn.Module.state_dict(stage, keep_vars=True).items()]
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    odd = [name for name in a if not torch.equal(a[name], b[name])]
    assert not odd, f"these differ: {odd}"
