"""Run inside the TensorRT-RTX environment: parse and build each .onnx named, print one JSON line a file."""

import json
import sys
from pathlib import Path

import tensorrt_rtx_bindings as trt

from data.errors import CheckFailed, InputError
from exports.tensorrt_build import Profile, build_plan

for path, least, best, most in (argument.split(",") for argument in sys.argv[1:]):
    profile = Profile(*((n, 3, int(side), int(side)) for n, side in ((1, least), (2, best), (4, most))))
    try:
        plan, cache = build_plan(trt, Path(path), profile, capabilities=("SM86", "SM89"))
        print(
            json.dumps({"path": path, "bytes": len(plan), "cache": len(cache), "version": trt.__version__}), flush=True
        )
    except (InputError, CheckFailed) as error:
        print(json.dumps({"path": path, "error": str(error)}), flush=True)
