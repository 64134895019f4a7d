"""A layer x step heatmap as pixels, in milliseconds: it is drawn at every log, where a figure would cost too much."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Nine anchors of the viridis colour map (CC0, van der Walt & Smith), interpolated in between.
_VIRIDIS = np.array(
    [
        (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140),
        (40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37),
    ]
)  # fmt: skip
_TEXT, _PAPER, _MISSING = (60, 60, 60), (255, 255, 255), (220, 220, 220)
# TensorBoard shows an image at about half its size. Pixels: font, margins, width of the map, least height of a block.
_FONT, _LEFT, _TOP, _CELLS, _LINE = 18, 200, 64, 440, 24
_LONGEST_NAME = 20  # characters


def heatmap(title: str, blocks: Mapping[str, np.ndarray], steps: list[int], across: str = "step") -> np.ndarray:
    """Image (height, width, 3), uint8: one block of rows per name, one column per step (or what `across` says).

    blocks: (layers, steps) values each, first layer on top; NaN is grey. One colour scale for all blocks.
    """
    low = min(np.nanmin(block) for block in blocks.values())
    high = max(np.nanmax(block) for block in blocks.values())
    heights = [max(_LINE, 6 * len(block)) for block in blocks.values()]
    image = Image.new("RGB", (_LEFT + _CELLS + 20, _TOP + sum(heights) + 4 * len(heights) + 30), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(_FONT)
    draw.text((8, 6), title, _TEXT)
    _scale(image, draw, low, high)
    y = _TOP
    for (name, block), height in zip(blocks.items(), heights, strict=True):
        draw.text((8, y + height // 2), _shortened(name), _TEXT, anchor="lm")
        cells = Image.fromarray(_colors(block, low, high))
        image.paste(cells.resize((_CELLS, height), Image.Resampling.NEAREST), (_LEFT, y))
        y += height + 4
    draw.text((_LEFT, y + 2), f"{across} {steps[0]}", _TEXT)
    draw.text((_LEFT + _CELLS, y + 2), str(steps[-1]), _TEXT, anchor="ra")
    return np.asarray(image)


def _scale(image: Image.Image, draw: ImageDraw.ImageDraw, low: float, high: float) -> None:
    ramp = _colors(np.linspace(0, 1, 120)[None], 0, 1)  # (1, 120, 3)
    image.paste(Image.fromarray(ramp).resize((160, 14), Image.Resampling.NEAREST), (_LEFT + 80, 38))
    draw.text((_LEFT + 72, 45), f"{low:.3g}", _TEXT, anchor="rm")
    draw.text((_LEFT + 248, 45), f"{high:.3g}", _TEXT, anchor="lm")


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _colors(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """RGB (..., 3), uint8."""
    place = (values - low) / max(high - low, 1e-12) * (len(_VIRIDIS) - 1)
    channels = [np.interp(place, np.arange(len(_VIRIDIS)), _VIRIDIS[:, c]) for c in range(3)]
    colors = np.stack(channels, -1)
    return np.where(np.isnan(values)[..., None], _MISSING, np.nan_to_num(colors)).astype(np.uint8)
