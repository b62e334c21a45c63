"""The training loop: a recipe and a data set in, a run folder out.

A run is exact: views depend on (seed, epoch, image) only, what a step draws on (seed, step) only, and the state holds weights, optimiser,
centres and position, so that a run interrupted anywhere and resumed ends, on a CPU, with the same bits as one that was never interrupted.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.checkpoints import Manifest, save_backbone
from data.datasets import Dataset
from data.errors import InputError
from data.loader import Maker, ViewLoader, Views
from data.streams import Stream
from training import parallel
from training.distillation import State
from training.feature_distillation import FeatureSpec
from training.guard import Guard
from training.guides import fingerprint, learn_from
from training.methods import make_state, take_step_
from training.picture import Album
from training.plan import Plan
from training.probe import EvalEvery, KnnProbe
from training.recipe import Recipe
from training.resume import everything, restore_
from training.run_folder import RunFolder
from training.run_log import NoLog, RunLog
from training.run_page import RunPage
from training.saved_state import Saver
from training.scale import Scale, plain_backbone, spread_
from training.speed import measure_speed
from training.step import parts_of
from training.stopping import dead_workers_named, failed_writes_named, leave, stop_signals
from training.warm_start import warm_start_, warming_heads
from training.watch import Watch

SAVE_EVERY_S = 120.0


@dataclass(frozen=True)
class Student:
    """One of the networks that learn at the same time."""

    name: str
    recipe: Recipe
    out: Path


def train(
    recipe: Recipe,
    dataset: Dataset | Stream,
    out: Path,
    *,
    recipe_name: str,
    source: str,
    revision: str,
    seed: int = 0,
    workers: int = 1,
    views: Maker = "workers",
    device: torch.device | None = None,
    init: str | None = None,
    freeze_backbone_steps: int | None = None,
    teacher: str | None = None,
    beside: Sequence[Student] = (),
    eval_data: str | None = None,
    eval_every: EvalEvery | None = None,
    scale: Scale | None = None,
    stop_at_step: int | None = None,
) -> Path:
    """Train to the end (or to `stop_at_step`, then resumable) and return the path of the teacher's checkpoint.

    `init` names the weights to begin with instead of random ones, see `warm_start_`; heads learn alone for `freeze_backbone_steps`, see
    `warming_heads`; `teacher` the frozen teacher that is learned from, a run or any backbone, see `learn_from`; `beside` other students
    that learn from it at the same time, on the same views, each as it would alone; `eval_data` a labelled set on which the run's teacher
    is measured, by default after each epoch, and whose test images are drawn; `scale` how it is computed, which changes nothing of what
    is learned.

    Raises InputError for data or a folder that do not fit, CheckFailed where the loss stays non-finite.
    """
    device, scale = device or torch.device("cpu"), scale or Scale()
    check_possible(dataset, seed, init, freeze_backbone_steps)
    students, guide = [Student(recipe_name, recipe, out), *beside], None
    for one in students:
        one.recipe.check_start(one.name, init, teacher)
    if teacher:
        recipes, guide = learn_from(teacher, [one.recipe for one in students], device, scale.accumulate)
        students = [replace(one, recipe=fitted) for one, fitted in zip(students, recipes, strict=True)]
    check_alike(students, teacher)
    recipe, share = students[0].recipe, parallel.part_of(students[0].recipe.batch_size)
    list(parts_of(share, scale.accumulate))  # raises at once where they do not divide
    places, rank, world_size = out / "places.jsonl", parallel.rank(), parallel.world_size()
    loader = ViewLoader(
        dataset, recipe.crops, share, seed, workers, views=views, mean=recipe.preprocess.mean, std=recipe.preprocess.std,
        device=device, rank=rank, world_size=world_size, places=places,
    )  # fmt: skip
    steps_per_epoch = recipe.epoch_steps or len(loader)
    probe = KnnProbe(eval_data, (eval_every or EvalEvery()).steps(steps_per_epoch)) if eval_data else None
    known = {"data": dataset.fingerprint(), "seed": seed, "views": views} | ({"init": init} if init else {})
    if guide is not None:
        known |= {"teacher": {"run": teacher, "weights_sha256": fingerprint(guide)}}
    origin = {"source": source, "revision": revision}
    with ExitStack() as open_until_done:
        open_until_done.enter_context(failed_writes_named(out))
        open_until_done.enter_context(dead_workers_named(out))
        runs: list[Run] = []
        for student in students:
            if init:
                fitted = warming_heads(student.recipe, init, recipe.epochs * steps_per_epoch, freeze_backbone_steps)
                student = replace(student, recipe=fitted)
            runs.append(prepare(student, known, origin, loader, guide, probe, scale, spread_guide=not runs))
        end = min(runs[0].plan.steps, stop_at_step or runs[0].plan.steps)
        stopped = open_until_done.enter_context(stop_signals())
        for run in runs:
            log = RunLog(run.folder, run.step, end, run.resolved | run.speed.describe()) if rank == 0 else NoLog()
            open_until_done.enter_context(run.saver)
            run.begin(end, stopped, open_until_done.enter_context(log))
        march(runs, end)
    return runs[0].folder.checkpoint


def check_possible(dataset: Dataset | Stream, seed: int, init: str | None, freeze_backbone_steps: int | None) -> None:
    """Raise InputError for what no recipe can be trained on."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: want 0 to 2^63 - 1")
    if len(dataset) < 2:
        raise InputError(
            f"{dataset.name}: {len(dataset)} image; self-distillation needs at least one batch of different images"
        )
    if freeze_backbone_steps and not init:
        raise InputError("--freeze-backbone-steps is for --init: random backbones have nothing to keep")


