"""Pictures: colours of holes and edges, layout and size of sample grids."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.plots.images import (
    DRAWN_EDGE_COLOR,
    HOLE_COLOR,
    Grid,
    _font,
    _wrap_caption,
    decode_png,
    edges_image,
    encode_png,
    masked_image,
    sample_grid,
    sample_strip,
)


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 1
    edges = np.zeros((32, 32), bool)
    edges[16] = True
    return image, mask, edges


def test_holes_are_white_and_known_pixels_untouched(scene):
    image, mask, _ = scene
    masked = masked_image(image, mask)
    assert (masked[mask == 1] == 255).all()
    np.testing.assert_array_equal(masked[mask == 0], image[mask == 0])


def test_known_edges_are_black_and_generated_edges_blue(scene):
    _, mask, edges = scene
    picture = edges_image(edges, mask, edges)
    assert tuple(picture[16, 4]) == (0, 0, 0)
    assert tuple(picture[16, 16]) == DRAWN_EDGE_COLOR
    assert tuple(picture[12, 16]) == HOLE_COLOR
    assert tuple(picture[2, 2]) == (255, 255, 255)
    without = edges_image(edges, mask)
    assert tuple(without[16, 16]) == HOLE_COLOR  # known edges in the hole would be a leak: they are not drawn
    half = edges_image(edges, mask, edges * 0.5)[16, 16]
    assert tuple(half) == tuple(round((a + b) / 2 + 1e-9) for a, b in zip(DRAWN_EDGE_COLOR, HOLE_COLOR))


def test_a_strip_has_the_columns_truth_masked_edges_result(scene):
    image, mask, edges = scene
    strip = sample_strip([image] * 2, [mask] * 2, [edges] * 2, [255 - image] * 2)
    assert strip.shape == (2 * 36 - 4, 4 * 36 - 4, 3)
    np.testing.assert_array_equal(strip[36:68, :32], image)
    np.testing.assert_array_equal(strip[:32, 36:68], masked_image(image, mask))
    np.testing.assert_array_equal(strip[:32, 108:], 255 - image)
    assert sample_strip([image], [mask], None, [image]).shape == (32, 3 * 36 - 4, 3)
    with pytest.raises(ValueError, match="at least one photograph"):
        sample_strip([], [], None, [])


def test_a_grid_scales_lines_by_whole_factors_and_marks_missing_results(scene):
    image, mask, edges = scene
    drawing = edges_image(edges, mask, edges)
    grid = Grid("center", ("ground truth", "edges", "a_model_of_a_long_name"), ((image, drawing, None),))
    sheet = sample_grid(grid, cell_pixels=128)
    assert sheet.shape[1] == 3 * (128 + 6) + 6
    top = sheet.shape[0] - 128 - 6
    np.testing.assert_array_equal(
        sheet[top : top + 128, 140 : 140 + 128], drawing.repeat(4, axis=0).repeat(4, axis=1)
    )
    assert sheet[top + 4, -30].min() > 240  # the empty cell
    with pytest.raises(ValueError, match="'center' has no rows"):
        sample_grid(Grid("center", ("ground truth",), ()))


def test_png_round_trip(scene):
    image, _, _ = scene
    np.testing.assert_array_equal(decode_png(encode_png(image)), image)
    assert encode_png(image) == encode_png(image)


def test_long_captions_are_wrapped_without_loss() -> None:
    font = _font(14)
    for name in ("ground truth", "edge_connect-canny@champion", "@alias", "a/very-long_name/of@something"):
        lines = _wrap_caption(name, font, 90).splitlines()
        assert "".join(lines).replace(" ", "") == name.replace(" ", "")
        assert all(font.getlength(line) <= 90 for line in lines), lines
