"""The tab Depth and segmentation: what the heads on the served backbone make of every pixel."""

from dataclasses import dataclass
from html import escape

import gradio as gr
import numpy as np

from demo.client import Served, class_names
from demo.parts import Parts
from demo.pictures import class_colours, depth_colours, palette
from demo.visits import read_picture

BUNDLED_WORDS = (
    "The bundled head is a linear probe that learned from few rendered rooms, and measured no better than one on an untrained network: "
    "**its metres are of no use**. Look at which parts it takes for nearer, not at how near."
)
LEGEND_ROWS = 12


@dataclass(frozen=True)
class DenseTab:
    """What its events do."""

    served: Served
    bundled: bool

    def depth(self, path: str, size: float) -> tuple[np.ndarray, str]:
        """The depth map, and its range in words."""
        data, picture = read_picture(path)
        depth_HW = self.served.ask("depth", [data], {"size": int(size)})["depth"][0]
        unit = self.served.parameters("depth").get("unit", "")
        says = f"The head says {depth_HW.min():.1f} {unit} (bright, near) to {depth_HW.max():.1f} {unit} (dark, far)."
        return depth_colours(depth_HW, picture), f"{says} {BUNDLED_WORDS if self.bundled else ''}"

    def segmentation(self, path: str, size: float) -> tuple[np.ndarray, str]:
        """The classes over the image, and a legend with each one's share of it."""
        data, picture = read_picture(path)
        classes_HW = self.served.ask("segmentation", [data], {"size": int(size)})["classes"][0]
        return class_colours(classes_HW, picture), legend(
            classes_HW, class_names(self.served.parameters("segmentation"))
        )


def legend(classes_HW: np.ndarray, names: list[str]) -> str:
    """HTML: the largest classes with their colours and shares."""
    numbers, counts = np.unique(classes_HW, return_counts=True)
    colours = palette(int(classes_HW.max()) + 1)
    rows = sorted(zip(counts.tolist(), numbers.tolist(), strict=True), reverse=True)
    items = []
    for count, number in rows[:LEGEND_ROWS]:
        name = escape(names[number]) if 0 <= number < len(names) else f"class {number}"
        colour = "rgb({},{},{})".format(*colours[number])
        items.append(f'<li><i style="background:{colour}"></i>{name} {100 * count / classes_HW.size:.1f} %</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def dense_tab(parts: Parts) -> None:
    """The depth map and the classes, or that there is no head for them."""
    tab = DenseTab(parts.served, parts.bundled)
    with parts.tab("Depth and segmentation", "dense"):
        size = parts.size_slider("dense-size") if parts.models & {"depth", "segmentation"} else None
        with gr.Row():
            with gr.Column(min_width=300):
                if parts.has(
                    "depth",
                    "Train one with `python -m evaluators.depth ... --save-head` and serve it beside the backbone.",
                ):
                    depth = gr.Image(label="Depth: near is bright", interactive=False, elem_id="depth")
                    words = gr.Markdown(elem_id="depth-words")
                    parts.on_image("dense", tab.depth, [size], [depth, words])
            with gr.Column(min_width=300):
                if parts.has(
                    "segmentation",
                    "Train one with `python -m evaluators.segmentation ... --save-head` and serve it beside the backbone.",
                ):
                    classes = gr.Image(label="Segmentation", interactive=False, elem_id="classes")
                    names = gr.HTML(elem_id="class-legend")
                    parts.on_image("dense", tab.segmentation, [size], [classes, names])
