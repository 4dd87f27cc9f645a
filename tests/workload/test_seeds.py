"""Random numbers: known answers, the same by any chunk, even, and apart from each other."""

from fractions import Fraction

import numpy as np
import pytest

from gmemcore.errors import InvalidArgumentError
from gmemcore.workload.seeds import Stream

MASK = (1 << 64) - 1


def splitmix64(seed, n):
    """Number n of SplitMix64 in Python's own integers."""
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_published_first_numbers():
    assert Stream(1234567).words(0, 3).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(("key", "start"), [(0, 0), (MASK, 5), (1 << 63, (1 << 64) - 3), (99, 1 << 40)])
def test_words_are_splitmix64s(key, start):
    assert Stream(key).words(start, 7).tolist() == [splitmix64(key, start + i) for i in range(7)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_any_chunk_size_gives_the_same_numbers(chunk):
    stream = Stream(3).split("chunks")
    starts = range(0, 1000, chunk)
    for draw in (
        stream.words,
        lambda start, n: stream.below(1000003, start, n),
        lambda start, n: stream.choices([1, 2, 3], start, n),
    ):
        parts = [draw(start, min(chunk, 1000 - start)) for start in starts]
        assert np.array_equal(np.concatenate(parts), draw(0, 1000))


@pytest.mark.parametrize("bound", [1, 2, 3, 4096, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, (1 << 52) + 7, MASK])
def test_below_is_the_high_half_of_the_product(bound):
    stream = Stream(17)
    words = stream.words(0, 500).tolist()
    assert stream.below(bound, 0, 500).tolist() == [word * bound >> 64 for word in words]


def test_below_takes_a_bound_for_each_number():
    bounds = Stream(1).words(0, 300) >> np.uint64(7)
    bounds[::2] &= np.uint64(0xFFF)
    bounds += np.uint64(1)
    words = Stream(2).words(0, 300).tolist()
    assert Stream(2).below(bounds, 0, 300).tolist() == [
        word * bound >> 64 for word, bound in zip(words, bounds.tolist(), strict=True)
    ]


def test_extreme_words_stay_below_the_bound():
    from gmemcore.workload.seeds import _high_half

    extremes = np.array([0, 1, (1 << 32) - 1, 1 << 32, MASK - 1, MASK], np.uint64)
    for bound in extremes[1:]:
        products = [int(word) * int(bound) >> 64 for word in extremes]
        assert _high_half(extremes, bound).tolist() == products


def test_numbers_are_even():
    """Chi-square over 100 values: 99 degrees of freedom, above 160 once in ten thousand."""
    counts = np.bincount(Stream(5).split("even").below(100, 0, 1_000_000).astype(np.int64), minlength=100)
    assert len(counts) == 100
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 160


def test_choices_follow_their_weights():
    for weights in ([1, 3, 0, 4], [0.1, 0.3, 0, 0.4], [Fraction(1, 8), Fraction(3, 8), 0, Fraction(1, 2)]):
        counts = np.bincount(Stream(6).choices(weights, 0, 80_000), minlength=4)
        assert counts[2] == 0
        assert np.abs(counts - [10_000, 30_000, 0, 40_000]).max() < 700  # 5 standard deviations
    assert Stream(6).choices([0, 1, 0], 0, 100).tolist() == [1] * 100


def key_of(word):
    """The key whose first word is this: SplitMix64 backwards."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        whole = word
        while whole != (whole := word ^ (whole >> shift)):
            pass
        word = whole * pow(factor, -1, 1 << 64) & MASK
    return (word - 0x9E3779B97F4A7C15) & MASK


def test_choices_at_a_threshold():
    """Of two equal weights, the first has the lower half of all words and not one more."""
    for word, choice in ((0, 0), ((1 << 63) - 1, 0), (1 << 63, 1), (MASK, 1)):
        stream = Stream(key_of(word))
        assert stream.words(0, 1).tolist() == [word]
        assert stream.choices([1, 1], 0, 1).tolist() == [choice]


def test_permutation_is_one():
    order = Stream(7).permutation(1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert not np.array_equal(order, np.arange(1000))
    assert Stream(7).permutation(0).tolist() == []


def test_streams_of_different_names_are_different():
    root = Stream(0)
    names = [(), ("a",), ("b",), (1,), ("1",), ("a", "b"), ("ab",), ("a", 1), ("a", 11), (1, 1), (11,), ("",)]
    names += [("guest", guest) for guest in range(1000)]
    assert len({root.split(*each).key for each in names}) == len(names)
    assert root.split("a").split("b").key != root.split("a", "b").key
    assert root.split().key != root.key


def test_split_keys_are_these():
    """They are part of every recorded result: a change here changes every seeded run."""
    assert Stream(0).split("guest", 7, "pins").key == 1424822407523373503
    assert Stream(MASK).split(MASK).key == 2555676858925061257


def test_correlation_of_neighbouring_guests_is_noise():
    bits = [Stream(9).split("guest", guest).words(0, 4096) for guest in range(8)]
    for one in range(8):
        for other in range(one):
            same = int(np.bitwise_count(bits[one] ^ bits[other]).sum())
            assert abs(same - 4096 * 32) < 5 * (4096 * 16) ** 0.5


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(InvalidArgumentError, match="weight"):
        Stream(0).choices(weights, 0, 1)


def test_bad_bounds_keys_and_names_are_refused():
    with pytest.raises(InvalidArgumentError, match="a bound must be 1 or more, not 0"):
        Stream(0).below(0, 0, 1)
    with pytest.raises(InvalidArgumentError, match="a bound must be 1 or more, not 0"):
        Stream(0).below(np.array([1, 0], np.uint64), 0, 2)
    with pytest.raises(InvalidArgumentError, match="64 bits"):
        Stream(1 << 64)
    with pytest.raises(InvalidArgumentError, match="64 bits"):
        Stream(0).split(-1)
    with pytest.raises(TypeError, match="name of a stream"):
        Stream(0).split(1.5)
    with pytest.raises(TypeError, match="name of a stream"):
        Stream(0).split(True)
