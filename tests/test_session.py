"""The session: checkpoints that survive, numbers that are refused, memory that is what it should be."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked import checkpoint as checkpoint_module
from unlocked.errors import BadCheckpoint, HeadTooLarge, InvalidChoice, NonFiniteLoss, UnlockedError
from unlocked.probes.memory import SavedBytes

from methods import assert_same, batch, data, mlp, momentum, state, trainer


def zoo_trainer(**options):
    torch.manual_seed(0)
    model = ul.models.build("cnn", input_shape=(1, 8, 8), classes=3, width=4, depth=3)
    chain = ul.cut(model, 3, like=torch.randn(4, 1, 8, 8))
    options.setdefault("optimizer", lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.8, 0.95)))
    options.setdefault("credit", ul.credit.Interlocking(1, head="linear", budget=None))
    return ul.Trainer(chain, **options)


def images(seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(12, 1, 8, 8, generator=source), torch.randint(3, (12,), generator=source)


def test_a_library_model_resumes_from_its_path_alone(tmp_path):
    options = {
        "consensus": ul.consensus.WASH(p=0.2, schedule="constant"),
        "replicas": 2,
        "schedule": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4]),
        "clip": 1.0,
        "seed": 5,
    }
    whole, stopped = zoo_trainer(**options), zoo_trainer(**options)
    for k in range(6):
        whole.step(*images(k))
    for k in range(3):
        stopped.step(*images(k))
    stopped.save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path)
    for k in range(3, 6):
        resumed.step(*images(k))
    assert_same(state(resumed), state(whole))
    assert resumed.consensus == whole.consensus and resumed.credit == whole.credit
    assert resumed.learning_rates() == whole.learning_rates()


def test_no_file_of_a_checkpoint_is_pickled(tmp_path):
    session = zoo_trainer()
    session.step(*images())
    session.save(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ""}
    for path in files:
        head = path.read_bytes()[:2]
        assert head != b"PK" and not head.startswith(b"\x80"), path  # neither a zip of pickles nor a pickle
        if path.suffix == ".json":
            json.loads(path.read_text())


@pytest.mark.parametrize("when", ["tensors", "json", "commit"])
def test_an_interrupted_save_leaves_the_previous_checkpoint_valid(tmp_path, monkeypatch, when):
    session = zoo_trainer()
    session.step(*images(0))
    session.save(tmp_path)
    saved = state(session)
    session.step(*images(1))

    def broken(*arguments, **keywords):
        raise OSError("no space left on device")

    target = {"tensors": (checkpoint_module, "save_file"), "json": (checkpoint_module.json, "dumps")}.get(when)
    if target:
        monkeypatch.setattr(*target, broken)
    else:
        monkeypatch.setattr(checkpoint_module.Path, "rename", broken)
    with pytest.raises(OSError):
        session.save(tmp_path)
    monkeypatch.undo()
    assert_same(state(ul.Trainer.resume(tmp_path)), saved)
    session.save(tmp_path)  # and the next save works
    assert_same(state(ul.Trainer.resume(tmp_path)), state(session))


def test_saving_the_same_step_again_and_keeping_two(tmp_path):
    session = zoo_trainer()
    for k in range(3):
        session.step(*images(k))
        session.save(tmp_path)
        session.save(tmp_path)
    assert len(list(tmp_path.glob("step-*"))) == 2
    assert_same(state(ul.Trainer.resume(tmp_path)), state(session))


def test_damaged_and_foreign_checkpoints_are_refused_in_sentences(tmp_path):
    with pytest.raises(BadCheckpoint, match="no such folder"):
        ul.Trainer.resume(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match="holds no complete checkpoint"):
        ul.Trainer.resume(tmp_path / "empty")
    session = zoo_trainer()
    folder = session.save(tmp_path / "run")
    shard = folder / "replica-0-stage-1.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadCheckpoint, match=r"stage-1.safetensors cannot be read .*damaged"):
        ul.Trainer.resume(tmp_path / "run")
    shard.write_bytes(whole)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(BadCheckpoint, match="format 99"):
        ul.Trainer.resume(tmp_path / "run")
    (folder / "manifest.json").write_text('{"format": 2, "stages": 3}')
    with pytest.raises(BadCheckpoint, match=r"lacks recipe, credit.* written by another version"):
        ul.Trainer.resume(tmp_path / "run")
    other = trainer(ul.credit.Backprop())
    other.save(tmp_path / "own")
    with pytest.raises(BadCheckpoint, match="made by your own code"):
        ul.Trainer.resume(tmp_path / "own")
    with pytest.raises(BadCheckpoint, match="has 3 stages, the given chain 2"):
        ul.Trainer.resume(tmp_path / "own", ul.cut(mlp(), 2, like=batch()[0]))
    with pytest.raises(BadCheckpoint, match="does not fit"):
        ul.Trainer.resume(tmp_path / "own", ul.cut(mlp(norm=True), 3, like=batch()[0]))


def test_what_only_the_users_code_can_make_must_be_given_again(tmp_path):
    def head(features, outputs):
        return nn.Sequential(nn.Flatten(), nn.Linear(features[0].numel(), outputs))

    credit = ul.credit.DGL(head=head, budget=None)
    schedule = lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.5**k)  # noqa: E731
    session = zoo_trainer(credit=credit, schedule=schedule)
    session.step(*images())
    session.save(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"give it again: Trainer.resume\(path, credit="):
        ul.Trainer.resume(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"give it again: Trainer.resume\(path, schedule="):
        ul.Trainer.resume(tmp_path, credit=credit)
    resumed = ul.Trainer.resume(tmp_path, credit=credit, schedule=schedule)
    session.step(*images(1)), resumed.step(*images(1))
    assert_same(state(resumed), state(session))


def test_a_loss_noticed_late_does_not_claim_that_the_weights_are_untouched():
    """On accelerators losses are read once a step, after the updates."""
    session = trainer(ul.credit.Backprop())
    session.workers[1].losses = [torch.tensor(float("nan"))]
    with pytest.raises(
        NonFiniteLoss, match=r"stage 1 .* was noticed after the update, so go back to the last checkpoint"
    ):
        session._losses()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_loss_that_is_not_finite_stops_with_its_stage_named_and_its_weights_untouched(value, bad):
    session = trainer(ul.credit.DGL(head="linear", budget=None))
    stage = session.chains[0][bad]
    stage.loss = lambda output, y: output.sum() * value
    before = state(session)
    with pytest.raises(
        NonFiniteLoss, match=f"loss of stage {bad} of replica 0 is (nan|inf|-inf) .*did not touch its weights"
    ):
        session.step(*batch())
    after = state(session)
    for name in before:
        if name.startswith(f"0.{bad}.body"):
            assert torch.equal(before[name], after[name])


def test_a_failed_step_leaves_nothing_for_the_next_one():
    """The gradients and micro-batches of the stages that had not failed are dropped with it."""
    session = trainer(ul.credit.DGL(head="linear", budget=None), ul.consensus.AllReduce(), replicas=2, accumulate=2)
    stage = session.chains[1][1]
    good = stage.loss
    calls = []

    def fails_later(output, y):
        calls.append(len(y))
        return good(output, y) * (float("nan") if len(calls) == 2 else 1.0)

    stage.loss = fails_later
    with pytest.raises(NonFiniteLoss):
        session.step(*batch(24))
    assert all(parameter.grad is None for chain in session.chains for parameter in chain.parameters())
    session.step(*batch(24))  # stages 0 and 2 would be one micro-batch ahead of each other otherwise
    assert session.steps == 1


def test_the_callers_batches_must_fit_the_replicas():
    session = trainer(ul.credit.Backprop(), ul.consensus.AllReduce(), replicas=3)
    x, y = batch(10)
    with pytest.raises(InvalidChoice, match="10 inputs and 10 targets cannot be split evenly among 3 replicas"):
        session.step(x, y)
    with pytest.raises(InvalidChoice, match="2 batches and 2 targets were given for 3 replicas"):
        session.step([x, x], [y, y])
    with pytest.raises(InvalidChoice, match="need equal parts of it, got sizes"):
        session.step([x, x, x[:4]], [y, y, y[:4]])
    with pytest.raises(InvalidChoice, match="both as tensors, or both as lists"):
        session.step(x, [y])
    split, listed = trainer(ul.credit.Backprop(), replicas=2), trainer(ul.credit.Backprop(), replicas=2)
    split.step(*batch(12))
    x, y = batch(12)
    listed.step([x[:6], x[6:]], [y[:6], y[6:]])
    assert_same(state(split), state(listed))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"replicas": 0}, "replicas=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"batchnorm": "locl"}, "did you mean 'local'"),
        ({"schedule_every": "steps"}, "did you mean 'step'"),
    ],
)
def test_impossible_arguments_are_refused(options, words):
    with pytest.raises(InvalidChoice, match=words):
        trainer(ul.credit.Backprop(), **options)


def test_other_refusals():
    with pytest.raises(InvalidChoice, match="Trainer takes a Chain, got Sequential"):
        ul.Trainer(mlp(), optimizer=momentum)
    with pytest.raises(HeadTooLarge, match="stage 0"):
        trainer(ul.credit.DGL(head="mlp", budget=0.01))
    with pytest.raises(InvalidChoice, match="d=-1"):
        ul.credit.Interlocking(-1)
    session = trainer(ul.credit.Backprop())
    with pytest.raises(UnlockedError, match="batch"):
        session.fit(data(8), 1, batch_size=64)
    with pytest.raises(InvalidChoice, match="cannot be split into 3 micro-batches"):
        trainer(ul.credit.Backprop(), accumulate=3).step(*batch(2))


def test_heads_are_reported_and_under_budget():
    model = ul.models.build("cnn", input_shape=(1, 8, 8), classes=10)
    chain = ul.cut(model, 4, like=torch.randn(4, 1, 8, 8))
    session = ul.Trainer(chain, credit=ul.credit.DGL(head="mlp"), optimizer=momentum)
    assert len(session.heads) == 3
    assert all(0 < report.share <= 0.10 for report in session.heads)


def test_accumulated_micro_batches_are_the_whole_batch():
    """For a network without BatchNorm, weighted by their sizes, uneven ones too."""
    results = []
    for accumulate in (1, 5):
        credit = ul.credit.Interlocking(1, head=lambda f, k: nn.Linear(7, k).double(), budget=None)
        session = trainer(credit, accumulate=accumulate)
        for k in range(3):
            losses = session.step(*batch(12, seed=k))
        results.append((losses, dict(session.chains[0].named_parameters())))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, x in results[0][1].items():
        torch.testing.assert_close(x, results[1][1][name], rtol=1e-10, atol=1e-12)


def test_clipping_bounds_each_stages_gradient():
    session = trainer(ul.credit.Backprop(), clip=1e-3, optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
    before = [torch.cat([p.detach().flatten() for p in stage.parameters()]) for stage in session.chains[0]]
    session.step(*batch())
    for stage, old in zip(session.chains[0], before):
        moved = torch.cat([p.detach().flatten() for p in stage.parameters()]) - old
        assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_bf16_runs_in_bf16_and_keeps_float32_weights():
    seen = []
    session = trainer(ul.credit.Backprop(), model=mlp(dtype=torch.float32), precision="bf16")
    session.chains[0][0].body.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x, y = batch(dtype=torch.float32)
    (*_, loss) = session.step(x, y)
    assert seen == [torch.bfloat16]
    plain = trainer(ul.credit.Backprop(), model=mlp(dtype=torch.float32))
    (*_, exact) = plain.step(x, y)
    assert loss != exact and loss == pytest.approx(exact, rel=0.02)
    assert all(p.dtype == torch.float32 for p in session.chains[0].parameters())


def test_schedules_step_per_update_or_per_epoch():
    def made(every):
        session = trainer(
            ul.credit.Greedy(budget=None),
            stages=2,
            schedule=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5),
            schedule_every=every,
        )
        session.fit(data(24), 2, batch_size=12)
        return session.learning_rates()

    assert made("step") == [0.1 / 16, 0.1 / 16]  # two epochs of two updates each, per stage
    assert made("epoch") == [0.1 / 4, 0.1 / 4]


def test_local_learning_keeps_one_stage_and_backprop_keeps_all():
    """Peak of saved bytes: DGL's is that of its largest stage with its head; backprop's is the sum."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)), nn.Linear(64, 10))
    x, y = torch.randn(256, 64), torch.randint(10, (256,))
    peaks = {}
    for credit in (ul.credit.Backprop(), ul.credit.DGL(head="linear", budget=None)):
        session = ul.Trainer(ul.cut(model, 8, like=x), credit=credit, optimizer=momentum)
        with SavedBytes(ignore=session.chains[0].parameters()) as meter:
            session.step(x, y)
        peaks[credit.name] = meter.peak
        assert meter.live == 0
    activation = x.numel() * 4
    assert peaks["backprop"] >= 8 * activation
    assert peaks["dgl"] <= 5 * activation


