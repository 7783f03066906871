"""A link delivers what was sent, in order, in the same memory layout, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import queue
import struct
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.errors import UnlockedError
from unlocked.links import HEADER_BYTES, Door, GroupReceiver, GroupSender, RingSender, shared_memory
from unlocked.links.header import END, GROW, MESSAGE, Header, dense, goodbye, header_of, room
from unlocked.links.process_group import pair_group

WITHIN = 10.0  # seconds
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
few = settings(max_examples=15, deadline=None)


def raw(x):
    """The elements as bytes: NaNs compare too."""
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride() and raw(x) == raw(y)


def until(condition):
    """Wait for what a thread does."""
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


@st.composite
def tensors(draw):
    """Any dtype, 0 to 8 dimensions, empty ones too, dense in any order of the dimensions."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=8))
    count = torch.Size(shape).numel()
    size = torch.empty(0, dtype=dtype).element_size()
    source = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if dtype == torch.bool:
        flat = torch.randint(2, (count,), generator=source).bool()
    else:
        flat = torch.randint(256, (count * size,), generator=source, dtype=torch.uint8).view(dtype)
    return flat.reshape(shape).permute(draw(st.permutations(range(len(shape)))))


# ---- the header ------------------------------------------------------------------------------------------------------


@given(tensors(), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_header_describes_any_dense_tensor(x, slot):
    assert dense(x) is x or x.numel() == 0
    header = header_of(x, slot)
    packed = header.pack()
    assert len(packed) == HEADER_BYTES
    assert Header.unpack(packed) == header and header.slot == slot and header.kind == MESSAGE
    assert header.size == x.numel() * x.element_size()
    memory = torch.zeros(header.size + 40, dtype=torch.uint8)
    view = header.view(memory)
    view.copy_(x)
    assert same(view, x)
    assert view.data_ptr() == memory.data_ptr() or x.numel() == 0
    assert not memory[header.size :].any()


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(24).reshape(4, 6)[:, ::2],
        torch.arange(24).reshape(4, 6)[:, :3],
        torch.arange(24).reshape(4, 6)[:, :1],
        torch.arange(4).expand(3, 4),
        torch.arange(4)[:, None].expand(4, 3),
        torch.tensor(5.0).expand(2, 2),
        torch.arange(10).as_strided((3, 3), (2, 1)),
        torch.arange(10).as_strided((2, 2), (3, 1)),
    ],
)
def test_what_is_not_one_block_is_made_one(x):
    packed = dense(x)
    assert packed.is_contiguous() and torch.equal(packed, x)
    assert not packed.untyped_storage().nbytes() > x.numel() * x.element_size()


def test_layouts_that_are_one_block_are_kept():
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for x in (
        image,
        image.transpose(0, 3),
        torch.rand(3, 4).t(),
        torch.rand(8, 4)[2:3],
        torch.rand(()),
        image[1:],
        torch.rand(2, 3, 4)[:1, :1],
    ):
        assert dense(x) is x
        header = header_of(x)
        assert header.view(torch.zeros(header.size, dtype=torch.uint8)).stride() == x.stride()


@pytest.mark.parametrize(
    "x", [torch.zeros([1] * 9), torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2, dtype=torch.uint16)]
)
def test_what_no_message_can_carry_is_refused_with_a_sentence(x):
    with pytest.raises(
        UnlockedError, match=f"{x.dim()}-dimensional tensor of {x.dtype} cannot be sent; messages have up to 8"
    ):
        header_of(x)


def test_a_body_behind_a_header_is_aligned_and_other_kinds_carry_their_size():
    assert HEADER_BYTES % 64 == 0
    assert Header.unpack(room(2**40).pack()) == (GROW, torch.uint8, (), (), 0, 2**40)
    assert Header.unpack(goodbye().pack())[0] == END


# ---- shared memory ---------------------------------------------------------------------------------------------------


