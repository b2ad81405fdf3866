"""Crops around holes, and the context window of a network that fills only the centre of a square.

Tensor operations only, so that exported programs contain them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bounding_box(hole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, bottom, left, right [B] of the True pixels of [B,1,H,W], ends exclusive; bottom < top if there are none."""
    bounds = []
    for dim in (3, 2):  # rows, then columns
        occupied = hole.any(dim).flatten(1)
        index = torch.arange(occupied.shape[1], device=hole.device).expand_as(occupied)
        bounds.append(torch.where(occupied, index, occupied.shape[1]).amin(1))
        bounds.append(torch.where(occupied, index + 1, 0).amax(1))
    return bounds[0], bounds[1], bounds[2], bounds[3]


def crop_corner(mask: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Top, left [B] of the square of `side` pixels centred on the hole's bounding box in mask [B,1,H,W], shifted into
    the image.

    A box longer than the square is cut off; without a hole the square is in the image's centre.
    """
    top, bottom, left, right = bounding_box(mask > 0.5)
    height, width = mask.shape[2:]
    return (
        ((top + bottom - side) // 2).clamp(0, height - side),
        ((left + right - side) // 2).clamp(0, width - side),
    )


def crop(image: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """One square [B,C,side,side] per image [B,C,H,W], with its corner at integer top, left [B], inside the image."""
    b, c, _, w = image.shape
    offsets = torch.arange(side, device=image.device)
    rows, columns = top[:, None] + offsets, left[:, None] + offsets  # [B,side]
    strip = image.gather(2, rows[:, None, :, None].expand(b, c, side, w))
    return strip.gather(3, columns[:, None, None, :].expand(b, c, side, side))


def resampling_matrix(start: Tensor, step: Tensor, count: int, size: int) -> Tensor:
    """Matrices [B,count,size] that take `count` samples, `step` pixels apart, of a line of `size` pixels.

    start, step [B]: left border of the first sample and distance between samples, in pixels. Triangle filter,
    widened for downsampling (no aliasing); the line's end pixels are repeated beyond its ends. Integer starts with
    steps of 1 copy pixels exactly.
    """
    centre = start[:, None] + (torch.arange(count, device=start.device) + 0.5) * step[:, None] - 0.5
    pixel = torch.arange(size, device=start.device)
    distance = (centre.clamp(0, size - 1)[:, :, None] - pixel).abs()  # [B,count,size]
    weight = (1 - distance / step.clamp(min=1)[:, None, None]).clamp(min=0)
    return weight / weight.sum(2, keepdim=True)


class ContextWindow(nn.Module):
    """Where a hole's context window lies in the photograph, and how its centre is blanked for the generator."""

    fill_color: Tensor
    blanked_mask: Tensor

    def __init__(self, size: int, overlap: int, fill_rgb: tuple[float, float, float]) -> None:
        super().__init__()
        self.size = size
        self.blanked_size = size // 2 - 2 * overlap
        start, end = size // 4 + overlap, 3 * size // 4 - overlap
        blanked_mask = torch.zeros(size, size, dtype=torch.bool)
        blanked_mask[start:end, start:end] = True
        fill_color = torch.tensor(fill_rgb).view(1, 3, 1, 1) / 127.5 - 1
        self.register_buffer("fill_color", fill_color, persistent=False)
        self.register_buffer("blanked_mask", blanked_mask, persistent=False)

    def blank_center(self, image: Tensor, hole: Tensor | None = None) -> Tensor:
        """[B,3,S,S] in [-1,1] with the fill colour in the square that training blanks, and in the hole."""
        blanked = self.blanked_mask if hole is None else self.blanked_mask | hole
        return torch.where(blanked, self.fill_color, image)

    def locate(self, hole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top, left and side [B] of each hole's window, in pixels of the photograph.

        The smallest window whose blanked square contains the hole's box; if that is larger than the photograph, a
        window whose output block contains the box. It is shifted into the photograph as far as the box allows.
        """
        height, width = hole.shape[2:]
        top, bottom, left, right = bounding_box(hole)
        hole_size = torch.maximum(bottom - top, right - left).clamp(min=1)
        side = (hole_size * self.size + self.blanked_size - 1) // self.blanked_size  # rounded up
        side = torch.maximum(side.clamp(max=height).clamp(max=width), 2 * hole_size)
        # side of the square in the window that must contain the box: blanked square, or output block
        inner_size = torch.maximum(side * self.blanked_size // self.size, hole_size)
        margin = (side - inner_size) // 2

        def start(low: Tensor, high: Tensor, length: int) -> Tensor:
            centered = (low + high - side) // 2  # the window is centred on the box,
            inside = torch.minimum(centered, length - side).clamp(min=0)  # shifted into the photograph,
            # and shifted back as far as the box needs to stay in the inner square
            return torch.minimum(torch.maximum(inside, high - margin - inner_size), low - margin)

        return start(top, bottom, height), start(left, right, width), side
