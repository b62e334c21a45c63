"""The tab Similarity: click a patch, see what is like it in this image and in another; patches by their principal components."""

from dataclasses import dataclass

import gradio as gr
import numpy as np

from demo.client import Served
from demo.parts import Parts, signal
from demo.pictures import cosines, heat, marked, principal_colours
from demo.visits import as_it_came, read_picture, read_upload


@dataclass(frozen=True)
class SimilarityTab:
    """What its events do."""

    served: Served

    def draw(
        self, path: str, other: str | None, size: float, spot: str
    ) -> tuple[np.ndarray, np.ndarray | None, str, np.ndarray, np.ndarray | None]:
        """Similarity here and there, in words, and both images' principal components; None where no other image is chosen.

        `spot` is the place of the patch, per cent of the image's width and height: "50,50".
        """
        images = [read_upload(one)[1] for one in (path, other) if one is not None]
        pictures = [read_picture(one)[1] for one in (path, other) if one is not None]
        patches_BhwD = self.served.patches(images, int(size))
        rows, columns = patches_BhwD.shape[1:3]
        across, down = (float(part) / 100 for part in spot.split(","))
        row, column = min(int(down * rows), rows - 1), min(int(across * columns), columns - 1)
        alike_Bhw = cosines(patches_BhwD[0, row, column], patches_BhwD)
        low = float(alike_Bhw.min())
        heats = [heat(picture, one, low, 1.0) for picture, one in zip(pictures, alike_Bhw, strict=True)]
        colours = principal_colours(patches_BhwD, pictures)
        says = (
            f"Patch in row {row + 1} of {rows}, column {column + 1} of {columns}. "
            f"Cosine similarity from {low:.2f} (dark) to 1 (bright)."
        )
        if len(pictures) == 1:
            return marked(heats[0], row, column, (rows, columns)), None, says, colours[0], None
        best = np.unravel_index(int(alike_Bhw[1].argmax()), (rows, columns))
        there = marked(heats[1], int(best[0]), int(best[1]), (rows, columns))
        says += f" The most similar patch of the other image has {alike_Bhw[1].max():.2f}; it is framed too."
        return marked(heats[0], row, column, (rows, columns)), there, says, colours[0], colours[1]


def clicked(picture: np.ndarray | None, event: gr.SelectData) -> tuple[str, int, int]:
    """Where somebody clicked, in per cent, together and for each of the two sliders."""
    if picture is None:
        return gr.skip()
    height, width = picture.shape[:2]
    across, down = 100 * (event.index[0] + 0.5) / width, 100 * (event.index[1] + 0.5) / height
    return f"{across:.2f},{down:.2f}", round(across), round(down)


def similarity_tab(parts: Parts) -> None:
    """The two images, their maps, and where the patch is."""
    tab = SimilarityTab(parts.served)
    with parts.tab("Similarity", "similarity"):
        gr.Markdown("Click anywhere in the first picture: bright is what the network finds similar to that patch.")
        titles = {f"{sample.title} ({sample.label})": sample.path for sample in parts.samples}
        sample = gr.Dropdown(
            list(titles), value=next(iter(titles), None), label="The other image: a sample", elem_id="other-sample"
        )
        with gr.Row():
            here = gr.Image(label="This image: click a patch", interactive=False, elem_id="here", min_width=280)
            there = gr.Image(label="Similar in the other image", interactive=False, elem_id="there", min_width=280)
        words = gr.Markdown(elem_id="similarity-words")
        with gr.Row():
            across = gr.Slider(0, 100, 50, step=1, label="Patch, from the left (%)", elem_id="across")
            down = gr.Slider(0, 100, 50, step=1, label="Patch, from the top (%)", elem_id="down")
            size = parts.size_slider("similarity-size")
        with gr.Row():
            first = gr.Image(
                label="Principal components of this image", interactive=False, elem_id="pca", min_width=280
            )
            second = gr.Image(label="of the other, same colours", interactive=False, elem_id="pca-other", min_width=280)
        gr.Markdown(
            "The three directions in which patches differ most, as red, green and blue. Both images share one basis, and signs are fixed: "
            "equal colours are equal features.",
            elem_classes="hint",
        )
        other = _other_image(next(iter(titles.values()), None))
        sample.input(titles.get, sample, other, show_progress="hidden")
        spot = signal("50,50", "spot")
        here.select(clicked, here, [spot, across, down], queue=False, show_progress="hidden")
        gr.on([across.input, down.input], None, [across, down], spot, js="(across, down) => `${across},${down}`")
        parts.on_image("similarity", tab.draw, [other, size, spot], [here, there, words, first, second])


def _other_image(start: str | None) -> gr.Image:
    other = gr.Image(
        start,
        label="The other image: one of yours",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=240,
        elem_id="other",
    )
    other.preprocess = as_it_came  # type: ignore[method-assign]
    return other
