"""Contextual attention (docs/papers.md 2.2 and 2.5): against naive loops, in chunks, exported."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.attention import ContextualAttention, flow_to_image


def square_mask(top: int, left: int, side: int, size: int, batch: int = 1) -> Tensor:
    mask = torch.zeros(batch, 1, size, size)
    mask[:, :, top : top + side, left : left + side] = 1
    return mask


def attention_weights(attention: ContextualAttention, f: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Attention weights [B,L,L]."""
    queries, keys, valid = attention._patches(f, b, mask)
    h, w = f.shape[2] // 2, f.shape[3] // 2
    return attention._attention_weights(attention._scores(queries, keys, 0, h * w, h, w), valid)


# -- an independent implementation -----------------------------------------------------------------------------


def ordered_positions(h: int, w: int, by_columns: bool) -> list[tuple[int, int]]:
    """The positions in row-major or column-major order."""
    if by_columns:
        return [(y, x) for x in range(w) for y in range(h)]
    return [(y, x) for y in range(h) for x in range(w)]


def naive(
    f: Any, b: Any, mask: Any, fuse: int, masking: str, overlap: str, similarity: str, norm: str
) -> np.ndarray:
    """One photograph, float64: [C,H,W], [C,H,W], [H,W] -> [C,H,W], in loops over positions and patches."""
    channels, height, width = f.shape
    h, w = height // 2, width // 2

    def patch_at(x: Any, position: tuple[int, int]) -> np.ndarray:  # 3x3 of the features at half resolution
        y, z = position
        values = np.zeros((channels, 3, 3))
        for i in range(3):
            for j in range(3):
                if 0 <= y + i - 1 < h and 0 <= z + j - 1 < w:
                    values[:, i, j] = x[:, 2 * (y + i - 1), 2 * (z + j - 1)]
        return values

    def norm_of(patch: np.ndarray) -> float:
        square = sum(x * x for x in patch.ravel())
        if norm == "smooth":
            return math.sqrt(sum(x * x + 1e-4 for x in patch.ravel()))
        return max(math.sqrt(square), 1e-4)

    positions = ordered_positions(h, w, by_columns=False)
    usable = {}
    for y, z in positions:
        neighbors = [(y + i, z + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        usable[y, z] = all(mask[2 * i, 2 * j] == 0 for i, j in neighbors if 0 <= i < h and 0 <= j < w)
    score = {}
    for p in positions:
        for q in positions:
            query, key = patch_at(f, p), patch_at(b, q)
            value = (query * key).sum() / norm_of(key)
            if similarity == "cosine":
                value /= norm_of(query)
            score[p, q] = value
    for by_columns in (False, True) if fuse else ():
        order = ordered_positions(h, w, by_columns)
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
    for p in positions:
        if masking == "exact":
            known = [q for q in positions if usable[q]] or positions
            logits = {q: 10 * score[p, q] if any(usable.values()) else 0.0 for q in known}
        else:
            logits = {q: 10 * score[p, q] * usable[q] for q in positions}
        largest = max(logits.values())
        total = sum(math.exp(x - largest) for x in logits.values())
        for q, x in logits.items():
            weight = math.exp(x - largest) / total * (usable[q] if masking == "released" else 1)
            for i in range(-1, 3):
                for j in range(-1, 3):
                    target, source = (2 * p[0] + i, 2 * p[1] + j), (2 * q[0] + i, 2 * q[1] + j)
                    if not (0 <= target[0] < height and 0 <= target[1] < width):
                        continue
                    if 0 <= source[0] < height and 0 <= source[1] < width:
                        pasted[:, target[0], target[1]] += weight * b[:, source[0], source[1]]
        for i in range(-1, 3):
            for j in range(-1, 3):
                if 0 <= 2 * p[0] + i < height and 0 <= 2 * p[1] + j < width:
                    count[2 * p[0] + i, 2 * p[1] + j] += 1
    return pasted / (count if overlap == "exact" else 4)


def random_inputs(batch: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Foreground, background, mask in float64, with a different hole per photograph; the last photograph is all hole."""
    f, b = torch.randn(2, batch, channels, height, width, dtype=torch.double) / 2
    mask = torch.zeros(batch, 1, height, width, dtype=torch.double)
    for i in range(batch):
        mask[i, :, 2 * i : 2 * i + 2, :2] = 1
    if batch > 1:
        mask[-1] = 1
    return f, b, mask


@pytest.mark.parametrize("fuse", [0, 3])
@pytest.mark.parametrize("masking", ["exact", "released"])
@pytest.mark.parametrize(
    ("overlap", "similarity", "norm"),
    [("exact", "released", "released"), ("released", "cosine", "smooth"), ("released", "released", "smooth")],
)
def test_equals_loops_over_positions_and_patches(fuse, masking, overlap, similarity, norm) -> None:
    options = {"fuse": fuse, "masking": masking, "overlap": overlap, "similarity": similarity, "norm": norm}
    f, b, mask = random_inputs(3, 2, 8, 6)
    result = ContextualAttention(**options)(f, b, mask)
    for i in range(3):
        expected = naive(f[i].numpy(), b[i].numpy(), mask[i, 0].numpy(), **options)
        torch.testing.assert_close(result[i], torch.from_numpy(expected), atol=1e-9, rtol=1e-9)


# -- known results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [0, 3])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_periodic_texture_continues_into_the_hole(fuse, zeroed) -> None:
    features = (20 * torch.randn(1, 16, 8, 8)).repeat(1, 1, 4, 4)
    mask = square_mask(12, 12, 8, 32)
    background = features * (1 - mask) if zeroed else features
    filled = ContextualAttention(fuse=fuse)(features, background, mask)
    inside = (slice(None), slice(None), slice(12, 20), slice(12, 20))
    error = (filled[inside] - features[inside]).norm() / features[inside].norm()
    assert error < 1e-6


def test_without_a_hole_every_position_attends_to_itself() -> None:
    features, empty = 20 * torch.randn(1, 16, 32, 32), torch.zeros(1, 1, 32, 32)
    attention = ContextualAttention()
    assert not attention.attention_offsets(features, features, empty).any()
    torch.testing.assert_close(attention(features, features, empty), features, atol=1e-4, rtol=1e-5)


def test_weights_sum_to_one_and_are_zero_for_patches_that_touch_the_hole() -> None:
    f, b = torch.randn(2, 2, 4, 16, 16)
    mask = torch.cat([square_mask(4, 6, 4, 16), square_mask(0, 0, 6, 16)])
    touches_hole = nn.functional.max_pool2d(mask[:, :, ::2, ::2], 3, 1, 1).flatten(2) > 0
    exact = attention_weights(ContextualAttention(), f, b, mask)
    assert exact.min() >= 0
    torch.testing.assert_close(exact.sum(2), torch.ones(2, 64))
    assert exact.masked_select(touches_hole).eq(0).all()
    released = attention_weights(ContextualAttention(masking="released"), f, b, mask)
    assert released.masked_select(touches_hole).eq(0).all()
    assert (released.sum(2) < 1).any()
    assert (released.sum(2) <= 1 + 1e-5).all()
    assert not torch.equal(touches_hole[0], touches_hole[1])  # one mask per photograph


def test_larger_features_concentrate_the_weights_on_one_patch() -> None:
    f, b = torch.randn(2, 1, 4, 16, 16)
    mask = square_mask(4, 4, 6, 16)
    largest = [
        attention_weights(ContextualAttention(), a * f, a * b, mask).amax(2).mean() for a in (0.01, 0.1, 1e4)
    ]
    assert largest[0] < largest[1] < largest[2]
    assert largest[2] > 0.999


def test_the_overlap_is_4_patches_inside_2_at_edges_and_1_in_corners() -> None:
    f, b = torch.randn(2, 1, 1, 8, 12, dtype=torch.double)
    mask = torch.zeros(1, 1, 8, 12)
    exact, released = (ContextualAttention(overlap=o)(f, b, mask) for o in ("exact", "released"))
    expected = torch.full((8, 12), 4.0, dtype=torch.double)
    expected[[0, -1], :] /= 2
    expected[:, [0, -1]] /= 2
    torch.testing.assert_close((4 * released / exact)[0, 0], expected)


def test_a_photograph_that_is_all_hole_gets_uniform_weights() -> None:
    f, b = torch.randn(2, 2, 3, 8, 8, requires_grad=True)
    mask = torch.ones(2, 1, 8, 8)
    mask[1, :, 4:] = 0
    for masking in ("exact", "released"):
        attention = ContextualAttention(masking=masking)
        result = attention(f, b, mask)
        assert result.isfinite().all()
        assert torch.autograd.grad(result.sum(), b)[0].isfinite().all()
        torch.testing.assert_close(result[1:], attention(f[1:], b[1:], mask[1:]))
        if masking == "exact":
            torch.testing.assert_close(
                attention_weights(attention, f, b, mask)[0], torch.full((16, 16), 1 / 16)
            )
        else:
            assert not result[0].any()
    assert not ContextualAttention().attention_offsets(f, b, mask)[0].any()


def test_zero_features_give_finite_outputs_and_gradients() -> None:
    f, b = torch.zeros(2, 1, 2, 8, 8, requires_grad=True)
    for similarity in ("released", "cosine"):
        result = ContextualAttention(similarity=similarity)(f, b, square_mask(2, 2, 2, 8))
        for gradient in torch.autograd.grad(result.sum(), (f, b)):
            assert gradient.isfinite().all()


# -- chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [0, 3])
@pytest.mark.parametrize("size", [(8, 12), (12, 4), (2, 6), (6, 2), (2, 2)])
def test_chunks_change_neither_outputs_nor_gradients(fuse, size) -> None:
    f, b, mask = random_inputs(3, 4, *size)
    f.requires_grad_()
    b.requires_grad_()
    output_gradient = torch.randn_like(f)

    def run(max_scores: int | None) -> tuple[Tensor, ...]:
        result = ContextualAttention(fuse=fuse, max_scores=max_scores)(f, b, mask)
        return result, *torch.autograd.grad((result * output_gradient).sum(), (f, b))

    expected_tensors = run(None)
    for max_scores in (1, 24**2, 24 * 21, 2 * 24**2, 10**9):
        for tensor, expected in zip(run(max_scores), expected_tensors, strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-9, rtol=1e-9)
        with torch.no_grad():
            attention = ContextualAttention(fuse=fuse, max_scores=max_scores)
            torch.testing.assert_close(attention(f, b, mask), expected_tensors[0])


def test_chunks_hold_at_most_max_scores_and_cover_every_position_once(monkeypatch) -> None:
    f, b, mask = random_inputs(3, 1, 16, 24)  # 96 positions
    score_counts: list[int] = []
    matmul = Tensor.__matmul__

    def counting_matmul(x: Tensor, y: Tensor) -> Tensor:
        product = matmul(x, y)
        if product.shape[-1] == 96 and x.shape[-1] == 9:  # scores
            score_counts.append(product.numel())
        return product

    monkeypatch.setattr(Tensor, "__matmul__", counting_matmul)
    # two photographs and then one; and four rows of 12 positions with a halo of two rows and 6 positions
    for max_scores, chunks in ((2 * 96**2, 2), ((4 + 2) * 12 * 96 + 6 * 96, 6)):
        score_counts.clear()
        attention = ContextualAttention(fuse=0 if chunks == 2 else 3, max_scores=max_scores)
        attention(f, b, mask)
        assert len(score_counts) == chunks
        assert max(score_counts) <= max_scores
    positions = [(p.start, i) for p, start, end in attention._chunks(3, 8, 12) for i in range(start, end)]
    assert positions == [(i, j) for i in range(3) for j in range(96)]


@pytest.mark.slow
def test_gradients_agree_with_finite_differences() -> None:
    f, b, mask = random_inputs(2, 1, 6, 4)
    for max_scores in (None, 1):
        attention = ContextualAttention(softmax_scale=2, max_scores=max_scores)
        inputs = (f.requires_grad_(), b.requires_grad_())
        assert torch.autograd.gradcheck(lambda f, b, a=attention: a(f, b, mask), inputs)


def test_a_batch_gives_the_same_as_its_photographs_one_by_one() -> None:
    f, b, mask = random_inputs(3, 4, 8, 8)
    result = ContextualAttention()(f, b, mask)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(result[one], ContextualAttention()(f[one], b[one], mask[one]))


def test_the_smooth_norm_lowers_the_scores_of_small_patches() -> None:
    """With the authors' norm scores do not depend on the patch's scale; sqrt(|p|^2 + 1e-4 n) is at least 1e-2 sqrt(n)."""
    f, b, mask = random_inputs(1, 2, 8, 8)
    key_norms = []
    for norm in ("released", "smooth"):
        attention = ContextualAttention(norm=norm, softmax_scale=1.0)
        _, keys, _ = attention._patches(f, 1e-3 * b, mask)
        key_norms.append(torch.linalg.vector_norm(keys, dim=1))
    torch.testing.assert_close(key_norms[0], torch.ones_like(key_norms[0]))
    assert float(key_norms[1].max()) < 0.2
    result = ContextualAttention(norm="smooth")(f, torch.zeros_like(b), mask)
    assert result.isfinite().all()


# -- export ----------------------------------------------------------------------------------------------------


class UpsampleAndAttend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = ContextualAttention(**options)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=2)  # even sides
        return self.attention(x[:, :4], x[:, 4:8], (x[:, 8:] > 0.5).to(x.dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("fuse", "norm"), [(0, "released"), (3, "smooth")])
def test_exported_equals_eager_at_every_size(fuse, norm) -> None:
    module = UpsampleAndAttend(fuse=fuse, norm=norm, max_scores=200)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(module, (torch.rand(2, 9, 8, 11),), dynamic_shapes=(dynamic,)).module()
    for size in ((1, 3, 5), (3, 12, 7), (2, 8, 8)):
        x = torch.randn(size[0], 9, *size[1:])
        torch.testing.assert_close(exported(x), module(x), atol=1e-5, rtol=1e-5)


# -- offsets and images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_scores", [None, 1])
def test_offsets_recover_a_known_shift(max_scores) -> None:
    background = 5 * torch.randn(1, 8, 32, 32)
    foreground = background.roll(
        (-4, 6), (2, 3)
    )  # each position's content was 2 positions below and 3 to the left
    empty = torch.zeros(1, 1, 32, 32)
    attention = ContextualAttention(fuse=0, max_scores=max_scores)
    offsets = attention.attention_offsets(foreground, background, empty)
    assert offsets.shape == (1, 2, 16, 16)
    inner = offsets[0, :, 1:12, 5:15]
    assert torch.equal(inner, torch.tensor([2, -3])[:, None, None].expand_as(inner))


def test_offsets_point_outside_the_hole() -> None:
    f = torch.randn(2, 4, 16, 16)
    mask = torch.cat([square_mask(4, 4, 6, 16), square_mask(0, 0, 2, 16)])
    offsets = ContextualAttention(max_scores=600).attention_offsets(f, f, mask)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    y, x = y + offsets[:, 0], x + offsets[:, 1]
    touches_hole = nn.functional.max_pool2d(mask[:, :, ::2, ::2], 3, 1, 1)[:, 0]
    for i in range(2):
        assert not touches_hole[i][y[i], x[i]].any()


def test_the_flow_image_is_white_for_0_green_to_the_top_right_and_pink_to_the_bottom_left() -> None:
    offsets = torch.tensor([[[0, -9, 9, -2]], [[0, 9, -9, 2]]])  # down, right
    image = flow_to_image(offsets)
    assert image.dtype == np.uint8
    assert image.shape == (1, 4, 3)
    assert image[0].tolist()[:3] == [[255, 255, 255], [0, 255, 0], [255, 0, 255]]
    red, green, blue = image[0, 3].tolist()
    assert red == blue < green == 255
    assert red > 0  # shorter offsets are paler


# -- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 2},
        {"rate": 3},
        {"softmax_scale": 0},
        {"fuse": 5},
        {"masking": "tf"},
        {"overlap": "paper"},
        {"similarity": "exact"},
        {"norm": "added"},
        {"max_scores": 0},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ContextualAttention(**options)


def test_shapes_that_do_not_match_are_refused() -> None:
    f = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
        ContextualAttention()(f, f, torch.zeros(1, 1, 4, 4))
    odd = torch.randn(1, 4, 7, 8)
    with pytest.raises(ValueError, match="multiples of 2"):
        ContextualAttention()(odd, odd, torch.zeros(1, 1, 7, 8))


def test_it_has_no_parameters_and_no_buffers() -> None:
    assert not ContextualAttention().state_dict()
