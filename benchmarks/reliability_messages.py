"""The gRPC messages that `reliability_requests` sends: good ones, and ones of random fields and values."""

import random
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb


def tensor_request(pixels: np.ndarray) -> Any:
    """Tensors to `backbone`, for two of its outputs."""
    request = pb.ModelInferRequest(model_name="backbone")
    request.inputs.add(name="pixels", datatype="FP32", shape=pixels.shape)
    for name in ("embedding", "attention"):
        request.outputs.add(name=name)
    request.raw_input_contents.append(pixels.tobytes())
    return request


def image_request(model: str, file: bytes) -> Any:
    """An image file to a model."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(file).to_bytes(4, "little") + file)
    return request


def random_message(message: Any, rng: random.Random, depth: int) -> Any:
    """A message with random values in random fields; names that the server knows come up now and then."""
    words = [
        "backbone",
        "depth",
        "pixels",
        "image",
        "embedding",
        "FP32",
        "BYTES",
        "timeout",
        "size",
        "",
        "\x00",
        "é" * 40,
    ]
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.4:
            continue
        map_entry = field.message_type is not None and field.message_type.GetOptions().map_entry
        value = getattr(message, field.name)
        if map_entry:
            random_message(value[rng.choice(words)], rng, depth - 1)
        elif field.message_type is not None:
            if depth:
                random_message(value.add() if field.is_repeated else value, rng, depth - 1)
        else:
            made = _random_value(field, rng, words)
            value.append(made) if field.is_repeated else setattr(message, field.name, made)
    return message


def _random_value(field: Any, rng: random.Random, words: list[str]) -> Any:
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        return rng.randbytes(rng.randrange(20)) if field.type == field.TYPE_BYTES else rng.choice(words)
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice([0.0, 1e30, float("nan"), float("inf"), -1.5])
    if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
        return rng.choice([0, 1, 7, (1 << 32) - 1])
    return rng.choice([0, 1, -1, 3, 32, (1 << 31) - 1])
