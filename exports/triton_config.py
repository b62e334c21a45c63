"""What Triton is told of each model: names, types, shapes, batching, threads, warm-up. Written by Triton's own message types.

Names, types and shapes are those of the server's models, so that one client program talks to either.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from data.errors import InputError
from exports.graph import Value

Engine = Literal["onnxruntime", "tensorrt", "python"]
Shape = Sequence[int]
TYPES = {"FP32": pb.TYPE_FP32, "UINT8": pb.TYPE_UINT8, "INT32": pb.TYPE_INT32, "BYTES": pb.TYPE_STRING}
ONNX_TYPES = {1: "FP32", 2: "UINT8", 6: "INT32", 7: "INT64"}
BACKENDS: dict[Engine, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime", ""),
    "tensorrt": ("tensorrt", "tensorrt_plan"),
    "python": ("python", ""),
}


@dataclass(frozen=True, kw_only=True)
class TritonSpec:
    """How the models run inside Triton."""

    engine: Engine = "onnxruntime"
    """What computes the network: onnxruntime; tensorrt (needs --plan); python (ONNX Runtime inside the python backend, for servers
    that have no other)."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where the network runs."""
    instances: int = 1
    """Copies of the network that run at the same time."""
    threads: int = 1
    """CPU threads of each copy: one copy a core with one thread each gives the most images (measured)."""
    decode_instances: int = 2
    """Processes that decode and resize images."""
    max_batch: int = 32
    """Largest batch that Triton puts together, and that a request may be."""
    batch_delay_us: int = 0
    """How long a batch may wait for more: 0 on a CPU, 1000 to 2000 on a GPU."""
    queue_size: int = 256
    """Requests that may wait; more are refused."""

    def __post_init__(self) -> None:
        least = {
            "instances": 1,
            "threads": 1,
            "decode_instances": 1,
            "max_batch": 1,
            "batch_delay_us": 0,
            "queue_size": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted at least {lowest}")


def network_config(
    name: str,
    spec: TritonSpec,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    file: str,
    warm_up: Mapping[str, Shape],
    parameters: Mapping[str, str],
) -> pb.ModelConfig:
    """A model that takes batches: the backbone, or a head on it. `warm_up`: the shape of each input without its batch axis."""
    backend, platform = BACKENDS[spec.engine]
    config = pb.ModelConfig(name=name, backend=backend, platform=platform, max_batch_size=spec.max_batch)
    for values, made in ((inputs, config.input), (outputs, config.output)):
        for value in values:
            made.add(name=value.name, data_type=TYPES[ONNX_TYPES[value.kind]], dims=_dims(value))
    config.dynamic_batching.max_queue_delay_microseconds = spec.batch_delay_us
    config.dynamic_batching.default_queue_policy.max_queue_size = spec.queue_size
    _place(config, spec.instances, spec.device)
    if spec.engine == "python":
        parameters = {**parameters, "file": file, "intra_op_thread_count": str(spec.threads)}
    elif spec.engine == "onnxruntime":
        config.default_model_filename = file
        parameters = {**parameters, "intra_op_thread_count": str(spec.threads), "inter_op_thread_count": "1"}
    else:
        config.default_model_filename = file
    _set(config, parameters)
    for rows in dict.fromkeys((1, spec.max_batch)):
        sample = config.model_warmup.add(name=f"batch of {rows}", batch_size=rows)
        for value in inputs:
            sample.inputs[value.name].data_type = TYPES[ONNX_TYPES[value.kind]]
            sample.inputs[value.name].dims.extend(warm_up[value.name])
            sample.inputs[value.name].zero_data = True
    return config


def _dims(value: Value) -> list[int]:
    """Axes without that of the batch; -1 for any size."""
    return [size if isinstance(size, int) else -1 for size in value.shape[1:]]


def python_config(
    name: str,
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, tuple[str, Shape]],
    instances: int = 1,
    parameters: Mapping[str, str] | None = None,
    optional: bool = False,
) -> pb.ModelConfig:
    """A model written in Python, whose shapes carry the number of rows themselves."""
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=0)
    _add_tensors(config, inputs, outputs, optional)
    _place(config, instances, "cpu")
    _set(config, parameters or {})
    return config


Step = tuple[str, Mapping[str, str], Mapping[str, str]]
"""A model, and which tensor of the ensemble each of its inputs and outputs is."""


def ensemble_config(
    name: str,
    outputs: Mapping[str, tuple[str, Shape]],
    steps: Sequence[Step],
    parameters: Mapping[str, str],
) -> pb.ModelConfig:
    """Models one after another, from `image` to the outputs."""
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=0)
    _add_tensors(config, {"image": ("BYTES", [-1])}, outputs, False)
    for model, inputs, made in steps:
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map.update(inputs)
        step.output_map.update(made)
    _set(config, parameters)
    return config


def _add_tensors(
    config: pb.ModelConfig,
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, tuple[str, Shape]],
    optional: bool,
) -> None:
    for tensor, (kind, shape) in inputs.items():
        config.input.add(name=tensor, data_type=TYPES[kind], dims=shape, optional=optional)
    for tensor, (kind, shape) in outputs.items():
        config.output.add(name=tensor, data_type=TYPES[kind], dims=shape)


def _place(config: pb.ModelConfig, count: int, device: str) -> None:
    kind = pb.ModelInstanceGroup.KIND_GPU if device == "gpu" else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(count=count, kind=kind)


def _set(config: pb.ModelConfig, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value


def config_text(config: pb.ModelConfig) -> str:
    """config.pbtxt; of a model's versions the newest is served."""
    config.version_policy.latest.num_versions = 1
    return str(text_format.MessageToString(config))


def as_parameter(value: object) -> str:
    """JSON in one line."""
    return json.dumps(value, sort_keys=True)
