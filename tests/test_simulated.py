"""The world with a clock: the numbers of every other world, and times that meet their closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from unlocked.batch import micro_batches
from unlocked.errors import Deadlock, DoesNotFit, InvalidChoice
from unlocked.simulation.costs import costs_of, unit
from unlocked.simulation.hardware import Device, Hardware, SlowDowns
from unlocked.simulation.network import Edge, Line, Network, hierarchical, uniform
from unlocked.simulation.profile import profile
from unlocked.simulation.simulating import seconds_per_update, simulate
from unlocked.worlds import Simulated

import methods
from methods import assert_same, batch, mlp, name_of, some_pairs, state, trainer

MESSY = Hardware(
    Device(1e6),
    speeds=(1.0, 0.25, 0.5),
    slow_downs=SlowDowns(0.3, 4.0, 0.2, seed=3),
    network=Network(Edge(1e-3, 1e5), send=Line(1e-4, 1e-8), receive=Line(1e-4, 1e-8), exchange=Line(1e-4)),
)


def lengths(timeline, kind="U"):
    """When the updates of each worker end."""
    ends = {}
    for act in timeline:
        if act.kind == kind:
            ends.setdefault((act.replica, act.stage), []).append(act.end)
    return ends


def steady(credit, consensus=None, *, steps=40, **options):
    """Seconds between updates of the slowest worker, once the pipeline is full."""
    ends = lengths(simulate(credit, consensus, steps=steps, **options))
    return max((row[-1] - row[steps // 2 - 1]) / (steps - steps // 2) for row in ends.values())


# ---- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize(("credit", "consensus"), some_pairs(1), ids=name_of)
def test_simulated_with_tensors_is_in_process_bit_for_bit(credit, consensus):
    results = []
    for world in (None, Simulated(MESSY)):
        model = mlp(norm=True, dropout=0.2, dtype=torch.float32)
        session = trainer(
            credit.make(), consensus.make(), model=model, replicas=3, world=world, accumulate=2, clip=0.5, seed=1
        )
        x, y = batch(36, dtype=torch.float32)
        losses = [session.step(x, y) for _ in range(2)]
        session.fit(
            methods.data(36, dtype=torch.float32), epochs=session.credit.phases(2), batch_size=12, validate=(x, y)
        )
        results.append((losses, state(session), session.bytes_sent, session.evaluate((x, y))))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])
    assert results[0][2:] == results[1][2:]


def test_the_same_seed_gives_the_same_timeline_and_another_seed_another():
    def run(seed):
        hardware = MESSY.but(slow_downs=SlowDowns(0.3, 4.0, 0.2, seed))
        session = trainer(
            ul.credit.DGL(head="linear", budget=None), ul.consensus.AllReduce(), replicas=2, world=Simulated(hardware)
        )
        acts = []
        for _ in range(3):
            session.step(*batch())
            acts += session.timeline.acts
        return acts

    assert run(0) == run(0)
    assert run(0) != run(1)


def at_once(session, count):
    """So many steps of a trainer in one run of its world, as `simulate` does them."""
    k = session.accumulate
    batches = []
    for i in range(session.replicas):
        x, y = (part[6 * i : 6 * i + 6] for part in batch())
        batches.append([part for step in range(count) for part in micro_batches(x, y, k, step * k, session.phase)])

    def program(k, worker):
        stage, weights = session._stage(k)
        return session.credit.run(worker, stage, weights.taken(batches[worker.replica]), weights)

    return session.world.run((worker, program(k, worker)) for k, worker in enumerate(session.workers))


@pytest.mark.covering
@pytest.mark.parametrize(
    ("credit", "consensus", "accumulate"),
    [(*pair, accumulate) for part, accumulate in ((2, 1), (0, 2)) for pair in some_pairs(part)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_without_tensors_the_timeline_is_the_one_with_tensors(credit, consensus, accumulate):
    """Shapes only or with tensors, several steps in one go: the same acts, at the same times, of the same bytes."""
    if credit.name in ("pipedream-2bw", "cdp-pipeline"):
        accumulate = 2
    accumulate = max(accumulate, consensus.make().fewest)
    steps = 7 if "delayed" in credit.laws else 2
    hardware = Hardware(Device(1e6), speeds=(1.0, 0.5), network=uniform(1e-4, 1e6))
    session = trainer(credit.make(), consensus.make(), replicas=2, world=Simulated(hardware), accumulate=accumulate)
    costs = costs_of(profile(session.chains[0]), hardware.device)
    with_tensors = at_once(session, steps)
    ghostly = simulate(
        credit.make(),
        consensus.make(),
        costs=costs,
        replicas=2,
        steps=steps,
        samples=6 // accumulate,
        accumulate=accumulate,
        hardware=hardware,
        chain=session.chains[0],
    )
    real = {worker: with_tensors.of(*worker) for worker in with_tensors.workers()}
    assert {worker: ghostly.of(*worker) for worker in ghostly.workers()}.keys() == real.keys()
    for worker, acts in real.items():
        if "wash" not in consensus.name:
            assert ghostly.of(*worker) == acts
            continue
        # how many entries move is random there, and sometimes it is none
        mine, others = ([act[:5] for act in row if act.kind != "M"] for row in (acts, ghostly.of(*worker)))
        assert others == mine


# ---- the times ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 12), st.floats(0.1, 3.0))
@settings(deadline=None, max_examples=40)
def test_the_bubble_of_gpipe(stages, parts, backward):
    timeline = simulate(ul.credit.GPipe(parts), costs=unit(stages, backward=backward), samples=parts)
    idle = sum(timeline.idle_shares().values()) / stages
    assert idle == pytest.approx((stages - 1) / (parts + stages - 1))


@given(st.integers(1, 7), st.integers(1, 12), st.floats(0.1, 3.0))
@settings(deadline=None, max_examples=40)
def test_the_bubble_of_1f1b_is_that_of_gpipe(stages, parts, backward):
    timeline = simulate(ul.credit.OneFOneB(parts), costs=unit(stages, backward=backward), samples=parts)
    idle = sum(timeline.idle_shares().values()) / stages
    assert idle == pytest.approx((stages - 1) / (parts + stages - 1))


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize(
    ("credit", "turn"),
    [
        (ul.credit.PipeDream(), 3.0),
        (ul.credit.PipeDream(keep="input"), 4.0),
        (ul.credit.FDG(), 3.0),
        (ul.credit.PETRA(), 4.0),
        (ul.credit.PETRA(keep="graph"), 3.0),
    ],
    ids=str,
)
def test_a_full_pipeline_has_no_bubble(credit, turn, stages):
    """Equal stages, F = 1, B = 2, and F once more in the backward where it is recomputed; the last stage needs it not."""
    timeline = simulate(credit, costs=unit(stages, backward=2.0), steps=8 * stages + 8)
    turn = 3.0 if stages == 1 else turn
    end = max(act.end for act in timeline if act.kind == "F" and act.stage == 0)
    idle = timeline.idle_shares(end - 4 * turn, end)
    assert [idle[0, j] for j in range(stages)] == pytest.approx([0.0] * (stages - 1) + [1 - 3.0 / turn])


@given(st.integers(2, 5), st.floats(0.1, 4.0), st.floats(0.0, 6.0))
@settings(deadline=None, max_examples=30)
def test_how_long_a_message_may_travel(stages, backward, latency):
    """A chain of what waits for what goes k stages up and down again: (k + 1)(F + B) + 2kL, in hop · k + 1 turns; the longest
    decides. With hop = 1 every latency costs, with hop = 2 only what is above half a turn, (F + B)/2."""
    hardware = Hardware(network=uniform(latency))
    turn = 1.0 + backward
    for credit, hop in ((ul.credit.PipeDream(), 1), (ul.credit.PETRA(keep="graph"), 2)):
        chains = [((k + 1) * turn + 2 * k * latency) / (hop * k + 1) for k in range(stages)]
        last = 2 * stages * (2 * stages - 1)  # whole periods of either
        timeline = simulate(credit, costs=unit(stages, backward=backward), steps=3 * last, hardware=hardware)
        found = max(seconds_per_update(timeline, last).values())
        assert found == pytest.approx(max(chains))
        if hop == 2 and 2 * latency <= turn:
            assert found == pytest.approx(turn)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_naive_model_parallelism_uses_one_device_of_j(stages):
    timeline = simulate(ul.credit.Backprop(), costs=unit(stages, backward=2.0), steps=5)
    assert 1 - sum(timeline.idle_shares().values()) / stages == pytest.approx(1 / stages)


@given(
    st.integers(2, 9), st.integers(1, 10**6), st.floats(0, 1), st.floats(1, 1e9), st.sampled_from(["ring", "direct"])
)
@settings(deadline=None, max_examples=40)
def test_a_mean_takes_what_a_ring_takes(replicas, values, latency, bandwidth, collective):
    network = Network(Edge(latency, bandwidth), collective=collective)
    timeline = simulate(
        ul.credit.Backprop(),
        ul.consensus.AllReduce(bucket_mb=0),
        costs=unit(1, weights=values),
        replicas=replicas,
        hardware=Hardware(network=network),
    )
    hops = 2 * (replicas - 1) if collective == "ring" else 2
    exchange = 2 * (replicas - 1) / replicas * 4 * values / bandwidth + hops * latency
    assert timeline.span() == pytest.approx(2.0 + exchange)


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_dgl_goes_as_fast_as_its_slowest_stage(forward, head):
    costs = unit(len(forward), forward=forward, backward=[2 * f for f in forward], head=head, update=0.1)
    assert steady(ul.credit.DGL(), costs=costs) == pytest.approx(3 * max(forward) + head + 0.1)


@pytest.mark.parametrize("d", [0, 1, 2])
def test_a_step_of_interlocking_does_not_grow_with_depth(d):
    steps = {steady(ul.credit.Interlocking(d), costs=unit(stages, head=0.5)) for stages in (d + 3, d + 6, d + 12)}
    assert len(steps) == 1
    backprop = [steady(ul.credit.Backprop(), costs=unit(stages)) for stages in (4, 8)]
    assert backprop == [8.0, 16.0]


@pytest.mark.parametrize(("replicas", "slow"), [(4, 4.0), (8, 2.5)])
def test_without_a_barrier_a_straggler_delays_only_itself(replicas, slow):
    hardware = Hardware(speeds=(1 / slow,))
    together = steady(
        ul.credit.Backprop(), ul.consensus.AllReduce(), costs=unit(1), replicas=replicas, hardware=hardware
    )
    ends = lengths(simulate(ul.credit.Backprop(), costs=unit(1), replicas=replicas, hardware=hardware, steps=10))
    apart = sum(10 / row[-1] for row in ends.values())  # updates per second, of all
    assert together == pytest.approx(2.0 * slow)
    assert apart / (replicas / together) == pytest.approx((replicas - 1 + 1 / slow) * slow / replicas)


def test_buckets_hide_behind_the_backward_what_the_network_allows():
    """Four buckets of equal size: the first begins after a quarter of the backward, so all but the last may be hidden."""

    def seconds(bucket_mb, bandwidth):
        model = torch.nn.Sequential(*[torch.nn.Linear(50, 50, bias=False) for _ in range(16)])
        chain = ul.cut(model, 1, like=torch.zeros(2, 50))
        costs = costs_of(profile(chain), Device(1e6))
        rule = ul.consensus.AllReduce(bucket_mb=bucket_mb)
        hardware = Hardware(Device(1e6), network=uniform(0.0, bandwidth))
        timeline = simulate(ul.credit.Backprop(), rule, costs=costs, replicas=2, samples=10, hardware=hardware)
        backward = next(act for act in timeline if act.kind == "B")
        return timeline.span(), backward

    plain, _ = seconds(0, 1e6)
    hidden, backward = seconds(1.0, 1e6)
    exchange = 16 * 50 * 50 * 4 / 1e6
    bucket = exchange / 8
    assert plain == pytest.approx(backward.end + exchange)
    # whatever is longer: the exchange, from the moment its first bucket is full, or the backward and the last bucket
    length = backward.end - backward.start
    first = backward.start + length * (2 / 16)
    assert hidden == pytest.approx(max(first + exchange, backward.end + bucket), rel=0.05)
    assert hidden < plain


def test_exchanges_of_a_group_follow_each_other_on_its_wires():
    """Two means of 100 bytes begun at once, at 100 bytes/s over two members: a second each; a message then waits for both."""

    async def program(worker):
        both = [worker.replicas.begin_mean(f"mean/{k}", [torch.zeros(25)]) for k in range(2)]
        await both[0]
        await worker.replicas.peer(1 - worker.replica).swap("after", torch.zeros(25))
        await both[1]

    world = Simulated(Hardware(network=uniform(0.0, 100.0)), unit(1))
    timeline = world.run([(worker, program(worker)) for worker in world.mesh(2, 1)])
    ends = {(act.kind, act.channel): [] for act in timeline}
    for act in timeline:
        ends[act.kind, act.channel].append(act.end)
    assert ends["M", "mean"] == [1.0, 1.0, 2.0, 2.0]
    assert ends["R", "after"] == [3.0, 3.0]


def test_messages_share_a_wire_and_arrive_a_latency_later():
    async def program(worker):
        if worker.first:
            await worker.above.send("up", torch.zeros(25))  # 100 bytes
            await worker.above.send("up", torch.zeros(25))
        else:
            await worker.below.recv("up")
            await worker.below.recv("up")

    world = Simulated(Hardware(network=uniform(1.0, 50.0)), unit(2))
    timeline = world.run([(worker, program(worker)) for worker in world.mesh(1, 2)])
    assert [act.end for act in timeline if act.kind == "R"] == [3.0, 5.0]
    assert world.clock() == 5.0


def test_a_node_has_one_wire_to_the_others():
    """Two devices of a node send to the other node at once: the second message waits. Inside the node they do not meet."""

    async def program(worker):
        if worker.replica < 2:
            await worker.replicas.peer(worker.replica + 2).send("over", torch.zeros(25))
            await worker.replicas.peer(1 - worker.replica).swap("near", torch.zeros(25))
        else:
            await worker.replicas.peer(worker.replica - 2).recv("over")

    network = hierarchical(2, inside=Edge(0.5, 1000.0), outside=Edge(2.0, 100.0))
    world = Simulated(Hardware(network=network), unit(1))
    timeline = world.run([(worker, program(worker)) for worker in world.mesh(4, 1)])
    taken = {(act.replica, act.channel): act.end for act in timeline if act.kind == "R"}
    assert taken == {
        (2, "over"): 3.0,
        (3, "over"): 4.0,
        (0, "near"): pytest.approx(0.6),
        (1, "near"): pytest.approx(0.6),
    }


def test_edges_are_the_only_ways():
    async def program(worker):
        await worker.replicas.peer(1 - worker.replica).swap("x", torch.zeros(25))

    network = Network(edges={(1, 0): Edge(0.25, 100.0)})
    world = Simulated(Hardware(network=network), unit(1))
    assert world.run([(worker, program(worker)) for worker in world.mesh(2, 1)]).span() == 1.25
    world = Simulated(Hardware(network=Network(edges={(0, 2): Edge()})), unit(1))
    with pytest.raises(InvalidChoice, match="Devices 0 and 1 must talk, but this network has no edge"):
        world.run([(worker, program(worker)) for worker in world.mesh(2, 1)])


def test_workers_of_one_device_take_turns():
    alone = simulate(ul.credit.DGL(), costs=unit(4), steps=10)
    shared = simulate(ul.credit.DGL(), costs=unit(4), steps=10, hardware=Hardware(devices=1))
    halves = simulate(ul.credit.DGL(), costs=unit(4), steps=10, hardware=Hardware(devices=2))
    assert (alone.span(), shared.span()) == (23.0, 80.0)
    assert 40.0 <= halves.span() <= 43.0


def test_slow_downs_are_as_frequent_and_as_long_as_said():
    slow = SlowDowns(probability=0.25, factor=3.0, seed=5)
    factors = [slow.of(r, 0, m) for r in range(50) for m in range(80)]
    assert set(factors) == {1.0, 3.0}
    assert abs(factors.count(3.0) / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    logs = torch.tensor([SlowDowns(spread=0.3, seed=1).of(r, 1, m) for r in range(50) for m in range(80)]).log()
    assert abs(logs.mean()) < 4 * 0.3 / 4000**0.5
    assert abs(logs.std() - 0.3) < 0.02


def test_the_clock_goes_on_from_step_to_step_and_an_evaluation_takes_no_time():
    session = trainer(ul.credit.Backprop(), world=Simulated(Hardware(Device(1e6))))
    session.step(*batch())
    first = session.world.clock()
    session.step(*batch())
    assert session.world.clock() == pytest.approx(2 * first)
    session.evaluate(batch())
    assert session.world.clock() == pytest.approx(2 * first)
    [record] = session.fit(methods.data(24), epochs=1, batch_size=12)
    assert record["seconds"] == pytest.approx(2 * first)  # two steps of the same size


def test_what_does_not_fit_is_refused_with_the_device_and_the_bytes():
    costs = unit(2, activation=1000, weights=500)  # 4,000 bytes a sample, 2 × 2,000 bytes of weights and gradients
    for memory, fits in ((12_000, True), (11_999, False)):
        hardware = Hardware(Device(memory=memory))
        run = lambda hardware=hardware: simulate(ul.credit.Backprop(), costs=costs, samples=2, hardware=hardware)  # noqa: E731
        if fits:
            run()
        else:
            with pytest.raises(DoesNotFit, match=r"Device 0 \(replica 0 stage 0\) would hold 12,000 bytes"):
                run()


def test_a_deadlock_is_named():
    async def program(worker):
        await worker.replicas.peer(1 - worker.replica).recv("x")

    world = Simulated(costs=unit(1))
    with pytest.raises(Deadlock, match="replica 0 stage 0 waits for channel 'x' from replica 1 stage 0"):
        world.run([(worker, program(worker)) for worker in world.mesh(2, 1)])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Simulated().mesh(1, 2), "needs costs, or a chain"),
        (lambda: Simulated(costs=unit(3)).mesh(1, 2), r"costs are of 3 stage\(s\), the network has 2"),
        (lambda: Hardware(speeds=(0.0,)), "Speeds must be greater than 0"),
        (lambda: Hardware(speeds=(1.0, 1.0), devices=1), "2 speeds were given for 1 devices"),
        (lambda: uniform(-1.0), "latency -1.0 s"),
        (lambda: uniform(0.0, 0.0), "bandwidth 0.0"),
        (lambda: SlowDowns(2.0), "probability 2.0"),
        (lambda: unit(3, forward=[1.0]), "forward has 1 entries for 3 stages"),
        (lambda: simulate(ul.credit.TorchGPipe(), costs=unit(2)), "cannot be simulated"),
        (lambda: Simulated(Hardware(devices=5), unit(2)).mesh(2, 2), "5 processes were started for 4 worker"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ul.UnlockedError, match=sentence):
        make()


@pytest.mark.parametrize("tensors", [True, False])
def test_micro_batches_of_unequal_size_cost_what_each_of_them_does(tensors):
    """Seven samples in three parts: 3, 2, 2; their backwards come after all forwards."""
    if tensors:
        session = trainer(ul.credit.GPipe(3), stages=2, world=Simulated(Hardware(Device(1e6))))
        session.step(*batch(7))
        timeline = session.timeline
    else:
        chain = ul.cut(mlp(), 2, like=batch()[0])
        costs = costs_of(profile(chain), Device(1e6))
        timeline = simulate(ul.credit.GPipe(3), costs=costs, samples=7, hardware=Hardware(Device(1e6)))
    for kind in "FB":
        lengths = [act.end - act.start for act in timeline.of(0, 0) if act.kind == kind]
        assert lengths == pytest.approx([1.5 * lengths[1], lengths[1], lengths[1]])
        assert lengths[1] > 0


# ---- the parts of the cost model ----------------------------------------------------------------------------------------


def computing(kinds, **options):
    """The timeline of one worker that computes one act of each of these kinds for micro-batches 0, 1, 2, …"""

    async def program(worker):
        for number, kind in enumerate(kinds):
            worker.at(number)
            await worker.run(kind, int)

    world = Simulated(options.pop("hardware", None), options.pop("costs", unit(1, backward=2.0, head=3.0, update=0.5)))
    return world, world.run([(worker, program(worker)) for worker in world.mesh(1, 1)], **options)


def test_what_is_not_charged_takes_no_time_and_moves_no_clock():
    world, timeline = computing("FBLU", charged=False)
    assert (timeline.span(), world.clock()) == (0.0, 0.0)
    world, timeline = computing("FBLU")
    assert (timeline.span(), world.clock()) == (6.5, 6.5)


def test_every_micro_batch_is_slowed_down_by_its_own_draw():
    slow = SlowDowns(0.5, 3.0, 0.1, seed=2)
    _, timeline = computing("F" * 20, hardware=Hardware(slow_downs=slow))
    lengths = [act.end - act.start for act in timeline]
    assert lengths == pytest.approx([slow.of(0, 0, number) for number in range(20)])
    assert len(set(lengths)) > 10


def test_handling_messages_and_exchanges_keeps_a_worker_busy():
    """100 bytes: 1 + 100 · 0.01 s to send, 2 + 100 · 0.02 s to receive; an exchange of 100 bytes sent: 3 + 100 · 0.03 s."""
    network = Network(send=Line(1.0, 0.01), receive=Line(2.0, 0.02), exchange=Line(3.0, 0.03))

    async def program(worker):
        if worker.replica == 0:
            await worker.replicas.peer(1).send("x", torch.zeros(25))
        else:
            await worker.replicas.peer(0).recv("x")
        await worker.replicas.mean("mean", [torch.zeros(25)])

    world = Simulated(Hardware(network=network), unit(1))
    timeline = world.run([(worker, program(worker)) for worker in world.mesh(2, 1)])
    spans = {(act.kind, act.replica): (act.start, act.end, act.bytes) for act in timeline}
    assert spans["S", 0] == (0.0, 2.0, 100)
    assert spans["R", 1] == (0.0, 6.0, 100)
    for replica, size in ((0, 100), (1, 100)):
        begin, end, sent = spans["M", replica]
        assert sent == size
        assert end - 6.0 == pytest.approx(3.0 + 0.03 * sent)
        assert begin == (2.0, 6.0)[replica]


def test_buckets_begin_when_the_backward_has_completed_them():
    """Sixteen equal layers in eight buckets: the k-th is complete after 2 k of the 16 equal parts of the backward."""
    model = torch.nn.Sequential(*[torch.nn.Linear(50, 50, bias=False) for _ in range(16)])
    costs = costs_of(profile(ul.cut(model, 1, like=torch.zeros(2, 50))), Device(1e6))
    timeline = simulate(ul.credit.Backprop(), ul.consensus.AllReduce(), costs=costs, replicas=2, samples=10)
    backward = next(act for act in timeline.of(0, 0) if act.kind == "B")
    starts = [act.start for act in timeline.of(0, 0) if act.kind == "M"]
    shares = [(start - backward.start) / (backward.end - backward.start) for start in starts]
    # a layer's gradient with respect to its input and its weight take equally long, but the first needs none for its input
    assert shares == pytest.approx([min(1.0, (4 * k - 1) / 31) for k in range(1, 9)], abs=0.04)
    assert shares == sorted(set(shares))


def test_the_moment_at_which_gradients_are_complete():
    """A head of 100 trained bytes whose backward takes 2 s, a body of 300 whose first tenth of the time completes half."""
    from dataclasses import replace

    from unlocked.simulation.costs import StageCosts

    made_up = unit(1, weights=75).stages[0]
    weights = (((75,), torch.float32), ((25,), torch.float32))
    shape = replace(
        made_up.profile, weights=weights, head_weights=1, trained=400, done=((0.0, 0.0), (0.5, 0.1), (1.0, 1.0))
    )
    seconds = {"head-forward": Line(1.0), "head-backward": Line(2.0), "backward": Line(10.0), "forward": Line(5.0)}
    costs = StageCosts(seconds, shape)
    parts = ("head-forward", "head-backward", "backward")
    moments = [costs.moment(parts, 1, complete) for complete in (0, 50, 100, 175, 250, 400)]
    assert moments == pytest.approx([1.0, 2.0, 3.0, 3.5, 4.0, 13.0])
    assert costs.moment(("backward",), 1, 150) == pytest.approx(1.0)
    assert costs.moment(("forward",), 1, 10) == 5.0  # nothing is completed here: at its end


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_seconds_are_operations_over_speed_and_bytes_over_bandwidth(optimizer, states):
    chain = ul.cut(torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False)), 1, like=torch.zeros(2, 8))
    stage = costs_of(profile(chain), Device(1e3, memory_bandwidth=1e2), optimizer).stages[0]
    weight, kept = 8 * 4 * 4, 5 * 8 * 4  # bytes; a linear layer keeps its input
    assert stage.of(("forward",), 5) == pytest.approx(5 * 2 * 8 * 4 / 1e3 + 2 * kept / 1e2)
    assert stage.of(("backward",), 5) == pytest.approx(5 * 2 * 8 * 4 / 1e3 + 3 * kept / 1e2)
    # a gradient and a weight are read, the weight is written; every state is read and written
    assert stage.of(("update",), 5) == pytest.approx((3 + 2 * states) * weight / 1e2)
    assert stage.held == weight * (2 + states)


def test_messages_that_wait_are_memory():
    """DGL's first stage is three times as fast as its second: what it sent and nobody took yet lies there."""
    from unlocked.simulation.memory import activation_curves

    costs = unit(2, forward=[1.0, 3.0], backward=[0.0, 0.0], activation=10)
    timeline = simulate(ul.credit.DGL(), costs=costs, steps=4)
    curve = dict(activation_curves(timeline, costs, 1)[(0, 1)])
    # at 4: the second takes its second message (40 bytes kept for it), two more have come (40 bytes each)
    assert curve[4.0] == 120
    assert max(curve.values()) == 120
    assert curve[13.0] == 0


def test_what_a_micro_batch_keeps_from_its_first_forward_to_its_last_backward():
    """Two forwards and two backwards of one micro-batch: 40 bytes from 0 to 7; the head's 8 bytes from its own act at 3."""
    from dataclasses import replace

    from unlocked.simulation.costs import Costs
    from unlocked.simulation.memory import activation_curves

    stage = unit(1, activation=10).stages[0]
    costs = Costs((replace(stage, profile=replace(stage.profile, head_kept=Line(8.0))),))
    spans = [("F", 0, 1), ("F", 2, 3), ("L", 3, 4), ("B", 4, 5), ("B", 6, 7)]
    acts = [ul.Act(kind, 0, 0, 0, 0, 0, float(begin), float(end)) for kind, begin, end in spans]
    forward_only = ul.Act("F", 0, 0, 1, 0, 0, 8.0, 9.0)
    curves = activation_curves(ul.Timeline([*acts, forward_only]), costs, 1)
    assert curves == {(0, 0): [(0.0, 40), (3.0, 48), (7.0, 0)]}
