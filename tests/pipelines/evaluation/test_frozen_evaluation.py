"""Evaluations on frozen mask sets: photograph i gets mask i, equal figures, and protocols that do not depend on paths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from data_prep.frozen_masks import freeze_masks, load_frozen_set
from data_prep.masks import open_masks
from pipelines.evaluation.evaluate import evaluate, make_masks
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.tables import table_text
from pipelines.recipe import EvaluationConfig
from pipelines.recipe.load import RecipeError, parse_recipe
from pipelines.weights import CheckpointInfo, save_weights
from support.small_models import build_small

CommandLine = Callable[..., tuple[int, str, str]]

SIDE, COUNT = 48, 12


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    path = tmp_path / "thick.tar"
    freeze_masks(open_masks("lama_thick"), {"lama_thick": {}}, COUNT, SIDE, 0, str(path))
    return path


@pytest.fixture
def photos() -> list[tuple[str, np.ndarray]]:
    picture = astronaut()
    return [(f"{n}", np.ascontiguousarray(picture[:SIDE, 30 * n : 30 * n + SIDE])) for n in range(COUNT)]


def score(path: Path, photos: list[tuple[str, np.ndarray]], **fields: object) -> EvaluationResult:
    config = EvaluationConfig.model_validate(
        {"masks": (str(path),), "distance": None, "grid_rows": 1} | fields
    )
    methods = {name: baseline_methods()[name] for name in ("telea", "mean_colour")}
    return evaluate(methods, photos, config)


def test_photograph_i_gets_mask_i(frozen: Path, photos: list[tuple[str, np.ndarray]]) -> None:
    config = EvaluationConfig(masks=(str(frozen), "center"), seed=9)
    masks = make_masks(config, [image for _, image in photos[:5]])
    assert list(masks) == ["thick", "center"]
    expected = load_frozen_set(str(frozen)).fixed_set(SIDE, SIDE, COUNT, 0)
    assert all(np.array_equal(a, b) for a, b in zip(masks["thick"], expected[:5], strict=True))


def test_two_evaluations_are_equal_to_the_last_bit_wherever_the_set_lies(
    frozen: Path, tmp_path: Path, photos: list[tuple[str, np.ndarray]]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(frozen, tmp_path / "elsewhere" / "thick.tar"))
    one, again = score(frozen, photos), score(frozen, photos)
    assert one.to_dict() == again.to_dict()
    assert one.pictures == again.pictures
    other = score(moved, photos, seed=7)
    assert (other.values, other.bands, table_text(other)) == (one.values, one.bands, table_text(one))
    assert one.protocol.comparable_with(other.protocol)
    assert one.protocol.frozen_masks[str(frozen)] == {
        "digest": load_frozen_set(str(frozen)).manifest.digest,
        "masks": {"lama_thick": {}},
        "count": COUNT,
        "size": SIDE,
        "seed": 0,
    }
    stored: dict[str, bytes] = {}
    one.save(stored.__setitem__)
    assert EvaluationResult.load(stored.__getitem__).protocol == one.protocol


def test_too_few_masks_stop_the_evaluation(frozen: Path, photos: list[tuple[str, np.ndarray]]) -> None:
    with pytest.raises(ValueError, match="12 masks for 13 photographs"):
        score(frozen, [*photos, photos[0]])
    assert len(score(frozen, [*photos, photos[0]], max_photos=COUNT).photos) == COUNT


def test_a_recipe_names_a_set_for_its_evaluation_and_not_for_training(frozen: Path) -> None:
    from pipelines.check_recipe import check_recipe

    body = {"name": "a", "data": {"size": 64}, "model": {"name": "deepfill_v2", "width": 0.1}}
    with pytest.raises(RecipeError, match=r"^evaluate\.masks: .* masks of 48 x 48 pixels, not 64 x 64"):
        check_recipe(parse_recipe(body | {"evaluate": {"masks": [str(frozen)], "distance": None}}))
    body = body | {"data": {"size": SIDE}}
    for most, words in ((13, "up to 13"), (None, "any number of")):
        evaluate_section = {"masks": [str(frozen)], "distance": None, "max_photos": most}
        with pytest.raises(
            RecipeError, match=rf"^evaluate\.masks: .* 12 masks, and .* {words} photographs: set it to 12"
        ):
            check_recipe(parse_recipe(body | {"evaluate": evaluate_section}))
    check_recipe(parse_recipe(body | {"evaluate": {**evaluate_section, "max_photos": COUNT}}))
    with pytest.raises(RecipeError, match=r"^masks: .* frozen mask set, which is for evaluation"):
        check_recipe(parse_recipe(body | {"masks": str(frozen)}), allow_downloads=False)


def test_the_command_scores_at_the_size_of_the_set(
    frozen: Path, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INPAINT_CACHE", str(tmp_path / "cache"))
    model = build_small("partial_conv")
    (tmp_path / "model").mkdir()
    save_weights(
        tmp_path / "model", model, {}, CheckpointInfo(model.name, vars(model.options), size=32, sigma=2.0)
    )
    (tmp_path / "photos").mkdir()
    for n in range(3):
        Image.fromarray(astronaut()[:90, 80 * n : 80 * n + 80]).save(tmp_path / "photos" / f"{n}.png")
    command = (
        "evaluate",
        "model",
        "--images",
        "photos",
        "--masks",
        "thick.tar",
        "--out",
        "scores",
        "--no-baselines",
    )
    status, out, error = command_line(*command)
    assert status == 0, error
    digest = load_frozen_set("thick.tar").manifest.digest
    result = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert result["protocol"]["sizes"] == [f"{SIDE}x{SIDE}"]
    assert result["protocol"]["frozen_masks"]["thick.tar"]["digest"] == digest
    assert "thick masks · 3 photographs" in out
    assert f"masks {result['protocol']['masks_sha256'][:12]}" in " ".join(out.split())
    status, _, error = command_line(*command, "--size", "32")
    assert (status, "\n" in error.strip().splitlines()[-1]) == (1, False)
    assert "masks of 48 x 48 pixels, not 32 x 32" in error
    frozen.write_bytes(frozen.read_bytes()[:4000])
    status, _, error = command_line(*command)
    assert status == 1
    assert "thick.tar is damaged" in error
