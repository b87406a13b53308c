"""How many bytes quantized numbers take."""

import pytest

from quant.formats import Format, container_bits


@pytest.mark.parametrize(
    ("stored", "shape", "values", "groups", "nbytes"),
    [
        (Format("int", 8, 0, False), (10, 100), 1000, 1, 1000 + 10 * 2),
        (Format("int", 8, 32, False), (10, 100), 1000, 4, 1000 + 40 * 2),
        (Format("fp8", 8, 0, False), (10, 100), 1000, 1, 1000 + 10 * 2),
        (Format("int", 4, 32, False), (10, 128), 640, 4, 640 + 40 * 2),
        (Format("int", 4, 32, True), (10, 128), 640, 4, 640 + 40 * 3),
        (Format("int", 4, 32, True), (10, 129), 800, 5, 800 + 50 * 3),
        (Format("int", 2, 0, False), (1, 1), 8, 1, 10),
        (Format("int", 1, 64, False), (3, 513), 3 * 68, 9, 3 * 68 + 27 * 2),
    ],
)
def test_bytes(stored, shape, values, groups, nbytes):
    assert stored.values_bytes(*shape) == values
    assert stored.groups(shape[1]) == groups
    assert stored.nbytes(*shape, 2) == nbytes


def test_what_smaller_numbers_are_stored_in():
    assert [container_bits(bits) for bits in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_what_happens_to_inputs_changes_nothing_about_storage():
    assert Format("int", 8, 0, False, "int8").stored_like(Format("int", 8, 0, False))
    assert not Format("int", 8, 32, False).stored_like(Format("int", 8, 0, False))
    assert not Format("fp8", 8, 0, False).stored_like(Format("int", 8, 0, False))


@pytest.mark.parametrize("wrong", [("int", 3, 0), ("fp8", 4, 0), ("int", 4, 16), ("int", 8, -32)])
def test_formats_that_do_not_exist(wrong):
    with pytest.raises(AssertionError):
        Format(*wrong, has_zero=False)
