"""The tab Search: what is like the image in a collection, a vote of the nearest, and images of one's own in collections of one's own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import numpy as np

from data.decode import decode_image
from demo.client import Served
from demo.parts import Parts, Sample, signal
from demo.visits import read_bytes, refusal

SAMPLES = "samples"
NEIGHBOURS = 8
MAX_NEIGHBOURS = 24
MAX_FILES = 50
MAX_LISTED = 1000
EMPTY = np.full((128, 128, 3), 230, np.uint8)
"""Stands for an item without a thumbnail."""

Found = list[tuple[Any, str]]


@dataclass(frozen=True)
class SearchTab:
    """What its events do."""

    served: Served
    bundled: dict[str, str]
    """Item of the collection of samples -> path of the bundled image, which is larger than the server's thumbnail."""

    def search(self, path: str, collection: str | None, k: float) -> tuple[Found, dict[str, float] | None, str]:
        """The nearest items with their distances, the labels' shares of the vote, and words."""
        if not collection:
            raise refusal("Choose a collection to search, or add images to a new one below.")
        data = read_bytes(path)
        if self.served.rest is None:
            return self._without_rest(data, collection, int(k))
        sizes = {one["name"]: one["size"] for one in self.served.get("/v1/collections")["collections"]}
        if collection not in sizes:
            return [], None, f"There is no collection {_plain(collection)}: choose one of the list."
        if sizes[collection] == 0:
            return [], None, "This collection is empty: add images to it below."
        sent: dict[str, Any] = {
            "content": data,
            "headers": {"content-type": "application/octet-stream"},
            "params": {"k": max(1, min(int(k), sizes[collection]))},
        }
        where = f"/v1/collections/{quote(collection, safe='')}"
        nearest = self.served.post(f"{where}/search", **sent)["results"][0]["neighbours"]
        found = [(self._picture(collection, one["id"], one.get("thumbnail")), caption(one)) for one in nearest]
        if not any(one["label"] for one in nearest):
            return found, None, "None of these has a label, so nothing is voted on."
        shares = self.served.post(f"{where}/classify", **sent)["results"][0]["classes"]
        says = f"Likeliest by the vote of the {len(nearest)} nearest: **{_plain(shares[0]['label'])}**."
        return found, {one["label"]: one["share"] for one in shares}, says

    def _without_rest(self, data: bytes, collection: str, k: int) -> tuple[Found, None, str]:
        answer = self.served.ask("knn", [data], {"collection": collection, "k": k})
        rows = zip(answer["ids"][0], answer["labels"][0], answer["scores"][0], strict=True)
        nearest = [{"id": i.decode(), "label": label.decode(), "score": float(score)} for i, label, score in rows]
        found = [(self.bundled.get(one["id"], EMPTY), caption(one)) for one in nearest]
        return found, None, "The server is known by its gRPC port only: no vote, no thumbnails but the samples'."

    def _picture(self, collection: str, item: str, link: str | None) -> Any:
        if collection == SAMPLES and item in self.bundled:
            return self.bundled[item]
        return EMPTY if link is None else decode_image(self.served.picture(link))

    def collections(self) -> list[tuple[str, str]]:
        """What can be searched, as (shown, name)."""
        if self.served.rest is None:
            return [(SAMPLES, SAMPLES)]
        infos = [one for one in self.served.get("/v1/collections")["collections"] if one["usable"]]
        return [(f"{one['name']} ({one['size']})", one["name"]) for one in infos]

    def choice(self, chosen: str | None) -> Any:
        """The collections as they are now."""
        known = self.collections()
        names = [name for _, name in known]
        return _choices(known, chosen in names, next(iter(names), None))

    def items(self, collection: str | None, chosen: list[str]) -> Any:
        """The items to delete: those of a collection of one's own, the newest first."""
        known = self._items(collection)
        left = [one for one in chosen if one in {name for _, name in known}]
        return _choices(known, left == chosen, left)

    def _items(self, collection: str | None) -> list[tuple[str, str]]:
        if self.served.rest is None or collection in (None, SAMPLES):
            return []
        if collection not in [name for _, name in self.collections()]:
            return []  # deleted a moment ago
        page = self.served.get(f"/v1/collections/{quote(collection, safe='')}/items", limit=MAX_LISTED)
        shown = [
            (f"{one['label'] or 'no label'}: {one['metadata'].get('file', one['id'])}", one["id"])
            for one in page["items"]
        ]
        return shown[::-1]

    def add(self, files: list[str] | None, label: str, collection: str, count: str) -> tuple[Any, None, str, str]:
        """Embed images into a collection, which is made where there is none. Returns the choice of it, no files, words, `count` + 1."""
        if not files:
            raise refusal("Choose one or more image files to add.")
        if len(files) > MAX_FILES:
            raise refusal(f"{len(files)} files came; add at most {MAX_FILES} at a time.")
        name = collection.strip()
        if not name:
            raise refusal("Name the collection: 1 to 64 of a-z, 0-9, '-' and '_'.")
        form: list[Any] = [("file", (Path(path).name, read_bytes(path))) for path in files]
        fields = {"label": label.strip()} if label.strip() else {}
        ids = self.served.post(f"/v1/collections/{quote(name, safe='')}/items", files=form, data=fields)["ids"]
        words = f"Added {len(ids)} to {_plain(name)}. They stay until somebody deletes them."
        return gr.Dropdown(choices=self.collections(), value=name), None, words, _one_more(count)

    def remove(self, chosen: list[str], collection: str | None, count: str) -> tuple[str, str]:
        """Delete items of a collection. Returns words and `count` + 1."""
        if not chosen:
            raise refusal("Choose the images to delete.")
        for item in chosen:
            self.served.delete(f"/v1/collections/{quote(str(collection), safe='')}/items/{quote(str(item), safe='')}")
        return f"Deleted {len(chosen)}.", _one_more(count)

    def remove_all(self, collection: str | None) -> tuple[Any, str]:
        """Delete a whole collection."""
        if collection in (None, SAMPLES):
            raise refusal("The samples belong to the server. Choose a collection of your own to delete.")
        self.served.delete(f"/v1/collections/{quote(collection, safe='')}")
        return self.choice(None), f"Deleted the collection {_plain(collection)}."


