"""The window of a network that fills only the middle of a square: where it lies around a hole, and the resampling
into it and back. Tensor operations throughout, so that an exported program finds it too."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def box(hole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, bottom, left, right [B] of the True pixels of [B,1,H,W]; bottom < top where there are none."""
    bounds = []
    for dim in (3, 2):  # rows, then columns
        there = hole.any(dim).flatten(1)
        index = torch.arange(there.shape[1], device=hole.device).expand_as(there)
        bounds.append(torch.where(there, index, there.shape[1]).amin(1))
        bounds.append(torch.where(there, index + 1, 0).amax(1))
    return bounds[0], bounds[1], bounds[2], bounds[3]


def around(mask: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Top, left [B] of the square of `side` pixels in the middle of which the box of a hole lies, in mask [B,1,H,W],
    shifted into the image.

    A box longer than the square is cut; without a hole the square is the image's middle.
    """
    top, bottom, left, right = box(mask > 0.5)
    height, width = mask.shape[2:]
    return (
        ((top + bottom - side) // 2).clamp(0, height - side),
        ((left + right - side) // 2).clamp(0, width - side),
    )


def crop(image: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """The square [B,C,side,side] of each image [B,C,H,W] whose corner is at top, left [B] (integers, inside)."""
    b, c, _, w = image.shape
    along = torch.arange(side, device=image.device)
    rows, columns = top[:, None] + along, left[:, None] + along  # [B,side]
    strip = image.gather(2, rows[:, None, :, None].expand(b, c, side, w))
    return strip.gather(3, columns[:, None, None, :].expand(b, c, side, side))


def resampler(start: Tensor, step: Tensor, count: int, size: int) -> Tensor:
    """Matrices [B,count,size] that take `count` samples of a line of `size` pixels, `step` pixels apart.

    start, step [B]: the left border of the first sample and the distance of two, in pixels. Triangle filter,
    widened when samples are far apart (no aliasing); beyond its ends the line repeats its last pixel. Whole
    steps of 1 copy pixels exactly.
    """
    centre = start[:, None] + (torch.arange(count, device=start.device) + 0.5) * step[:, None] - 0.5
    pixel = torch.arange(size, device=start.device)
    distance = (centre.clamp(0, size - 1)[:, :, None] - pixel).abs()  # [B,count,size]
    weight = (1 - distance / step.clamp(min=1)[:, None, None]).clamp(min=0)
    return weight / weight.sum(2, keepdim=True)


class Window(nn.Module):
    """Where the window of a hole lies, and what the generator sees in it."""

    mean: Tensor
    inner: Tensor

    def __init__(self, size: int, overlap: int, fill: tuple[float, float, float]) -> None:
        super().__init__()
        self.size = size
        self.blanked = size // 2 - 2 * overlap
        a, b = size // 4 + overlap, 3 * size // 4 - overlap
        inner = torch.zeros(size, size, dtype=torch.bool)
        inner[a:b, a:b] = True
        self.register_buffer("mean", torch.tensor(fill).view(1, 3, 1, 1) / 127.5 - 1, persistent=False)
        self.register_buffer("inner", inner, persistent=False)

    def blank(self, image: Tensor, hole: Tensor | None = None) -> Tensor:
        """[B,3,S,S] in [-1,1] with the square that training blanks, and the hole, in the fill colour."""
        return torch.where(self.inner if hole is None else self.inner | hole, self.mean, image)

    def place(self, hole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top, left and side [B] of each hole's window, in pixels of the photograph.

        The smallest window in which the hole's box lies in the square that training blanked; where that would be
        larger than the photograph, one with the box in the output block. It is shifted into the photograph as far as
        the box's place in it allows.
        """
        height, width = hole.shape[2:]
        top, bottom, left, right = box(hole)
        longest = torch.maximum(bottom - top, right - left).clamp(min=1)
        side = (longest * self.size + self.blanked - 1) // self.blanked  # rounded up
        side = torch.maximum(side.clamp(max=height).clamp(max=width), 2 * longest)
        # the part of the window that the box must lie in: blanked square, or output block
        part = torch.maximum(side * self.blanked // self.size, longest)
        margin = (side - part) // 2

        def start(low: Tensor, high: Tensor, length: int) -> Tensor:
            wanted = (low + high - side) // 2  # the box in the middle ...
            inside = torch.minimum(wanted, length - side).clamp(min=0)  # ... the window in the photograph ...
            return torch.minimum(
                torch.maximum(inside, high - margin - part), low - margin
            )  # ... box in its part

        return start(top, bottom, height), start(left, right, width), side
