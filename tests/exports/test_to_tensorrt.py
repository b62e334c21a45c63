"""Plans: which graphs may become one, for which sizes, what is refused; and the real parser and builder of TensorRT-RTX.

No GPU runs here, so what an engine computes is not tested: the builder's and the runtime's calls go to a stand-in for `tensorrt` that
computes with ONNX Runtime.
"""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from backbones.checkpoints import MANIFEST_KEY
from data.errors import CheckFailed, InputError
from exports import graph, onnx_file
from exports.onnx_file import OnnxSpec
from exports.tensorrt_build import OPERATORS, check_operators
from exports.to_onnx import export_onnx
from exports.to_tensorrt import check_graph, export_tensorrt, make_profile
from runtimes.onnx_runtime import OnnxRuntime
from runtimes.open import open_runtime
from runtimes.tensorrt_runtime import TensorRTRuntime
from tests.exports.artifacts import artifact
from tests.exports.test_heads_in_graph import CASES, heads_of_another_backbone, make_backbone_file, make_head_file
from tests.exports.test_precision import ANY

VENV = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoscope" / "venvs" / "trtx"


def metadata_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_every_exported_graph_has_only_operators_that_tensorrt_takes() -> None:
    seen: set[str] = set()
    for name in ("v1", "v2", "resnet"):
        model = onnx.load(artifact(name).onnx)
        check_graph(model)
        seen |= {node.op_type for node in model.graph.node}
    assert seen < OPERATORS


@pytest.mark.parametrize("case", [case for case in CASES if "ResNet" not in case])
def test_every_head_has_only_operators_that_tensorrt_takes(case: str, tmp_path: Path) -> None:
    name, kind, options = CASES[case]
    ckpt = make_backbone_file(name, tmp_path)
    head = make_head_file(ckpt, kind, options, tmp_path / "h.safetensors")
    export_onnx(ckpt, tmp_path / "x.onnx", **{f"{kind}_head": head})  # type: ignore[arg-type]
    check_graph(onnx.load(tmp_path / "x.onnx"))


def test_an_unsupported_operator_is_named() -> None:
    with pytest.raises(InputError, match="does not take the operator Det of this graph"):
        check_operators(["Add", "Det"], ["", ""])
    with pytest.raises(InputError, match=r"the operator com\.microsoft\.MultiHeadAttention"):
        check_operators(["MultiHeadAttention"], ["com.microsoft"])
    with pytest.raises(InputError, match="MatMulInteger of this graph; int8 is for CPUs, use --precision int8-static"):
        check_operators(["MatMulInteger"], [""])


def test_a_plan_is_made_for_the_sizes_that_are_shown_to_the_network() -> None:
    told = metadata_of(artifact("v1").onnx)  # views of 24 and 40 px, patches of 8
    profile = make_profile(told, 4, 16, None, None)
    assert (profile.least, profile.best, profile.most) == ((1, 3, 24, 24), (4, 3, 24, 24), (16, 3, 40, 40))
    wide = make_profile(told, 1, 1, 8, 96)
    assert (wide.least, wide.best, wide.most) == ((1, 3, 8, 8), (1, 3, 24, 24), (1, 3, 96, 96))
    for options, words in (
        ((0, 4, None, None), "--batch 0 --max-batch 4"),
        ((5, 4, None, None), "--batch 5 --max-batch 4"),
        ((1, 4, 12, None), "--min-px 12: wanted a multiple of the patch, 8"),
        ((1, 4, None, 0), "--max-px 0: wanted a multiple"),
        ((1, 4, 96, 48), "--min-px 96 is more than --max-px 48"),
    ):
        with pytest.raises(InputError, match=words):
            make_profile(told, *options)


# --- a stand-in for the module ------------------------------------------------------------------------------------------


