"""A checkpoint on torch."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from backbones.checkpoints import Backbone
from backbones.network import Network
from backbones.vit import ViT
from data.errors import InputError
from runtimes.runtime import BACKBONE_OUTPUTS, Runtime, gpu_number


class TorchRuntime(Runtime):
    """A backbone and its heads in float32. Calls take turns: torch's thread count belongs to the process.

    `network` is this backbone with its heads; left out: without any.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        network: Network | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.manifest = backbone.manifest
        self.name = "torch"
        self.device = pick_device(device)
        network = network or Network(backbone.model)  # type: ignore[arg-type]
        self._held: Network | None = network.to(self.device).eval()
        self.outputs = self._network.output_names
        self.threads = threads
        self._lock = threading.Lock()

    @property
    def _network(self) -> Network:
        if self._held is None:
            raise InputError("this runtime was closed; open it again")
        return self._held

    def close(self) -> None:
        """Let go of the weights: a server that has loaded others may keep the rest of this for as long as it lives."""
        self._held = None

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        self.check_call(pixels_NCHW, outputs)
        with self._turn():
            pixels = self._on_device(pixels_NCHW)
            # A map costs more than an embedding; heads are left out unless one is wanted.
            headed = not set(outputs) <= set(BACKBONE_OUTPUTS)
            made = self._network(pixels) if headed else self._network.backbone.outputs(pixels)
            return {name: as_array(made[name]) for name in outputs}

    def run_blocks(self, pixels_NCHW: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """CLS [N, n, D] of the last `n` blocks, oldest first, and patches [N, h*w, D] of the last; all after the final norm.

        What an exported graph does not give. Raises InputError for a network without so many blocks.
        """
        self.check_call(pixels_NCHW, ("embedding",))
        backbone = self._network.backbone
        if not isinstance(backbone, ViT):
            raise InputError("a ResNet has no blocks with CLS tokens; use the features of its last layer")
        if n > backbone.spec.depth:
            raise InputError(f"the last {n} blocks were asked for; this backbone has {backbone.spec.depth}")
        with self._turn():
            layers = backbone.intermediate_layers(self._on_device(pixels_NCHW), n)
            cls_BnD = torch.stack([cls_BD for _, cls_BD in layers], dim=1)
            return as_array(cls_BnD), as_array(layers[-1][0])

    def run_layers(self, pixels_NCHW: np.ndarray, layers: tuple[int, ...], norm: bool) -> tuple[np.ndarray, np.ndarray]:
        """What a head on these blocks reads: patches [N, h*w, L D] and CLS [N, L D], the final norm applied where asked.

        Raises InputError for blocks that the network does not have.
        """
        self.check_call(pixels_NCHW, ("embedding",))
        backbone = self._network.backbone
        depth = backbone.spec.depth if isinstance(backbone, ViT) else 0
        if not isinstance(backbone, ViT) or max(layers) >= depth:
            raise InputError(f"blocks {list(layers)} were asked for; this network has {depth} with CLS tokens")
        with self._turn():
            made = backbone.outputs(self._on_device(pixels_NCHW), layers)
            patches_BND, cls_BD = self._network.read_layers(made, layers, norm)
            return as_array(patches_BND), as_array(cls_BD)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, with this runtime's number of threads."""
        with self._lock, torch.inference_mode():
            if self.threads is not None and torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)
            yield

    def _on_device(self, pixels_NCHW: np.ndarray) -> torch.Tensor:
        # torch warns of arrays that it could not write to, such as those that lie in a received message.
        return torch.from_numpy(np.require(pixels_NCHW, requirements=["C", "W"])).to(self.device)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """On the CPU, floats in float32; whole numbers stay what they are."""
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return array


def pick_device(name: str) -> str:
    """cpu or cuda, as `--device` asks. Raises InputError for a device that is not there."""
    number = gpu_number(name)
    found = torch.cuda.is_available()
    if name.startswith("cuda") and not found:
        raise InputError(f"--device {name}: torch sees no GPU here; use --device cpu or auto")
    if number is not None and number >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are the GPUs 0 to {torch.cuda.device_count() - 1} here")
    if number is not None:
        return name
    return "cuda" if found and name != "cpu" else "cpu"
