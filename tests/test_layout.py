"""Named tensors and one flat vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedq import Layout
from fedq.errors import ConfigError

shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4), max_size=5)


@given(shapes)
def test_flatten_and_unflatten_are_inverse(shapes):
    arrays = {
        f"t{i}": np.random.default_rng(i).standard_normal(shape).astype(np.float32)
        for i, shape in enumerate(shapes)
    }
    layout = Layout.of(arrays)
    x = layout.flatten(arrays)
    assert x.shape == (layout.size,)
    assert x.dtype == np.float32
    back = layout.unflatten(x)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape
        assert np.array_equal(back[name], array)
        assert array.size == 0 or np.shares_memory(back[name], x)
    ends = [tensor.start + tensor.size for tensor in layout]
    assert [tensor.start for tensor in layout] == [0, *ends][: len(ends)]


def test_order_follows_the_layout_not_the_mapping():
    layout = Layout(("a", "b"), ((1,), (1,)))
    assert layout.flatten({"b": [2.0], "a": [1.0]}).tolist() == [1, 2]


def test_rows_are_output_channels():
    layout = Layout(("conv", "bias", "scalar"), ((8, 3, 3, 3), (8,), ()))
    assert [tensor.rows for tensor in layout] == [8, 1, 1]


def test_mismatches_are_refused():
    layout = Layout(("a",), ((2, 3),))
    with pytest.raises(ConfigError, match="a has shape"):
        layout.flatten({"a": np.ones((3, 2))})
    with pytest.raises(ConfigError, match="b"):
        layout.flatten({"a": np.ones((2, 3)), "b": np.ones(1)})
    with pytest.raises(ConfigError, match="shape"):
        layout.unflatten(np.zeros(5, np.float32))
    with pytest.raises(ConfigError, match="distinct"):
        Layout(("a", "a"), ((1,), (1,)))
    with pytest.raises(ConfigError, match="one shape per name"):
        Layout(("a",), ())
    with pytest.raises(ConfigError, match="d >= 0"):
        Layout.flat(-1)


def test_fingerprint_tells_names_and_shapes_apart():
    layouts = [
        Layout(("a", "b"), ((2,), (3,))),
        Layout(("b", "a"), ((2,), (3,))),
        Layout(("a", "b"), ((3,), (2,))),
        Layout(("a", "b"), ((2, 1), (3,))),
        Layout(("a",), ((5,),)),
    ]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert Layout.flat(7).fingerprint.hex() == "930e3c47"
