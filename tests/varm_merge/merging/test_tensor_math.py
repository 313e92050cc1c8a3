"""Reductions, blends and the selection on single tensors, against numpy, brute force and exact properties."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from state_dicts import FLOATS, bits
from torch import Tensor

from varm_merge.merging import tensor_math
from varm_merge.merging.tensor_math import ElementWeights, Selection, blend, blend_elements, delta_sums, select
from varm_merge.merging.threads import pool
from varm_merge.merging.weights import Statistic, normalize

property_test = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
cut_into_chunks = pytest.mark.usefixtures("chunks")
NOTHING = Selection(threshold=torch.iinfo(torch.int64).max, tie_stop=0)


@pytest.fixture(params=[5, 1 << 18], ids=["many chunks", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs twice: with tensors cut into many chunks, and with tensors that fit one."""
    monkeypatch.setattr(tensor_math, "CPU_CHUNK", request.param)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


@cut_into_chunks
@pytest.mark.parametrize("statistic", ["square", "abs"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_those_of_numpy_in_float64(dtype: torch.dtype, statistic: Statistic) -> None:
    pivot, targets = noise(5, 3, dtype=dtype), [noise(5, 3, seed=k, dtype=dtype) for k in (1, 2, 3)]
    power = 2 if statistic == "square" else 1
    expected = [(np.abs(float64(target) - float64(pivot)) ** power).sum() for target in targets]
    assert delta_sums(pivot, targets, statistic, None) == pytest.approx(expected, rel=1e-14)


def test_a_float32_target_of_a_bfloat16_pivot_is_compared_without_rounding_it() -> None:
    pivot = torch.ones(9, dtype=torch.bfloat16)
    assert delta_sums(pivot, [pivot.float() + 2**-20], "abs", None) == [9 * 2**-20]


def test_ten_million_elements_add_up_to_twelve_digits() -> None:
    delta = np.random.default_rng(0).random(10**7, dtype=np.float32) * np.float32(1e-4)
    pivot, target = torch.zeros(10**7), torch.from_numpy(delta)
    wide = delta.astype(np.float64)
    expected: dict[Statistic, float] = {"abs": wide.sum(), "square": np.square(wide, out=wide).sum()}
    for statistic, total in expected.items():
        (found,) = delta_sums(pivot, [target], statistic, None)
        assert abs(found / total - 1) < 1e-12


def test_the_square_of_the_smallest_float32_delta_is_not_lost() -> None:
    smallest = 2.0**-149
    assert delta_sums(torch.zeros(10), [torch.full((10,), smallest)], "square", None) == [10 * smallest**2]


@cut_into_chunks
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("damaged", [0, 1, 2])
@pytest.mark.parametrize("selection", [None, NOTHING], ids=["all", "nothing selected"])
def test_a_sum_is_not_finite_where_an_input_is_not_even_outside_the_selection(
    damage: float, damaged: int, selection: Selection | None
) -> None:
    models = [noise(20, seed=k) for k in range(3)]
    models[damaged][13] = damage
    assert not np.isfinite(delta_sums(models[0], models[1:], "square", selection)).all()


@cut_into_chunks
def test_a_strided_view_is_read_in_the_order_of_its_elements() -> None:
    pivot, target = noise(6, 4).t(), noise(4, 12, seed=1)[:, ::2]
    expected = np.square(float64(target) - float64(pivot)).sum()
    assert delta_sums(pivot, [target], "square", None) == pytest.approx([expected], rel=1e-14)
    out = torch.empty(4, 6)
    blend(pivot, [pivot, target], [0.25, 0.75], out)
    torch.testing.assert_close(out, 0.25 * pivot + 0.75 * target)


@cut_into_chunks
def test_a_target_with_all_the_weight_is_copied_to_the_bit() -> None:
    targets = [noise(20, seed=k) for k in range(3)]
    targets[1][4] = -0.0
    out = torch.empty(20)
    blend(targets[0], targets, [0.0, 1.0, 0.0], out)
    assert bits(out) == bits(targets[1])


@cut_into_chunks
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.3, 0.5], [0.9, 0.05, 0.05], [0.1] * 10])
@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_targets_blend_to_that_target_to_the_bit(dtype: torch.dtype, weights: list[float]) -> None:
    target, out = noise(20, dtype=dtype), torch.empty(20, dtype=dtype)
    blend(target, [target] * len(weights), weights, out)
    assert bits(out) == bits(target)


