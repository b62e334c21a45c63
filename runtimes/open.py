"""`--ckpt` to a running network: what was named decides what computes it."""

from pathlib import Path

from backbones.checkpoints import load_backbone
from backbones.network import load_heads, make_network
from data.errors import InputError
from runtimes.connection import REMOTE_SCHEMES
from runtimes.onnx_build import check_one_build
from runtimes.runtime import Runtime
from runtimes.torch_runtime import TorchRuntime


def open_runtime(
    ckpt: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    depth_head: str | Path | None = None,
    segmentation_head: str | Path | None = None,
    max_batch: int | None = None,
) -> Runtime:
    """A runtime for a checkpoint, published weights, a Hugging Face folder, a catalog name, an .onnx, a plan or a server's address.

    `threads` bounds the CPU threads, `max_batch` the images that an exported file computes at a time;
    heads add the outputs `depth` and `classes` to a checkpoint. Raises InputError.
    """
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads}: wanted at least 1")
    name = str(ckpt)
    remote, exported = name.startswith(REMOTE_SCHEMES), name.lower().endswith(".onnx")
    planned = name.lower().endswith(".plan")
    for kind, head in (("depth", depth_head), ("segmentation", segmentation_head)):
        if head is not None and (remote or exported or planned):
            where = "a server" if remote else "an exported file"
            raise InputError(f"{ckpt}: a {kind} head cannot be added to {where}")
    # Each engine's library takes a while to load, and a command needs one of them.
    if remote:
        from runtimes.remote import RemoteRuntime

        return RemoteRuntime(name)
    if planned:
        from runtimes.tensorrt_runtime import TensorRTRuntime

        return TensorRTRuntime(name, device=device, max_batch=max_batch)
    if exported:
        from runtimes.onnx_runtime import OnnxRuntime

        return OnnxRuntime(name, device=device, threads=threads, max_batch=max_batch)
    check_one_build()  # said at every start, whichever engine runs
    backbone = load_backbone(ckpt)
    network = make_network(backbone, load_heads(backbone, None, depth_head, segmentation_head))
    return TorchRuntime(backbone, network=network, device=device, threads=threads)
