"""Load, unload, and change the served network while requests go on.

One backbone is served under several names, so loading any of them reads `--models` again and changes all of them at once: the new network
is brought up beside the old one, run at every usual size, checked, put in the old one's place between two requests, and the old one is
closed when its last request is answered. What fails on the way leaves the old one serving. Read in this order: Repository, check_network.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from data.errors import InputError
from data.preprocess import normalise
from runtimes.runtime import Runtime
from server.artifacts import Loaded, versions_in
from server.collection_items import Binding
from server.collections import Collections
from server.config import ServerConfig
from server.engine import Engine, EngineSpec
from server.errors import Conflict, NotFound
from server.evaluations import Evaluations
from server.models import make_models
from server.samples import build_samples
from server.service import Service

log = logging.getLogger("server")

Load = Callable[[ServerConfig], Loaded]
SAME_COSINE = 0.999
"""Two files of the same weights must agree this well; half precision does, a damaged file does not."""
SAME_ALONE = 1e-3
"""An image's embedding alone and within a batch may differ by this share of its largest value."""
LINGER_S = 1.0
"""How long an idle old network is kept for what has its answer and still draws a picture of it."""


def binding_of(engine: Engine) -> Binding:
    """What vectors of this network depend on."""
    preprocess = json.dumps(engine.manifest.preprocess.to_json(), sort_keys=True)
    return Binding(engine.manifest.weights_sha256, preprocess, engine.width)


class Repository:
    """What `--models` holds, and which of it is served."""

    def __init__(
        self, config: ServerConfig, load: Load, spec: EngineSpec, service: Service, evaluations: Evaluations
    ) -> None:
        self._config, self._load, self._spec = config, load, spec
        self._service, self._evaluations = service, evaluations
        self._changing = asyncio.Lock()
        self._loading: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def index(self, only_ready: bool = False) -> list[dict[str, str]]:
        """Every model and version there is, with its state and, where it is not served, why."""
        service = self._service
        state = "READY" if service.ready else "UNAVAILABLE"
        found = [(name, service.model_version, state, "") for name in service.models]
        found += [(name, service.model_version, "UNAVAILABLE", "unloaded") for name in service.unloaded]
        others = [one for one in versions_in(self._config.models) if one != service.model_version]
        found += [("backbone", version, "UNAVAILABLE", "not loaded") for version in others]
        keys = ("name", "version", "state", "reason")
        return [dict(zip(keys, one, strict=True)) for one in sorted(found) if one[2] == "READY" or not only_ready]

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Serve what `--models` holds now, or the version that the parameter `version` names, to all models: they share the network.

        Raises InputError and CheckFailed for what cannot be served, or has no such model, Conflict while an evaluation runs; the old
        network then stays. What has begun is finished, even if its caller leaves: half of it would be a network that nobody serves.
        """
        self._service.check_open()
        self._known(name)
        unknown = sorted(parameters.keys() - {"version"})
        if unknown:
            raise InputError(f"load takes the parameter 'version' only; {unknown[0]!r:.40} came")
        version = parameters.get("version")
        if version is not None and str(version) not in versions_in(self._config.models):
            there = ", ".join(versions_in(self._config.models)) or "none: --models is no repository of versions"
            raise NotFound(f"there is no version {str(version)!r:.20}; there are {there}")
        config = self._config if version is None else replace(self._config, version=str(version))
        task = asyncio.ensure_future(self._load_in_turn(config, name))
        self._loading.add(task)
        task.add_done_callback(self._loaded)
        await asyncio.shield(task)

    async def _load_in_turn(self, config: ServerConfig, name: str) -> None:
        async with self._changing:
            self._refuse_while_evaluating()
            loaded = await asyncio.to_thread(self._load, config)
            await self._change(loaded, name)

    def _loaded(self, task: asyncio.Task[None]) -> None:
        self._loading.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("not loaded", extra={"fields": {"error": " ".join(str(task.exception()).split())[:300]}})

    async def _change(self, loaded: Loaded, name: str) -> None:
        service, old = self._service, self._service.engine
        engine = await asyncio.to_thread(Engine, loaded.runtimes, self._spec)
        try:
            sides = {engine.preprocess.size_px, engine.preprocess.whole_px}
            store = service.collections.bound_to(binding_of(engine))
            _, absent = make_models(engine, store)
            if name in absent:
                raise InputError(
                    f"model {name!r} cannot be loaded: {absent[name]}; add what is missing, and load it again"
                )
            same = engine.manifest.weights_sha256 == old.manifest.weights_sha256
            await asyncio.to_thread(check_network, engine.runtimes, sides, old.runtimes[0] if same else None)
            if self._config.sample_data is not None:
                await build_samples(engine, store, self._config.sample_data)
            self._refuse_while_evaluating()  # once more: one may have begun while the network was brought up
        except BaseException:
            await engine.close()
            raise
        away, old_store = service.unloaded.keys() - {name}, service.collections
        service.use(engine, store, loaded.version, loaded.depth_unit, loaded.classes, loaded.labels)
        for other in away:  # as in Triton, what was unloaded comes back by its own name
            service.unload(other)
        log.info(
            "loaded", extra={"fields": {"version": loaded.version, "weights": engine.manifest.weights_sha256[:12]}}
        )
        task = asyncio.ensure_future(self._close_when_idle(old, None if old_store is store else old_store))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _refuse_while_evaluating(self) -> None:
        if self._evaluations.running:
            raise Conflict("an evaluation of the served network is running; wait for it, or cancel it")

    async def _close_when_idle(self, engine: Engine, store: Collections | None) -> None:
        """Also what the network's own view of the collections holds in memory, where nobody else shares it."""
        while self._service.runs_on(engine):
            await asyncio.sleep(0.02)
        await asyncio.sleep(LINGER_S)
        await engine.close()
        if store is not None:
            store.leave_memory()
        await asyncio.to_thread(_give_memory_back)

    async def unload(self, name: str) -> None:
        """Answer no more requests for a model; those that are in finish. Loading it brings it back.

        Raises NotFound, and Conflict while an evaluation runs.
        """
        self._service.check_open()
        self._known(name)
        self._refuse_while_evaluating()
        self._service.unload(name)
        log.info("unloaded", extra={"fields": {"model": name}})

    async def close(self) -> None:
        """Give up what is being loaded for nobody any more, and close what is still being closed."""
        for task in list(self._loading):
            task.cancel()
            await asyncio.wait([task])
        for task in list(self._closing):
            await task

    def _known(self, name: str) -> None:
        service = self._service
        names = {*service.models, *service.unloaded, *service.absent}
        if name not in names:
            raise NotFound(f"there is no model {name!r:.80}; there are: {', '.join(sorted(names))}")


