"""Sizes and counts as people write them."""

import pytest

from slimgpt.quantities import BYTES, COUNTS, in_millions, read_quantity, written


@pytest.mark.parametrize(
    ("text", "units", "number"),
    [
        ("200MB", BYTES, 200_000_000),
        ("1.5 gb", BYTES, 1_500_000_000),
        (".5kB", BYTES, 500),
        ("100M", COUNTS, 100_000_000),
        ("5.44b", COUNTS, 5_440_000_000),
        ("81430848", COUNTS, 81_430_848),
    ],
)
def test_they_are_read_with_decimal_units(text, units, number):
    assert read_quantity(text, units, "x") == number


@pytest.mark.parametrize("text", ["200", "MB", "-1MB", "0MB", "200MiB", "1e3MB", "2 00MB", ""])
def test_others_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match=f"target_size is '{text}'; it must be a number and kB, .* such as 200MB"):
        read_quantity(text, BYTES, "target_size")


@pytest.mark.parametrize("text", ["1.5", "0", "many", "1e6"])
def test_other_counts_are_refused_and_a_whole_number_is_offered(text):
    with pytest.raises(ValueError, match=f"x is '{text}'; it must be a whole number, or a number and k, M, B or T"):
        read_quantity(text, COUNTS, "x")


@pytest.mark.parametrize(
    ("numbers", "units", "texts"),
    [
        ([370_000, 430_040], BYTES, ["370.0 kB", "430.1 kB"]),
        ([1_240_000, 1_243_000], BYTES, ["1.24 MB", "1.25 MB"]),
        ([500, 999_999, 13_480_000_000], BYTES, ["0.5 kB", "1,000.0 kB", "13.5 GB"]),
        ([10_000, 5_440_000_000], COUNTS, ["10.0 k", "5.5 B"]),
        ([7, 7], COUNTS, ["0.1 k", "0.1 k"]),
    ],
)
def test_compared_numbers_are_written_apart_and_never_too_small(numbers, units, texts):
    assert written(numbers, units) == texts
    for text, number in zip(texts, numbers, strict=True):
        assert read_quantity(text.replace(",", ""), units, "x") >= number


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0"), (9_402, "0.0094"), (47_312, "0.047"), (137_000, "0.14"), (4_000_000, "4.0"), (16e9, "16,000.0")],
)
def test_millions_of_a_tiny_model_are_not_0(number, text):
    assert in_millions(number) == text
