"""Triton model: an .onnx beside it on ONNX Runtime, for servers that have the python backend only.

Requests that came together and have images of one size are computed together.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Inputs and outputs are those of the file."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        file = Path(args["model_repository"]) / args["model_version"] / config["parameters"]["file"]["string_value"]
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]

    def execute(self, requests):
        answers = [None] * len(requests)
        groups = {}
        for k, request in enumerate(requests):
            given = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.names]
            wanted = tuple(sorted(request.requested_output_names()))
            groups.setdefault((wanted, *(array.shape[1:] for array in given)), []).append((k, given))
        for (wanted, *_), members in groups.items():
            arrays = [np.concatenate(parts) for parts in zip(*(given for _, given in members), strict=True)]
            try:
                made = self.session.run(list(wanted), dict(zip(self.names, arrays, strict=True)))
            except Exception as error:  # every one who waits is told
                text = " ".join(str(error).split())
                for k, _ in members:
                    told = pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG)
                    answers[k] = pb_utils.InferenceResponse(error=told)
                continue
            start = 0
            for k, given in members:
                stop = start + len(given[0])
                parts = [pb_utils.Tensor(name, array[start:stop]) for name, array in zip(wanted, made, strict=True)]
                answers[k] = pb_utils.InferenceResponse(parts)
                start = stop
        return answers