class Ring:
    """A door and a sender in one process; what is delivered waits in `arrived`, unless `gate` is shut."""

    def __init__(self, channel=("a", 1)):
        self.arrived, self.told, self.lost, self.moved = queue.Queue(), [], [], 0
        self.gate = threading.Event()
        self.gate.set()
        self.door = Door(self.open_channel)
        self.sender = self.connect(list(channel))

    def connect(self, channel):
        return RingSender(self.door.address, channel, lambda how: self.lost.append(("sender", how)), self.sent)

    def open_channel(self, channel):
        self.told.append(channel)
        return self.deliver, lambda how: self.lost.append(("receiver", how))

    def deliver(self, x):
        self.gate.wait(WITHIN)
        self.arrived.put(x)

    def sent(self):
        self.moved += 1

    def get(self):
        return self.arrived.get(timeout=WITHIN)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.gate.set()
        until(lambda: self.told)
        for link in (self.sender, self.door):
            link.closing()
        for link in (self.sender, self.door):
            link.close()
        if error[0] is None:
            assert self.lost == []


@given(st.lists(tensors(), max_size=8))
@few
def test_any_tensors_arrive_as_they_were_sent(row):
    with Ring() as ring:
        for x in row:
            assert ring.sender.put(x, 0) == x.numel() * x.element_size() + HEADER_BYTES
        for x in row:
            y = ring.get()
            assert same(dense(x), y) or (x.numel() == 0 and y.shape == x.shape)


@given(st.lists(st.tuples(st.integers(0, 20000), st.booleans()), max_size=40))
@few
def test_order_is_kept_and_kept_tensors_are_never_overwritten(plan):
    """Sizes go up and down, so rings are replaced while slots of old ones are still out; some messages are kept for ever."""
    with Ring() as ring:
        kept = []
        for number, (size, keep) in enumerate(plan):
            ring.sender.put(torch.full((size,), number, dtype=torch.int16), 0)
            x = ring.get()
            assert x.shape == (size,) and bool((x == number).all())
            if keep:
                kept.append((number, x))
            del x
        assert all(bool((x == number).all()) for number, x in kept)


@pytest.mark.parametrize("sizes", [[500] * 60, range(0, 60000, 1000), range(60000, 0, -1000), [0] * 30, [3000, 0] * 20])
def test_all_sent_at_once_arrive_in_order_though_the_receiver_keeps_them(sizes):
    """The last free slot is never kept, so nothing waits for ever."""
    with Ring() as ring:
        for number, size in enumerate(sizes):
            ring.sender.put(torch.full((size,), float(number)), number)
        kept = [ring.get() for _ in sizes]
        until(lambda: ring.sender.oldest is None)
        for number, (size, x) in enumerate(zip(sizes, kept)):
            assert torch.equal(x, torch.full((size,), float(number)))


