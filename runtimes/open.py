"""`--ckpt` to a running network: what was named decides what computes it."""

from pathlib import Path

from backbones.checkpoints import load_backbone
from backbones.heads import load_depth_head
from data.errors import InputError
from runtimes.onnx_runtime import OnnxRuntime, check_one_build
from runtimes.remote import REMOTE_SCHEMES, RemoteRuntime
from runtimes.runtime import Runtime
from runtimes.torch_runtime import TorchRuntime


def open_runtime(
    ckpt: str | Path, *, device: str = "auto", threads: int | None = None, depth_head: str | Path | None = None
) -> Runtime:
    """A runtime for a checkpoint, published weights, a Hugging Face folder, an .onnx, a catalog name or a server's address.

    `threads` bounds the CPU threads; `depth_head` adds the output `depth` to a checkpoint. Raises InputError.
    """
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads}: wanted at least 1")
    name = str(ckpt)
    remote, exported = name.startswith(REMOTE_SCHEMES), name.lower().endswith(".onnx")
    if depth_head is not None and (remote or exported):
        raise InputError(f"{ckpt}: a depth head cannot be added to {'a server' if remote else 'an exported file'}")
    if remote:
        return RemoteRuntime(name)
    if exported:
        return OnnxRuntime(name, device=device, threads=threads)
    check_one_build()  # said at every start, whichever engine runs
    backbone = load_backbone(ckpt)
    head = None if depth_head is None else load_depth_head(depth_head, backbone.manifest.weights_sha256)[0]
    return TorchRuntime(backbone, head, device=device, threads=threads)