def test_saved_bytes_counts_a_storage_once_and_no_parameter():
    layer = nn.Linear(16, 16, bias=False)
    x = torch.randn(8, 16)
    with SavedBytes(ignore=layer.parameters()) as meter:
        h = layer(x)  # saves x
        y = h * h  # saves h, twice
        assert meter.live == x.numel() * 4 + h.numel() * 4
        y.sum().backward()
        assert meter.live == 0
    assert meter.peak == 2 * x.numel() * 4 and meter.curve[0] == meter.curve[-1] == 0


def test_ctrl_c_without_a_folder_stops_after_a_whole_step_and_restores_the_handler():
    before = signal.getsignal(signal.SIGINT)

    class Stop(ul.callbacks.Callback):
        def on_step(self, trainer, record):
            os.kill(os.getpid(), signal.SIGINT)

    session = trainer(ul.credit.Backprop())
    with pytest.raises(ul.Interrupted, match="nothing was saved"):
        session.fit(data(), 1, batch_size=12, callbacks=[Stop()])
    assert session.steps == 1 and signal.getsignal(signal.SIGINT) is before


def test_going_on_with_another_batch_size_inside_an_epoch_is_refused(tmp_path):
    class Stop(ul.callbacks.Callback):
        def on_step(self, trainer, record):
            os.kill(os.getpid(), signal.SIGINT)

    session = trainer(ul.credit.Backprop())
    with pytest.raises(ul.Interrupted, match=r"Trainer.resume\("):
        session.fit(data(), 1, batch_size=12, callbacks=[Stop()], checkpoint=tmp_path)
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]))
    with pytest.raises(InvalidChoice, match="batch_size=12, not 6"):
        resumed.fit(data(), 1, batch_size=6)