def test_put_never_waits_and_oldest_is_the_window_of_the_first_queued():
    with Ring() as ring:
        assert ring.sender.oldest is None
        ring.gate.clear()
        begin = time.monotonic()
        for number in range(30):
            ring.sender.put(torch.full((10,), number), number // 2)
        assert time.monotonic() - begin < WITHIN / 2
        assert ring.sender.oldest == shared_memory.SLOTS // 2  # a ring full has left
        assert ring.moved == 0
        ring.gate.set()
        assert [int(ring.get()[0]) for _ in range(30)] == list(range(30))
        until(lambda: ring.sender.oldest is None)
        until(lambda: ring.moved > 0)


def test_what_is_put_behind_queued_messages_waits_its_turn():
    """A larger message would get a new, free ring; it may not overtake."""
    with Ring() as ring:
        ring.gate.clear()
        for number in range(6):
            ring.sender.put(torch.full((10,), number), 0)
        ring.sender.put(torch.full((10000,), 6), 1)
        assert ring.sender.oldest == 0
        ring.gate.set()
        assert [int(ring.get()[0]) for _ in range(7)] == list(range(7))


def test_a_message_lies_in_shared_memory_and_its_slot_comes_back_when_dropped():
    with Ring() as ring:
        for _ in range(2):
            kept = []
            for number in range(shared_memory.SLOTS):
                ring.sender.put(torch.full((3,), number), 0)
                kept.append(ring.get())
            ring.sender._memory.fill_(7)  # as only a test may do: shows which tensors are views
            views = [bool((x == 0x0707070707070707).all()) for x in kept]
            assert views == [True] * (shared_memory.SLOTS - 1) + [False]
            until(lambda: len(ring.sender._free) == 1)
            kept.clear()
            until(lambda: sorted(ring.sender._free) == list(range(shared_memory.SLOTS)))


def test_tensors_of_an_old_ring_do_not_count_in_the_new_one():
    with Ring() as ring:
        before = []
        for size in (3, 3000):
            for _ in range(shared_memory.SLOTS - 1):
                ring.sender.put(torch.zeros(size), 0)
                before.append(ring.get())
        ring.sender._memory.fill_(7)
        assert all(bool((x != 0).all()) for x in before[shared_memory.SLOTS - 1 :])  # the new ring is counted anew


def test_slots_of_an_old_ring_do_not_come_back_to_the_new_one():
    with Ring() as ring:
        ring.sender.put(torch.zeros(10), 0)
        old = ring.get()
        ring.sender.put(torch.ones(5000), 0)
        new = ring.get()
        assert len(ring.sender._free) == shared_memory.SLOTS - 1
        del old
        ring.sender.put(torch.ones(1), 0)
        del new
        ring.get()
        until(lambda: sorted(ring.sender._free) == list(range(shared_memory.SLOTS)))


def test_a_ring_fits_its_message_to_the_page():
    """4096 bytes fit a page; one more needs the next; a smaller message keeps the ring."""
    with Ring() as ring:
        rings = []
        for size in (1, 4096, 4097, 4096, 8192, 8193):
            x = torch.randint(256, (size,), dtype=torch.uint8)
            ring.sender.put(x, 0)
            assert torch.equal(ring.get(), x)
            assert ring.sender._slot_bytes % 4096 == 0 and ring.sender._slot_bytes >= size
            rings.append(ring.sender._ring)
        assert rings == [0, 0, 1, 1, 1, 2]


def test_a_sent_tensor_carries_no_graph_and_may_be_a_slice_or_conjugate():
    with Ring() as ring:
        weight = torch.rand(4, 6, requires_grad=True)
        ring.sender.put(weight * 2, 0)
        x = ring.get()
        assert not x.requires_grad and torch.equal(x, 2 * weight)
        ring.sender.put(weight[:, 1:3], 0)
        assert torch.equal(ring.get(), weight[:, 1:3])
        number = torch.tensor([1 + 2j])
        ring.sender.put(number.conj(), 0)
        assert torch.equal(ring.get(), torch.tensor([1 - 2j]))


def test_channels_do_not_mix_and_the_door_is_told_their_names():
    with Ring(["first", [0, 1], "ä/ö"]) as ring:
        other = ring.connect(["second"])
        until(lambda: len(ring.told) == 2)
        assert sorted(map(str, ring.told)) == sorted(map(str, [["first", [0, 1], "ä/ö"], ["second"]]))
        other.put(torch.ones(1), 0)
        ring.sender.put(torch.ones(2), 0)
        assert sorted(len(ring.get()) for _ in range(2)) == [1, 2]
        ring.door.closing()
        other.close()


def test_the_end_of_a_sender_is_a_loss_for_the_receiver_unless_it_was_told():
    ring = Ring()
    ring.sender.put(torch.ones(1), 0)
    ring.get()
    ring.sender.close()
    until(lambda: ring.lost)
    time.sleep(0.05)
    assert ring.lost == [("receiver", "its end of a shared-memory channel was closed")]
    ring.door.close()


def test_the_end_of_a_receiver_is_one_loss_for_the_sender_whatever_it_puts():
    ring = Ring()
    ring.sender.put(torch.ones(1), 0)
    ring.get()
    ring.door.close()
    until(lambda: ring.lost)
    for _ in range(10):
        ring.sender.put(torch.ones(10000), 0)
    time.sleep(0.05)
    assert ring.lost == [("sender", "its end of a shared-memory channel was closed")]
    ring.sender.close()


def test_another_user_is_not_let_in(monkeypatch):
    monkeypatch.setattr(shared_memory, "_same_user", lambda connection: False)
    ring = Ring()
    until(lambda: ring.lost)
    assert ring.lost[0][0] == "sender" and ring.told == []
    ring.sender.close()
    ring.door.close()


def test_who_is_the_same_user(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    for user, allowed in [(1000, True), (0, True), (1001, False)]:
        connection = SimpleNamespace(getsockopt=lambda *asked, user=user: struct.pack("3i", 1000, user, 1000))
        assert shared_memory._same_user(connection) == allowed


def test_a_tensor_that_cannot_be_sent_is_refused_by_put_even_behind_others():
    """Not on the thread that sends what is queued: that one would end without a word."""
    with Ring() as ring:
        ring.gate.clear()
        for number in range(6):
            ring.sender.put(torch.full((1,), number), 0)
        with pytest.raises(UnlockedError, match="cannot be sent"):
            ring.sender.put(torch.zeros(2, dtype=torch.uint16), 0)
        ring.gate.set()
        assert [int(ring.get()) for _ in range(6)] == list(range(6))
        with pytest.raises(UnlockedError, match="cannot be sent"):
            ring.sender.put(torch.zeros(2, dtype=torch.uint16), 0)
        until(lambda: sorted(ring.sender._free) == list(range(shared_memory.SLOTS)))


def test_a_slot_of_a_ring_long_ago_is_not_taken_for_one_of_today():
    """Rings are numbered modulo 256."""
    with Ring() as ring:
        ring.sender.put(torch.zeros(1, dtype=torch.uint8), 0)
        first = ring.get()
        for pages in range(2, 258):
            ring.sender.put(torch.zeros(pages * 4096, dtype=torch.uint8), 0)
            ring.get()
        kept = []
        for number in range(2):
            ring.sender.put(torch.full((5,), number), 0)
            kept.append(ring.get())
        del first
        time.sleep(0.05)
        for number in range(2, 6):
            ring.sender.put(torch.full((5,), number), 0)
            kept.append(ring.get())
        assert [int(x[0]) for x in kept] == list(range(6))


def test_a_receiver_that_is_gone_before_the_first_message_is_a_loss_not_an_error():
    ring = Ring()
    ring.sender.closing()
    ring.door.closing()
    ring.door.close()
    late = ring.connect(["late"])
    late.put(torch.ones(3), 0)
    until(lambda: ring.lost)
    late.put(torch.ones(3), 0)
    assert ring.lost == [("sender", "its end of a shared-memory channel was closed")]
    late.close()
    ring.sender.close()


def test_a_channel_that_is_opened_while_the_door_closes_is_no_loss():
    ring = Ring()
    ring.door.closing()
    late = ring.connect(["late"])
    until(lambda: len(ring.told) == 2)
    for sender in (ring.sender, late):
        sender.close()
    time.sleep(0.05)
    ring.door.close()
    assert ring.lost == []


def handles():
    """What this process has open: files and sockets, and shared rings it maps."""
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("unlocked-ring" in line for line in maps)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files the Linux way")
def test_closed_links_leave_no_handle_no_memory_no_thread_and_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads, shared, closed = threading.active_count(), set(os.listdir("/dev/shm")), []
    gc.collect()  # nothing of other tests may go meanwhile
    before = handles()
    for _ in range(5):
        with Ring() as ring:
            for size in (10, 10000, 20000):
                ring.sender.put(torch.ones(size), 0)
                ring.get()
            closed.append(ring)
    until(lambda: threading.active_count() <= threads and handles() == before)  # though the closed ones are still known
    assert os.listdir(tmp_path) == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if "unlocked" in name]


def test_without_abstract_sockets_and_memfd_it_works_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_memory.sys, "platform", "darwin")
    monkeypatch.delattr(os, "memfd_create")
    with Ring() as ring:
        assert ring.door.address.startswith(str(tmp_path))
        for size in (3, 5000):
            ring.sender.put(torch.ones(size), 0)
            assert torch.equal(ring.get(), torch.ones(size))
    assert os.listdir(tmp_path) == []


