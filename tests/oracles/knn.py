"""Weighted k-NN, one query and one neighbour at a time, from the papers' words; slow and obvious."""

import math


def knn_votes(
    train: list[list[float]], labels: list[int], query: list[float], k: int, temperature: float, n_classes: int
) -> list[float]:
    """Class votes of one query: cosine similarity, nearest first, equals by row, weight exp(similarity / T)."""

    def unit(row: list[float]) -> list[float]:
        length = math.sqrt(sum(x * x for x in row)) or 1.0
        return [x / length for x in row]

    own = unit(query)
    similarities = [sum(a * b for a, b in zip(unit(row), own, strict=True)) for row in train]
    order = sorted(range(len(train)), key=lambda row: (-similarities[row], row))
    votes = [0.0] * n_classes
    for row in order[:k]:
        votes[labels[row]] += math.exp(similarities[row] / temperature)
    return votes
