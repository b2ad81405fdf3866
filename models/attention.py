"""Contextual attention: Generative Image Inpainting with Contextual Attention. Yu, Lin, Yang, Shen, Lu, Huang.
CVPR 2018, section 4. Each position of a feature map is replaced by a weighted mean of similar known patches.

A position is a pixel of the features downsampled by `rate`; there are L = (H/rate)(W/rate) of them, in row-major order.
The scores of all positions with all patches are an L x L matrix: 1 GiB for a photograph of 1024 x 1024 px. They are
therefore computed for at most `max_scores` entries at a time, and recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.base import Model

MIN_NORM = 1e-4  # lower bound of a patch's norm
NORM_SMOOTHING = 1e-4  # added to each squared number of a patch, with norm="smooth"

# (target, source): a block of one matrix that is added to a block of another; a block is (rows, columns).
BlockPair = tuple[tuple[slice, slice], tuple[slice, slice]]


class ContextualAttention(nn.Module):
    """foreground, background [B,C,H,W], mask [B,1,H,W] (1 = hole) -> [B,C,H,W]; H and W multiples of `rate`.

    kernel: side of the compared patches, in positions. rate: downsampling of the features for the comparison; the pasted
    patches are 2 rate pixels wide, from the full-resolution background. softmax_scale: factor of the scores in the
    softmax. fuse: 3 for attention propagation (neighbouring positions prefer neighbouring patches), 0 for none.

    Where the paper and the released code differ, or the code contradicts itself:
    masking: "exact", patches that touch the hole have weight 0 and the weights sum to 1 (uniform if all patches touch
    it); "released", their score is 0, and their weights are zeroed after the softmax, so that the sum is below 1.
    overlap: "exact", pasted pixels are means over the patches that cover them; "released", sums divided by 4, too dark in
    the outermost rows and columns. similarity: "released", background patches have norm 1; "cosine", foreground too.
    norm, by which a patch p of n = C kernel^2 numbers is divided: "released", max(|p|, 1e-4); "smooth",
    sqrt(|p|^2 + 1e-4 n), as in daa233/generative-inpainting-pytorch and its derivatives: patches of small numbers get
    lower scores.

    max_scores: scores held at a time (at least one row of positions and its two neighbouring rows); None: all. Exported
    and compiled programs hold all. No parameters. ValueError: an option out of range, or wrong shapes.
    """

    def __init__(
        self,
        kernel: int = 3,
        rate: int = 2,
        softmax_scale: float = 10.0,
        fuse: int = 3,
        masking: str = "exact",
        overlap: str = "exact",
        similarity: str = "released",
        norm: str = "released",
        max_scores: int | None = 2**24,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"attention kernel {kernel} is not odd")
        if rate < 2 or rate % 2:
            raise ValueError(f"attention rate {rate} is not even")
        if softmax_scale <= 0:
            raise ValueError(f"attention softmax_scale {softmax_scale} is not positive")
        if fuse not in (0, 3):
            raise ValueError(f"attention fuse {fuse} is neither 0 nor 3")
        for option, value, alternative in (
            ("masking", masking, "exact"),
            ("overlap", overlap, "exact"),
            ("similarity", similarity, "cosine"),
            ("norm", norm, "smooth"),
        ):
            if value not in ("released", alternative):
                raise ValueError(f"attention {option} {value!r} is neither {alternative!r} nor 'released'")
        if max_scores is not None and max_scores < 1:
            raise ValueError(f"attention max_scores {max_scores} is not positive")
        self.kernel, self.rate, self.softmax_scale, self.fuse = kernel, rate, softmax_scale, fuse
        self.masking, self.overlap, self.similarity, self.norm = masking, overlap, similarity, norm
        self.max_scores = max_scores

    def forward(self, foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
        size, r = foreground.shape[2:], self.rate
        queries, keys, valid = self._patches(foreground, background, mask)
        values = F.unfold(background, 2 * r, stride=r, padding=r // 2)  # [B,4 r^2 C,L]
        h, w = size[0] // r, size[1] // r
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            scores = queries.transpose(1, 2) @ keys
            scores = fuse_scores(scores, h, w) if self.fuse else scores
            columns = values @ self._attention_weights(scores, valid).transpose(1, 2)
        else:
            columns = self._attended_patches(queries, keys, valid, values, h, w)
        pasted = F.fold(columns, size, 2 * r, stride=r, padding=r // 2)
        if self.overlap == "released":
            return pasted / 4
        ones = torch.ones_like(columns[:1, : 4 * r * r])
        return pasted / F.fold(ones, size, 2 * r, stride=r, padding=r // 2)  # 4, 2 at edges, 1 in corners

    @torch.no_grad()
    def attention_offsets(self, foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
        """int64 [B,2,H/rate,W/rate]: offset (down, right), in positions, from each position to the patch with the
        highest attention weight. 0 if no patch lies outside the hole."""
        queries, keys, valid = self._patches(foreground, background, mask)
        h, w = foreground.shape[2] // self.rate, foreground.shape[3] // self.rate
        best = torch.empty(len(valid), h * w, dtype=torch.int64, device=foreground.device)
        for samples, start, end in self._chunks(len(valid), h, w):
            scores = self._scores(queries[samples], keys[samples], start, end, h, w)
            best[samples, start:end] = scores.masked_fill(~valid[samples], -torch.inf).argmax(2)
        position = torch.arange(h * w, device=foreground.device)
        offset = torch.stack([best // w - position // w, best % w - position % w], dim=1).view(-1, 2, h, w)
        return offset * valid.any(2).view(-1, 1, 1, 1)

    def _patches(self, foreground: Tensor, background: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches of the foreground (queries) and of the background (keys), both [B,C kernel^2,L], and bool [B,1,L]:
        the background patches that do not touch the hole. Keys are divided by their norm and multiplied by
        `softmax_scale`."""
        k, size = self.kernel, foreground.shape[2:]
        if not (torch.compiler.is_exporting() or torch.compiler.is_compiling()) and (
            background.shape != foreground.shape
            or mask.shape != (len(foreground), 1, *size)
            or size[0] % self.rate
            or size[1] % self.rate
        ):
            shapes = [tuple(t.shape) for t in (foreground, background, mask)]
            raise ValueError(
                f"attention takes foreground and background [B,C,H,W] and mask [B,1,H,W], H and W multiples of "
                f"{self.rate}, not {shapes}"
            )
        f, b, m = (self._downsample(x) for x in (foreground, background, mask.to(foreground.dtype)))
        valid = F.max_pool2d(m, k, 1, k // 2).flatten(2) == 0
        queries, keys = (F.unfold(x, k, padding=k // 2) for x in (f, b))
        if self.similarity == "cosine":
            queries = queries / self._norm(queries)
        # without a valid patch all scores are 0, so the weights are uniform
        return queries, keys * (self.softmax_scale * valid.any(2, keepdim=True) / self._norm(keys)), valid

    def _norm(self, patches: Tensor) -> Tensor:
        """Norms [B,1,L] of patches [B,n,L]."""
        if self.norm == "smooth":
            return (patches.square().sum(1, keepdim=True) + NORM_SMOOTHING * patches.shape[1]).sqrt()
        return torch.linalg.vector_norm(patches, dim=1, keepdim=True).clamp_min(MIN_NORM)

    def _downsample(self, x: Tensor) -> Tensor:
        for dim in (2, 3):  # nearest; index_select exports with dynamic sizes
            index = torch.arange(x.shape[dim] // self.rate, device=x.device) * self.rate
            x = x.index_select(dim, index)
        return x

    def _attention_weights(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Weights [B,positions,L] of the patches."""
        if self.masking == "released":
            return (scores * valid).softmax(2) * valid
        usable = valid | ~valid.any(2, keepdim=True)
        bias = torch.zeros_like(usable, dtype=scores.dtype).masked_fill(~usable, -torch.inf)
        return (scores + bias).softmax(2)

    def _attended_patches(
        self, queries: Tensor, keys: Tensor, valid: Tensor, values: Tensor, h: int, w: int
    ) -> Tensor:
        """The patch to paste at each position [B,4 r^2 C,L], computed in chunks."""

        def attend(
            queries: Tensor, keys: Tensor, valid: Tensor, values: Tensor, start: int, end: int
        ) -> Tensor:
            scores = self._scores(queries, keys, start, end, h, w)
            return values @ self._attention_weights(scores, valid).transpose(1, 2)

        chunks = [*self._chunks(len(valid), h, w)]
        if len(chunks) == 1:
            return attend(queries, keys, valid, values, 0, h * w)
        columns: dict[int, list[Tensor]] = {}
        for samples, start, end in chunks:
            arguments = (queries[samples], keys[samples], valid[samples], values[samples], start, end)
            if torch.is_grad_enabled():
                patches = checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                patches = attend(*arguments)
            columns.setdefault(samples.start, []).append(patches)
        return torch.cat([torch.cat(patches, 2) for patches in columns.values()])

    def _chunks(self, batch: int, h: int, w: int) -> Iterator[tuple[slice, int, int]]:
        """(photographs, first position, end) of each chunk; the positions are whole rows."""
        positions = h * w
        limit = self.max_scores or batch * positions**2
        photos_per_chunk = max(1, min(batch, limit // positions**2))
        halo = 2 * w + 6 if self.fuse else 0  # further positions that `_fuse_indices` needs
        rows = h if limit >= positions**2 else max(1, (limit // positions - halo) // w)
        for first in range(0, batch, photos_per_chunk):
            for row in range(0, h, rows):
                yield slice(first, first + photos_per_chunk), row * w, min(h, row + rows) * w

    def _scores(self, queries: Tensor, keys: Tensor, start: int, end: int, h: int, w: int) -> Tensor:
        """Scores [B,end-start,L] of the positions start..end (whole rows), after attention propagation."""
        if not self.fuse:
            return queries[:, :, start:end].transpose(1, 2) @ keys
        index, along_rows, along_columns = _fuse_indices(start, end, h, w)
        positions = torch.tensor(index, device=queries.device)
        outside = (positions < 0) | (positions >= h * w)
        queries = queries.index_select(2, positions.clamp(0, h * w - 1)).masked_fill(outside, 0)
        scores = BlockSum.apply(queries.transpose(1, 2) @ keys, end - start + 2 * w, along_rows)
        return BlockSum.apply(scores, end - start, along_columns)


def fuse_scores(scores: Tensor, h: int, w: int) -> Tensor:
    """Attention propagation on all scores [B,L,L]: add to each score its two diagonal neighbours, once with the positions
    in row-major and once in column-major order. (As in the released code, the last position of a row and the first of
    the next one are neighbours in that order.)"""
    n = h * w
    position = torch.arange(n, device=scores.device)
    for height, width in ((h, w), (w, h)):
        has_next, has_previous = ((position < n - 1).to(scores.dtype), (position > 0).to(scores.dtype))
        after = scores.roll((-1, -1), (1, 2)) * has_next[:, None] * has_next
        before = scores.roll((1, 1), (1, 2)) * has_previous[:, None] * has_previous
        scores = scores + after + before
        scores = scores.view(-1, height, width, height, width).permute(0, 2, 1, 4, 3).reshape(-1, n, n)
    return scores


def _fuse_indices(start: int, end: int, h: int, w: int) -> tuple[list[int], list[BlockPair], list[BlockPair]]:
    """`fuse_scores` for the positions start..end, whole rows: the positions whose scores it needs (-1 and L: outside,
    with score 0), and the blocks of those scores to add up for each of its two sums.

    In column-major order a position's neighbours are those above and below it; above the top one is the last of the
    column before. So the first sum is needed for the row above, the chunk itself, and the row below, concatenated.
    """
    n, count = h * w, end - start
    above = (
        (1, n - w, w - 1) if start == 0 else (0, start - w, w)
    )  # offset, first position, number of positions
    below = (w + count, 1, w - 1) if end == n else (w + count, end, w)
    everything, but_last, but_first = slice(0, n), slice(0, n - 1), slice(1, n)
    index: list[int] = []
    along_rows: list[BlockPair] = []
    for offset, first, number in (above, (w, start, count), below):
        target = slice(offset, offset + number)
        before, same, after = (slice(len(index) + i, len(index) + i + number) for i in range(3))
        along_rows += [
            ((target, everything), (same, everything)),
            ((target, but_last), (after, but_first)),
            ((target, but_first), (before, but_last)),
        ]
        index += range(first - 1, first + number + 1)
    target = slice(0, count)
    up, same, down = (slice(i * w, i * w + count) for i in range(3))
    top, but_top, bottom, but_bottom = slice(1, w), slice(w, n), slice(n - w, n - 1), slice(0, n - w)
    along_columns: list[BlockPair] = [
        ((target, everything), (same, everything)),
        ((target, but_bottom), (down, but_top)),
        ((target, bottom), (down, top)),
        ((target, but_top), (up, but_bottom)),
        ((target, top), (up, bottom)),
    ]
    return index, along_rows, along_columns


class BlockSum(torch.autograd.Function):
    """Adds up blocks of matrices [B,n,L] at given blocks of matrices [B,rows,L].

    With plain slicing, autograd would allocate a matrix of zeros per block in the backward pass; the adjoint is the
    same sum with target and source exchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, block_pairs: list[BlockPair]) -> Tensor:
        ctx.rows, ctx.block_pairs = x.shape[1], block_pairs
        out = x.new_zeros(x.shape[0], rows, x.shape[2])
        for (to_rows, to_columns), (from_rows, from_columns) in block_pairs:
            out[:, to_rows, to_columns] += x[:, from_rows, from_columns]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        transposed = [(source, target) for target, source in ctx.block_pairs]
        return BlockSum.apply(gradient, ctx.rows, transposed), None, None


def flow_to_image(offsets: Tensor) -> np.ndarray:
    """Offsets [2,h,w] (down, right) as an image, uint8 RGB [h,w,3], as in the paper's figures: white for offset 0, the
    hue for the direction (pink: bottom left, green: top right), more saturated the longer, up to max(h, w)."""
    down, right = offsets.cpu().double().numpy()
    distance = np.minimum(1.0, np.hypot(down, right) / max(down.shape))
    hue = (np.degrees(np.arctan2(-down, right)) + 75) / 60  # top right, at 45 degrees, is green: 120
    sector = (np.array([5, 3, 1]) + hue[..., None]) % 6
    rgb = 1 - distance[..., None] * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return np.round(255 * rgb).astype(np.uint8)


def visualize_attention(model: Model, image: Tensor, mask: Tensor, edge: Tensor | None = None) -> Tensor:
    """`Model.visualize_attention` for a model with one `ContextualAttention`, on features at a quarter of the size."""
    attention = next(m for m in model.modules() if isinstance(m, ContextualAttention))
    calls: list[tuple[Tensor, ...]] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    try:
        model.complete(image, mask, edge)
    finally:
        hook.remove()
    images = np.stack([flow_to_image(offsets) for offsets in attention.attention_offsets(*calls[0])])
    pixels_per_position = 4 * attention.rate
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    for dim in (2, 3):
        pixels = pixels.repeat_interleave(pixels_per_position, dim=dim)
    return pixels[..., : mask.shape[2], : mask.shape[3]]