# ---- process groups --------------------------------------------------------------------------------------------------


class Pair:
    """A gloo sender and receiver on two threads of one process; used as Ring."""

    def __init__(self):
        store = dist.HashStore()
        self.arrived, self.lost, self.moved = queue.Queue(), [], 0
        self.gate = threading.Event()
        self.gate.set()
        self.sender = GroupSender(
            lambda: pair_group(store, "pair", 0, "127.0.0.1"), lambda how: self.lost.append(("sender", how)), self.sent
        )
        self.receiver = GroupReceiver(
            lambda: pair_group(store, "pair", 1, "127.0.0.1"),
            self.deliver,
            lambda how: self.lost.append(("receiver", how)),
        )

    deliver, sent, get = Ring.deliver, Ring.sent, Ring.get

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.gate.set()
        for link in (self.sender, self.receiver):
            link.closing()
        for link in (self.sender, self.receiver):
            link.close()
        if error[0] is None:
            assert self.lost == []
            assert not self.sender._thread.is_alive() and not self.receiver._thread.is_alive()


@given(st.lists(tensors(), max_size=8))
@settings(max_examples=10, deadline=None)
def test_any_tensors_arrive_over_gloo(row):
    with Pair() as pair:
        for x in row:
            assert pair.sender.put(x, 0) == x.numel() * x.element_size() + HEADER_BYTES
        for x in row:
            y = pair.get()
            assert same(dense(x), y) or (x.numel() == 0 and y.shape == x.shape)


