"""JSON as the server writes it: what Python's own reader gets back is what went in, however the text was put together."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data.errors import InputError
from server import json_text
from server.json_text import check_json, parse_json, parse_kept, write_json
from server.tensors import NUMPY_OF, PIECE, from_values

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)  # fmt: skip


@given(plain)
def test_plain_values_are_read_back_by_python_and_by_ourselves(value):
    assert json.loads(write_json(value)) == value
    assert parse_json(write_json(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


whole = st.recursive(st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False), st.lists)


@given(whole)
def test_whole_numbers_of_any_length_are_kept_exactly(value):
    kept = parse_kept(json.dumps({"a": value}).encode())["a"]
    assert kept == value
    assert json.loads(write_json({"items": [{"metadata": kept}]})) == {"items": [{"metadata": value}]}


@pytest.mark.parametrize(
    ("opening", "closing"), [(b"[", b"]"), (b'{"a":[', b"]}"), (b'[0,{"]":2,"a":[[1,', b'],"]"]},3]')]
)
@pytest.mark.parametrize("read", [parse_json, parse_kept])
def test_what_is_nested_deeper_than_everyone_can_follow_is_not_read(read, opening, closing):
    levels = json_text.READ_NESTING // len([one for one in opening if one in b"[{"])
    number = b"1" * 40
    assert repr(read(opening * levels + number + closing * levels))
    with pytest.raises(InputError, match="nested more than 256 deep"):
        read(opening * levels + b"[" + number + b"]" + closing * levels)


FINITE = {"allow_nan": False, "allow_infinity": False}


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=4), elements=FINITE))
def test_numbers_are_read_back_bit_by_bit_in_whatever_pieces_they_were_written(array):
    for piece in (1, 2, 5, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_text, "PIECE", piece)
            read = json.loads(write_json({"items": [{"map": array}]}))["items"][0]["map"]
        assert np.array_equal(np.array(read), array)  # as doubles, without rounding them


@pytest.mark.parametrize("datatype", [name for name in NUMPY_OF if name != "BYTES"])
def test_every_type_of_number_can_be_written_in_any_layout(datatype):
    array = np.arange(6).reshape(2, 3).astype(NUMPY_OF[datatype])
    for same in (array, array.T, array[:, ::-1], np.zeros((0, 3), array.dtype)):
        assert json.loads(write_json(same)) == same.tolist()


def test_a_text_with_a_byte_order_mark_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_has_no_word_for_is_not_written(value):
    with pytest.raises(InputError, match="not finite, which JSON has no words for"):
        write_json({"outputs": [{"data": np.array([1, value], np.float32)}]})


@pytest.mark.parametrize("text", [b"NaN", b"[1, Infinity]", b'{"\xc3\xa9": -Infinity}'])
def test_pythons_words_for_what_is_not_finite_are_named(text):
    with pytest.raises(InputError, match=r"(NaN|Infinity) is not finite, and JSON has no word for it"):
        parse_json(text)


@pytest.mark.parametrize(
    "text", [b"", b"[", b"[1,]", b'"\xff"', b'"\\ud800"', b"1e999", b"[" * 5000, b"\xff\xfe[\0]\0", b'"NaN" 1']
)
def test_what_is_no_json_is_refused_in_a_line(text):
    with pytest.raises(InputError, match="the request is not JSON: ") as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_what_is_nested_too_deep_to_be_stored_is_refused():
    value = []
    for _ in range(json_text.MAX_NESTING):
        value = [value]
    check_json(value[0], "it")
    with pytest.raises(InputError, match="it is nested more than 64 deep"):
        check_json(value, "it")


@pytest.mark.parametrize("shape", [(3 * PIECE + 1,), (3, PIECE // 2), (2, 2, PIECE), (1, 3, 224, 224)])
def test_large_sequences_are_the_same_numbers_whole_or_in_pieces(shape):
    wanted = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(from_values("x", "FP32", shape, wanted.tolist()).array, wanted)
    np.testing.assert_array_equal(from_values("x", "FP32", shape, wanted.reshape(-1).tolist()).array, wanted)


def test_a_mistake_far_into_a_large_sequence_is_found():
    values = [0.0] * (3 * PIECE)
    for wrong in ("x", [1.0]):
        with pytest.raises(InputError, match="not a regular array of FP32"):
            from_values("x", "FP32", [3 * PIECE], [*values[:-1], wrong])
