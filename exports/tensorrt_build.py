"""An ONNX graph to a TensorRT plan, by the Python API that TensorRT 10, TensorRT 11 and TensorRT-RTX share.

The network is strongly typed: what is computed in which precision stands in the graph, and no builder flag changes it (TensorRT 11 has
none). Nothing but the API itself is imported here, so that any environment that has one can build.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import CheckFailed, InputError

OLDEST = 10
"""Major version of TensorRT whose networks can be strongly typed and whose tensors have names."""
OPERATORS = frozenset(
    """Abs Add And ArgMax Cast Concat Conv ConvTranspose DequantizeLinear Div Equal Expand Gather Gelu Identity LayerNormalization
    Less MatMul Max MaxPool Min Mul QuantizeLinear Range ReduceMean ReduceSum Relu Reshape Resize Shape Sigmoid Slice Softmax Split
    Squeeze Sub Transpose Unsqueeze Where""".split()  # noqa: SIM905 (a list of forty strings is no easier to read)
)
"""Operators that exported files consist of and that TensorRT's parser takes."""
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Profile:
    """The sizes of `pixels` that a plan is made for, each [N, 3, H, W]: the least, the one it is tuned to, the most."""

    least: Shape
    best: Shape
    most: Shape


def check_operators(kinds: Sequence[str], domains: Sequence[str]) -> None:
    """Raise InputError, naming it, for an operator that TensorRT does not take."""
    for kind, domain in zip(kinds, domains, strict=True):
        if domain not in ("", "ai.onnx") or kind not in OPERATORS:
            name = f"{domain}.{kind}" if domain else kind
            dynamic = kind in ("DynamicQuantizeLinear", "MatMulInteger")
            hint = "int8 is for CPUs, use --precision int8-static" if dynamic else "use a file of exports.to_onnx"
            raise InputError(f"TensorRT does not take the operator {name} of this graph; {hint}")


def load_api() -> Any:
    """The module `tensorrt`. Raises InputError where it is missing or too old."""
    try:
        import tensorrt
    except Exception as error:  # an import of half an installation raises what it likes
        raise InputError(
            f"TensorRT is not installed here ({' '.join(str(error).split())[:120]}); "
            "install the package `tensorrt` on the machine with the GPU that the plan is for"
        ) from error
    version = str(getattr(tensorrt, "__version__", "0"))
    if int(version.split(".")[0]) < OLDEST:
        raise InputError(f"TensorRT {version} is installed; wanted {OLDEST}.0 or newer")
    return tensorrt


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings for the one line that we raise."""

    class Kept(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.lines.append(" ".join(text.split()))

    return Kept()


def build_plan(
    trt: Any,
    model: Path,
    profile: Profile,
    timing_cache: bytes = b"",
    capabilities: Sequence[str] = (),
) -> tuple[bytes, bytes]:
    """The plan, and the timing cache as it is afterwards (which makes the next build of a like network quicker).

    `capabilities` are names such as SM89, for TensorRT-RTX on a machine without a GPU. Raises InputError where the parser refuses the
    graph, CheckFailed where no plan can be built.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):  # which finds weights that lie beside it
        told = [str(parser.get_error(k).desc()) for k in range(parser.num_errors)]
        said = [text for text in (*told, *logger.lines) if text.strip().lower() not in ("", "false")]
        why = " ".join(" ".join(dict.fromkeys(said)).split())
        raise InputError(f"TensorRT's parser refuses the graph ({why[:300] or 'it gives no reason'})")
    config = builder.create_builder_config()
    sizes = builder.create_optimization_profile()
    sizes.set_shape("pixels", profile.least, profile.best, profile.most)
    config.add_optimization_profile(sizes)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for k, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), k)
    cache = config.create_timing_cache(timing_cache)
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=True)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CheckFailed(f"TensorRT built no plan ({'; '.join(logger.lines)[-300:] or 'it gives no reason'})")
    after = config.get_timing_cache()
    return bytes(plan), b"" if after is None else bytes(after.serialize())