def test_sizes_up_and_down_over_gloo_kept_for_ever():
    with Pair() as pair:
        sizes = [0, 5, 5000, 3, 20000, 0, 20001, 1]
        for number, size in enumerate(sizes):
            pair.sender.put(torch.full((size,), float(number)), 0)
        kept = [pair.get() for _ in sizes]
        for number, (size, x) in enumerate(zip(sizes, kept)):
            assert torch.equal(x, torch.full((size,), float(number)))


def test_gloo_put_never_waits_and_oldest_is_what_has_not_been_sent():
    with Pair() as pair:
        assert pair.sender.oldest is None
        pair.gate.clear()
        for number in range(6):
            pair.sender.put(torch.full((200000,), float(number)), number)
        until(lambda: pair.sender.oldest == 1 or pair.sender.oldest == 2)
        assert pair.sender.oldest is not None
        pair.gate.set()
        assert [int(pair.get()[0]) for _ in range(6)] == list(range(6))
        until(lambda: pair.sender.oldest is None)
        until(lambda: pair.moved == 6)


def test_gloo_put_refuses_what_cannot_be_sent():
    with Pair() as pair:
        with pytest.raises(UnlockedError, match="cannot be sent"):
            pair.sender.put(torch.zeros(2, dtype=torch.uint16), 0)
        pair.sender.put(torch.ones(1), 0)
        assert pair.get() == 1


def test_closing_a_gloo_sender_sends_what_is_queued():
    with Pair() as pair:
        for number in range(20):
            pair.sender.put(torch.full((1000,), number), 0)
        pair.sender.closing()
        pair.sender.close()
        assert [int(pair.get()[0]) for _ in range(20)] == list(range(20))


@pytest.mark.parametrize("quiet", [False, True])
def test_a_broken_gloo_connection_is_told_once_without_its_stack(quiet):
    lost, start = [], threading.Event()

    def broken():
        start.wait(WITHIN)
        raise RuntimeError(
            "[/a/b.cc:12] Connection closed by peer [127.0.0.1]:4.\nException raised from here\nframe #0"
        )

    sender = GroupSender(broken, lost.append, lambda: None)
    receiver = GroupReceiver(broken, lambda x: None, lost.append)
    if quiet:
        sender.closing()
        receiver.closing()
    start.set()
    sender._thread.join(WITHIN)
    receiver._thread.join(WITHIN)
    said = "the connection broke (Connection closed by peer [127.0.0.1]:4)"
    assert lost == ([] if quiet else [said, said])
