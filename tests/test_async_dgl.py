"""Asynchronous DGL: the buffer's laws, what it equals, the paper's algorithm written out, clocks, checkpoints."""

from __future__ import annotations

import copy
import os
import signal
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from unlocked.batch import own_memory
from unlocked.cli import main
from unlocked.errors import InvalidChoice
from unlocked.rng import generator, mix
from unlocked.rules.compression import quantised, restored
from unlocked.rules.replay import POLICIES, Replay
from unlocked.rules.turns import drawn, staircase, ticks
from unlocked.simulation.costs import unit
from unlocked.worlds import Simulated

from methods import assert_same, batch, data, mlp, state, trainer

AsyncDGL = ul.credit.AsyncDGL
PLAIN = {"head": "linear", "budget": None}
TRAIN = data(60)  # 5 batches of 12


def made(world=None, stages=3, session=None, **options):
    """A trainer under the rule; `session`: arguments of Trainer."""
    return trainer(AsyncDGL(**PLAIN, **options), stages=stages, world=world, **(session or {}))


def clock(*times, update=0.5):
    """A simulated world whose stages take times[j] for forward and backward each; an update takes a half."""
    return Simulated(costs=unit(len(times), forward=times, backward=times, update=update))


def dgl(epochs=2, **session):
    plain = trainer(ul.credit.DGL(**PLAIN), **session)
    plain.fit(TRAIN, epochs, batch_size=12)
    return plain


def balanced(rows, before=None):
    """What came is what left and what is here; what was used is what was learned from or passed on (all, if from the start)."""
    for k, row in enumerate(rows):
        was = before[k]["kept"] if before else 0
        assert row["received"] + was == sum(row["left"].values()) + row["kept"], row
        assert row["overwritten"] == row["left"].get("0", 0)
        if k:
            sent = rows[k - 1]["updates"] + rows[k - 1]["forwarded"]
            assert row["received"] == sent, rows
    assert rows[-1]["forwarded"] == 0 and rows[0]["received"] == 0


# ---- the buffer ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from(POLICIES),
    st.none() | st.integers(1, 3),
    st.lists(st.none() | st.tuples(st.integers(0, 2**60), st.booleans()), max_size=60),
)
def test_a_buffer_is_bounded_counts_uses_and_takes_by_its_policy(capacity, policy, reuse, acts):
    buffer, put, uses = Replay(capacity, policy, reuse), 0, Counter()
    for act in acts:
        if act is None:
            before = [entry.what for entry in buffer.entries]
            buffer.put(put)
            assert [entry.what for entry in buffer.entries] == [*before, put][-capacity:]
            put += 1
        else:
            here = {entry.what: entry.uses for entry in buffer.entries}
            assert here == {what: uses[what] for what in here} and buffer.fresh == sum(not n for n in here.values())
            allowed = [what for what, n in here.items() if n == 0 or not act[1]]
            taken = buffer.take(act[0], fresh=act[1])
            assert (taken is None) == (not allowed)
            if taken is None:
                continue
            fewest = [what for what in allowed if here[what] == min(here[one] for one in allowed)]
            wanted = {"least-used": max(fewest), "fifo": min(fewest), "uniform": allowed[act[0] % len(allowed)]}
            assert taken == wanted[policy]
            uses[taken] += 1
        assert len(buffer) <= capacity and all(n <= (reuse or n) for n in uses.values())
        assert all(entry.uses < (reuse or 99) for entry in buffer.entries)
    assert put == sum(buffer.left.values()) + len(buffer)
    assert sum(uses.values()) == sum(n * count for n, count in buffer.left.items()) + sum(
        e.uses for e in buffer.entries
    )
    kept, told = len(buffer), buffer.close_books()
    assert told["received"] == put and told["kept"] == kept and told["overwritten"] == told["left"].get("0", 0)
    assert buffer.close_books() == {"received": 0, "overwritten": 0, "left": {}, "kept": kept}


def test_a_uniform_buffer_takes_all_alike():
    buffer = Replay(4, "uniform")
    for k in range(4):
        buffer.put(k)
    taken = Counter(buffer.take(mix(5, turn)) for turn in range(4000))
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in taken.values())


def test_turns_are_a_staircase_and_then_drawn_by_the_rates():
    assert staircase(3) == [0, 0, 1, 0, 1, 2]
    noise, count = 0.75, 20_000
    source = drawn((1.0, 1.0 - noise, 1.0), generator("turns"))
    turns = [next(source) for _ in range(count)]
    for stage, share in enumerate((1 / 2.25, 0.25 / 2.25, 1 / 2.25)):
        assert abs(turns.count(stage) - share * count) < 5 * (count * share * (1 - share)) ** 0.5
        assert list(ticks(stage, iter(turns[:50]))) == [k for k, whose in enumerate(turns[:50]) if whose == stage]