def test_records_add_up():
    log = []

    class Note(ul.callbacks.Callback):
        def on_start(self, trainer, epochs):
            log.append(("start", epochs))

        def on_step(self, trainer, record):
            log.append(("step", record["samples"]))

        def on_stop(self, trainer, reason):
            log.append(("stop", reason))

    session = trainer(ul.credit.Backprop(), ul.consensus.AllReduce(), replicas=2)
    records = session.fit(data(60), 2, batch_size=10, validate=data(24, 1), callbacks=[Note()])
    assert log == [("start", 2), *[("step", 20)] * 6, ("stop", "finished")]
    assert [record["samples"] for record in records] == [60, 60]
    assert sum(record["bytes"]["activation"] for record in records) == session.bytes_sent["activation"]
    assert records[-1]["activation_peak"] > 0 and records[-1]["step"] == 6


def test_the_users_own_random_stream_is_left_alone():
    session = trainer(ul.credit.Backprop(), model=mlp(dropout=0.5))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    session.step(*batch())
    assert torch.equal(torch.rand(3), expected)


def test_a_resumed_epoch_is_reported_whole_and_one_that_was_done_is_not_run_again(tmp_path):
    class Stop(ul.callbacks.Callback):
        def __init__(self, step):
            self.step = step

        def on_step(self, trainer, record):
            if trainer.steps == self.step:
                os.kill(os.getpid(), signal.SIGINT)

    (expected, second) = trainer(ul.credit.Backprop(), ul.consensus.AllReduce(), replicas=2).fit(
        data(), 2, batch_size=6
    )
    for step in (3, 5):  # inside the first epoch of five updates, and on its last one
        session = trainer(ul.credit.Backprop(), ul.consensus.AllReduce(), replicas=2)
        with pytest.raises(ul.Interrupted):
            session.fit(data(), 2, batch_size=6, callbacks=[Stop(step)], checkpoint=tmp_path / str(step))
        assert (session.epoch, session.batch_in_epoch) == ((0, 3) if step == 3 else (1, 0))
        spent = session.elapsed
        assert spent > 0
        resumed = ul.Trainer.resume(tmp_path / str(step), ul.cut(mlp(), 3, like=batch()[0]))
        assert resumed.elapsed == spent
        records = resumed.fit(data(), 2, batch_size=6)
        wanted = [expected, second] if step == 3 else [second]
        for name in ("epoch", "step", "losses", "samples", "bytes"):
            assert [record[name] for record in records] == [record[name] for record in wanted], name
        assert records[-1]["elapsed"] > spent


