"""Contextual attention: papers.md 2.2 and 2.5, against naive loops, chunked and exported."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.attention import ContextualAttention, flow_picture


def hole(top: int, left: int, side: int, size: int, batch: int = 1) -> Tensor:
    mask = torch.zeros(batch, 1, size, size)
    mask[:, :, top : top + side, left : left + side] = 1
    return mask


def weights(attention: ContextualAttention, f: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Attention weights [B,L,L]."""
    queries, keys, valid = attention._patches(f, b, mask)
    h, w = f.shape[2] // 2, f.shape[3] // 2
    return attention._attention(attention._scores(queries, keys, 0, h * w, h, w), valid)


# -- an independent implementation -----------------------------------------------------------------------------


def neighbours(h: int, w: int, by_columns: bool) -> list[tuple[int, int]]:
    """The places in the order of rows or columns."""
    if by_columns:
        return [(y, x) for x in range(w) for y in range(h)]
    return [(y, x) for y in range(h) for x in range(w)]


def naive(f: Any, b: Any, mask: Any, fuse: int, masking: str, overlap: str, similarity: str) -> np.ndarray:
    """One photograph, float64: [C,H,W], [C,H,W], [H,W] -> [C,H,W], place by place and patch by patch."""
    channels, height, width = f.shape
    h, w = height // 2, width // 2

    def small(x: Any, place: tuple[int, int]) -> np.ndarray:  # 3x3 of the features at half resolution
        y, z = place
        values = np.zeros((channels, 3, 3))
        for i in range(3):
            for j in range(3):
                if 0 <= y + i - 1 < h and 0 <= z + j - 1 < w:
                    values[:, i, j] = x[:, 2 * (y + i - 1), 2 * (z + j - 1)]
        return values

    places = neighbours(h, w, by_columns=False)
    usable = {}
    for y, z in places:
        around = [(y + i, z + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        usable[y, z] = all(mask[2 * i, 2 * j] == 0 for i, j in around if 0 <= i < h and 0 <= j < w)
    score = {}
    for p in places:
        for q in places:
            mine, theirs = small(f, p), small(b, q)
            value = (mine * theirs).sum() / max(math.sqrt((theirs**2).sum()), 1e-4)
            if similarity == "cosine":
                value /= max(math.sqrt((mine**2).sum()), 1e-4)
            score[p, q] = value
    for by_columns in (False, True) if fuse else ():
        order = neighbours(h, w, by_columns)
        fused = {}
        for i, p in enumerate(order):
            for j, q in enumerate(order):
                total = score[p, q]
                if i > 0 and j > 0:
                    total += score[order[i - 1], order[j - 1]]
                if i + 1 < len(order) and j + 1 < len(order):
                    total += score[order[i + 1], order[j + 1]]
                fused[p, q] = total
        score = fused
    pasted, count = np.zeros((channels, height, width)), np.zeros((height, width))
    for p in places:
        if masking == "exact":
            known = [q for q in places if usable[q]] or places
            logits = {q: 10 * score[p, q] if any(usable.values()) else 0.0 for q in known}
        else:
            logits = {q: 10 * score[p, q] * usable[q] for q in places}
        most = max(logits.values())
        total = sum(math.exp(x - most) for x in logits.values())
        for q, x in logits.items():
            share = math.exp(x - most) / total * (usable[q] if masking == "released" else 1)
            for i in range(-1, 3):
                for j in range(-1, 3):
                    to, source = (2 * p[0] + i, 2 * p[1] + j), (2 * q[0] + i, 2 * q[1] + j)
                    if not (0 <= to[0] < height and 0 <= to[1] < width):
                        continue
                    if 0 <= source[0] < height and 0 <= source[1] < width:
                        pasted[:, to[0], to[1]] += share * b[:, source[0], source[1]]
        for i in range(-1, 3):
            for j in range(-1, 3):
                if 0 <= 2 * p[0] + i < height and 0 <= 2 * p[1] + j < width:
                    count[2 * p[0] + i, 2 * p[1] + j] += 1
    return pasted / (count if overlap == "exact" else 4)


def some(batch: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features in float64 with another hole in every photograph: in the last one, no patch is outside."""
    f, b = torch.randn(2, batch, channels, height, width, dtype=torch.double) / 2
    mask = torch.zeros(batch, 1, height, width, dtype=torch.double)
    for i in range(batch):
        mask[i, :, 2 * i : 2 * i + 2, :2] = 1
    if batch > 1:
        mask[-1] = 1
    return f, b, mask


@pytest.mark.parametrize("fuse", [0, 3])
@pytest.mark.parametrize("masking", ["exact", "released"])
@pytest.mark.parametrize(("overlap", "similarity"), [("exact", "released"), ("released", "cosine")])
def test_equals_loops_over_places_and_patches(fuse, masking, overlap, similarity) -> None:
    options = {"fuse": fuse, "masking": masking, "overlap": overlap, "similarity": similarity}
    f, b, mask = some(3, 2, 8, 6)
    result = ContextualAttention(**options)(f, b, mask)
    for i in range(3):
        expected = naive(f[i].numpy(), b[i].numpy(), mask[i, 0].numpy(), **options)
        torch.testing.assert_close(result[i], torch.from_numpy(expected), atol=1e-9, rtol=1e-9)


# -- oracles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [0, 3])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_periodic_texture_is_continued_into_the_hole(fuse, zeroed) -> None:
    features = (20 * torch.randn(1, 16, 8, 8)).repeat(1, 1, 4, 4)
    mask = hole(12, 12, 8, 32)
    background = features * (1 - mask) if zeroed else features
    filled = ContextualAttention(fuse=fuse)(features, background, mask)
    inside = (slice(None), slice(None), slice(12, 20), slice(12, 20))
    error = (filled[inside] - features[inside]).norm() / features[inside].norm()
    assert error < 1e-6


def test_without_a_hole_everything_attends_to_itself() -> None:
    features, none = 20 * torch.randn(1, 16, 32, 32), torch.zeros(1, 1, 32, 32)
    attention = ContextualAttention()
    assert not attention.offsets(features, features, none).any()
    torch.testing.assert_close(attention(features, features, none), features, atol=1e-4, rtol=1e-5)


def test_weights_sum_to_one_and_leave_out_patches_that_touch_the_hole() -> None:
    f, b = torch.randn(2, 2, 4, 16, 16)
    mask = torch.cat([hole(4, 6, 4, 16), hole(0, 0, 6, 16)])
    touched = nn.functional.max_pool2d(mask[:, :, ::2, ::2], 3, 1, 1).flatten(2) > 0
    exact = weights(ContextualAttention(), f, b, mask)
    assert exact.min() >= 0
    torch.testing.assert_close(exact.sum(2), torch.ones(2, 64))
    assert exact.masked_select(touched).eq(0).all()
    released = weights(ContextualAttention(masking="released"), f, b, mask)
    assert released.masked_select(touched).eq(0).all()
    assert (released.sum(2) < 1).any()
    assert (released.sum(2) <= 1 + 1e-5).all()
    assert not torch.equal(touched[0], touched[1])  # each photograph has its own


def test_larger_features_sharpen_the_attention_to_one_patch() -> None:
    f, b = torch.randn(2, 1, 4, 16, 16)
    mask = hole(4, 4, 6, 16)
    largest = [weights(ContextualAttention(), a * f, a * b, mask).amax(2).mean() for a in (0.01, 0.1, 1e4)]
    assert largest[0] < largest[1] < largest[2]
    assert largest[2] > 0.999


def test_pixels_are_covered_by_4_patches_inside_2_at_edges_and_1_in_corners() -> None:
    f, b = torch.randn(2, 1, 1, 8, 12, dtype=torch.double)
    mask = torch.zeros(1, 1, 8, 12)
    exact, released = (ContextualAttention(overlap=o)(f, b, mask) for o in ("exact", "released"))
    expected = torch.full((8, 12), 4.0, dtype=torch.double)
    expected[[0, -1], :] /= 2
    expected[:, [0, -1]] /= 2
    torch.testing.assert_close((4 * released / exact)[0, 0], expected)


def test_a_photograph_that_is_all_hole_is_painted_evenly() -> None:
    f, b = torch.randn(2, 2, 3, 8, 8, requires_grad=True)
    mask = torch.ones(2, 1, 8, 8)
    mask[1, :, 4:] = 0
    for masking in ("exact", "released"):
        attention = ContextualAttention(masking=masking)
        done = attention(f, b, mask)
        assert done.isfinite().all()
        assert torch.autograd.grad(done.sum(), b)[0].isfinite().all()
        torch.testing.assert_close(done[1:], attention(f[1:], b[1:], mask[1:]))
        if masking == "exact":
            torch.testing.assert_close(weights(attention, f, b, mask)[0], torch.full((16, 16), 1 / 16))
        else:
            assert not done[0].any()
    assert not ContextualAttention().offsets(f, b, mask)[0].any()


def test_zero_features_give_finite_outputs_and_gradients() -> None:
    f, b = torch.zeros(2, 1, 2, 8, 8, requires_grad=True)
    for similarity in ("released", "cosine"):
        done = ContextualAttention(similarity=similarity)(f, b, hole(2, 2, 2, 8))
        for gradient in torch.autograd.grad(done.sum(), (f, b)):
            assert gradient.isfinite().all()


# -- chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [0, 3])
@pytest.mark.parametrize("size", [(8, 12), (12, 4), (2, 6), (6, 2), (2, 2)])
def test_chunks_change_neither_outputs_nor_gradients(fuse, size) -> None:
    f, b, mask = some(3, 4, *size)
    f.requires_grad_()
    b.requires_grad_()
    seed = torch.randn_like(f)

    def run(chunk: int | None) -> tuple[Tensor, ...]:
        done = ContextualAttention(fuse=fuse, chunk=chunk)(f, b, mask)
        return done, *torch.autograd.grad((done * seed).sum(), (f, b))

    whole = run(None)
    for chunk in (1, 24**2, 24 * 21, 2 * 24**2, 10**9):
        for mine, expected in zip(run(chunk), whole, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(ContextualAttention(fuse=fuse, chunk=chunk)(f, b, mask), whole[0])


def test_chunks_hold_as_many_scores_as_they_may_and_cover_every_place_once(monkeypatch) -> None:
    f, b, mask = some(3, 1, 16, 24)  # 96 places
    held: list[int] = []
    matmul = Tensor.__matmul__

    def watched(x: Tensor, y: Tensor) -> Tensor:
        product = matmul(x, y)
        if product.shape[-1] == 96 and x.shape[-1] == 9:  # scores
            held.append(product.numel())
        return product

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    # whole photographs, two of them and then one; and four rows of 12 places with the halo of two rows and 6 places
    for chunk, pieces in ((2 * 96**2, 2), ((4 + 2) * 12 * 96 + 6 * 96, 6)):
        held.clear()
        attention = ContextualAttention(fuse=0 if pieces == 2 else 3, chunk=chunk)
        attention(f, b, mask)
        assert len(held) == pieces
        assert max(held) <= chunk
    places = [(p.start, i) for p, start, end in attention._chunks(3, 8, 12) for i in range(start, end)]
    assert places == [(i, j) for i in range(3) for j in range(96)]


def test_gradients_are_those_of_finite_differences() -> None:
    f, b, mask = some(2, 1, 6, 4)
    for chunk in (None, 1):
        attention = ContextualAttention(scale=2, chunk=chunk)
        inputs = (f.requires_grad_(), b.requires_grad_())
        assert torch.autograd.gradcheck(lambda f, b, a=attention: a(f, b, mask), inputs)


def test_a_batch_is_its_photographs_one_by_one() -> None:
    f, b, mask = some(3, 4, 8, 8)
    done = ContextualAttention()(f, b, mask)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(done[one], ContextualAttention()(f[one], b[one], mask[one]))


# -- export ----------------------------------------------------------------------------------------------------


class Padded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = ContextualAttention(**options)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=2)  # even sides
        return self.attention(x[:, :4], x[:, 4:8], (x[:, 8:] > 0.5).to(x.dtype))


@pytest.mark.parametrize("fuse", [0, 3])
def test_exported_equals_eager_at_every_size(fuse) -> None:
    module = Padded(fuse=fuse, chunk=200)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(module, (torch.rand(2, 9, 8, 11),), dynamic_shapes=(dynamic,)).module()
    for size in ((1, 3, 5), (3, 12, 7), (2, 8, 8)):
        x = torch.randn(size[0], 9, *size[1:])
        torch.testing.assert_close(exported(x), module(x), atol=1e-5, rtol=1e-5)


# -- offsets and pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1])
def test_offsets_find_where_things_have_gone(chunk) -> None:
    background = 5 * torch.randn(1, 8, 32, 32)
    foreground = background.roll((-4, 6), (2, 3))  # what is here lay 2 places below and 3 to the left
    none = torch.zeros(1, 1, 32, 32)
    offsets = ContextualAttention(fuse=0, chunk=chunk).offsets(foreground, background, none)
    assert offsets.shape == (1, 2, 16, 16)
    inner = offsets[0, :, 1:12, 5:15]
    assert torch.equal(inner, torch.tensor([2, -3])[:, None, None].expand_as(inner))


def test_offsets_lead_out_of_the_hole() -> None:
    f = torch.randn(2, 4, 16, 16)
    mask = torch.cat([hole(4, 4, 6, 16), hole(0, 0, 2, 16)])
    offsets = ContextualAttention(chunk=600).offsets(f, f, mask)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    y, x = y + offsets[:, 0], x + offsets[:, 1]
    touched = nn.functional.max_pool2d(mask[:, :, ::2, ::2], 3, 1, 1)[:, 0]
    for i in range(2):
        assert not touched[i][y[i], x[i]].any()


def test_the_picture_is_white_at_rest_green_to_the_top_right_and_pink_to_the_bottom_left() -> None:
    offsets = torch.tensor([[[0, -9, 9, -2]], [[0, 9, -9, 2]]])  # down, right
    picture = flow_picture(offsets)
    assert picture.dtype == np.uint8
    assert picture.shape == (1, 4, 3)
    assert picture[0].tolist()[:3] == [[255, 255, 255], [0, 255, 0], [255, 0, 255]]
    red, green, blue = picture[0, 3].tolist()
    assert red == blue < green == 255
    assert red > 0  # nearer is paler


# -- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 2},
        {"rate": 3},
        {"scale": 0},
        {"fuse": 5},
        {"masking": "tf"},
        {"overlap": "paper"},
        {"similarity": "exact"},
        {"chunk": 0},
    ],
)
def test_options_out_of_range_are_named(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ContextualAttention(**options)


def test_shapes_that_do_not_go_together_are_named() -> None:
    f = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
        ContextualAttention()(f, f, torch.zeros(1, 1, 4, 4))
    odd = torch.randn(1, 4, 7, 8)
    with pytest.raises(ValueError, match="multiples of 2"):
        ContextualAttention()(odd, odd, torch.zeros(1, 1, 7, 8))


def test_it_has_nothing_to_learn() -> None:
    assert not ContextualAttention().state_dict()