def stand_in(spoiled: bool = False) -> ModuleType:
    """`tensorrt` as far as it is used: a plan is the graph itself behind a word, and a context runs it on ONNX Runtime."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = "11.4.0"
    severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)
    module.ILogger = type("ILogger", (), {"Severity": severity, "__init__": lambda self: None})
    module.Logger = type("Logger", (module.ILogger,), {"ERROR": 1, "__init__": lambda self, level: None})
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    module.TensorIOMode = SimpleNamespace(OUTPUT="output", INPUT="input")
    seen: dict[str, Any] = {}
    module.seen = seen

    class Builder:
        def __init__(self, logger: Any) -> None: ...
        def create_network(self, flags: int) -> Any:
            seen["flags"] = flags
            return SimpleNamespace()

        def create_builder_config(self) -> Any:
            caches = {}
            return SimpleNamespace(
                add_optimization_profile=lambda profile: seen.__setitem__("profile", profile.shapes),
                create_timing_cache=lambda known: SimpleNamespace(serialize=lambda: known + b"+"),
                set_timing_cache=lambda cache, ignore_mismatch: caches.__setitem__("one", cache),
                get_timing_cache=lambda: caches["one"],
            )

        def create_optimization_profile(self) -> Any:
            shapes: list[Any] = []
            return SimpleNamespace(shapes=shapes, set_shape=lambda *told: shapes.extend(told))

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            return b"plan" + network.content

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            self.network.content = onnx.load(path).SerializeToString()
            return True

    class Engine:
        def __init__(self, content: bytes) -> None:
            self.session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
            self.names = ["pixels", *(output.name for output in self.session.get_outputs())]
            self.num_io_tensors = len(self.names)

        def get_tensor_name(self, k: int) -> str:
            return self.names[k]

        def get_tensor_mode(self, name: str) -> str:
            return "input" if name == "pixels" else "output"

        def get_tensor_dtype(self, name: str) -> Any:
            return SimpleNamespace(name="INT32" if name == "classes" else "FLOAT")

        def create_execution_context(self) -> Any:
            return Context(self)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.addresses, self.shape = engine, {}, ()

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shape = shape
            zeros = np.zeros(shape, np.float32)
            made = self.engine.session.run(None, {"pixels": zeros})
            self.shapes = {name: array.shape for name, array in zip(self.engine.names[1:], made, strict=True)}
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.shapes[name]

        def set_tensor_address(self, name: str, address: int) -> None:
            self.addresses[name] = address

        def execute(self) -> bool:
            size = 4 * int(np.prod(self.shape))
            pixels = np.frombuffer(ctypes.string_at(self.addresses["pixels"], size), np.float32).reshape(self.shape)
            made = self.engine.session.run(None, {"pixels": -pixels if spoiled else pixels})
            for name, array in zip(self.engine.names[1:], made, strict=True):
                ctypes.memmove(self.addresses[name], array.tobytes(), array.nbytes)
            return True

    class Runtime:
        def __init__(self, logger: Any) -> None: ...
        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            return Engine(plan[4:]) if plan.startswith(b"plan") else None

    module.Builder, module.OnnxParser, module.Runtime = Builder, OnnxParser, Runtime
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in in the place of the module, and this machine's memory in that of a GPU's."""
    module = stand_in()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(TensorRTRuntime, "_gpu", staticmethod(lambda: "cpu"))
    monkeypatch.setattr(TensorRTRuntime, "_execute", lambda self: self._context.execute())
    return module


