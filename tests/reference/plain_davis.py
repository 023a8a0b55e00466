"""J and F by definition, pixel by pixel: slow and simple."""

from __future__ import annotations

import math

import numpy as np


def plain_j(mask: np.ndarray, truth: np.ndarray) -> float:
    both = either = 0
    for a, b in zip(mask.ravel().tolist(), truth.ravel().tolist(), strict=True):
        both += a and b
        either += a or b
    return both / either if either else 1.0


def plain_outline(mask: np.ndarray) -> list[tuple[int, int]]:
    """Pixels that differ from their right, lower or lower right neighbour, where these exist."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(mask[n] != mask[y, x] for n in neighbours if n[0] < height and n[1] < width):
                found.append((y, x))
    return found


def plain_f(mask: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    height, width = mask.shape
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.sqrt(height**2 + width**2))
    found, expected = plain_outline(mask), plain_outline(truth)
    if not found and not expected:
        return 1.0
    if not found or not expected:
        return 0.0
    precision = sum(_near(p, expected, radius) for p in found) / len(found)
    recall = sum(_near(p, found, radius) for p in expected) / len(expected)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(pixel: tuple[int, int], others: list[tuple[int, int]], radius: float) -> bool:
    return any((pixel[0] - y) ** 2 + (pixel[1] - x) ** 2 <= radius**2 for y, x in others)
