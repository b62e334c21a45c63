"""The tab Attention: what each head of the last block looks at, for one model or two side by side."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from demo.client import Served
from demo.parts import Parts
from demo.pictures import cut_out, heat, holding
from demo.visits import read_picture

Pictures = list[tuple[np.ndarray, str]]


@dataclass(frozen=True)
class AttentionTab:
    """What its events do."""

    served: Served
    beside: Served | None

    def draw(self, path: str, mass: float, size: float) -> tuple[Pictures, ...]:
        """For the mean and for each head: the map over the image, and the patches that hold `mass` of it; then the second model's."""
        data, picture = read_picture(path)
        drawn: list[Pictures] = []
        for served in (self.served, self.beside):
            if served is not None:
                drawn += self._draw_one(served, data, picture, mass, size)
        return tuple(drawn)

    def _draw_one(
        self, served: Served, data: bytes, picture: np.ndarray, mass: float, size: float
    ) -> tuple[Pictures, Pictures]:
        answer = served.ask("attention", [data], {"mass": float(mass), "size": int(size)})
        maps_nhw, masks_nhw = answer["attention"][0], answer["mask"][0]
        mean_hw = maps_nhw.mean(axis=0)
        names = [f"head {i + 1}" for i in range(len(maps_nhw))]
        heats = [(heat(picture, one), name) for one, name in zip(maps_nhw, names, strict=True)]
        cuts = [(cut_out(picture, one), name) for one, name in zip(masks_nhw, names, strict=True)]
        mean_cut = cut_out(picture, holding(mean_hw, mass))
        return (
            [(picture, "image"), (heat(picture, mean_hw), "mean of all heads"), *heats],
            [(mean_cut, "mean of all heads"), *cuts],
        )


def attention_tab(parts: Parts) -> None:
    """Maps, masks, and what they depend on."""
    with parts.tab("Attention", "attention"):
        if not parts.has("attention", "A ResNet has no attention; a ViT has."):
            return
        gr.Markdown(
            "Where the last block's CLS token looks: bright is much. Below, only the patches that together hold the chosen share."
        )
        with gr.Row():
            mass = gr.Slider(0.1, 0.95, 0.6, step=0.05, label="Threshold: share of the attention shown", elem_id="mass")
            size = parts.size_slider("size")
        tab = AttentionTab(parts.served, parts.beside)
        outputs: list[Any] = []
        with gr.Row():
            for served, prefix in ((parts.served, ""), (parts.beside, "beside-")):
                if served is not None:
                    with gr.Column(min_width=300):
                        whose = f", {served.name}" if parts.beside else ""
                        outputs += _galleries(whose, prefix, 2 if parts.beside else 3)
        if parts.beside is None:
            gr.Markdown(
                "*Two models side by side:* start the demo with `--beside` and another server's address, or a checkpoint.",
                elem_classes="hint",
            )
        parts.on_image("attention", tab.draw, [mass, size], outputs, also=[parts.loaded])


def _galleries(whose: str, prefix: str, columns: int) -> list[gr.Gallery]:
    look: dict[str, Any] = {"columns": columns, "object_fit": "contain", "height": "auto"}
    return [
        gr.Gallery(label=f"Attention over the image{whose}", elem_id=f"{prefix}maps", **look),
        gr.Gallery(label=f"The patches that hold that share{whose}", elem_id=f"{prefix}masks", **look),
    ]