def test_a_plan_is_built_checked_told_of_and_run_like_any_network(fake: Any, tmp_path: Path) -> None:
    v1, plan = artifact("v1"), tmp_path / "x.plan"
    (tmp_path / "cache").write_bytes(b"earlier")
    told = export_tensorrt(v1.onnx, plan, batch=2, max_batch=4, min_px=8, max_px=48, timing_cache=tmp_path / "cache")
    assert fake.seen["flags"] == 1 << fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert fake.seen["profile"] == ["pixels", (1, 3, 8, 8), (2, 3, 24, 24), (4, 3, 48, 48)]
    assert (tmp_path / "cache").read_bytes() == b"earlier+"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x.plan", "x.plan.json"]
    assert json.loads((tmp_path / "x.plan.json").read_text()) == told
    assert told["plan_sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert told["manifest"] == json.loads(metadata_of(v1.onnx)[MANIFEST_KEY])
    pixels = np.random.default_rng(0).standard_normal((9, 3, 16, 40), dtype=np.float32)
    with open_runtime(plan) as found, OnnxRuntime(v1.onnx) as wanted:
        assert (found.name, found.outputs, found.manifest) == ("tensorrt", wanted.outputs, wanted.manifest)
        for name, array in wanted.run(pixels, wanted.outputs).items():
            np.testing.assert_allclose(found.run(pixels, (name,))[name], array, atol=2e-5 * np.abs(array).max())
        with pytest.raises(InputError, match="this plan was built for 8x8 to 48x48"):
            found.run(np.zeros((1, 3, 64, 8), np.float32))


def test_a_checkpoint_is_exported_first_with_its_heads(fake: Any, tmp_path: Path) -> None:
    v1 = artifact("v1")
    export_tensorrt(v1.ckpt, tmp_path / "x.plan", depth_head=v1.depth_head)
    with open_runtime(tmp_path / "x.plan") as found:
        assert found.outputs == v1.outputs


def test_an_engine_that_computes_something_else_is_not_written(
    fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in(spoiled=True))
    with pytest.raises(CheckFailed, match=r"have a cosine of .* to ONNX Runtime's, wanted 0\.999; nothing was written"):
        export_tensorrt(artifact("v1").onnx, tmp_path / "x.plan")
    assert list(tmp_path.iterdir()) == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_without_tensorrt_the_command_says_so_with_status_2(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "exports.to_tensorrt", "--ckpt", str(artifact("v1").onnx)]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path / "x.plan")], cwd=repo_root, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: TensorRT is not installed here")
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_version_from_before_strong_types_is_refused(fake: Any, tmp_path: Path) -> None:
    fake.__version__ = "8.6.1"
    with pytest.raises(InputError, match=r"TensorRT 8\.6\.1 is installed; wanted 10\.0 or newer"):
        export_tensorrt(artifact("v1").onnx, tmp_path / "x.plan")


def test_what_cannot_become_a_plan_is_refused_and_nothing_is_left(fake: Any, tmp_path: Path, pictures: Path) -> None:
    v1 = artifact("v1")
    work = tmp_path / "work"
    work.mkdir()
    (work / "taken.plan").write_text("a file")
    uint8, dynamic = tmp_path / "uint8.onnx", tmp_path / "dynamic.onnx"
    export_onnx(v1.ckpt, uint8, spec=OnnxSpec(uint8=True))
    export_onnx(v1.ckpt, dynamic, spec=OnnxSpec(precision="int8"), data=str(pictures), tolerance=ANY)
    stranger = tmp_path / "stranger.onnx"
    model = onnx.load(v1.onnx)
    del model.metadata_props[:]
    onnx.save(model, stranger)
    others = heads_of_another_backbone(tmp_path)
    for ckpt, out, options, words in (
        (v1.onnx, "x.engine", {}, r"wanted the name of a file that ends in \.plan"),
        (v1.onnx, "taken.plan", {}, "is there already"),
        (v1.onnx, "x.plan", {"depth_head": v1.depth_head}, "is exported already"),
        (v1.onnx, "x.plan", {"batch": 0}, "--batch 0"),
        (uint8, "x.plan", {}, "export the .onnx without --uint8"),
        (dynamic, "x.plan", {}, "does not take the operator DynamicQuantizeLinear"),
        (stranger, "x.plan", {}, r"an \.onnx without our manifest"),
        (tmp_path / "none.onnx", "x.plan", {}, "no such file"),
        (v1.ckpt, "x.plan", {"depth_head": others["depth"]}, "this head fits the backbone"),
        (v1.ckpt, "x.plan", {"segmentation_head": others["segmentation"]}, "this head fits the backbone"),
        (v1.ckpt, "x.plan", {"segmentation_head": v1.depth_head}, "is a depth head; wanted a segmentation head"),
        (v1.ckpt, "x.plan", {"linear_head": v1.depth_head}, "is a depth head; wanted a linear head"),
        (v1.depth_head, "x.plan", {}, "holds a depth head, not a backbone"),
    ):
        with pytest.raises(InputError, match=words):
            export_tensorrt(ckpt, work / out, **options)  # type: ignore[arg-type]
    assert [path.name for path in work.iterdir()] == ["taken.plan"]