# ---- what it equals --------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("policy", POLICIES)
def test_with_one_micro_batch_and_equal_rates_it_is_dgl_bit_for_bit(policy):
    session = {
        "model": mlp(norm=True, dropout=0.2),
        "accumulate": 2,
        "replicas": 2,
        "consensus": ul.consensus.AllReduce(),
    }
    plain = dgl(**copy.deepcopy(session))
    equal = made(policy=policy, rates="equal", session=copy.deepcopy(session))
    records = equal.fit(TRAIN, 2, batch_size=12)
    assert_same(state(equal), state(plain))
    assert equal.bytes_sent == plain.bytes_sent
    balanced(records[0]["buffers"][:3])


@pytest.mark.parametrize("ends", ["updates", "data"])
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.1, 0.7, 0.3)], ids=["equal", "faster"])
def test_on_a_clock_it_is_dgl_where_no_stage_is_slower_than_the_one_below_and_nothing_is_reused(ends, times):
    session = {"model": mlp(norm=True, dropout=0.2)}
    plain = dgl(**copy.deepcopy(session))
    own = made(clock(*times), reuse=1, ends=ends, session=session)
    records = own.fit(TRAIN, 2, batch_size=12)
    assert_same(state(own), state(plain))
    assert [record["losses"] for record in records][-1] == pytest.approx(own_losses(plain), nan_ok=False)
    for record in records:
        balanced(record["buffers"])


def own_losses(plain):
    """The mean losses of the last epoch of DGL, trained once more."""
    again = trainer(ul.credit.DGL(**PLAIN), model=mlp(norm=True, dropout=0.2))
    return again.fit(TRAIN, 2, batch_size=12)[-1]["losses"]


def test_what_makes_it_another_thing_than_dgl():
    """The condition is needed: a slower stage above misses micro-batches, a faster one reuses some unless told not to."""
    plain = state(dgl())

    def same(*times, **options):
        own = made(clock(*times), **{"ends": "data", **options})
        own.fit(TRAIN, 2, batch_size=12)
        return all(torch.equal(x, plain[name]) for name, x in state(own).items())

    assert same(1.0, 1.0, 1.0, reuse=None)  # to the last bit of the clock
    assert same(1.0, 1.0, 1.0, reuse=None, ends="updates")
    assert not same(1.0, 0.5, 1.0, reuse=None)
    assert not same(1.0, 1.0, 1.5, reuse=1)


def written_out(chain, rates, capacity, ends, epochs, lr):
    """Algorithm 2 with plain lists, torch and SGD: the least used of each buffer, then the freshest."""
    count = len(chain)
    optimizers = [torch.optim.SGD(stage.parameters(), lr=lr) for stage in chain]
    buffers = [[] for _ in range(count)]  # [features, targets, uses], the oldest first
    for epoch in range(epochs):
        rows = [(own_memory(x), own_memory(y)) for x, y in TRAIN.batches(12, epoch=epoch, seed=0, replica=0)]
        made, read, over = [0] * count, 0, [False] * count
        whose = iter([*([] if epoch else staircase(count))])
        later = drawn(rates, generator(0, "turns", 0, epoch, 0))
        while True:
            j = next(whose, None)
            j = next(later) if j is None else j
            if ends == "updates" and all(n >= len(rows) for n in made):
                break
            if ends == "data" and all(over):
                break
            learns = ends == "data" or made[j] < len(rows)
            passes_on = ends == "updates" and not learns and any(made[k] < len(rows) for k in range(j + 1, count))
            if over[j] or not (learns or passes_on):
                continue
            if j == 0:
                if ends == "data" and read == len(rows):
                    over[0] = True
                    continue
                x, y = rows[read % len(rows)]
                read += 1
            else:
                ended = over[j - 1]
                usable = [entry for entry in buffers[j] if entry[2] == 0 or not (ended or passes_on)]
                if not usable:
                    over[j] = ended
                    continue
                fewest = min(entry[2] for entry in usable)
                entry = [entry for entry in usable if entry[2] == fewest][-1]
                entry[2] += 1
                x, y = entry[0], entry[1]
            h = chain[j].body(x)
            if j + 1 < count:
                buffers[j + 1] = [*buffers[j + 1], [h.detach(), y, 0]][-capacity:]
            if learns:
                torch.nn.functional.cross_entropy(chain[j].read(h), y).backward()
                optimizers[j].step()
                optimizers[j].zero_grad()
                made[j] += 1
            if ends == "data" and j == 0 and read == len(rows):
                over[0] = True
        buffers = [[entry for entry in row if entry[2]] for row in buffers]
    return chain, made


def tensors(chain):
    """As methods.state names them."""
    return {f"0.{j}.{k}": x for j, stage in enumerate(chain) for k, x in torch.nn.Module.state_dict(stage).items()}


