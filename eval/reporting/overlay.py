"""Pictures of the tokens that a method keeps."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def kept_tokens(
    image: Image.Image, kept: dict[str, tuple[int, ...]], grid: tuple[int, int]
) -> Figure:
    """The image beside one panel per method, in which the dropped patches are dark.

    Args:
        kept: label -> kept patch indices, raster order over `grid` (rows, columns).
    """
    figure, axes = plt.subplots(
        1, 1 + len(kept), figsize=(2.2 * (1 + len(kept)), 2.5), layout="constrained"
    )
    pixels = np.asarray(image)
    rows, columns = (pixels.shape[axis] / grid[axis] for axis in (0, 1))
    axes[0].imshow(pixels)
    axes[0].set_title("image", fontsize=9)
    for axis, (label, indices) in zip(axes[1:], kept.items(), strict=True):
        mask = np.zeros(grid[0] * grid[1], dtype=bool)
        mask[list(indices)] = True
        share = np.where(mask.reshape(grid), 1.0, 0.22)
        large = share[(np.arange(pixels.shape[0]) / rows).astype(int)][
            :, (np.arange(pixels.shape[1]) / columns).astype(int)
        ]
        axis.imshow((pixels * large[..., None]).astype(np.uint8))
        axis.set_title(f"{label}: {len(indices)} of {mask.size}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    return figure
