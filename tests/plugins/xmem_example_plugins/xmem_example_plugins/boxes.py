"""Box segmenter `diamond`: the mask is the diamond inscribed in the box."""

import numpy as np
from numpy.typing import NDArray


class Diamond:
    """Masks the pixels of the diamond through the midpoints of the box's sides."""

    def segment(self, frame: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
        x, y, width, height = box
        across = np.abs(np.arange(width) - (width - 1) / 2) / max(width / 2, 1)
        down = np.abs(np.arange(height) - (height - 1) / 2) / max(height / 2, 1)
        mask = np.zeros(frame.shape[:2], np.bool_)
        mask[y : y + height, x : x + width] = across[None, :] + down[:, None] <= 1
        return mask