def test_a_batchnorm_frozen_by_hand_stays_frozen_and_a_model_in_evaluation_mode_is_trained():
    session = trainer(ul.credit.Backprop(), model=mlp(norm=True))
    norms = [part for part in session.chains[0].modules() if isinstance(part, nn.BatchNorm1d)]
    norms[1].eval()
    before = norms[1].running_mean.clone()
    session.fit(data(), 1, batch_size=12, validate=data(24, 1))
    session.ensemble(batch()[0])
    assert [part.training for part in norms] == [True, False, True, True]
    assert torch.equal(norms[1].running_mean, before)
    evaluated = trainer(ul.credit.Backprop(), model=mlp(norm=True).eval())
    assert all(part.training for part in evaluated.chains[0].modules())


def test_optimizers_and_schedules_that_need_a_loss_are_refused():
    with pytest.raises(InvalidChoice, match="LBFGS wants to be called with a loss"):
        trainer(ul.credit.Backprop(), optimizer=lambda ps: torch.optim.LBFGS(ps))
    with pytest.raises(InvalidChoice, match="ReduceLROnPlateau wants to be called with a loss"):
        trainer(ul.credit.Backprop(), schedule=lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt))


def test_a_stage_with_nothing_to_train_is_refused():
    chain = ul.Chain([ul.Stage(nn.Linear(5, 6)), ul.Stage(nn.Tanh()), ul.Stage(nn.Linear(6, 3))])
    with pytest.raises(InvalidChoice, match="Stage 1 has nothing to train"):
        ul.Trainer(chain, optimizer=momentum)


def test_one_step_saved_many_times_keeps_the_newest_two_and_no_litter(tmp_path):
    session = zoo_trainer()
    (tmp_path / ".step-000000007.999999999").mkdir()  # of a process that was killed while it saved
    for k in range(6):
        session.steps = 3
        session.elapsed = float(k)
        session.save(tmp_path)
        folders = sorted(path.name for path in tmp_path.iterdir())
        assert len(folders) == min(k + 1, 2) + 1 and folders[0] == "LATEST"
        assert ul.Trainer.resume(tmp_path).elapsed == k
    (tmp_path / "LATEST").unlink()
    assert ul.Trainer.resume(tmp_path).elapsed == 5
