"""The server's collections as files of vectors, for a server that only searches: read from its SQLite file, which stays as it is."""

import json
import sqlite3
from pathlib import Path

import numpy as np

from backbones.checkpoints import Manifest
from data.errors import InputError


def read_collections(folder: Path, manifest: Manifest) -> dict[str, dict[str, np.ndarray]]:
    """Each collection that this network's vectors fill: `unit` [n, D], `ids`, `labels` (text; empty where there is none).

    Raises InputError for a folder without collections, or with none of this network.
    """
    file = folder / "collections.sqlite"
    if not file.is_file():
        raise InputError(f"--collections {folder}: holds no collections.sqlite; name the folder that a server keeps")
    binding = (manifest.weights_sha256, manifest.preprocess.to_json())
    try:
        with sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True) as db:
            rows = db.execute("SELECT name, weights_sha256, preprocess FROM collections ORDER BY name").fetchall()
            usable = [name for name, weights, seen in rows if (weights, json.loads(seen)) == binding]
            found = {name: _read(db, name) for name in usable}
    except (sqlite3.Error, ValueError) as error:
        raise InputError(f"--collections {folder}: cannot be read ({error}); is it a server's folder?") from error
    kept = {name: arrays for name, arrays in found.items() if len(arrays["unit"])}
    if not kept:
        raise InputError(
            f"--collections {folder}: none of its {len(rows)} collections was filled by this network; "
            "serve it and add images, or name another folder"
        )
    return kept


def _read(db: sqlite3.Connection, name: str) -> dict[str, np.ndarray]:
    query = "SELECT id, label, vector FROM items WHERE collection = ? ORDER BY sequence"
    rows = db.execute(query, (name,)).fetchall()
    vectors_nD = np.frombuffer(b"".join(vector for *_, vector in rows), "<f4").reshape(len(rows), -1)
    lengths = np.linalg.norm(vectors_nD, axis=1, keepdims=True)
    return {
        "unit": (vectors_nD / np.maximum(lengths, 1e-30)).astype(np.float32),
        "ids": np.array([row[0] for row in rows], str),
        "labels": np.array([row[1] or "" for row in rows], str),
    }