def test_a_plan_without_its_other_half_or_of_another_version_is_refused(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, beside = tmp_path / "x.plan", tmp_path / "x.plan.json"
    with pytest.raises(InputError, match=r"x\.plan: no such file"):
        open_runtime(plan)
    export_tensorrt(artifact("v1").onnx, plan)
    good = beside.read_text()
    with pytest.raises(InputError, match="--device cpu: a TensorRT plan runs on a GPU"):
        open_runtime(plan, device="cpu")
    for text, words in (
        ("{}", "does not tell what the plan is"),
        ("[1", "is not readable"),
        ("[]", "does not tell|is not readable"),
    ):
        beside.write_text(text)
        with pytest.raises(InputError, match=words):
            open_runtime(plan)
    beside.write_text(good)
    fake.__version__ = "10.13.0"
    with pytest.raises(InputError, match=r"was built by TensorRT 11\.4\.0, and 10\.13\.0 is installed; plans are tied"):
        open_runtime(plan)
    plan.write_bytes(plan.read_bytes()[:-10])
    with pytest.raises(InputError, match="was written for another plan"):
        open_runtime(plan)
    beside.write_text(good.replace(json.loads(good)["plan_sha256"], hashlib.sha256(plan.read_bytes()).hexdigest()))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InputError, match=r"TensorRT is not installed here; install `tensorrt==11\.4\.0`"):
        open_runtime(plan)
    beside.unlink()
    with pytest.raises(InputError, match=r"x\.plan\.json: no such file; a plan is two files"):
        open_runtime(plan)


# --- the real parser and builder --------------------------------------------------------------------------------------


@pytest.mark.tensorrt
@pytest.mark.timeout(1200)
def test_the_real_parser_and_builder_take_every_precision_and_head(
    pictures: Path, tmp_path: Path, repo_root: Path
) -> None:
    python = VENV / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no TensorRT-RTX in {VENV}; `make test-tensorrt` installs it")
    names = ("v1", "v2", "resnet")
    built: dict[str, tuple[Path, int]] = {name: (artifact(name).onnx, artifact(name).step_px) for name in names}
    for precision in ("fp16", "int8-static"):
        for name in names:
            path = tmp_path / f"{name}-{precision}.onnx"
            export_onnx(
                artifact(name).ckpt, path, spec=OnnxSpec(precision=precision), data=str(pictures), tolerance=ANY
            )  # type: ignore[arg-type]
            built[f"{name} {precision}"] = (path, artifact(name).step_px)
    for case, (name, kind, options) in CASES.items():
        folder = tmp_path / case.replace(" ", "-")
        ckpt = make_backbone_file(name, folder)
        head = make_head_file(ckpt, kind, options, folder / "h.safetensors")
        export_onnx(ckpt, folder / "x.onnx", **{f"{kind}_head": head})  # type: ignore[arg-type]
        built[case] = (folder / "x.onnx", artifact(name).step_px)
    with pytest.MonkeyPatch.context() as patch:  # weights in a file of their own
        patch.setattr(onnx_file, "ONE_FILE_BYTES", 50_000)
        patch.setattr(graph, "LEAST_BYTES", 1024)
        export_onnx(artifact("v1").ckpt, tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").is_file()
    built["weights in a second file"] = (tmp_path / "large.onnx", 8)
    foreign = onnx.helper.make_graph(
        [onnx.helper.make_node("Det", ["pixels"], ["embedding"])],
        "g",
        [onnx.helper.make_tensor_value_info("pixels", 1, ["N", 3, "H", "W"])],
        [onnx.helper.make_tensor_value_info("embedding", 1, ["N", 3])],
    )
    onnx.save(
        onnx.helper.make_model(foreign, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "det.onnx",
    )
    jobs = [f"{path},{2 * step},{3 * step},{4 * step}" for path, step in built.values()]
    ended = subprocess.run(
        [str(python), "-m", "tests.exports.build_with_rtx", *jobs, f"{tmp_path / 'det.onnx'},8,8,8"],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(jobs) + 1
    for name, line in zip(built, lines, strict=False):
        assert line.get("bytes", 0) > 10_000, (name, line)
    assert "parser refuses the graph" in lines[-1]["error"]
