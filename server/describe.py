"""What the server says about itself and its models: one description, which both wires print.

The functions give plain dictionaries in the protocol's own JSON form; gRPC parses the same into its messages, so the
wires cannot disagree. (Open Inference Protocol; Triton's statistics, configuration and repository extensions.)
"""

import json
from typing import Any

from server.errors import NotFound
from server.models import ServedModel
from server.service import EXTENSIONS, NAME, VERSION, Service
from server.statistics import STAGES, ModelCounts, Stage
from server.tensors import TensorSpec

_CONFIG_TYPE = {"BYTES": "TYPE_STRING"}


def server_metadata() -> dict[str, Any]:
    """`GET v2`, ServerMetadata."""
    return {"name": NAME, "version": VERSION, "extensions": list(EXTENSIONS)}


def model_metadata(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """`GET v2/models/M`, ModelMetadata."""
    model = service.model(name, version)
    return {
        "name": name,
        "versions": [service.model_version],
        "platform": _platform(service),
        "inputs": [_tensor_metadata(spec) for spec in model.inputs],
        "outputs": [_tensor_metadata(spec) for spec in model.outputs],
    }


def model_config(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """`GET v2/models/M/config`, ModelConfig.

    `parameters` carry the backbone's manifest, so that whoever knows the address can preprocess as this server does.
    """
    model = service.model(name, version)
    batched = name == "backbone"
    return {
        "name": name,
        "platform": _platform(service),
        "backend": NAME,
        "max_batch_size": service.admission.spec.max_rows if batched else 0,
        "input": [_config_tensor(spec, batched) | {"optional": spec.optional} for spec in model.inputs],
        "output": [_config_tensor(spec, batched) for spec in model.outputs],
        "dynamic_batching": {"max_queue_delay_microseconds": service.engine.spec.batching.max_delay_us},
        "parameters": {key: {"string_value": value} for key, value in _config_parameters(service, model).items()},
    }


def model_statistics(service: Service, name: str = "", version: str = "") -> dict[str, Any]:
    """`GET v2/models[/M]/stats`, ModelStatistics; without a name, of all models."""
    if name:
        service.model(name, version)
    elif version:
        raise NotFound("a version was named without a model")
    names = [name] if name else sorted(service.models)
    return {"model_stats": [_statistics(one, service.model_version, service.counts[one].since_load()) for one in names]}


def _platform(service: Service) -> str:
    return f"{NAME}_{service.engine.name}"


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _config_tensor(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    """Triton leaves the batch axis out of `dims` exactly where `max_batch_size` is above 0."""
    kind = _CONFIG_TYPE.get(spec.datatype, f"TYPE_{spec.datatype}")
    return {"name": spec.name, "data_type": kind, "dims": list(spec.shape[1:] if batched else spec.shape)}


def _config_parameters(service: Service, model: ServedModel) -> dict[str, str]:
    engine = service.engine
    parameters = {"manifest": json.dumps(engine.manifest.to_json()), "precision": engine.runtimes[0].precision}
    for one in model.inputs:
        if one.shades:
            parameters[f"{one.name}.also"] = "UINT8 [-1,-1,-1,3] or [-1,3,-1,-1]: RGB shades"
    for one in model.outputs:
        if one.formats:
            parameters[f"{one.name}.formats"] = ", ".join(one.formats)
    if model.name == "depth" and service.depth_unit is not None:
        parameters["unit"] = service.depth_unit
    if model.name in ("segmentation", "classification"):
        names = service.classes if model.name == "segmentation" else service.labels
        parameters["classes"] = json.dumps(names)
    return parameters


def _statistics(name: str, version: str, counts: ModelCounts) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.rows,
        "execution_count": counts.executions,
        "inference_stats": {stage: _duration(getattr(counts, stage)) for stage in STAGES},
        "batch_stats": [
            {"batch_size": rows, "compute_infer": _duration(stage)} for rows, stage in sorted(counts.batches.items())
        ],
    }


def _duration(stage: Stage) -> dict[str, int]:
    return {"count": stage.count, "ns": stage.ns}
