"""How rows of values travel: what each codec keeps, in how many bytes, and that error feedback loses nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked.checkpoint import pack as described
from unlocked.checkpoint import unpack as undescribed
from unlocked.consensus.averaging.codecs import (
    BF16,
    Codec,
    ErrorFeedback,
    Int8,
    Plain,
    TopK,
    codec,
    pack,
    payload_bytes,
    unpack,
)
from unlocked.errors import InvalidChoice, UnlockedError
from unlocked.method_names import literal, show
from unlocked.rng import generator
from unlocked.rules.compression import first_sorted, kept, quantised, selected
from unlocked.simulation.ghosts import Ghost

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
CODECS: list[Codec] = [Plain(), BF16(), Int8(), Int8(3), Int8(1), TopK(), TopK(0.3), TopK(1.0)]

counts = st.integers(0, 700)
blocks = st.integers(1, 300)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(FLOATS)
codecs = st.one_of(st.just(Plain()), st.just(BF16()), blocks.map(Int8), st.floats(1e-3, 1.0).map(TopK))


def normal(count: int, seed: int = 0, dtype: torch.dtype = torch.float64, power: int = 0) -> Tensor:
    """Normal numbers of size 2^power."""
    drawn = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.mul(2.0**power).to(dtype)


def coarse(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Few different values of either sign: many equal magnitudes."""
    return torch.randint(-3, 4, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, the sign of zeros and NaN included."""
    bits = BITS[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def through(rule: Codec, row: Tensor) -> Tensor:
    """What arrives."""
    return rule.decode(rule.encode(row), row)


def described_by(payload: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in payload]


# ---- what every codec does -------------------------------------------------------------------------------------------


@given(codecs, counts, dtypes, seeds)
@settings(deadline=None, max_examples=60)
def test_shapes_and_types_are_foretold_and_come_back(rule: Codec, count: int, dtype: torch.dtype, seed: int) -> None:
    row = normal(count, seed, dtype)
    payload = rule.encode(row)
    expected = rule.empty(row)
    assert described_by(payload) == described_by(expected)
    assert all(x.is_meta for x in expected)
    assert described_by(rule.empty(row.to("meta"))) == described_by(expected)
    assert described_by(rule.empty(Ghost((count,), dtype))) == described_by(expected)  # type: ignore[arg-type]
    for like in (row, row.to("meta"), torch.zeros_like(row)):
        arrived = rule.decode(payload, like)
        assert (arrived.shape, arrived.dtype, arrived.device) == (row.shape, dtype, row.device)
        assert same_bits(arrived, rule.decode(payload, row))


@given(counts, blocks, st.floats(1e-4, 1.0), dtypes)
@settings(deadline=None, max_examples=60)
def test_bytes_are_those_of_the_formulas(count: int, block: int, share: float, dtype: torch.dtype) -> None:
    row, width = normal(count, 0, dtype), dtype.itemsize
    k = min(count, max(1, round(share * count)))
    expected = {
        Plain(): width * count,
        BF16(): 2 * count,
        Int8(block): count + 4 * math.ceil(count / block),
        TopK(share): (width + 4) * k,
    }
    for rule, size in expected.items():
        assert payload_bytes(rule.encode(row)) == payload_bytes(rule.empty(row)) == size
        assert pack(rule.encode(row)).numel() == pack(rule.empty(row)).numel() == size


def test_places_take_eight_bytes_only_where_four_do_not_reach() -> None:
    for count, places in ((2**31 - 1, torch.int32), (2**31, torch.int64)):
        assert TopK().empty(torch.empty(count, device="meta"))[1].dtype == places


@pytest.mark.parametrize("rule", CODECS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_no_and_of_one_value(rule: Codec, dtype: torch.dtype) -> None:
    nothing = torch.empty(0, dtype=dtype)
    assert same_bits(through(rule, nothing), nothing)
    assert payload_bytes(rule.encode(nothing)) == 0
    for value in (0.0, 1.0, -2.5, 2.0**-14):  # bfloat16 holds them
        assert through(rule, torch.tensor([value], dtype=dtype)).tolist() == [value]


@given(codecs, counts, dtypes, seeds)
@settings(deadline=None, max_examples=60)
def test_encoding_repeats_itself_and_changes_nothing(rule: Codec, count: int, dtype: torch.dtype, seed: int) -> None:
    row = coarse(count, seed, dtype)
    before = row.clone()
    first, second = rule.encode(row), rule.encode(row.clone().requires_grad_())
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    assert not any(x.requires_grad for x in second)
    kept_bits = [x.clone() for x in first]
    rule.decode(first, row)
    assert same_bits(row, before)
    assert all(same_bits(a, b) for a, b in zip(first, kept_bits))


@pytest.mark.parametrize("rule", CODECS, ids=str)
def test_a_row_may_lie_anyhow_in_memory(rule: Codec) -> None:
    matrix = normal(7 * 11).view(7, 11)
    assert same_bits(through(rule, matrix[:, 3]), through(rule, matrix[:, 3].clone()))
    assert same_bits(pack(rule.encode(matrix[:, 3])), pack(rule.encode(matrix[:, 3].clone())))


@pytest.mark.parametrize("rule", [BF16(), Int8(), TopK()], ids=str)
def test_whole_numbers_are_refused(rule: Codec) -> None:
    with pytest.raises(InvalidChoice, match=r"floating-point values; given torch\.int64"):
        rule.encode(torch.arange(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sends_the_same_bits() -> None:
    for rule, dtype in itertools.product(CODECS, FLOATS):
        for row in (normal(5000, 1, dtype), coarse(5000, 2, dtype)):
            there, here = rule.encode(row.cuda()), rule.encode(row)
            assert all(x.is_cuda for x in there)
            assert all(same_bits(a.cpu(), b) for a, b in zip(there, here, strict=True))
            assert same_bits(rule.decode(there, row.cuda()).cpu(), rule.decode(here, row))
            assert rule.decode(here, row.cuda()).is_cuda
            assert same_bits(unpack(pack(there), rule.empty(row))[0].cpu(), here[0])
    drawn = [Int8(64, stochastic=True).encode(x, generator(0, "test"))[1] for x in (row.cuda(), row)]
    assert same_bits(drawn[0].cpu(), drawn[1])


# ---- none and bf16 ---------------------------------------------------------------------------------------------------


@given(counts, st.sampled_from([*FLOATS, torch.int64, torch.bool]), seeds)
@settings(deadline=None)
def test_plain_is_the_identity(count: int, dtype: torch.dtype, seed: int) -> None:
    row = coarse(count, seed, torch.float64).div(3.0).to(dtype)
    assert same_bits(through(Plain(), row), row)


def test_plain_keeps_every_bit() -> None:
    row = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 1e-45])
    assert same_bits(through(Plain(), row), row)


@given(counts, dtypes, seeds, st.integers(-20, 20))
@settings(deadline=None)
def test_bf16_is_torchs_rounding_and_half_a_unit_off_at_most(
    count: int, dtype: torch.dtype, seed: int, power: int
) -> None:
    row = normal(count, seed, dtype, power if dtype != torch.float16 else 0)
    arrived = through(BF16(), row)
    assert same_bits(arrived, row.to(torch.bfloat16).to(dtype))
    assert bool(((arrived.double() - row.double()).abs() <= 2.0**-8 * row.double().abs()).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bf16_rounds_ties_to_even(dtype: torch.dtype) -> None:
    unit = 2.0**-7
    row = torch.tensor([1 + unit / 2, 1 + 3 * unit / 2, 1 + unit / 2 + 2**-20, -1 - unit / 2], dtype=dtype)
    assert through(BF16(), row).tolist() == [1.0, 1 + 2 * unit, 1 + unit, -1.0]


# ---- int8 ------------------------------------------------------------------------------------------------------------


@given(counts, blocks, dtypes, seeds, st.integers(-140, 120))
@example(300, 256, torch.float32, 0, -149)
@settings(deadline=None, max_examples=60)
def test_int8_is_half_a_scale_off_at_most(count: int, block: int, dtype: torch.dtype, seed: int, power: int) -> None:
    row = normal(count, seed, dtype, power if dtype != torch.float16 else power // 14)
    arrived = through(Int8(block), row)
    for x, y in zip(row.double().split(block), arrived.double().split(block)):
        scale = max(x.abs().max().item(), 2.0**-126) / 127 if len(x) else 0.0
        rounding = (
            torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 2.0**-22
        )  # of what arrives; and 127·2⁻²⁴ of a scale
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = scale / 2 * (1 + 1e-4) + rounding * y.abs() + smallest
        assert bool(((x - y).abs() <= bound).all())


@given(counts, blocks, dtypes, seeds, st.integers(-8, 8))
@settings(deadline=None)
def test_int8_keeps_zeros_and_the_largest_of_a_block(
    count: int, block: int, dtype: torch.dtype, seed: int, power: int
) -> None:
    base = normal(count, seed, torch.float32, power).to(dtype).float().to(dtype)  # float32 holds them
    for row in base.split(block):
        largest = row.abs().max() if len(row) else None
        signs = row.sign() * largest if largest is not None else row
        assert same_bits(through(Int8(block), signs) + 0.0, signs + 0.0)
        if largest is not None:
            there = row.abs() == largest
            assert torch.equal(through(Int8(block), row)[there], row[there])
    assert torch.equal(through(Int8(block), torch.zeros_like(base)), torch.zeros_like(base))


def test_int8_codes_and_what_they_stand_for() -> None:
    largest, codes = Int8(4).encode(torch.tensor([127.0, -63.5, 2.5, -1.5, 0.0, -10.0]))
    assert largest.tolist() == [127.0, 10.0]
    assert codes.tolist() == [127, -64, 2, -2, 0, -127]  # ties to even
    assert Int8(4).decode([largest, codes], torch.empty(6, device="meta")).tolist() == [127, -64, 2, -2, 0, -10]


@given(st.integers(1, 300), blocks, st.data())
@settings(deadline=None)
def test_int8_blocks_know_nothing_of_each_other(count: int, block: int, data: st.DataObject) -> None:
    row = normal(count, 1, torch.float32)
    place = data.draw(st.integers(0, count - 1))
    before = through(Int8(block), row)
    for value in (1e6, math.nan, math.inf, -math.inf):
        row[place] = value
        after = through(Int8(block), row)
        inside = torch.arange(count) // block == place // block
        assert same_bits(after[~inside], before[~inside])
        if not math.isfinite(value):
            assert bool(after[inside].isnan().all())


def test_int8_divides_by_no_zero() -> None:
    smallest = 2.0**-126
    largest, codes = quantised(torch.tensor([0.0, -0.0, smallest / 127, -smallest / 8]), 2)
    assert largest.tolist() == [smallest, smallest]
    assert codes.tolist() == [0, 0, 1, -16]


def test_int8_of_values_beyond_float32() -> None:
    row = torch.tensor([1.0, 1e39, 1.0, 1e-60, 0.0, 1e-300], dtype=torch.float64)
    arrived = through(Int8(2), row)
    assert arrived[:2].isnan().all()
    assert arrived[2:].tolist() == [1.0, 0.0, 0.0, 0.0]


@given(counts, blocks, st.sampled_from([torch.float64, torch.float32]), seeds)
@settings(deadline=None)
def test_stochastic_int8_is_less_than_a_scale_off_and_keeps_the_ends(
    count: int, block: int, dtype: torch.dtype, seed: int
) -> None:
    row = normal(count, seed, torch.float32).to(dtype)
    rule = Int8(block, stochastic=True)
    payload = rule.encode(row, generator(seed, "test"))
    assert all(same_bits(a, b) for a, b in zip(payload, rule.encode(row, generator(seed, "test"))))
    for x, y in zip(row.split(block), rule.decode(payload, row).split(block)):
        if len(x):
            largest = x.abs().max()
            assert bool(((x - y).abs() <= largest / 127 * (1 + 1e-4)).all())
            assert torch.equal(x[x.abs() == largest], y[x.abs() == largest])


def test_stochastic_int8_keeps_the_ends_for_every_draw() -> None:
    row = torch.tensor([3.7, -3.7, 0.0])
    for uniform in (0.0, 0.5, 1 - 2.0**-24):
        assert quantised(row, 3, torch.full((3,), uniform))[1].tolist() == [127, -127, 0]
    rounded_down = torch.tensor([1 + 2.0**-25, -1 - 2.0**-25], dtype=torch.float64)  # as float32: 1
    for uniform in (0.0, 1 - 2.0**-24):
        assert quantised(rounded_down, 2, torch.full((2,), uniform))[1].tolist() == [127, -127]


def test_stochastic_int8_is_right_in_the_mean_and_nearest_rounding_is_not() -> None:
    trials, row = 20_000, torch.tensor([1.0, 0.0042, -0.0191, 0.3], dtype=torch.float64)
    repeated = row.repeat(trials)
    payload = Int8(4, stochastic=True).encode(repeated, generator(0, "test"))
    mean = Int8(4).decode(payload, repeated).view(trials, 4).mean(dim=0)
    assert bool(((mean - row).abs() <= 5 / 127 / 2 / math.sqrt(trials)).all())
    assert bool(((through(Int8(4), row) - row).abs() > 1e-3).any())


def test_stochastic_int8_wants_a_source() -> None:
    with pytest.raises(InvalidChoice, match="give encode a generator"):
        Int8(stochastic=True).encode(torch.ones(3))


# ---- top-k -----------------------------------------------------------------------------------------------------------


def by_hand(row: Tensor, k: int) -> list[int]:
    """The places of the k largest magnitudes; of equal ones the first; NaN above all."""
    values = [math.inf if math.isnan(x) else abs(x) for x in row.tolist()]
    return sorted(sorted(range(len(values)), key=lambda i: (not math.isnan(row[i].item()), -values[i], i))[:k])


@given(counts, st.floats(1e-3, 1.0), dtypes, seeds, st.booleans())
@settings(deadline=None, max_examples=60)
def test_topk_sends_the_largest_and_of_equal_ones_the_first(
    count: int, share: float, dtype: torch.dtype, seed: int, ties: bool
) -> None:
    row = coarse(count, seed, dtype) if ties else normal(count, seed, dtype)
    k = kept(count, share)
    values, where = TopK(share).encode(row)
    assert where.tolist() == by_hand(row, k)
    assert same_bits(values, row[where.long()])
    arrived = TopK(share).decode([values, where], row)
    expected = torch.zeros_like(row)
    expected[where.long()] = row[where.long()]
    assert same_bits(arrived, expected)


@given(counts, st.integers(1, 5), st.data())
@settings(deadline=None)
def test_selection_and_sorting_agree(count: int, largest: int, data: st.DataObject) -> None:
    values = torch.randint(0, largest, (count,), generator=torch.Generator().manual_seed(count))
    k = data.draw(st.integers(0, count))
    assert selected(values.numpy(), k).tolist() == first_sorted(values, k).tolist()
    assert first_sorted(values, k).tolist() == by_hand(values.double(), k)


@given(counts, st.floats(1e-3, 1.0), seeds, st.booleans())
@settings(deadline=None)
def test_topk_contracts(count: int, share: float, seed: int, ties: bool) -> None:
    row = coarse(count, seed, torch.float64) if ties else normal(count, seed)
    lost = (row - through(TopK(share), row)).square().sum().item()
    left = 1 - kept(count, share) / count if count else 0.0
    assert lost <= left * row.square().sum().item() * (1 + 1e-12)


def test_topk_is_at_equality_where_all_magnitudes_are_equal() -> None:
    row = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    assert through(TopK(0.4), row).tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_topk_hides_no_value_that_is_no_number(dtype: torch.dtype) -> None:
    row = torch.tensor([1.0, math.inf, -0.0, -math.nan, 60000.0, -math.inf, math.nan], dtype=dtype)
    for k, expected in ((1, [3]), (2, [3, 6]), (3, [1, 3, 6]), (4, [1, 3, 5, 6]), (5, [1, 3, 4, 5, 6])):
        assert TopK(k / 7).encode(row)[1].tolist() == expected


@pytest.mark.parametrize(
    ("count", "share", "k"), [(0, 1.0, 0), (1, 1e-9, 1), (1000, 0.01, 10), (99, 0.01, 1), (7, 1.0, 7)]
)
def test_how_many_entries_travel(count: int, share: float, k: int) -> None:
    assert kept(count, share) == k == len(TopK(share).encode(torch.ones(count))[1])


# ---- error feedback --------------------------------------------------------------------------------------------------


@given(codecs, st.integers(0, 60), st.integers(1, 12), seeds)
@settings(deadline=None, max_examples=60)
def test_feedback_loses_nothing(rule: Codec, count: int, steps: int, seed: int) -> None:
    feedback = ErrorFeedback(rule)
    rows = [normal(count, seed + t) for t in range(steps)]
    arrived = sum(
        (rule.decode(feedback.send("row", row), row) for row in rows), torch.zeros(count, dtype=torch.float64)
    )
    owed = feedback.carried().get("row", torch.zeros(count, dtype=torch.float64))
    torch.testing.assert_close(arrived + owed, sum(rows), rtol=0.0, atol=1e-13 * steps**2)
    if rule.lossless:
        assert not feedback.carried()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", [Int8(16), TopK(0.1)], ids=str)
def test_feedback_on_narrow_rows_owes_in_float32(rule: Codec, dtype: torch.dtype) -> None:
    feedback, steps = ErrorFeedback(rule), 50
    once = ErrorFeedback(rule)
    assert described_by(once.send("row", normal(40, 0, dtype))) == described_by(rule.empty(normal(40, 0, dtype)))
    assert once.carried()["row"].dtype == torch.float32
    rows = [normal(40, t, dtype) for t in range(steps)]
    arrived = [rule.decode(feedback.send("row", row), row).double() for row in rows]
    owed = feedback.carried()["row"]
    assert owed.dtype == torch.float32
    torch.testing.assert_close(sum(arrived) + owed.double(), sum(row.double() for row in rows), rtol=0.0, atol=1e-4)


def test_feedback_is_its_formula() -> None:
    feedback, rule = ErrorFeedback(TopK(0.5)), TopK(0.5)
    row = torch.tensor([4.0, 3.0, 2.0, 1.0])
    arrived = [rule.decode(feedback.send("a", row), row).tolist() for _ in range(3)]
    assert arrived == [[4.0, 3.0, 0.0, 0.0], [4.0, 0.0, 4.0, 0.0], [4.0, 6.0, 0.0, 0.0]]
    assert feedback.carried()["a"].tolist() == [0.0, 0.0, 2.0, 3.0]


def test_with_feedback_a_row_that_stays_arrives_in_the_mean_and_without_it_does_not() -> None:
    row, rule, steps = normal(200, 3), TopK(0.05), 2000
    feedback = ErrorFeedback(rule)
    mean = sum(rule.decode(feedback.send("a", row), row) for _ in range(steps)) / steps
    assert (mean - row).norm() < 0.05 * row.norm()
    assert (through(rule, row) - row).norm() > 0.5 * row.norm()


def test_names_owe_separately_and_lengths_are_kept() -> None:
    both, alone = ErrorFeedback(TopK(0.2)), ErrorFeedback(TopK(0.2))
    for step in range(4):
        both.send("b", normal(10, 100 + step))
        a, b = both.send("a", normal(10, step)), alone.send("a", normal(10, step))
        assert all(same_bits(x, y) for x, y in zip(a, b))
    with pytest.raises(UnlockedError, match="a row of 9 values follows one of 10"):
        both.send("a", normal(9))


@pytest.mark.parametrize("rule", [BF16(), Int8(4), Int8(4, stochastic=True), TopK(0.2)], ids=str)
def test_feedback_goes_on_from_a_checkpoint(rule: Codec) -> None:
    def steps(feedback: ErrorFeedback, begin: int, end: int) -> list[Tensor]:
        rows = [(normal(10, t, torch.float32), generator(0, "test", t)) for t in range(begin, end)]
        return [x for row, source in rows for x in feedback.send("a", row, source)]

    first, straight = ErrorFeedback(rule), ErrorFeedback(rule)
    whole = steps(straight, 0, 9)
    begun = steps(first, 0, 4)
    tensors: dict[str, Tensor] = {}
    saved = described(first.carried(), "feedback", tensors)
    tensors = {name: x.clone() for name, x in tensors.items()}
    steps(first, 4, 5)  # does not reach what was saved
    second = ErrorFeedback(rule)
    second.load_carried(undescribed(saved, tensors))
    resumed = begun + steps(second, 4, 9)
    assert all(same_bits(a, b) for a, b in zip(whole, resumed, strict=True))
    assert same_bits(second.carried()["a"], straight.carried()["a"])


def test_what_was_carried_does_not_change_afterwards() -> None:
    feedback = ErrorFeedback(TopK(0.2))
    feedback.send("a", normal(10))
    carried = feedback.carried()
    before = carried["a"].clone()
    feedback.send("a", normal(10, 1))
    assert same_bits(carried["a"], before)


# ---- messages --------------------------------------------------------------------------------------------------------

parts = st.lists(
    st.tuples(
        st.sampled_from([*FLOATS, torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex128]),
        st.lists(st.integers(0, 7), max_size=3),
    ),
    min_size=1,
    max_size=6,
)


@given(parts, st.integers(0, 20), st.booleans())
@settings(deadline=None, max_examples=60)
def test_messages_give_back_every_bit(drawn: list[tuple[torch.dtype, list[int]]], offset: int, moved: bool) -> None:
    source = torch.Generator().manual_seed(len(drawn))
    payload = []
    for dtype, shape in drawn:
        size = math.prod(shape) * dtype.itemsize
        noise = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=source).to(torch.uint8)
        payload.append(noise.view(dtype).view(shape))
    message = pack(payload)
    assert (message.dtype, message.shape) == (torch.uint8, (payload_bytes(payload),))
    if moved:  # as it may lie in a larger buffer
        buffer = torch.zeros(offset + message.numel(), dtype=torch.uint8)
        buffer[offset:] = message
        message = buffer[offset:]
    like = [x.to("meta") for x in payload]
    for a, b in zip(unpack(message, like), payload, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@given(codecs, counts, dtypes, seeds)
@settings(deadline=None, max_examples=60)
def test_rows_travel_as_messages(rule: Codec, count: int, dtype: torch.dtype, seed: int) -> None:
    row = normal(count, seed, dtype)
    payload = rule.encode(row)
    message = pack(payload)
    assert same_bits(rule.decode(unpack(message, rule.empty(row)), row), rule.decode(payload, row))
    assert pack(rule.empty(row)).shape == message.shape
    assert described_by(unpack(pack(rule.empty(row)), rule.empty(row))) == described_by(payload)


@pytest.mark.parametrize("rule", CODECS, ids=str)
def test_a_message_is_looked_at_and_not_copied(rule: Codec) -> None:
    payload = rule.encode(normal(1000, 0, torch.float32))
    message = pack(payload)
    if len(payload) == 1:
        assert message.data_ptr() == payload[0].data_ptr()
    memory = message.untyped_storage()._cdata
    assert all(x.untyped_storage()._cdata == memory for x in unpack(message, payload))


def test_a_message_of_another_length_is_refused() -> None:
    with pytest.raises(UnlockedError, match="A message of 20 bytes came where one of 14 was expected"):
        unpack(torch.zeros(20, dtype=torch.uint8), Int8().empty(torch.empty(10)))


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Plain()),
        ("bf16", BF16()),
        ("int8", Int8(256)),
        ("int8:512", Int8(512)),
        ("topk", TopK(0.01)),
        ("topk:0.05", TopK(0.05)),
        ("topk:1", TopK(1.0)),
    ],
)
def test_codecs_have_texts_that_may_stand_on_the_command_line(text: str, expected: Codec) -> None:
    assert codec(text) == expected
    assert codec(expected) is expected
    assert literal(show(text)) == text


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        ("int9", "Unknown compression 'int9'; did you mean 'int8'"),
        ("", "Allowed are: bf16, int8, none, topk"),
        ("none:3", "none takes none; write none"),
        ("bf16:", "bf16 takes none; write bf16"),
        ("int8:0", "after the colon give values per block, as in int8:512"),
        ("int8:many", "after the colon give values per block, as in int8:512"),
        ("int8:", "after the colon give values per block, as in int8:512"),
        ("topk:0", "after the colon give a share above 0 and at most 1"),
        ("topk:1.5", "after the colon give a share above 0 and at most 1"),
        ("topk:nan", "after the colon give a share above 0 and at most 1"),
        (8, "8 is no compression; give one of none, bf16, int8"),
    ],
)
def test_other_texts_are_refused_in_a_sentence(given_: object, sentence: str) -> None:
    with pytest.raises(InvalidChoice, match=sentence):
        codec(given_)  # type: ignore[arg-type]


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidChoice, match="block=0 holds no value"):
        Int8(0)
    with pytest.raises(InvalidChoice, match=r"share=0\.0 is no share"):
        TopK(0.0)


def test_only_what_drops_values_is_biased_and_only_none_is_lossless() -> None:
    assert [rule.lossless for rule in (Plain(), BF16(), Int8(), TopK())] == [True, False, False, False]
    assert [rule.biased for rule in (Plain(), BF16(), Int8(), TopK())] == [False, False, False, True]
