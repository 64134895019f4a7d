"""Cutting stored weights into matrices and joining them again."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry.errors import UsageError
from blueberry.optim.splits import Layout, check_layout, cut, describe, join

HALVES, INTERLEAVED = Layout(shape=(2, -1)), Layout(shape=(-1, 2), axis=1)


def stack(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_no_layout_is_the_whole_matrix():
    weight = stack(2, 3, 4)
    assert cut(weight, None)[0] is weight
    assert join([weight], None) is weight


def test_halves_are_the_upper_and_the_lower_rows():
    weight = stack(6, 4)
    (parts,) = cut(weight, HALVES)
    assert torch.equal(parts[0], weight[:3]) and torch.equal(parts[1], weight[3:])
    assert parts.data_ptr() == weight.data_ptr()  # a view


def test_interleaved_parts_are_even_and_odd_rows():
    (parts,) = cut(stack(6, 4), INTERLEAVED)
    assert torch.equal(parts[0], stack(6, 4)[::2]) and torch.equal(parts[1], stack(6, 4)[1::2])


def test_transposed_storage_is_cut_along_outputs():
    weight = stack(3, 4, 6)  # (experts, in, out) with gate and up in turn, as in gpt-oss
    (parts,) = cut(weight, INTERLEAVED._replace(transposed=True))
    assert parts.shape == (3, 2, 3, 4)
    assert torch.equal(parts[1, 0], weight[1, :, ::2].T) and torch.equal(parts[1, 1], weight[1, :, 1::2].T)


def test_unequal_blocks_are_separate_tensors():
    weight = stack(8, 3)
    query, key, value = cut(weight, Layout(shape=(-1,), sizes=(4, 2, 2)))
    assert torch.equal(query, weight[:4]) and torch.equal(key, weight[4:6]) and torch.equal(value, weight[6:])


def test_query_key_and_value_of_each_head_in_turn():
    weight = stack(2 * 3 * 5, 4)  # two heads of 5
    (parts,) = cut(weight, Layout(shape=(-1, 3, 5), axis=1))
    key = torch.cat([weight[5:10], weight[20:25]])
    assert parts.shape == (3, 10, 4) and torch.equal(parts[1], key)


def test_unequal_shares_of_grouped_heads():
    weight = stack(2 * 4 * 5, 3)  # two groups of two queries, a key and a value, heads of 5, as in Falcon
    query, key, _ = cut(weight, Layout(shape=(-1, 4, 5), axis=1, sizes=(2, 1, 1)))
    assert torch.equal(query, torch.cat([weight[:10], weight[20:30]]))
    assert torch.equal(key, torch.cat([weight[10:15], weight[30:35]]))


def test_columns_of_interleaved_experts():
    weight = stack(4, 6)  # (out, rank * experts) of three experts, the expert counts fastest
    (parts,) = cut(weight, Layout(dim=-1, shape=(-1, 3), axis=1))
    assert parts.shape == (3, 4, 2) and torch.equal(parts[2], weight[:, 2::3])


@st.composite
def layouts(draw) -> tuple[Layout, tuple[int, ...]]:
    """A layout with up to three unfolded axes, and the shape of a stack that it fits."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = ()
    if draw(st.booleans()):
        sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
        shape = (*shape[:axis], sum(sizes), *shape[axis + 1 :])
    dim, transposed = draw(st.sampled_from([-1, -2])), draw(st.booleans())
    matrix = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    matrix[dim] = torch.Size(shape).numel()
    leading = draw(st.lists(st.integers(1, 3), max_size=2))
    hole = draw(st.sampled_from([None, *range(len(shape))]))
    unfolded = tuple(-1 if i == hole else n for i, n in enumerate(shape))
    return Layout(transposed, dim, unfolded, axis, sizes), (*leading, *(matrix[::-1] if transposed else matrix))


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_join_undoes_cut(case):
    layout, shape = case
    weight = stack(*shape)
    check_layout("weight", shape, layout)
    parts = cut(weight, layout)
    assert sum(part.numel() for part in parts) == weight.numel()
    assert torch.equal(join(parts, layout), weight)
    assert torch.equal(join([part.clone() for part in parts], tuple(layout)), weight)


def test_the_plain_tuple_of_a_layout_survives_a_weights_only_checkpoint():
    layout = Layout(True, -2, (-1,), 0, (4, 2, 2))
    file = io.BytesIO()
    torch.save({"layout": tuple(layout)}, file)
    file.seek(0)
    assert Layout(*torch.load(file, weights_only=True)["layout"]) == layout


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(shape=(-1,), sizes=(4, 2)), r"does not fit qkv of shape \(8, 3\)"),
        (Layout(shape=(3, -1)), r"does not fit qkv of shape \(8, 3\)"),
        (Layout(shape=(-1,)), "makes every row a part"),
        (Layout(shape=(2, -1), axis=2), "axis an index of shape"),
        (Layout(dim=0, shape=(2, -1)), "dim is -2"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout, message):
    with pytest.raises(UsageError, match=message):
        check_layout("qkv", (8, 3), layout)


def test_the_audit_is_told_how_a_weight_is_cut():
    assert describe(None) == ""
    assert describe(Layout(transposed=True, shape=(3, -1))) == "stored transposed, rows [3, -1] cut along axis 0"
    assert describe(Layout(shape=(-1,), sizes=(4, 2))) == "rows [-1] cut along axis 0 into [4, 2]"