def check_alike(students: Sequence[Student], teacher: str | None) -> None:
    """Raise InputError unless the students can learn side by side, and have the teacher that they need."""
    if not teacher and any(isinstance(student.recipe.step, FeatureSpec) for student in students):
        raise InputError("this recipe learns the features of a teacher; name one with --teacher")
    if len(students) > 1 and not teacher:
        raise InputError(f"{len(students)} recipes at once share the answers of a teacher; name it with --teacher")
    if len({student.name for student in students}) < len(students):
        raise InputError("the same recipe was named twice; name each once")
    first = students[0]
    for other in students[1:]:
        for name in ("crops", "batch_size", "epochs", "epoch_steps"):
            one, another = getattr(first.recipe, name), getattr(other.recipe, name)
            if one != another:
                raise InputError(
                    f"recipes {first.name} and {other.name} have different {name}; students of one teacher see the same views: "
                    "give both --epochs and --batch-size, and choose recipes of equal crops"
                )
        if statistics_of(first.recipe) != statistics_of(other.recipe):
            raise InputError(
                f"recipes {first.name} and {other.name} normalise images by another mean or std; students of one teacher see the same views"
            )


def statistics_of(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which the recipe's network sees images, in training and afterwards."""
    return recipe.preprocess.mean, recipe.preprocess.std


def prepare(
    student: Student,
    known: dict[str, Any],
    origin: dict[str, Any],
    loader: ViewLoader,
    guide: Any,
    probe: KnnProbe | None,
    scale: Scale,
    spread_guide: bool = True,
) -> "Run":
    """A run as it begins, or as it was saved. `known` must be the same when it is resumed, `origin` is only told.

    `spread_guide` is for the first of several students, which share the teacher.
    """
    recipe, folder, device = student.recipe, RunFolder(student.out), loader.device
    resolved = {"recipe": recipe.to_json(), "name": student.name} | known
    resuming = parallel.of_the_first(lambda: folder.open(resolved))
    torch.manual_seed(known["seed"])
    state = make_state(recipe, device)
    if "init" in known and not resuming:
        warm_start_(state, known["init"])
    state.guide = guide if spread_guide else None
    spread_(state, recipe, scale)
    state.guide = guide
    plan = Plan(recipe, recipe.epoch_steps or len(loader))
    step = restore_(state, folder) if resuming else 0
    if parallel.rank() == 0:
        folder.keep_log_until(step)
    return Run(recipe, plan, folder, state, loader, resolved | origin, probe, scale, step)


def march(runs: Sequence["Run"], end: int) -> None:
    """Take the steps up to `end` of all runs, on the same views; saves and leaves early on a signal.

    Runs that were interrupted between their saves go on from different steps: those that are ahead wait.
    """
    step, waited_from, signal_number = min(run.step for run in runs), time.monotonic(), 0
    for views in runs[0].batches(step, end):
        began = time.monotonic()
        for run in runs:
            if run.step == step:
                signal_number = max(signal_number, run.take(views, began - waited_from))
        step += 1
        if signal_number:
            for run in runs:
                run.save()
                run.saver.wait()
            leave(signal_number, step, [run.folder for run in runs])
        waited_from = time.monotonic()
    for run in runs:
        run.save(last=True)
        run.saver.wait()


class Run:
    """A run under way: takes steps, writes the folder."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        folder: RunFolder,
        state: State[Any],
        loader: ViewLoader,
        resolved: dict[str, Any],
        probe: KnnProbe | None,
        scale: Scale,
        step: int,
    ) -> None:
        self.scale, self.saver, self.step = scale, Saver(folder.states), step
        self.recipe, self.plan, self.folder, self.state, self.loader = recipe, plan, folder, state, loader
        self.resolved, self.probe = resolved, probe
        self.n_listed = 0
        self.listed_before = folder.listed() if step else {}
        self.guard: Guard | None = None
        self.speed = measure_speed(recipe, self.device, parallel.world_size(), state.guide)
        if parallel.rank() == 0:
            self.album = Album(
                folder.path, probe.splits.val if probe else loader.dataset, recipe.preprocess, loader.dataset
            )
            self.page = RunPage(folder, resolved, plan.steps, self.album)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.state.centers["dino"].device

    def begin(self, end: int, stopped: Callable[[], int | None], log: NoLog) -> None:
        """Get ready for the steps up to `end`; `stopped` tells of a signal."""
        self.end, self.stopped, self.log = end, stopped, log
        self.watch = Watch(self.recipe, self.plan.steps_per_epoch, self.folder, log)
        if self.step == 0:
            self.watch.begin(self.loader.dataset)
            if self.probe and parallel.rank() == 0 and not self.album.held_out:
                log.say("note: images of --eval-data are trained on as well, so its k-NN tells less about new ones")
        if self.probe and "init" in self.resolved:
            self.guard = Guard(self.folder, log)
            self.guard.begin(self.step)
            if self.step == 0:
                self._measure(self.probe)
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None

    def take(self, views: Views, waited_s: float) -> int:
        """The next step, for whose views it waited so long; saves when it is time. Returns the number of a signal that came, or 0."""
        began = time.monotonic()
        record = self._step(self.step, views)
        record |= self.speed.of_step(waited_s + time.monotonic() - began, waited_s)
        self.step += 1
        if self.probe and self.probe.is_due(self.step, self.end):
            record |= self._measure(self.probe)
        self.log.write(self.step, record)
        due = time.monotonic() - self.saved_at > SAVE_EVERY_S or self.step % self.plan.steps_per_epoch == 0
        # All processes save and leave at the same step: whoever has a reason, all have it.
        reasons = parallel.largest(4 * (self.stopped() or 0) + 2 * due + self.saver.failed, self.device)
        if reasons:
            self.saver.wait()
        if reasons > 1:
            self.save()
        return reasons // 4

    def _measure(self, probe: KnnProbe) -> dict[str, float]:
        step, backbone = self.step, plain_backbone(self.state.teacher)
        if backbone is None:
            return {}
        top1 = probe.top1(backbone, self._manifest(step), self.device.type)
        self.log.say(f"step {step}: k-NN top-1 of the teacher {top1:.4f}")
        if self.guard and self.guard.see(step, top1):
            save_backbone(self.guard.best_checkpoint, backbone, self._manifest(step))
        return {"knn_top1": top1}

    def batches(self, step: int, end: int) -> Iterator[Views]:
        """The views of the steps from `step` up to `end`."""
        while step < end:
            epoch, batch = divmod(step, len(self.loader))
            for views in self.loader.epoch(epoch, batch):
                if step == end:
                    return
                yield views
                step += 1

    def _step(self, step: int, views: Views) -> dict[str, Any]:
        at = self.plan.at(step)
        # What a step draws depends on its number only: loaders and pictures draw from the same generator, and not as often in every run.
        rng = np.random.default_rng([self.resolved["seed"], step])
        torch.manual_seed((int(rng.integers(2**63)) + parallel.rank()) % 2**63)
        watch = self.watch.looks_at(step)
        found = take_step_(self.state, views, at, self.recipe, rng, watch, self.scale.accumulate)
        self.watch.see(step, found, self.state, views)
        return {"step": step, "epoch": step // len(self.loader), **found, **asdict(at)}

    def save(self, last: bool = False) -> None:
        """Begin to write the state; write checkpoint, picture and list of skipped images. All processes call it.

        Nothing is written again that was saved after this very step, unless it is the `last`. Raises CheckFailed, and leaves what was
        saved before as it is, where a weight is not finite.
        """
        step = self.step
        if self.saved_step == step and not last:
            return
        self.saved_at, self.saved_step = time.monotonic(), step
        self.watch.check_weights(step, self.state)
        skipped = {name: reason for part in parallel.gathered(self.loader.skipped) for name, reason in part.items()}
        self.saver.start(step, everything(self.state, step))
        backbone = plain_backbone(self.state.teacher)
        if backbone is None:
            return
        save_backbone(self.folder.checkpoint, backbone, self._manifest(step))
        self._list_skipped(skipped)
        if last or self.album.is_due(step):
            self.album.add(step, backbone)
        self.page.write(step)

    def _manifest(self, step: int) -> Manifest:
        return Manifest(
            architecture={},
            preprocess=self.recipe.preprocess,
            recipe={"name": self.resolved["name"], "seed": self.resolved["seed"], **self.resolved["recipe"]},
            step=step,
            source=self.resolved["source"],
            revision=self.resolved["revision"],
            data_fingerprint=self.resolved["data"],
        )

    def _list_skipped(self, found: Mapping[str, str]) -> None:
        # A process that resumed meets only some of those that were met before it.
        skipped = {**self.listed_before, **found}
        if len(skipped) == self.n_listed:
            return
        name, reason = next(iter(skipped.items()))
        self.log.say(
            f"{len(skipped)} of {len(self.loader.dataset)} images cannot be read and are passed over, first {name} ({reason}); "
            "skipped.json lists them"
        )
        self.folder.write_text(self.folder.skipped.name, json.dumps(skipped, indent=1))
        self.n_listed = len(skipped)