def _choices(known: list[tuple[str, str]], still_there: bool, otherwise: Any) -> Any:
    """An update of a list that leaves alone what is chosen while it is there: a late answer must not undo a choice made meanwhile."""
    return gr.Dropdown(choices=known) if still_there else gr.Dropdown(choices=known, value=otherwise)


def _one_more(count: str) -> str:
    return str(int(count) + 1)


def caption(item: dict[str, Any]) -> str:
    """Label (or id) and cosine distance of an item."""
    return f"{item['label'] or item['id']} {max(0.0, 1 - item['score']):.3f}"


def _plain(text: str) -> str:
    """A visitor's text within Markdown."""
    return "".join(f"&#{ord(letter)};" if letter in "<>&*_`[]()#!|\\\"'~" else letter for letter in text)


def bundled_items(samples: list[Sample] | Any, root: Path) -> dict[str, str]:
    """The server's id of each sample image: its name without the ending, ':' for '/'."""
    return {str(Path(one.path).relative_to(root).with_suffix("")).replace("/", ":"): one.path for one in samples}


def search_tab(parts: Parts, root: Path) -> None:
    """The nearest, the vote, adding and deleting."""
    with parts.tab("Search", "search"):
        if not parts.has("knn"):
            return
        tab = SearchTab(parts.served, bundled_items(parts.samples, root))
        with gr.Row():
            collection = gr.Dropdown(
                [SAMPLES],
                value=SAMPLES,
                label="Collection",
                allow_custom_value=True,  # Gradio's own check knows the list as it was a moment ago; the server judges
                elem_id="collection",
            )
            k = gr.Slider(1, MAX_NEIGHBOURS, NEIGHBOURS, step=1, label="Neighbours", elem_id="k")
        words = gr.Markdown(elem_id="search-words")
        with gr.Row():
            found = gr.Gallery(
                label="Nearest first, with the cosine distance: 0 is the same",
                columns=4,
                object_fit="cover",
                height="auto",
                elem_id="neighbours",
                scale=3,
                min_width=300,
            )
            classes = gr.Label(label="Weighted vote", num_top_classes=5, elem_id="vote", scale=1, min_width=200)
        changed = signal("0", "collections-changed")
        parts.on_image("search", tab.search, [collection, k], [found, classes, words], also=[changed.change])
        if parts.served.rest is None:
            gr.Markdown(
                "Adding and deleting need the server's REST address: start the demo with `--server http://host:port`.",
                elem_classes="hint",
            )
            return
        items = _own_images(parts, tab, collection, changed)
        _keep_up(parts, tab.choice, [collection], [changed.change])
        _keep_up(parts, tab.items, [collection, items], [changed.change, collection.change])


def _keep_up(parts: Parts, work: Callable[..., Any], controls: list[Any], also: list[Any]) -> None:
    """Put `work(*controls)` into the last of them whenever the tab comes to the front, the server is back, or `also` happens."""

    def event(request: gr.Request, looked_at: str, *values: Any) -> Any:
        if looked_at != "search":
            return gr.skip()
        return parts.turns.newest(request, work.__qualname__, work, *values)

    triggers = [parts.looked_at.change, parts.back.change, *also]
    inputs = [parts.looked_at, *controls]
    gr.on(triggers, event, inputs, controls[-1], trigger_mode="always_last", show_progress="hidden")


def _own_images(parts: Parts, tab: SearchTab, collection: gr.Dropdown, changed: gr.Textbox) -> gr.Dropdown:
    """The parts that write. Returns the choice of items to delete."""
    done = gr.Markdown(elem_id="collection-words")
    with gr.Accordion("Add images of your own", open=False, elem_id="add-own"):
        gr.Markdown(
            "What you add is kept by the server, as a small picture and a vector, for everyone who uses it, until it is deleted."
        )
        files = gr.File(label=f"Images, at most {MAX_FILES}", file_count="multiple", elem_id="own-files", height=140)
        with gr.Row():
            label = gr.Textbox(label="Label", placeholder="what they show", max_length=200, elem_id="own-label")
            name = gr.Textbox("mine", label="Collection, new or known", max_length=64, elem_id="own-collection")
        add = gr.Button("Add to the collection", variant="primary", elem_id="own-add")
    with gr.Accordion("Delete images", open=False, elem_id="delete-own"):
        items = gr.Dropdown(
            [], multiselect=True, label="Images of the chosen collection (the samples stay)", elem_id="own-items"
        )
        with gr.Row():
            remove = gr.Button("Delete the chosen images", elem_id="own-delete")
            remove_all = gr.Button("Delete the whole collection", variant="stop", elem_id="own-delete-all")

    def one_at_a_time(request: gr.Request, *values: Any) -> Any:
        with parts.turns.take(request, "add"):
            return tab.add(*values)

    add.click(one_at_a_time, [files, label, name, changed], [collection, files, done, changed], show_progress_on=done)
    remove.click(tab.remove, [items, collection, changed], [done, changed], show_progress_on=done)
    remove_all.click(tab.remove_all, collection, [collection, done], show_progress_on=done)
    return items
