"""Contextual attention: Generative Image Inpainting with Contextual Attention. Yu, Lin, Yang, Shen, Lu, Huang.
CVPR 2018, section 4. Every place of a feature map is repainted with the known patches that it resembles.

A place is a pixel of the features downsampled by `rate`; there are L = (H/rate)(W/rate) of them, numbered row by row.
The scores of all places with all patches are an L x L matrix: 1 GiB for a photograph of 1024 x 1024 px. They are
therefore computed, and in the backward pass computed again, for so many places at a time as `chunk` allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEAST_NORM = 1e-4  # of a background patch

# Where a block of a matrix is added, and which block of another: (rows, columns) each.
Block = tuple[tuple[slice, slice], tuple[slice, slice]]


class ContextualAttention(nn.Module):
    """foreground, background [B,C,H,W], mask [B,1,H,W] (1 = hole) -> [B,C,H,W]; H and W multiples of `rate`.

    kernel: side of the patches that are compared, in places. rate: how far the features are downsampled for it; what is
    pasted are patches of 2 rate pixels from the full background. scale: of the scores in the softmax. fuse: 3, a place
    is drawn to the patch beside those of its neighbours (attention propagation, on the scores); or 0, it is not.

    Where paper and released code differ, or the code is at odds with itself:
    masking: "exact", patches that touch the hole have no weight and the weights sum to 1 (uniform, if all touch it);
    "released", their score is 0, they take their share of the softmax, and are then dropped.
    overlap: "exact", pasted pixels are means over the patches that cover them; "released", sums over 4, too dark in the
    outermost rows and columns. similarity: "released", background patches have norm 1; "cosine", both have.

    chunk: the most scores held at once (a row of places and its two neighbours at least); None: all. Exported and
    compiled programs hold all. There are no parameters. ValueError: an option out of range, or shapes.
    """

    def __init__(
        self,
        kernel: int = 3,
        rate: int = 2,
        scale: float = 10.0,
        fuse: int = 3,
        masking: str = "exact",
        overlap: str = "exact",
        similarity: str = "released",
        chunk: int | None = 2**24,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"attention kernel {kernel} is not odd")
        if rate < 2 or rate % 2:
            raise ValueError(f"attention rate {rate} is not even")
        if scale <= 0:
            raise ValueError(f"attention scale {scale} is not positive")
        if fuse not in (0, 3):
            raise ValueError(f"attention fuse {fuse} is neither 0 nor 3")
        for option, value, second in (
            ("masking", masking, "exact"),
            ("overlap", overlap, "exact"),
            ("similarity", similarity, "cosine"),
        ):
            if value not in ("released", second):
                raise ValueError(f"attention {option} {value!r} is neither {second!r} nor 'released'")
        if chunk is not None and chunk < 1:
            raise ValueError(f"attention chunk {chunk} is not positive")
        self.kernel, self.rate, self.scale, self.fuse = kernel, rate, scale, fuse
        self.masking, self.overlap, self.similarity, self.chunk = masking, overlap, similarity, chunk

    def forward(self, foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
        size, r = foreground.shape[2:], self.rate
        queries, keys, valid = self._patches(foreground, background, mask)
        values = F.unfold(background, 2 * r, stride=r, padding=r // 2)  # [B,4 r^2 C,L]
        h, w = size[0] // r, size[1] // r
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            scores = queries.transpose(1, 2) @ keys
            scores = propagate(scores, h, w) if self.fuse else scores
            columns = values @ self._attention(scores, valid).transpose(1, 2)
        else:
            columns = self._columns(queries, keys, valid, values, h, w)
        pasted = F.fold(columns, size, 2 * r, stride=r, padding=r // 2)
        if self.overlap == "released":
            return pasted / 4
        ones = torch.ones_like(columns[:1, : 4 * r * r])
        return pasted / F.fold(ones, size, 2 * r, stride=r, padding=r // 2)  # 4, 2 at edges, 1 in corners

    @torch.no_grad()
    def offsets(self, foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
        """int64 [B,2,H/rate,W/rate]: where each place's most attended patch lies relative to it, (down, right) in
        places. Without any patch outside the hole: 0."""
        queries, keys, valid = self._patches(foreground, background, mask)
        h, w = foreground.shape[2] // self.rate, foreground.shape[3] // self.rate
        best = torch.empty(len(valid), h * w, dtype=torch.int64, device=foreground.device)
        for part, start, end in self._chunks(len(valid), h, w):
            scores = self._scores(queries[part], keys[part], start, end, h, w)
            best[part, start:end] = scores.masked_fill(~valid[part], -torch.inf).argmax(2)
        place = torch.arange(h * w, device=foreground.device)
        offset = torch.stack([best // w - place // w, best % w - place % w], dim=1).view(-1, 2, h, w)
        return offset * valid.any(2).view(-1, 1, 1, 1)

    def _patches(self, foreground: Tensor, background: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The patches to compare [B,C kernel^2,L], the background's divided by their norm and times the scale of the
        softmax, and which of those do not touch the hole, bool [B,1,L]."""
        k, size = self.kernel, foreground.shape[2:]
        if not (torch.compiler.is_exporting() or torch.compiler.is_compiling()) and (
            background.shape != foreground.shape
            or mask.shape != (len(foreground), 1, *size)
            or size[0] % self.rate
            or size[1] % self.rate
        ):
            shapes = [tuple(t.shape) for t in (foreground, background, mask)]
            raise ValueError(
                f"attention takes features [B,C,H,W], again, and mask [B,1,H,W], multiples of {self.rate}, not {shapes}"
            )
        f, b, m = (self._down(x) for x in (foreground, background, mask.to(foreground.dtype)))
        valid = F.max_pool2d(m, k, 1, k // 2).flatten(2) == 0
        queries, keys = (F.unfold(x, k, padding=k // 2) for x in (f, b))
        if self.similarity == "cosine":
            queries = queries / _norm(queries)
        # where no patch is valid every score is 0, hence all weights alike
        return queries, keys * (self.scale * valid.any(2, keepdim=True) / _norm(keys)), valid

    def _down(self, x: Tensor) -> Tensor:
        for dim in (2, 3):  # nearest; by index_select, for the sake of export
            index = torch.arange(x.shape[dim] // self.rate, device=x.device) * self.rate
            x = x.index_select(dim, index)
        return x

    def _attention(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Weights [B,places,L] of the patches."""
        if self.masking == "released":
            return (scores * valid).softmax(2) * valid
        usable = valid | ~valid.any(2, keepdim=True)
        barred = torch.zeros_like(usable, dtype=scores.dtype).masked_fill(~usable, -torch.inf)
        return (scores + barred).softmax(2)

    def _columns(
        self, queries: Tensor, keys: Tensor, valid: Tensor, values: Tensor, h: int, w: int
    ) -> Tensor:
        """What is pasted at each place [B,4 r^2 C,L], chunk by chunk."""

        def paste(
            queries: Tensor, keys: Tensor, valid: Tensor, values: Tensor, start: int, end: int
        ) -> Tensor:
            scores = self._scores(queries, keys, start, end, h, w)
            return values @ self._attention(scores, valid).transpose(1, 2)

        chunks = [*self._chunks(len(valid), h, w)]
        if len(chunks) == 1:
            return paste(queries, keys, valid, values, 0, h * w)
        columns: dict[int, list[Tensor]] = {}
        for part, start, end in chunks:
            arguments = (queries[part], keys[part], valid[part], values[part], start, end)
            if torch.is_grad_enabled():
                piece = checkpoint(paste, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                piece = paste(*arguments)
            columns.setdefault(part.start, []).append(piece)
        return torch.cat([torch.cat(pieces, 2) for pieces in columns.values()])

    def _chunks(self, batch: int, h: int, w: int) -> Iterator[tuple[slice, int, int]]:
        """Photographs, and the first place and the end of whole rows of places."""
        places = h * w
        most = self.chunk or batch * places**2
        together = max(1, min(batch, most // places**2))
        halo = 2 * w + 6 if self.fuse else 0  # places of `_neighbours` beside the chunk's own
        rows = h if most >= places**2 else max(1, (most // places - halo) // w)
        for first in range(0, batch, together):
            for row in range(0, h, rows):
                yield slice(first, first + together), row * w, min(h, row + rows) * w

    def _scores(self, queries: Tensor, keys: Tensor, start: int, end: int, h: int, w: int) -> Tensor:
        """The (propagated) scores [B,end-start,L] of some rows of places."""
        if not self.fuse:
            return queries[:, :, start:end].transpose(1, 2) @ keys
        index, along_rows, along_columns = _neighbours(start, end, h, w)
        places = torch.tensor(index, device=queries.device)
        outside = (places < 0) | (places >= h * w)
        queries = queries.index_select(2, places.clamp(0, h * w - 1)).masked_fill(outside, 0)
        scores = BlockSum.apply(queries.transpose(1, 2) @ keys, end - start + 2 * w, along_rows)
        return BlockSum.apply(scores, end - start, along_columns)


def _norm(patches: Tensor) -> Tensor:
    return torch.linalg.vector_norm(patches, dim=1, keepdim=True).clamp_min(LEAST_NORM)


def propagate(scores: Tensor, h: int, w: int) -> Tensor:
    """Attention propagation on all scores [B,L,L]: each is replaced by its sum with its two diagonal neighbours, once
    with the places in the order of rows and once in the order of columns. (The first and the last place of
    neighbouring rows are neighbours in that order, as in the released code.)"""
    n = h * w
    place = torch.arange(n, device=scores.device)
    for height, width in ((h, w), (w, h)):
        for_next, for_last = ((place < n - 1).to(scores.dtype), (place > 0).to(scores.dtype))
        after = scores.roll((-1, -1), (1, 2)) * for_next[:, None] * for_next
        before = scores.roll((1, 1), (1, 2)) * for_last[:, None] * for_last
        scores = scores + after + before
        scores = scores.view(-1, height, width, height, width).permute(0, 2, 1, 4, 3).reshape(-1, n, n)
    return scores


def _neighbours(start: int, end: int, h: int, w: int) -> tuple[list[int], list[Block], list[Block]]:
    """`propagate` for the places start..end, whole rows: the places whose scores it takes (-1 and L: none, their
    scores are 0), and the blocks of those scores to add for each of its two sums.

    In the order of columns, the neighbours of a place are those above and below it; above the top one is the last of
    the column before. So the first sum is wanted for the row above, the chunk, and the row below, end to end.
    """
    n, count = h * w, end - start
    above = (1, n - w, w - 1) if start == 0 else (0, start - w, w)  # at, first place, number of places
    below = (w + count, 1, w - 1) if end == n else (w + count, end, w)
    everything, but_last, but_first = slice(0, n), slice(0, n - 1), slice(1, n)
    index: list[int] = []
    along_rows: list[Block] = []
    for at, first, number in (above, (w, start, count), below):
        to = slice(at, at + number)
        before, here, after = (slice(len(index) + i, len(index) + i + number) for i in range(3))
        along_rows += [
            ((to, everything), (here, everything)),
            ((to, but_last), (after, but_first)),
            ((to, but_first), (before, but_last)),
        ]
        index += range(first - 1, first + number + 1)
    to = slice(0, count)
    up, here, down = (slice(i * w, i * w + count) for i in range(3))
    top, but_top, bottom, but_bottom = slice(1, w), slice(w, n), slice(n - w, n - 1), slice(0, n - w)
    along_columns: list[Block] = [
        ((to, everything), (here, everything)),
        ((to, but_bottom), (down, but_top)),
        ((to, bottom), (down, top)),
        ((to, but_top), (up, but_bottom)),
        ((to, top), (up, bottom)),
    ]
    return index, along_rows, along_columns


class BlockSum(torch.autograd.Function):
    """Blocks of matrices [B,n,L], added up at other places of matrices [B,rows,L].

    Autograd's own slices would fill a matrix of zeros for each block in the backward pass; the adjoint is the same sum
    the other way round.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, blocks: list[Block]) -> Tensor:
        ctx.rows, ctx.blocks = x.shape[1], blocks
        out = x.new_zeros(x.shape[0], rows, x.shape[2])
        for (to_rows, to_columns), (from_rows, from_columns) in blocks:
            out[:, to_rows, to_columns] += x[:, from_rows, from_columns]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return BlockSum.apply(gradient, ctx.rows, [(source, to) for to, source in ctx.blocks]), None, None


def flow_picture(offsets: Tensor) -> np.ndarray:
    """Offsets [2,h,w] (down, right) as a picture, uint8 RGB [h,w,3], as in the paper's figures: white for what attends
    to itself, hues for the direction (pink: bottom left, green: top right), deeper the farther, up to max(h, w)."""
    down, right = offsets.cpu().double().numpy()
    distance = np.minimum(1.0, np.hypot(down, right) / max(down.shape))
    hue = (np.degrees(np.arctan2(-down, right)) + 75) / 60  # top right, at 45 degrees, is green: 120
    sector = (np.array([5, 3, 1]) + hue[..., None]) % 6
    rgb = 1 - distance[..., None] * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return np.round(255 * rgb).astype(np.uint8)
