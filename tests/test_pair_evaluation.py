"""A network that learned from pairs of views is judged by what a probe reads, in every world the same, and left as it was."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import unlocked as ul
from unlocked import held_out_pairs, pair_evaluation
from unlocked.chain import Chain
from unlocked.cli import main
from unlocked.heads import HeadReport
from unlocked.held_out_pairs import pair_batch_size, pair_batches
from unlocked.live import LiveTable
from unlocked.merging import digest
from unlocked.pair_evaluation import classes_of
from unlocked.pairs import NTXent
from unlocked.probes import explain
from unlocked.report.study import read_study
from unlocked.report.words import probed_words
from unlocked.run_files import summarise
from unlocked.table import as_markdown, row_of
from unlocked.worlds import Distributed

import methods as m
from processes import run_processes


@dataclass(frozen=True)
class Local(ul.credit.DGL):
    """DGL whose stages have projectors and learn from pairs: the least that a self-supervised rule can be."""

    self_supervised: ClassVar[bool] = True

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _, stage, channels in zip(range(len(chain)), chain, (6, 9), strict=False):
                pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if channels == 6 else nn.Identity()
                stage.head = nn.Sequential(pooled, nn.Linear(channels, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
                stage.loss = NTXent()
        return []


class LastOnly(Local):
    """Only the last stage has a projector."""

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        super().prepare(chain, seed)
        chain[0].head, chain[0].loss = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), NTXent()
        return []


def images(count: int, seed: int, augment: str | None = None, like: ul.data.Data | None = None) -> ul.data.Data:
    """Images (2, 6, 6) whose class is where they are bright, so that probes have something to find."""
    source = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = torch.randint(0, 150, (count, 2, 6, 6), generator=source)
    for k, label in enumerate(y.tolist()):
        x[k, label % 2, 2 * label : 2 * label + 2] += 60
    return ul.data.from_tensors(x.to(torch.uint8), y, augment=augment, like=like)


TRAIN = images(60, 0, "views+crop-flip")
TEST = images(29, 1, like=TRAIN)


def model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    second = [nn.Conv2d(6, 9, 3, stride=2), nn.BatchNorm2d(9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, nn.Dropout(dropout), *second)


def network() -> Chain:
    return Chain([ul.Stage(part) for part in (model(0.2)[:4], model(0.2)[4:])], like=torch.zeros(2, 2, 6, 6))


def trainer(credit: ul.credit.Credit | None = None, consensus: ul.consensus.Consensus | None = None, **options: object):
    options.setdefault("optimizer", m.momentum)
    return ul.Trainer(network(), credit=credit or Local(), consensus=consensus, **options)  # type: ignore[arg-type]


def fitted(epochs: int = 1, **options: object):
    made = trainer(**options)  # type: ignore[arg-type]
    made.fit(TRAIN, epochs, batch_size=10)
    return made


def probes(found: ul.probes.Explanation) -> list[float | None]:
    return [depth.probe for depth in found.depths]


# ---- the numbers --------------------------------------------------------------------------------------------------------


def test_losses_and_probes_are_those_of_explain() -> None:
    made = fitted()
    scores, found = made.evaluate(TEST, batch_size=8), explain(made, TRAIN, TEST)
    assert [accuracy for _, accuracy in scores.stages] == probes(found)
    losses = [one.loss for depth in found.depths for one in depth.stages]
    assert [loss for loss, _ in scores.stages] == pytest.approx(losses)
    assert (scores.loss, scores.accuracy) == scores.stages[-1] and scores.probed
    assert scores.members == [] and scores.ensemble is None and scores.layerwise is None
    assert 1 / 3 < scores.accuracy <= 1.0
    readings = [one for depth in found.depths for one in depth.stages]
    assert all((one.accuracy, one.cosine, one.activation_cosine) == (None, None, None) for one in readings)
    assert found.pairs and [one.learns_from for one in readings] == [[0], [1]]


@pytest.mark.parametrize("views", [4, 512])  # in parts, or at once
def test_the_loss_is_of_two_views_of_held_out_images_in_evaluation_mode(
    views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out_pairs, "VIEWS", views)
    made = fitted()
    (chain,) = made.members()
    chain.eval()
    expected: list[list[Tensor]] = [[], []]
    alike = dataclasses.replace(TEST, augment="views+crop-flip")
    seed = ul.rng.seed_of(0, "held-out views")
    with torch.no_grad():
        for x, _ in alike.batches(10, epoch=0, seed=seed, train=True):
            assert len(x) == 20 and not torch.equal(x[0], x[1])
            for j, _, h in chain.walk(x):
                z = nn.functional.normalize(chain[j].head(h))
                s = (z @ z.T) / 0.5
                rest = s.masked_fill(torch.eye(20, dtype=torch.bool), -torch.inf).logsumexp(1)
                expected[j].append((rest - s[torch.arange(20), torch.arange(20) ^ 1]).mean())
    assert [len(row) for row in expected] == [2, 2]  # 29 images are two batches of 10 and no third
    losses = [loss for loss, _ in made.evaluate(TEST).stages]
    assert losses == pytest.approx([float(torch.stack(row).mean()) for row in expected], rel=1e-5)


def test_as_many_views_are_judged_together_as_in_an_update() -> None:
    rules = ul.consensus
    cases = ((None, 1, 10), (rules.AllReduce(), 2, 20), (rules.WASH(0.1), 2, 10), (rules.LocalSGD(period=2), 2, 10))
    for rule, replicas, size in cases:  # those of LocalSGD share an epoch, and contrast their own views
        assert pair_batch_size(fitted(consensus=rule, replicas=replicas, accumulate=2)) == size
    assert [len(x) for x, _ in pair_batches(TRAIN, TEST, 64, torch.device("cpu"))] == [58]  # no more than there are
    assert list(pair_batches(TEST, TEST, 10, torch.device("cpu"))) == []


def test_stages_without_a_projector_have_a_probe_and_no_loss() -> None:
    made = fitted(credit=LastOnly())
    made.chains[0][0].head = None
    scores, found = made.evaluate(TEST), explain(made.chains[0], TRAIN, TEST, credit=LastOnly())
    assert scores.stages[0][0] is None and scores.stages[1][0] is not None
    assert [accuracy for _, accuracy in scores.stages] == probes(found)
    assert [one.loss is None for depth in found.depths for one in depth.stages] == [True, False]


@pytest.mark.parametrize("batchnorm", ["local", "refresh"])
def test_of_a_population_the_mean_is_probed_and_every_member(batchnorm: str) -> None:
    made = fitted(consensus=ul.consensus.WASH(0.05), replicas=2, batchnorm=batchnorm)
    scores = made.evaluate(TEST)
    assert [accuracy for _, accuracy in scores.stages] == probes(explain(made, TRAIN, TEST))
    each = [probes(explain(chain, TRAIN, TEST, credit=Local()))[-1] for chain in made.members()]
    assert scores.members == each and scores.ensemble is None
    for chain, accuracy in zip(made.members(), each, strict=True):
        alone = trainer()
        alone.chains[0].load_state_dict(chain.state_dict())
        assert alone.evaluate(TEST, train=TRAIN).accuracy == accuracy


def test_probes_are_fitted_to_some_training_images_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fitted()
    monkeypatch.setattr(pair_evaluation, "PROBED", 24)
    some = made.evaluate(TEST)
    drawn = torch.randperm(60, generator=torch.Generator().manual_seed(ul.rng.seed_of(0, "probed")))[:24].sort().values
    those = dataclasses.replace(TRAIN, x=TRAIN.x[drawn], y=TRAIN.y[drawn])
    assert some == made.evaluate(TEST, train=those)
    monkeypatch.undo()
    assert some.stages != made.evaluate(TEST).stages
    domains = ul.data.Domains([those, those])
    assert made.evaluate(TEST, train=domains).loss == some.loss  # the views are the first one's


def oracle() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).eval()


RULES = {
    "simclr": lambda: ul.credit.SimCLR(dimension=8),
    "dgssl": lambda: ul.credit.DGSSL(dimension=8, loss="hard-negatives"),
    "oracle-simclr": lambda: ul.credit.OracleSimCLR(oracle(), dimension=8),
    "dgssl-llm": lambda: ul.credit.DGSSLLLM(oracle=oracle(), dimension=8, ratio=0.8),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_judged_by_its_own_losses(rule: str) -> None:
    credit = RULES[rule]()
    made = fitted(credit=credit)
    scores, found = made.evaluate(TEST), explain(made, TRAIN, TEST)
    losses = [one.loss for depth in found.depths for one in depth.stages]
    assert [loss is None for loss in losses] == [rule == "simclr", False]
    assert [loss for loss, _ in scores.stages] == [None if loss is None else pytest.approx(loss) for loss in losses]
    (chain,) = made.members()
    chain.eval()
    ((x, y),) = pair_batches(TRAIN, dataclasses.replace(TEST, x=TEST.x[:10], y=TEST.y[:10]), 10, torch.device("cpu"))
    few = dataclasses.replace(TEST, x=TEST.x[:10], y=TEST.y[:10])
    with torch.no_grad():
        z = chain[-1].head(chain(x))
        expected = made.chains[0][-1].loss.judge(z, y, credit.oracle_rows and credit.oracle_rows(x)).loss
    assert made.evaluate(few).loss == pytest.approx(float(expected), rel=1e-5)


def test_a_rule_that_has_to_meet_the_data_does_so_after_a_resume(tmp_path: Path) -> None:
    made = fitted(credit=RULES["dgssl-llm"]())
    made.save(tmp_path / "saved")
    again = ul.Trainer.resume(tmp_path / "saved", chain=network(), credit=RULES["dgssl-llm"]())
    unmet = explain(again, TRAIN, TEST)
    assert [one.loss is None for depth in unmet.depths for one in depth.stages] == [True, False]
    plain = again.evaluate(TEST, train=dataclasses.replace(TRAIN, augment=None))
    assert [loss for loss, _ in plain.stages] == [None, None]
    assert again.evaluate(TEST, train=TRAIN) == made.evaluate(TEST)
    half = dataclasses.replace(TRAIN, x=TRAIN.x[:30], y=TRAIN.y[:30])
    before = [stage.loss for stage in again.chains[0]]
    again.evaluate(TEST, train=half)  # other thresholds are none of its affair
    assert [stage.loss for stage in again.chains[0]] == before


# ---- what there is not -------------------------------------------------------------------------------------------------


def test_what_cannot_be_known_is_none() -> None:
    made = trainer()
    empty = made.evaluate(TEST)
    assert (empty.loss, empty.accuracy, empty.stages) == (None, None, [(None, None)] * 2)
    assert json.loads(json.dumps(empty.to_json(), allow_nan=False))["probed"] is True
    plain = dataclasses.replace(TRAIN, augment=None)
    scores = made.evaluate(TEST, train=plain)
    assert scores.loss is None and scores.accuracy is not None  # no views, but labels
    values = dataclasses.replace(TRAIN, y=TRAIN.y[:, None].float())
    unlabelled = dataclasses.replace(TRAIN, y=TRAIN.y - 1)
    for data in (values, unlabelled):
        scores = made.evaluate(dataclasses.replace(TEST, y=data.y[:29]), train=data)
        assert scores.loss is not None and scores.accuracy is None
    with pytest.raises(ul.UnlockedError, match="but the training data have 1 classes"):
        explain(made, dataclasses.replace(TRAIN, y=TRAIN.y * 0, classes=1), TEST)
    assert classes_of(TRAIN, TEST) == 3 and classes_of(TRAIN, unlabelled) is None


# ---- nothing is changed ------------------------------------------------------------------------------------------------


def test_nothing_is_changed_by_evaluating() -> None:
    def make() -> ul.Trainer:
        made = fitted(consensus=ul.consensus.WASH(0.05), replicas=2)
        made.chains[0][1].body[1].eval()  # frozen by hand
        return made

    looked, other = make(), make()
    parts = [part for chain in looked.chains for part in chain.modules()]
    modes, before, state = [part.training for part in parts], [digest(c) for c in looked.chains], torch.get_rng_state()
    first = looked.evaluate(TEST)
    assert [digest(chain) for chain in looked.chains] == before and torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in parts] == modes
    torch.rand(3)
    assert looked.evaluate(TEST) == first  # nothing is left to chance
    for made in (looked, other):
        made.fit(TRAIN, 2, batch_size=10)
    m.assert_same(m.state(looked), m.state(other))


# ---- every world -------------------------------------------------------------------------------------------------------


def outcome(world: ul.worlds.World | None) -> tuple:
    made = trainer(consensus=ul.consensus.WASH(0.05), replicas=2, world=world)
    (record,) = made.fit(TRAIN, 1, batch_size=10, validate=TEST)
    return record["losses"], record["validation"], made.evaluate(TEST, train=TRAIN)


def on_processes(cluster) -> tuple:
    torch.manual_seed(cluster.rank)
    with Distributed(cluster) as world:
        return outcome(world)


def test_processes_and_a_simulated_cluster_give_the_numbers_of_one_process() -> None:
    here = outcome(None)
    assert here[1] == here[2].to_json() and len(here[1]["members"]) == 2
    assert outcome(ul.worlds.Simulated()) == here
    assert run_processes(on_processes, 2) == [here, here]


# ---- what people read --------------------------------------------------------------------------------------------------


def test_people_are_told_that_it_is_a_probe(tmp_path) -> None:
    console = Console(record=True, width=200)
    log = ul.callbacks.EventLog(tmp_path / "events.jsonl")
    trainer().fit(TRAIN, 1, batch_size=10, validate=TEST, callbacks=[LiveTable(console), log])
    assert "% by linear probe" in console.export_text()
    summary = summarise(tmp_path, 1)
    assert summary["probed"] is True and summary["loss"] is not None
    markdown = as_markdown([row_of("local", 1, [summary], [])], "", "")
    assert "Accuracy of local: of a linear probe" in markdown
    study = read_study(tmp_path)
    assert study.methods[0].probed and "of a linear probe" in probed_words(study.methods)
    supervised = as_markdown([row_of("dgl", 1, [{**summary, "probed": False}], [])], "", "")
    assert "probe" not in supervised


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> list[dict]:
        assert main([*words, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    run = str(tmp_path / "run")
    options = [
        "--data",
        "digits",
        "--subset",
        "64",
        "--augment",
        "views+crop-flip",
        "--model",
        "mlp",
        "--width",
        "8",
        "--stages",
        "2",
        "--epochs",
        "1",
    ]
    rule = ["--credit", "subsampled-simclr(projector=0c2f)", "--batch-size", "32", "--tensorboard", "off"]
    epoch, result = said("train", *rule, *options, "--run", run)
    assert all(0 <= share <= 1 for share in epoch["notes"]["negatives kept"]) and result["probed"] is True
    assert main(["report", run, "--json"]) == 0
    capsys.readouterr()
    ((found,),) = (
        line["runs"] for line in said("probe", run, "--knn", "5", "--recipe", "adam", "--recipe-epochs", "2")
    )
    assert found["knn"] == 5 and found["recipe"]["epochs"] == 2 and found["pairs"] is True
    for depth, (loss, accuracy) in zip(found["depths"], epoch["validation"]["stages"], strict=True):
        assert depth["probe"] == accuracy and depth["stages"][0]["loss"] == pytest.approx(loss)
        assert depth["stages"][0]["cosine"] is None and 0 < depth["knn"] <= 1 and depth["spectrum"][0] == 1.0
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "What was watched" in page and "Vote of the nearest neighbours" in page and "Spectrum of the features" in page
    )
    assert "Cosine to backpropagation" not in page
    assert main(["probe", run, "--knn", "0"]) == 2 and "knn" in capsys.readouterr().err
