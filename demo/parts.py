"""What the tabs share: the server, the chosen image, who looks at what, and the way an event of an image tab is bound."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from backbones.checkpoints import Manifest
from data.datasets import open_dataset
from demo.client import Served
from demo.visits import Turns
from runtimes.runtime import step_px

MAX_SIZE_PX = 1024
"""Largest side that servers let a request ask for unless told otherwise."""
WORDS_WITHOUT = {
    "attention": "This server serves no attention maps.",
    "knn": "This server serves no search.",
    "depth": "This server has no depth head.",
    "segmentation": "This server has no segmentation head.",
}


@dataclass(frozen=True)
class Sample:
    """A picture that is ready to click."""

    path: str
    label: str
    title: str


def signal(value: str, elem_id: str) -> gr.Textbox:
    """A value in the browser whose change is an event; of a gr.State it is one only after work that went through the queue."""
    return gr.Textbox(value, visible="hidden", label=elem_id, elem_id=elem_id)


def read_samples(listing: Path) -> list[Sample]:
    """The images of a CSV; none where it is missing."""
    if not listing.is_file():
        return []
    items = open_dataset(str(listing)).items
    return [
        Sample(str(listing.parent / item.name), item.label or "", item.row.get("title") or item.name) for item in items
    ]


@dataclass(frozen=True)
class Parts:
    """Everything that a tab is made from."""

    served: Served
    beside: Served | None
    """A second model to compare with."""
    manifest: Manifest
    models: frozenset[str]
    """Models of `served`."""
    samples: Sequence[Sample]
    bundled: bool
    """Whether `served` is the bundled backbone with its head, of which more is known than any manifest says."""
    runs: Path
    """Run folders lie below it."""
    turns: Turns
    image: gr.Image
    chosen: gr.Textbox
    """Path of the image; it changes once for each image, where the image's own event comes twice."""
    loaded: Any
    """Event of a page that was opened."""
    looked_at: gr.Textbox
    """Name of the tab in front."""
    back: gr.Textbox
    """Changes whenever the server came back."""

    @contextlib.contextmanager
    def tab(self, label: str, name: str, image: bool = True) -> Iterator[gr.Tab]:
        """A tab of the page; `image`: whether it is about the chosen image, which otherwise makes room."""
        with gr.Tab(label, id=name, elem_id=f"tab-{name}") as tab:
            yield tab
        wide = "false" if image else "true"
        tab.select(
            None,
            None,
            self.looked_at,
            js=f"() => {{ document.body.classList.toggle('wide', {wide}); return '{name}' }}",
        )

    def has(self, model: str, more: str = "") -> bool:
        """Whether the server serves a model; says so on the page where it does not."""
        if model not in self.models:
            gr.Markdown(f"**{WORDS_WITHOUT[model]}** {more}", elem_classes="hint")
        return model in self.models

    def size_slider(self, elem_id: str) -> gr.Slider:
        """Any resolution, in whole patches, up to what servers take."""
        step, whole = step_px(self.manifest), self.manifest.preprocess.whole_px
        least, most = 2 * step, MAX_SIZE_PX // step * step
        return gr.Slider(
            least,
            most,
            max(least, whole // step * step),
            step=step,
            label="Resolution: pixels that the network sees across",
            elem_id=elem_id,
        )

    def on_image(
        self,
        name: str,
        work: Callable[..., Any],
        controls: Sequence[Any],
        outputs: Sequence[Any],
        also: Sequence[Any] = (),
        on_change: bool = True,
    ) -> None:
        """Do `work(path, *controls)` while this tab is in front: for a new image, a moved control, and when the server is back.

        `also` are more triggers; without `on_change` a control's value is used, and does not trigger.
        """

        def event(request: gr.Request, looked_at: str, path: str | None, *values: Any) -> Any:
            if looked_at != name or path is None:
                return gr.skip()
            return self.turns.newest(request, work.__qualname__, work, path, *values)

        moved = [control.change for control in controls if on_change and hasattr(control, "change")]
        gr.on(
            [self.chosen.change, self.looked_at.change, self.back.change, *moved, *also],
            event,
            [self.looked_at, self.image, *controls],
            list(outputs),
            trigger_mode="always_last",
        )
