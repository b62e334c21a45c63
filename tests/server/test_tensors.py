"""KServe tensors on the wire: what tritonclient writes is read, what is written tritonclient reads, nonsense is named."""

import base64
import re

import numpy as np
import pytest
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from data.errors import InputError
from server.tensors import NUMPY_OF, from_json, from_raw, from_values, object_array, to_json, to_raw


@pytest.mark.parametrize("datatype", [name for name in NUMPY_OF if name != "BYTES"])
def test_every_number_type_is_read_from_the_bytes_that_numpy_makes(datatype):
    array = np.arange(6).reshape(2, 3).astype(triton_to_np_dtype(datatype))
    tensor = from_raw("x", datatype, [2, 3], array.tobytes())
    np.testing.assert_array_equal(tensor.array, array)
    assert to_raw(tensor.array) == array.tobytes()


def test_bytes_tensors_are_those_of_tritonclient_even_with_zeros_at_the_end():
    elements = [b"abc\0\0", b"", b"\xff\xd8\xff"]
    raw = serialize_byte_tensor(object_array(elements)).item()
    tensor = from_raw("image", "BYTES", [3], raw)
    assert list(tensor.array) == elements
    assert list(deserialize_bytes_tensor(to_raw(tensor.array))) == elements


def test_typed_contents_may_be_flat_and_json_may_be_nested():
    assert from_json("x", "UINT64", [2], [2**63, 1], None).array.tolist() == [2**63, 1]
    assert from_json("x", "INT8", [1], [2.0], None).array.tolist() == [2]
    assert from_json("x", "BOOL", [2], [True, False], None).array.tolist() == [True, False]
    flat = from_values("x", "FP32", [2, 2], [1, 2, 3, 4]).array
    nested = from_json("x", "FP32", [2, 2], [[1, 2], [3, 4]], None).array
    np.testing.assert_array_equal(flat, nested)
    assert flat.dtype == np.float32


def test_json_strings_are_text_or_base64_where_the_input_says_so():
    assert from_json("image", "BYTES", [1], ["héllo"], None).array[0] == "héllo".encode()
    packed = base64.b64encode(b"\xff\x00").decode()
    assert from_json("image", "BYTES", [1], [packed], "base64").array[0] == b"\xff\x00"


def test_json_output_is_a_flat_list():
    assert to_json(np.array([[1.5, 2.0]], np.float32)).tolist() == [1.5, 2.0]
    assert to_json(object_array([b"cat", b""], (1, 2))) == ["cat", ""]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: from_raw("x", "FP32", [2, 2], b"\0" * 12), "16 bytes, and 12 came"),
        (lambda: from_raw("x", "FP33", [1], b"\0" * 4), "datatype 'FP33' is unknown"),
        (lambda: from_raw("x", "FP32", [-1, 2], b""), "negative size"),
        (lambda: from_raw("x", "BYTES", [2], b"\x01\0\0\0a"), "asks for 2 elements, its bytes hold 1"),
        (lambda: from_raw("x", "BYTES", [1], b"\x09\0\0\0a"), "element 0 is cut short"),
        (lambda: from_raw("x", "BYTES", [1], b"\x09\0"), "element 0 is cut short"),
        (lambda: from_raw("x", "BYTES", [1], b"\xff\xd8\xff\xe0JFIF"), "4-byte little-endian length"),
        (lambda: from_values("x", "FP32", [3], [1, 2]), "asks for 3 elements, 2 came"),
        (lambda: from_values("x", "UINT8", [1], [300]), "not a regular array of UINT8"),
        (lambda: from_json("x", "FP32", [2], [[1], [2, 3]], None), "not a regular array"),
        (lambda: from_json("x", "FP32", [1], ["a"], None), "not a regular array"),
        (lambda: from_json("x", "FP32", [1], ["1"], None), "not a regular array"),
        (lambda: from_json("x", "FP32", [1], [True], None), "not a regular array"),
        (lambda: from_json("x", "FP32", [1], "abc", None), "not a regular array"),
        (lambda: from_json("x", "FP32", [2], [1, None], None), "not a regular array"),
        (lambda: from_json("x", "FP32", [1], {"a": 1}, None), "not a regular array"),
        (lambda: from_json("x", "UINT8", [1], [1.5], None), "not a regular array"),
        (lambda: from_json("x", "BOOL", [1], [1], None), "not a regular array"),
        (lambda: from_json("x", "BYTES", [1], [1], None), "wants strings"),
        (lambda: from_json("x", "BYTES", [1], ["%%%"], "base64"), "not base64"),
        (lambda: from_json("x", "BYTES", [1], ["a"], "hex"), "content_type 'hex' is unknown"),
    ],
)
def test_what_contradicts_itself_is_named(call, told):
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        call()
    assert "'x'" in str(caught.value)


def test_a_deeply_nested_json_list_does_not_exhaust_the_stack():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InputError):
        from_json("x", "BYTES", [1], nested, None)