@pytest.mark.covering
@pytest.mark.parametrize("ends", ["updates", "data"])
@pytest.mark.parametrize("rates", [(1.0, 1.0, 1.0), (1.0, 0.3, 1.0), (0.3, 1.0, 0.6)])
def test_drawn_turns_are_the_papers_algorithm_written_out(ends, rates):
    session = made(buffer=2, rates=rates, ends=ends, session={"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.2)})
    chain = copy.deepcopy(session.chains[0])
    record = session.fit(TRAIN, 3, batch_size=12)[-1]
    chain, made_last = written_out(chain, rates, 2, ends, 3, 0.2)
    assert_same(state(session), tensors(chain))
    assert [row["updates"] for row in record["buffers"]] == made_last


def test_int8_features_are_what_the_codec_makes_of_them_and_are_counted_as_sent():
    stopped = {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.0)}
    session, seen = made(rates="equal", quantise="int8", session=stopped), []
    session.chains[0][1].body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, y = batch()
    session.step(x, y)
    h = session.chains[0][0].body(x).detach()
    largest, codes = quantised(h.reshape(-1), 256)
    assert torch.equal(seen[0], restored(largest, codes, 256, h.dtype).view(h.shape)) and not torch.equal(seen[0], h)
    assert session.bytes_sent == {"activation": 2 * (h.numel() + 4 * -(-h.numel() // 256))}


def test_in_lock_step_a_uniform_buffer_draws_anew_in_every_step():
    stopped = {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.0)}
    session, seen = made(buffer=3, policy="uniform", rates="equal", session=stopped), []
    session.chains[0][1].body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batches = [batch(seed=k) for k in range(12)]
    for x, y in batches:
        session.step(x, y)
    features = [session.chains[0][0].body(x).detach() for x, _ in batches]
    found = [next(k for k, h in enumerate(features) if torch.equal(h, x)) for x in seen[:12]]
    seed = session.workers[1].seed
    assert found == [max(0, k - 2) + mix(seed, k) % min(3, k + 1) for k in range(12)] != list(range(12))


# ---- at own rates ----------------------------------------------------------------------------------------------------


def test_a_slow_stage_makes_fewer_updates_or_the_others_pass_on_and_schedules_count_own_updates():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)

    session = {"schedule": schedule}
    slow = made(clock(1.0, 4.0, 1.0), buffer=2, ends="data", session=session)
    rows = (record := slow.fit(TRAIN, 1, batch_size=12)[0])["buffers"]
    balanced(rows)
    assert rows[0]["updates"] == 5 and rows[1]["updates"] < 5 and rows[1]["overwritten"] > 0
    assert rows[2]["updates"] > rows[1]["updates"]  # it goes on with what it has
    assert record["learning_rates"] == pytest.approx([0.1 * 0.9 ** row["updates"] for row in rows])
    alike = made(clock(1.0, 4.0, 1.0), buffer=2, reuse=1, session=session)
    rows = alike.fit(TRAIN, 1, batch_size=12)[0]["buffers"]
    balanced(rows)
    assert [row["updates"] for row in rows] == [5, 5, 5] and rows[0]["forwarded"] > 5
    assert rows[2]["waited"] > rows[1]["waited"] > 0.0


def test_nobody_waits_for_a_slow_stage():
    """The epoch of synchronous DGL lasts as long as its slowest stage; the buffered one, as long as the first."""
    times = (1.0, 4.0, 1.0)
    lasted = {}
    for name, rule in (("dgl", ul.credit.DGL(**PLAIN)), ("async", AsyncDGL(**PLAIN, ends="data"))):
        session = trainer(rule, world=clock(*times, update=0.0))
        lasted[name] = session.fit(TRAIN, 1, batch_size=12)[0]["seconds"]
    # 5 micro-batches at the slow stage; against 5 of the first, then what the slow one is at and one more, then the last stage
    assert lasted["dgl"] >= 5 * 8.0 and lasted["async"] <= 5 * 2.0 + 2 * 8.0 + 3.0


class Stop(ul.callbacks.Callback):
    """Ctrl-C inside the second epoch."""

    def __init__(self):
        self.done = False

    def on_step(self, session, record):
        if record["epoch"] == 1 and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)


WORLDS = {
    "drawn": (lambda: None, {"rates": (1.0, 0.4, 1.0), "policy": "uniform"}),
    "clock": (lambda: clock(1.0, 2.0, 0.5), {"quantise": "int8", "reuse": 3}),
    "clock-data": (lambda: clock(1.0, 1.5, 0.5), {"ends": "data", "policy": "fifo"}),
}


@pytest.mark.parametrize("name", WORLDS)
def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(name, tmp_path):
    world, options = WORLDS[name]
    session = {"model": mlp(norm=True, dropout=0.2)}
    whole, first = (made(world(), buffer=3, session=copy.deepcopy(session), **options) for _ in range(2))
    records = whole.fit(TRAIN, 4, batch_size=12)
    first.fit(TRAIN, 2, batch_size=12, checkpoint=tmp_path)
    chain = ul.cut(mlp(norm=True, dropout=0.2), 3, like=batch()[0])
    resumed = ul.Trainer.resume(tmp_path, chain, world=world())
    again = resumed.fit(TRAIN, 4, batch_size=12)
    assert_same(state(resumed), state(whole))
    for one, other in zip(again, records[2:]):
        assert [{**row, "waited": 0} for row in one["buffers"]] == [{**row, "waited": 0} for row in other["buffers"]]
        assert one["losses"] == other["losses"] and one["bytes"] == other["bytes"]


@pytest.mark.parametrize("name", WORLDS)
def test_a_stop_inside_an_epoch_is_clean_and_the_epoch_goes_on(name, tmp_path):
    world, options = WORLDS[name]
    session = made(world(), buffer=3, **options)
    with pytest.raises(ul.Interrupted, match="Saved to"):
        session.fit(TRAIN, 3, batch_size=12, checkpoint=tmp_path, callbacks=[Stop()])
    assert session.epoch == 1 and 0 < session.batch_in_epoch < 5 and session.steps == 5 + session.batch_in_epoch
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]), world=world())
    records = resumed.fit(TRAIN, 3, batch_size=12)
    assert [record["step"] for record in records] == [10, 15] and [record["samples"] for record in records] == [60, 60]
    for record in records:
        balanced_from(record["buffers"])
        assert record["buffers"][0]["updates"] == 5
        assert options.get("ends") == "data" or [row["updates"] for row in record["buffers"]] == [5, 5, 5]


