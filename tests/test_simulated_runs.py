"""Training on a simulated cluster from the command line: accuracy against simulated time, refusals, resume."""

import json

import pytest
import torch

import unlocked as ul
from unlocked import simulation as sim
from unlocked.cli import main

from methods import assert_same, data, mlp, state, trainer

TINY = ["--model", "mlp", "--width", "16", "--stages", "2", "--epochs", "2", "--subset", "128", "--tensorboard", "off"]


def records(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def epochs(folder):
    return [record for record in records(folder) if record["event"] == "epoch"]


def test_a_simulated_run_has_the_numbers_of_an_ordinary_one_and_its_own_seconds(tmp_path, capsys):
    common = ["train", *TINY, "--credit", "dgl(budget=None)", "--consensus", "all-reduce", "--replicas", "2", "--run"]
    cluster = ["--world", "simulated", "--speeds", "1,0.5", "--flops", "1M", "--bandwidth", "1MB/s", "--latency", "1ms"]
    assert main([*common, str(tmp_path / "plain")]) == 0
    assert main([*common, str(tmp_path / "simulated"), *cluster]) == 0
    assert main([*common, str(tmp_path / "again"), *cluster]) == 0
    plain, simulated, again = (epochs(tmp_path / name) for name in ("plain", "simulated", "again"))
    assert [one["losses"] for one in plain] == [one["losses"] for one in simulated]
    assert [one["validation"] for one in plain] == [one["validation"] for one in simulated]
    assert [one["seconds"] for one in simulated] == [one["seconds"] for one in again]  # no wall clock in it
    assert [one["seconds"] for one in simulated] != [one["seconds"] for one in plain]
    assert "on a simulated cluster: speeds 1,0.5, flops 1M" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "simulated")]) == 0


def test_resuming_a_simulated_run_equals_never_having_stopped_its_seconds_too(tmp_path):
    class Stop(ul.callbacks.Callback):
        def on_step(self, trainer, record):
            if record["step"] == 5:
                raise KeyboardInterrupt

    def session():
        hardware = sim.Hardware(
            sim.Device(1e6), speeds=(1.0, 0.3), slow_downs=sim.SlowDowns(0.3, 3.0), network=sim.uniform(1e-3, 1e5)
        )
        world = ul.worlds.Simulated(hardware)
        return trainer(
            ul.credit.DGL(head="linear", budget=None),
            ul.consensus.WASH(p=0.2),
            model=mlp(dtype=torch.float32),
            replicas=2,
            world=world,
        )

    whole = session()
    whole.fit(data(24, dtype=torch.float32), epochs=4, batch_size=8)
    first = session()
    first.fit(data(24, dtype=torch.float32), epochs=2, batch_size=8, checkpoint=tmp_path / "run")
    second = session()
    resumed = ul.Trainer.resume(tmp_path / "run", first.chains[0], world=second.world, optimizer=first_optimizer)
    resumed.fit(data(24, dtype=torch.float32), epochs=4, batch_size=8)
    assert_same(state(whole), state(resumed))
    assert resumed.world.clock() == whole.world.clock()
    assert resumed.timeline.acts == whole.timeline.acts
    assert resumed.elapsed == pytest.approx(whole.elapsed)


def first_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def test_compare_on_a_simulated_cluster_races_against_simulated_time(tmp_path):
    """One replica of four is four times slower: those that wait for it take as long, those that do not are done earlier."""
    options = ["--model", "mlp", "--width", "16", "--stages", "1", "--epochs", "1", "--subset", "128", "--seeds", "1"]
    cluster = ["--world", "simulated", "--speeds", "0.25", "--flops", "1M"]
    methods = ["--methods", "backprop/all-reduce@4", "backprop@4"]
    assert main(["compare", *options, *cluster, *methods, "--out", str(tmp_path / "race")]) == 0
    table = json.loads((tmp_path / "race" / "table.json").read_text())
    assert [row["failed"] for row in table] == [None, None]
    assert "simulated" in (tmp_path / "race" / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--speeds", "0.5"], "--speeds describes a simulated cluster; add --world simulated"),
        (["--world", "simulated", "--speeds", "fast"], "--speeds 'fast' is no row of numbers"),
        (["--world", "simulated", "--bandwidth", "3 lb"], "'3 lb' is no bandwidth"),
        (["--world", "simulated", "--memory", "0GiB"], "'0GiB' is not possible"),
        (["--world", "simulated", "--slow-downs", "often"], "'often' is not PROBABILITY:FACTOR"),
        (["--world", "simulated", "--inside-latency", "1us"], "give --per-node as well"),
        (["--world", "simulated", "--memory", "1kB", "--credit", "backprop"], "would hold"),
        (["--world", "simulated", "--credit", "torch-gpipe"], "needs a process for each"),
    ],
)
def test_bad_clusters_are_refused_in_a_sentence(options, sentence, tmp_path, capsys):
    assert main(["train", *TINY, "--run", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_a_simulated_run_goes_on_with_its_own_cluster(tmp_path, capsys):
    run = [
        "train",
        *TINY,
        "--run",
        str(tmp_path / "run"),
        "--world",
        "simulated",
        "--flops",
        "1M",
        "--credit",
        "backprop",
    ]
    assert main(run) == 0
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "on a simulated cluster: flops 1M" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run"), "--flops", "2M"]) == 2
    assert "leave out --flops" in capsys.readouterr().err


def test_a_cost_file_gives_the_machine_and_the_measured_stages(tmp_path, capsys):
    """Stages measured at 1, 2, 3 … seconds: an update of backpropagation takes their sum, whatever the operations are."""
    model = ul.models.build("mlp", input_shape=(1, 8, 8), classes=10, width=16)
    chain = ul.cut(model, 2, like=torch.zeros(2, 1, 8, 8))
    shapes = sim.profile(chain)
    stages = [
        sim.StageCosts({"forward": sim.Line(1.0 + j), "backward": sim.Line(3.0)}, shape)
        for j, shape in enumerate(shapes.stages)
    ]
    from unlocked.simulation import cost_file

    cost_file.save(tmp_path / "costs.json", sim.Hardware(network=sim.uniform(0.5)), sim.Costs(tuple(stages)))
    run = [
        "train",
        *TINY,
        "--run",
        str(tmp_path / "run"),
        "--world",
        "simulated",
        "--credit",
        "backprop",
        "--batch-size",
        "32",
    ]
    assert main([*run, "--costs", str(tmp_path / "costs.json")]) == 0
    first, _ = epochs(tmp_path / "run")
    assert first["seconds"] == pytest.approx(4 * (1 + 2 + 3 + 3 + 2 * 0.5))
    other = ["train", *TINY, "--run", str(tmp_path / "other"), "--world", "simulated", "--credit", "dgl(budget=None)"]
    assert main([*other, "--costs", str(tmp_path / "costs.json")]) == 2
    assert "was measured on another network" in capsys.readouterr().err
    assert main([*other, "--costs", str(tmp_path / "none.json")]) == 2
    assert "There is no cost file" in capsys.readouterr().err
