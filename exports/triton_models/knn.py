"""Triton model: images or embeddings in, the nearest items of an exported collection out.

Collections are the files NAME.npz beside it (`unit` [n,D], `ids`, `labels`). Images go through the model `embedding` of this server.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

DEFAULT_K = 5


class TritonPythonModel:
    """`image` BYTES [N] or `embedding` FP32 [N,D] to `ids`, `labels` BYTES [N,k] and `scores` FP32 [N,k]."""

    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self.collections = {path.stem: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}

    def execute(self, requests):
        answers = []
        for request in requests:
            try:
                answers.append(self._answer(request))
            except ValueError as error:
                told = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                answers.append(pb_utils.InferenceResponse(error=told))
        return answers

    def _answer(self, request):
        parameters = json.loads(request.parameters() or "{}")
        name = str(parameters.get("collection", "samples"))
        if name not in self.collections:
            raise ValueError(f"there is no collection {name!r:.80}; there are: {', '.join(self.collections) or 'none'}")
        collection = self.collections[name]
        queries_ND = self._queries(request)
        if queries_ND.shape[1:] != collection["unit"].shape[1:]:
            raise ValueError(f"embeddings are {queries_ND.shape}; wanted [N, {collection['unit'].shape[1]}]")
        k = self._k(parameters.get("k"), len(collection["unit"]), name)
        rows, scores = nearest(queries_ND, collection["unit"], k)
        tensors = [
            pb_utils.Tensor(
                key,
                np.array([text.encode() for text in collection[key][rows.ravel()].tolist()], object).reshape(
                    rows.shape
                ),
            )
            for key in ("ids", "labels")
        ]
        return pb_utils.InferenceResponse([*tensors, pb_utils.Tensor("scores", scores)])

    def _queries(self, request):
        given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in ("image", "embedding")}
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        if len(given) != 1:
            raise ValueError(f"model 'knn' wants either 'image' or 'embedding'; {len(given)} inputs came")
        if "embedding" in given:
            return given["embedding"].as_numpy()
        inner = pb_utils.InferenceRequest(
            model_name="embedding", requested_output_names=["embedding"], inputs=[given["image"]]
        )
        answer = inner.exec()
        if answer.has_error():
            raise ValueError(answer.error().message())
        return pb_utils.get_output_tensor_by_name(answer, "embedding").as_numpy()

    def _k(self, given, n, name):
        if given is None:
            return min(DEFAULT_K, n)
        try:
            k = int(given)
        except (TypeError, ValueError):
            k = 0
        if not 1 <= k <= n:
            raise ValueError(f"parameter 'k' is {given}, and collection {name!r} holds {n} items; wanted 1 to {n}")
        return k


def nearest(queries_ND, unit_nD, k):
    """Rows and cosines [N,k] of the nearest, best first, the lower row first among equals."""
    length = np.linalg.norm(queries_ND, axis=1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise ValueError("an embedding is zero or not finite, so it has no direction to compare")
    scores_Nn = (queries_ND / length).astype(np.float32) @ unit_nD.T
    rows = np.argsort(-scores_Nn, axis=1, kind="stable")[:, :k]
    return rows, np.clip(np.take_along_axis(scores_Nn, rows, 1), -1, 1)