def balanced_from(rows):
    """As `balanced`, for an epoch that may have begun with entries in the buffers."""
    for k, row in enumerate(rows[1:], 1):
        assert row["received"] == rows[k - 1]["updates"] + rows[k - 1]["forwarded"]


def test_replicas_each_by_themselves():
    session = made(clock(1.0, 2.0, 1.0), buffer=2, session={"replicas": 2})
    alone = made(clock(1.0, 2.0, 1.0), buffer=2)
    rows = session.fit(TRAIN, 2, batch_size=12)[-1]["buffers"]
    alone.fit(TRAIN, 2, batch_size=12)
    assert [(row["replica"], row["stage"]) for row in rows] == [(n, j) for n in range(2) for j in range(3)]
    both = state(session)
    assert_same({name: x for name, x in both.items() if name.startswith("0.")}, state(alone))
    assert any(not torch.equal(x, both["1" + name[1:]]) for name, x in both.items() if name.startswith("0."))


# ---- refusals and the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "session", "sentence"),
    [
        ({}, {}, "means nothing in one process without a clock"),
        ({"rates": (1.0, 1.0)}, {}, "are of 2 stages, but there are 3"),
        ({"rates": (1.0, 0.0, 1.0)}, {}, "are no rates"),
        ({"rates": 0.5}, {}, "are no rates"),
        ({"rates": (1.0, "slow", 1.0)}, {}, "are no rates"),
        ({"rates": (1.0, 1.0, 1.0)}, {"world": "clock"}, "give devices' speeds"),
        ({}, {"world": "clock", "consensus": ul.consensus.AllReduce(), "replicas": 2}, "cannot meet under all-reduce"),
        ({}, {"world": "clock", "accumulate": 2}, "give accumulate=1"),
        ({"buffer": 0}, {}, "at least 1"),
        ({"reuse": 0}, {}, "no number of uses"),
        ({"policy": "lifo"}, {}, "Unknown policy"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, session, sentence):
    if session.get("world") == "clock":
        session = {**session, "world": clock(1.0, 1.0, 1.0)}
    with pytest.raises(InvalidChoice, match=sentence):
        made(session.pop("world", None), session=session, **options)


def test_there_is_no_step_by_hand_at_own_rates():
    with pytest.raises(InvalidChoice, match="no step of all"):
        made(clock(1.0, 1.0, 1.0)).step(*batch())


def test_the_command_line_trains_on_a_simulated_clock(tmp_path, capsys):
    credit = "async-dgl(buffer=2,policy=least-used,head=linear,budget=None)"
    tiny = ["--model", "mlp", "--width", "16", "--stages", "3", "--epochs", "2", "--subset", "256"]
    tiny += ["--tensorboard", "off"]
    cluster = ["--world", "simulated", "--speeds", "1,0.25,1"]
    assert main(["train", *tiny, "--credit", credit, *cluster, "--run", str(tmp_path / "run")]) == 0
    assert "updates 8/8/8" in capsys.readouterr().out