@cut_into_chunks
@property_test
@given(
    st.lists(st.tuples(*[st.floats(-(2.0**120), 2.0**120, width=32)] * 3), min_size=1, max_size=20),
    st.tuples(*[st.floats(0, 1)] * 3).filter(any),
)
@example([(0.1, 0.1, 0.3)], (1.0, 1.0, 1.0))
def test_a_blend_stays_in_the_hull_of_its_targets(
    elements: list[tuple[float, float, float]], statistics: tuple[float, ...]
) -> None:
    targets = list(torch.tensor(elements).T)
    out = torch.empty_like(targets[0])
    blend(targets[0], targets, normalize(statistics, "sum", 1.0), out)
    moved = torch.stack([target for target, value in zip(targets, statistics, strict=True) if value])
    assert ((moved.amin(0) <= out) & (out <= moved.amax(0))).all()


def test_an_element_that_keeps_no_target_keeps_the_pivot_to_the_bit() -> None:
    pivot = torch.tensor([1.5, 0.0, -0.7, 3.1])
    assert bits(merged_without_a_selected_element(pivot, pivot + 1, pivot + 3)) == bits(pivot)


def merged_without_a_selected_element(pivot: Tensor, *targets: Tensor) -> Tensor:
    out = torch.empty_like(pivot)
    weights = ElementWeights("square", "sum", 1.0)
    blend_elements(pivot, targets, weights, out, selection=NOTHING, erase_minority=False)
    return out


def test_a_zero_sum_counts_as_positive_and_a_zero_delta_is_erased() -> None:
    targets = [torch.tensor([1.0, 2.0, -3.0]), torch.tensor([-1.0, 0.0, 1.0])]
    out = torch.empty(3)
    blend_elements(torch.zeros(3), targets, [0.5, 0.5], out, selection=None, erase_minority=True)
    assert out.tolist() == [1.0, 2.0, -3.0]


def selected(halves: list[float], fraction: float, view: int = 1 << 20) -> list[bool]:
    """What is selected of two targets with deltas ±h (variance h²); the mask is read ``view`` at a time."""
    half = torch.tensor(halves, dtype=torch.float64)
    deltas_KC = torch.stack([half, -half])
    selection = select(torch.zeros_like(half), list(deltas_KC), fraction)
    parts = [selection.mask(part, start * view) for start, part in enumerate(deltas_KC.split(view, dim=1))]
    return [bool(value) for part in parts for value in part]


def brute_force(halves: list[float], fraction: float) -> list[bool]:
    count = int(sum(half != 0 for half in halves) * fraction)
    chosen = sorted(range(len(halves)), key=lambda index: (-abs(halves[index]), index))[:count]
    return [index in chosen for index in range(len(halves))]


fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
TINY = 2.0**-530  # its square is a subnormal float64


@cut_into_chunks
@property_test
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), fractions, st.integers(1, 9))
@example([1] * 30, 0.5, 4)
@example([0] * 9, 0.9, 4)
def test_selection_is_that_of_a_sort_where_most_variances_tie(
    halves: list[int], fraction: float, view: int
) -> None:
    assert selected(halves, fraction, view) == brute_force(halves, fraction)


@property_test
@given(st.lists(st.floats(-64, 64, width=16) | st.floats(-64, 64, width=32), min_size=1, max_size=40), fractions)
def test_selection_is_that_of_a_sort_where_variances_differ(halves: list[float], fraction: float) -> None:
    assert selected(halves, fraction) == brute_force(halves, fraction)


@cut_into_chunks
@property_test
@given(st.lists(st.integers(-7, 7).map(lambda value: value * TINY), min_size=1, max_size=40), fractions)
def test_selection_is_that_of_a_sort_where_variances_are_subnormal(halves: list[float], fraction: float) -> None:
    assert selected(halves, fraction) == brute_force(halves, fraction)


