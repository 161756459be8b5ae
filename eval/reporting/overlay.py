"""Pictures of the tokens that methods keep."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from secateur.families.base import View

PER_ROW = 6  # panels per row, the image included
_WIDTH = 2.2  # inches of a panel
_DARK = 0.22  # brightness of what is dropped


def kept_tokens(
    views: Sequence[View], kept: Mapping[str, Sequence[np.ndarray]], caption: str = ""
) -> Figure:
    """The views of a document beside one panel per method, in which dropped tokens are dark.

    Several views, such as the whole image and its tiles, lie beneath each other.

    Args:
        kept: label -> for every view which of its tokens are kept, [rows, columns] of booleans.
        caption: stands above all panels.
    """
    names = list(kept)
    blocks = [names[i : i + PER_ROW - 1] for i in range(0, len(names), PER_ROW - 1)] or [[]]
    columns = 1 + max(map(len, blocks))
    titles = {
        name: textwrap.fill(
            f"{name}: {sum(int(one.sum()) for one in masks)} of {sum(one.size for one in masks)}",
            26,
        )
        for name, masks in kept.items()
    }
    heights = [_WIDTH * view.image.height / view.image.width for view in views]
    words = textwrap.fill(caption, int(13 * _WIDTH * columns))
    head = 0.1 + 0.17 * (words.count("\n") + 1 if caption else 0)
    room = [0.2 + 0.16 * max((titles[n].count("\n") + 1 for n in own), default=1) for own in blocks]
    high = head + sum(room) + len(blocks) * (sum(heights) + 0.08 * len(views))
    wide = columns * (_WIDTH + 0.1) + 0.1
    figure = Figure(figsize=(wide, high))
    if caption:
        figure.suptitle(words, fontsize=10, x=0.1 / wide, y=1 - 0.06 / high, ha="left", va="top")
    top = high - head
    for own, title_room in zip(blocks, room, strict=True):
        top -= title_room
        for number, (view, height) in enumerate(zip(views, heights, strict=True)):
            top -= height
            for column, name in enumerate(["image", *own]):
                left = 0.1 + column * (_WIDTH + 0.1)
                box = (left / wide, top / high, _WIDTH / wide, height / high)
                panel = figure.add_axes(box)
                pixels = np.asarray(view.image)
                mask = kept[name][number] if column else np.ones(view.tokens.shape, bool)
                panel.imshow(darkened(pixels, mask), aspect="auto")
                panel.set_axis_off()
                if number == 0:
                    panel.set_title(titles.get(name, name), fontsize=9, pad=4)
            top -= 0.08
    return figure


def darkened(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] in which the cells of a grid that are not kept are dark."""
    rows, columns = (
        (np.arange(pixels.shape[axis]) * kept.shape[axis] / pixels.shape[axis]).astype(int)
        for axis in (0, 1)
    )
    share = np.where(kept, 1.0, _DARK)[rows][:, columns]
    return (pixels * share[..., None]).astype(np.uint8)
