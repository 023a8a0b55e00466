"""Assignment: the one-to-one pairs of two sets with the largest total gain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assignment(gain: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The one-to-one pairs of rows and columns with the largest sum (Hungarian method), in order of rows.

    Args:
        gain: (R, C), the gain of each pair. All of the smaller dimension are paired, also where it is 0.
    """
    if not gain.size:
        return []
    if gain.shape[0] > gain.shape[1]:
        return sorted((r, c) for c, r in assignment(gain.T))
    cost = gain.max() - gain
    rows, columns = cost.shape
    of_row, of_column = np.zeros(rows + 1), np.zeros(columns + 1)
    holder = np.zeros(columns + 1, np.intp)  # row of each column; rows and columns count from 1 here
    for row in range(1, rows + 1):
        holder[0], at = row, 0
        least, seen = np.full(columns + 1, np.inf), np.zeros(columns + 1, np.bool_)
        came_from = np.zeros(columns + 1, np.intp)
        while holder[at]:
            seen[at] = True
            reduced = cost[holder[at] - 1] - of_row[holder[at]] - of_column[1:]
            better = ~seen[1:] & (reduced < least[1:])
            least[1:][better], came_from[1:][better] = reduced[better], at
            open_columns = np.where(seen, np.inf, least)
            open_columns[0] = np.inf
            following = int(np.argmin(open_columns))
            step = open_columns[following]
            of_row[holder[seen]] += step
            of_column[seen] -= step
            least[~seen] -= step
            at = following
        while at:
            holder[at] = holder[came_from[at]]
            at = int(came_from[at])
    return sorted((int(holder[c]) - 1, c - 1) for c in range(1, columns + 1) if holder[c])
