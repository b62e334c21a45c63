"""Images in, features out: the same call on torch, ONNX Runtime, TensorRT and a remote server."""