def check_network(runtimes: tuple[Runtime, ...], sides: set[int], served: Runtime | None) -> None:
    """Run every copy at every usual size, as a batch and alone. Raises InputError for what nobody should be served.

    `served` runs the same weights now; the new file must then agree with it.
    """
    rng = np.random.default_rng(0)
    for side in (one for one in sorted(sides) if _takes(runtimes[0], one)):
        images = rng.integers(0, 256, (2, side, side, 3), np.uint8)
        pixels = np.stack([normalise(image, runtimes[0].manifest.preprocess) for image in images])
        for runtime in dict.fromkeys(runtimes):
            found = runtime.run(pixels, runtime.outputs)
            bad = next((name for name, values in found.items() if not np.isfinite(values).all()), None)
            if bad:
                raise InputError(f"the new network's {bad} at {side} px is not finite; the old one goes on serving")
            alone = runtime.run(pixels[1:], ("embedding",))["embedding"]
            apart = float(np.abs(alone - found["embedding"][1:]).max() / np.abs(alone).max())
            if apart > SAME_ALONE:
                raise InputError(
                    f"the new network answers an image alone otherwise than in a batch, by {apart:.1e} of the largest value; "
                    "the old one goes on serving"
                )
            if served is not None:
                _agree(found["embedding"], served.run(pixels, ("embedding",))["embedding"])


def _takes(runtime: Runtime, side: int) -> bool:
    """Whether it has this size at all: exports of one size, and plans, refuse others, and clients that ask for them are told."""
    try:
        runtime.check_sides(side, side)
    except InputError:
        return False
    return True


def _agree(new_ND: np.ndarray, old_ND: np.ndarray) -> None:
    lengths = np.linalg.norm(new_ND, axis=1) * np.linalg.norm(old_ND, axis=1)
    cosine = float(((new_ND * old_ND).sum(axis=1) / np.maximum(lengths, 1e-30)).min())
    if cosine < SAME_COSINE:
        raise InputError(
            f"the new file says it holds the weights that are served, and its embeddings agree only to a cosine of {cosine:.4f}, "
            f"wanted {SAME_COSINE}; the old one goes on serving"
        )


def _give_memory_back() -> None:
    """Let glibc return what a closed network held: its freed blocks lie scattered, and each next one would take new pages."""
    with contextlib.suppress(OSError, AttributeError):  # another C library needs no telling, or takes none
        ctypes.CDLL(None).malloc_trim(0)
