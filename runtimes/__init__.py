"""Images in, features out: the same call on torch, on ONNX Runtime and on a remote server."""
