"""The order of examples: a permutation in each epoch, the same whichever way it is asked for, and no memory."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinformer.data.order import Order, Steps, mix
from twinformer.errors import InputError


@given(size=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_each_example_stands_in_one_place(size, seed, epoch):
    found = Order(size, seed).at(epoch, np.arange(size))
    assert sorted(found) == list(range(size))


@given(size=st.integers(1, 2**40), seed=st.integers(0, 2**63), epoch=st.integers(0, 9), data=st.data())
def test_a_place_alone_is_that_place_among_others(size, seed, epoch, data):
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    order = Order(size, seed)
    together = order.at(epoch, places)
    assert together.tolist() == [int(order.at(epoch, [place])[0]) for place in places]
    assert len(set(together.tolist())) == len(set(places))
    assert 0 <= together.min() <= together.max() < size


def test_the_order_is_this_one():
    """Worked once and kept: another machine, process or version of NumPy must give it again."""
    assert Order(10, 7).at(0, np.arange(10)).tolist() == [8, 1, 7, 6, 4, 2, 0, 9, 3, 5]
    assert Order(10**12, 7, name="other").at(3, [0, 1, 10**12 - 1]).tolist() == [
        102513199297,
        647697133221,
        305486301273,
    ]


def test_epochs_seeds_and_names_have_orders_of_their_own():
    orders = [
        Order(100, seed, name=name).at(epoch, np.arange(100))
        for seed, name, epoch in itertools.product((0, 1), ("a", "b"), (0, 1))
    ]
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(orders, 2))
    assert Order(100, 3, shuffle=False).at(5, [4, 2]).tolist() == [4, 2]


def test_all_orders_are_about_as_likely():
    """Of 480 seeds about 20 give each order of four: chi-square with 23 degrees, beyond 60 once in 30 000."""
    counts = Counter(tuple(Order(4, seed).at(0, np.arange(4))) for seed in range(480))
    assert len(counts) == 24
    assert sum((count - 20) ** 2 / 20 for count in counts.values()) < 60


def test_neighbours_do_not_stay_neighbours():
    """In a shuffle of n, two are neighbours after as before about 2 times, few stand where they stood."""
    n = 20_000
    found = Order(n, 1).at(0, np.arange(n))
    assert np.count_nonzero(np.abs(np.diff(found)) == 1) < 15
    assert np.count_nonzero(found == np.arange(n)) < 10
    assert abs(np.corrcoef(found, np.arange(n))[0, 1]) < 0.03
    # where the first half went: half of it into the first half (standard deviation 50)
    assert abs(np.count_nonzero(found[: n // 2] < n // 2) - n // 4) < 250


def test_the_mixer_is_one_to_one_and_no_identity():
    words = np.arange(1000, dtype=np.uint64)
    assert len(set(mix(words).tolist())) == 1000
    assert not (mix(words)[1:] == words[1:]).any()


@given(size=st.integers(1, 60), batch_size=st.integers(1, 70), epochs=st.integers(1, 3))
def test_an_epoch_of_steps_takes_each_example_once(size, batch_size, epochs):
    steps = Steps(Order(size, 0), batch_size)
    for epoch in range(epochs):
        taken = [steps.examples(epoch * steps.per_epoch + step) for step in range(steps.per_epoch)]
        assert {number for number, _ in taken} == {epoch}
        assert all(0 < len(examples) <= batch_size for _, examples in taken)
        assert sorted(np.concatenate([examples for _, examples in taken]).tolist()) == list(range(size))


def test_nothing_is_kept_for_each_example():
    tracemalloc.start()
    Order(10**12, 0).at(0, np.arange(10**6, 10**6 + 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


REFUSED = {
    "no size": (lambda: Order(0, 0), "size: expected a whole number from 1, got 0"),
    "a seed below 0": (lambda: Order(3, -1), "seed: expected a whole number from 0, got -1"),
    "a place beyond": (lambda: Order(3, 0).at(0, [3]), "places: expected places from 0 to 2, got 3 to 3"),
    "a place below": (lambda: Order(3, 0).at(0, [-1]), "got -1 to -1"),
    "no whole places": (lambda: Order(3, 0).at(0, [0.5]), "places: expected whole numbers"),
    "an epoch below 0": (lambda: Order(3, 0).at(-1, [0]), "epoch: expected a whole number from 0, got -1"),
    "no batch": (lambda: Steps(Order(3, 0), 0), "batch_size: expected a whole number from 1, got 0"),
    "a step below 0": (lambda: Steps(Order(3, 0), 2).examples(-1), "step: expected a whole number from 0, got -1"),
    "a step between": (lambda: Steps(Order(3, 0), 2).examples(0.5), "step: expected a whole number from 0, got 0.5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        call()
