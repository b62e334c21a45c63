"""What tests put into collections."""

from typing import Any

import numpy as np

from server.collection_items import Binding, NewItem

BINDING = Binding("a" * 64, "{}", 4)
"""A network whose vectors have four numbers."""


def item(*vector: float, **fields: Any) -> NewItem:
    """An item with this vector."""
    return NewItem(vector=np.array(vector, np.float32), **fields)