@pytest.mark.parametrize("halves", [[0.0], [0.0] * 5, [1.0, 2.0, 3.0]])
def test_nothing_is_selected_where_the_fraction_is_less_than_one_element(halves: list[float]) -> None:
    assert not any(selected(halves, 0.3))


@cut_into_chunks
def test_ties_go_to_the_lower_index_whatever_chunk_they_lie_in() -> None:
    chosen = selected([1.0, 2.0] * 10, 0.75)
    assert [index for index, keep in enumerate(chosen) if not keep] == [10, 12, 14, 16, 18]


def test_equal_elements_tie_wherever_they_lie() -> None:
    deltas_KC = torch.tensor([[0.1], [0.7], [-0.35]], dtype=torch.float64).repeat(1, 101)
    selection = select(torch.zeros(101), list(deltas_KC), 0.5)
    assert selection.mask(deltas_KC, 0).tolist() == [True] * 50 + [False] * 51


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(models: list[Tensor], out: Tensor) -> list[float]:
    """Every pass of this module over the models."""
    pivot, *targets = models
    rule = ElementWeights("square", "softmax", 1.0)
    sums, _ = blend_elements(pivot, targets, rule, out, selection=select(pivot, targets, 0.4), erase_minority=True)
    blend(targets[0], targets, [0.3, 0.7], out)
    return delta_sums(pivot, targets, "square", None) + sums


@cut_into_chunks
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    models, out, serial_out = [noise(500, seed=k) for k in range(3)], torch.empty(500), torch.empty(500)
    sums = run(models, out)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert run(models, serial_out) == sums
    assert bits(out) == bits(serial_out)


@cut_into_chunks
def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    pairs = [(noise(500, seed=2 * k), noise(500, seed=2 * k + 1)) for k in range(8)]

    def repeated(pair: tuple[Tensor, Tensor]) -> list[list[float]]:
        return [delta_sums(pair[0], [pair[1]], "square", None) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(repeated, pairs))
    assert concurrent == [repeated(pair) for pair in pairs]


def in_a_fresh_thread(work: Callable[[], None]) -> None:
    """Where no buffer has been made yet; what ``work`` raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_inputs_that_require_grad_are_read_outside_autograd(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_math, "CPU_CHUNK", 100)
    with torch.no_grad():
        out = torch.empty(500)
        run([noise(500, seed=k).requires_grad_() for k in range(3)], out)
    assert not out.requires_grad


@pytest.mark.parametrize("chunk", [100, 1000])
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_merge_works_in_inference_mode_and_after_it(
    threads: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_math, "CPU_CHUNK", chunk)
    models = [noise(500, seed=k) for k in range(3)]

    def in_and_out() -> None:
        with torch.inference_mode():
            run(models, torch.empty(500))
        run(models, torch.empty(500))

    in_a_fresh_thread(in_and_out)


@pytest.mark.parametrize(("fraction", "kept"), [(0.29, 29), (0.57, 57), (0.58, 58), (0.999, 99)])
def test_a_fraction_is_taken_as_it_is_written(fraction: float, kept: int) -> None:
    assert sum(selected([float(value) for value in range(1, 101)], fraction)) == kept


def test_deltas_that_differ_only_in_their_order_tie() -> None:
    for values in [(4.0, 4.0, 0.0), (-3.0, -3.0, -2.0), (1.0, 2.0, 4.0)]:
        deltas_KC = list(torch.tensor(list(itertools.permutations(values)), dtype=torch.float64).T.contiguous())
        mask = select(torch.zeros(6), deltas_KC, 0.5).mask(deltas_KC, 0)
        assert mask.tolist() == [True, True, True, False, False, False]


def test_torch_does_not_split_operations_in_our_own_threads(threads: int) -> None:
    pool.cache_clear()
    torch.set_num_threads(threads)
    assert set(pool().map(lambda _: torch.get_num_threads(), range(20))) == {1}


def test_the_callers_threads_are_left_as_they_were() -> None:
    """Also when several threads merge at once, as for several GPUs, and for threads that start later."""
    before = torch.get_num_threads()
    tensors = [torch.randn(3, 300_000) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda group: delta_sums(group[0], list(group[1:]), "square", None), tensors))
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == before
