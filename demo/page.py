"""The page: the chosen image and the samples beside the tabs, and a line that tells when the server is away."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from demo.attention import attention_tab
from demo.client import Served
from demo.dense import dense_tab
from demo.evaluate import evaluate_tab
from demo.parts import Parts, Sample, read_samples, signal
from demo.search import search_tab
from demo.similarity import similarity_tab
from demo.train import train_tab
from demo.video import video_tab
from demo.visits import KEPT_S, Turns, as_it_came

CSS = (Path(__file__).parent / "page.css").read_text()
WATCH_S = 3.0
FIRST = 2
"""The sample that is there at first; on it heads differ visibly."""


def make_page(served: Served, beside: Served | None, samples_csv: Path, runs: Path, bundled: bool) -> gr.Blocks:
    """The page for a server that is up. Raises gr.Error for one that does not answer.

    `beside` is a second server to compare with; `runs` the folder below which runs are watched; `bundled` whether `served` is the bundled
    backbone.
    """
    manifest, models = served.manifest(), served.models()
    samples = read_samples(samples_csv)
    with gr.Blocks(title="Dinoscope", delete_cache=(60, KEPT_S), analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(
            "# Dinoscope\nWhat a self-supervised backbone sees. It learned from images alone, without labels: "
            "upload one of yours, or click a sample."
        )
        looked_at, back = signal("attention", "looked-at"), signal("0", "times-back")
        _watch(served, back)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=1, min_width=300, elem_id="image-column"):
                image = _image(samples)
                chosen = signal("", "chosen")
                image.change(None, image, chosen, js="image => image ? image.path : ''")
            with gr.Column(scale=3, min_width=320), gr.Tabs(overflow_behavior="wrap", elem_id="tabs"):
                parts = Parts(
                    served=served,
                    beside=beside,
                    manifest=manifest,
                    models=frozenset(models),
                    samples=samples,
                    bundled=bundled,
                    runs=runs,
                    turns=Turns(),
                    image=image,
                    chosen=chosen,
                    loaded=blocks.load,
                    looked_at=looked_at,
                    back=back,
                )
                attention_tab(parts)
                similarity_tab(parts)
                search_tab(parts, samples_csv.parent)
                dense_tab(parts)
                video_tab(parts)
                evaluate_tab(parts)
                train_tab(parts)
        gr.Markdown(
            f"What you upload goes to the server, is answered and deleted {KEPT_S // 60} minutes later; only what you add to "
            "a collection is kept. Origins of the samples: `samples/ATTRIBUTION.md`.",
            elem_classes="hint",
        )
    return blocks


def _image(samples: list[Sample]) -> gr.Image:
    """The image that the tabs are about, and samples to click."""
    image = gr.Image(
        samples[FIRST].path if len(samples) > FIRST else None,
        label="Image",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=300,
        elem_id="image",
    )
    image.preprocess = as_it_came  # type: ignore[method-assign]
    gallery = gr.Gallery(
        [(sample.path, sample.title) for sample in samples],
        label="Samples: click one",
        columns=3,
        height=420,
        object_fit="cover",
        allow_preview=False,
        elem_id="samples",
    )

    def choose(event: gr.SelectData) -> str:
        return samples[event.index].path

    gallery.select(choose, None, image, show_progress="hidden")
    return image


def _watch(served: Served, back: gr.Textbox) -> None:
    """A line while the server is away, and a count of its returns, on which the tabs ask again."""
    line = gr.HTML(elem_id="status")
    up = gr.State(True)

    def look(was_up: bool, count: str) -> tuple[Any, ...]:
        is_up = served.is_ready()
        if is_up == was_up:
            return gr.skip(), gr.skip(), gr.skip()
        if is_up:
            return '<p role="status" class="up">The server is back.</p>', True, str(int(count) + 1)
        where = escape(served.address)
        text = f"The server at {where} does not answer. The page asks again every few seconds and goes on by itself when it is back."
        return f'<p role="alert" class="down">{text}</p>', False, gr.skip()

    gr.Timer(WATCH_S).tick(look, [up, back], [line, up, back], queue=False, show_progress="hidden")
