"""The search space of a sweep: settings, constraints, shared steps, and one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.cli.main import main
from pipelines.recipe import Recipe
from pipelines.recipe.load import RecipeError, load_recipe, parse_recipe, shipped_recipes
from pipelines.sweeps.space import (
    best_recipe,
    iter_settings,
    report_steps,
    satisfies_constraints,
    shared_steps,
    sweep_section,
    total_steps,
    trial_recipe,
)
from pipelines.sweeps.workflow import build_sweep, check_sweep
from support.pages import DOCS, blocks

STEPS = {"edge": 30, "inpaint_canny": 0, "inpaint": 50, "joint": 0}


def recipe(**sweep: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "test",
            "data": {"size": 32, "format": "png"},
            "train": {"checkpoint_every": 20},
            "models": {
                "edge_connect": {
                    "width": 0.1,
                    "residual_blocks": 1,
                    "features": "efficientnet_lite0",
                    "train": {"steps": STEPS},
                }
            },
            "sweep": sweep,
        }
    )


def test_a_grid_has_every_combination_and_seeds_vary_slowest() -> None:
    settings = list(
        iter_settings(recipe(fields={"seed": [0, 1], "edges.sigma": [1, 2], "model.lambda_s": [3, 4]}))
    )
    sigma, s = "edges.sigma", "model.lambda_s"
    pairs = [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert settings == [{sigma: a, s: b, "seed": seed} for seed in (0, 1) for a, b in pairs]


def test_random_draws_follow_their_distribution_and_are_reproducible() -> None:
    fields = {"model.lambda_s": {"loguniform": [1e-3, 10]}, "model.lambda_p": {"uniform": [2, 3]}}
    space = recipe(fields=fields, search="random", budget={"trials": 1})
    draws = [values for values, _ in zip(iter_settings(space), range(400), strict=False)]
    assert draws[:5] == [values for values, _ in zip(iter_settings(space), range(5), strict=False)]
    exponents = np.log10([values["model.lambda_s"] for values in draws])
    for sample, low, high in ((exponents, -3, 1), ([values["model.lambda_p"] for values in draws], 2, 3)):
        counts, _ = np.histogram(sample, bins=4, range=(low, high))
        assert counts.sum() == 400
        assert counts.min() > 70  # 100 each; 4 standard deviations are 35


def test_random_search_ends_when_every_choice_was_drawn_once() -> None:
    fields = {"model.lambda_s": {"choice": [1, 2, 3]}, "edges.sigma": {"choice": [1, 2]}, "seed": [7, 8]}
    settings = list(iter_settings(recipe(fields=fields, search="random", budget={"trials": 99})))
    assert len({tuple(values.values()) for values in settings}) == len(settings) == 12
    assert [values["seed"] for values in settings] == [7, 8] * 6


def test_constraints_may_use_fields_options_and_arithmetic_only() -> None:
    fields = {"model.lambda_s": [1, 10, 100], "model.lambda_p": [1, 10]}
    space = recipe(fields=fields, constraints=["model.lambda_p <= model.lambda_s / 10", "train.batch == 16"])
    assert [tuple(values.values()) for values in iter_settings(space)] == [(10, 1), (100, 1), (100, 10)]
    # lambda_l1 is 1 by the model's own default, sigma 2 by the recipe's
    assert satisfies_constraints(
        recipe(fields=fields, constraints=["not model.lambda_l1 != 1 and model.width < 2 ** -3"]), {}
    )
    harmful = (
        "__import__('os').system('true')",
        "getattr(model, 'lambda_p')",
        "model.__class__",
        "model.lambda_p.__class__.__base__.__subclasses__()",
        "().__class__",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "f'{model}'",
        "(seed := 2) > 1",
    )
    wrong = ("model.lambda_p = 1", "[1, 2]", "print(1)", "1 / 0 > 1", "2.0 ** 99999 > 1")
    for text in harmful + wrong:
        with pytest.raises(RecipeError, match=r"sweep\.constraints") as error:
            check_sweep(recipe(fields=fields, constraints=[text]))
        assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match="leave no setting"):
        check_sweep(recipe(fields=fields, constraints=["model.lambda_p > 99"]))


@pytest.mark.slow
def test_phases_with_equal_weights_in_all_trials_are_shared() -> None:
    def shared(**fields: Any) -> int:
        return shared_steps(recipe(fields=fields))

    assert (
        shared(**{"model.lambda_adv2": [0.1, 0.2], "seed": [0, 1]}) == 30
    )  # G1 does not depend on G2's weights
    assert shared(**{"model.lambda_FM": [1, 2]}) == 0
    assert shared(**{"model.lambda_adv2": [0.1, 0.2], "model.lambda_adv1": [1, 2]}) == 0
    assert shared(**{"edges.sigma": [1, 2]}) == 0
    assert shared(seed=[0, 1]) == 0


def test_the_recipes_of_a_trial_and_of_the_best_values() -> None:
    space = recipe(fields={"edges.sigma": [1, 2], "seed": [3]}, train={"steps": {"edge": 5}}, split="train")
    trial = trial_recipe(space, {"edges.sigma": 1, "seed": 3})
    assert trial.edges.sigma == (1.0,)
    assert trial.seed_for("edge_connect") == 3
    assert trial.train_for("edge_connect").steps == {"edge": 5}
    assert total_steps(trial) > 5  # the paper's steps in the phases that are not named
    assert (trial.evaluate.split, trial.sweep) == ("train", None)
    best = best_recipe(space, {"edges.sigma": 1.0, "seed": 3})
    assert best.train_for("edge_connect").steps == STEPS
    assert (best.edges.sigma, best.seed_for("edge_connect"), best.evaluate.split) == ((1.0,), 0, "test")
    assert parse_recipe(yaml.safe_load(best.to_yaml())) == best


def test_report_steps_of_the_schedulers() -> None:
    def steps(start: int, **sweep: Any) -> list[int]:
        return report_steps(sweep_section(recipe(fields={"model.lambda_s": [1, 2]}, **sweep)), start, 100)

    assert steps(0) == [100]
    assert steps(0, scheduler="asha", report_every=10) == [10, 30, 90, 100]
    assert steps(40, scheduler="asha", report_every=10, reduction_factor=2) == [50, 60, 80, 100]
    assert steps(30, scheduler="pbt", report_every=30) == [60, 90, 100]
    assert steps(0, scheduler="median", report_every=50) == [50, 100]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"fields": {"edges.sigma": [2, -1]}}, "sweep.fields.edges.sigma = -1"),
        ({"fields": {"model.lambda_s": [-0.1]}}, "a weight is not negative"),
        ({"fields": {"model.lambda_q": [1]}}, "no option 'lambda_q'"),
        ({"fields": {"edges.sigm": [1]}}, "did you mean sigma"),
        ({"fields": {"model.lambda_s": []}}, "sweep.fields.model.lambda_s: is empty"),
        ({"fields": {}}, "fields is empty"),
        ({"field": {"model.lambda_s": [1]}}, "unknown field sweep.field; did you mean fields"),
        ({"fields": {"model.lambda_s": {"log": [1, 2]}}}, "known are grid, choice, uniform, loguniform"),
        ({"fields": {"model.lambda_s": {"uniform": [2, 1]}}, "search": "random"}, "the range"),
        ({"fields": {"model.lambda_s": {"loguniform": [0, 1]}}, "search": "random"}, "begins above 0"),
        ({"fields": {"model.lambda_s": {"uniform": [0, 1]}}}, "search: grid cannot take the range"),
        ({"fields": {"model.lambda_s": {"uniform": [0, 1]}}, "search": "random"}, "give a budget"),
        ({"fields": {"data.size": [32, 64]}}, "all trials use the same shards"),
        ({"fields": {"evaluate.seed": [0, 1]}}, "make no difference"),
        ({"fields": {"model.lambda_s": [1]}, "metrics": ["psnr"]}, "did you mean psnr_rgb"),
        ({"fields": {"model.lambda_s": [1]}, "metrics": ["ssim_uniform51_grey"]}, "32 px .* too small for"),
        (
            {
                "fields": {"model.lambda_s": {"uniform": [0, 1]}},
                "search": "random",
                "budget": {"trials": 2},
                "constraints": ["model.lambda_s > 2"],
            },
            "leave no setting of 1000 draws: model.lambda_s > 2",
        ),
        (
            {"fields": {"model.lambda_s": [1]}, "constraints": ["model.lambda_q < 1"]},
            "no field model.lambda_q",
        ),
        ({"fields": {"model.lambda_s": [1]}, "scheduler": "asha"}, "needs `report_every`"),
        ({"fields": {"edges.sigma": [1]}, "scheduler": "pbt", "report_every": 20}, "only lambdas"),
        ({"fields": {"model.lambda_s": [1]}, "model": "edge_conect"}, "none of the recipe's models"),
    ],
)
def test_errors_are_one_line_before_anything_runs(sweep: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        check_sweep(recipe(**sweep))
    assert "\n" not in str(error.value)


def test_fd_as_a_metric_needs_evaluate_distance() -> None:
    swept = recipe(fields={"model.lambda_s": [1, 2]}, metrics=["psnr_rgb", "fd"])
    without = parse_recipe(swept.model_dump(mode="json") | {"evaluate": {"distance": None}})
    with pytest.raises(RecipeError, match=r"there is no fd without evaluate\.distance"):
        check_sweep(without)


def test_a_missing_optuna_is_reported_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"model.lambda_s": {"uniform": [0, 1]}}
    monkeypatch.setattr("pipelines.sweeps.workflow.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install optuna"):
        check_sweep(recipe(fields=fields, search="optuna", budget={"trials": 2}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sweep.metrics=[psnr]", "sweep.metrics: no 'psnr' among"),
        ("sweep.metrics=[fd_]", "did you mean fd"),
        ("sweep.constraints=['edges.sigma > 99']", "leave no setting of the grid: edges.sigma > 99"),
        ("sweep.constraints=['edges.sigm < 9']", "no field edges.sigm"),
        ("sweep.fields={edges.sigma: [-1]}", "sweep.fields.edges.sigma = -1"),
    ],
)
def test_plan_reports_the_errors_of_a_sweep(
    change: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["data.source=bundled", "models.edge_connect-canny.width=0.1", change]
    options = [argument for value in short for argument in ("--set", value)]
    with pytest.raises(SystemExit) as end:
        main(["plan", "edge_connect-sigma", "--storage", str(tmp_path), *options])
    assert end.value.code == 1
    assert words in capsys.readouterr().err


def test_a_sweep_over_sigma_has_an_edges_step_per_sigma() -> None:
    workflow = build_sweep(recipe(fields={"edges.sigma": [1, [0.5, 3]], "seed": [0, 1]}))
    names = [step.name for step in workflow.steps]
    assert names == ["shard", *(f"edges-sigma-{s}" for s in ("0.5", "1", "3")), "baselines", "sweep"]
    begin = build_sweep(recipe(fields={"model.lambda_adv2": [0.1, 1], "seed": [0, 1]})).steps
    names = [step.name for step in begin]
    assert names[1:] == [
        "edges-sigma-2",
        "baselines",
        "begin-edge_connect-0",
        "begin-edge_connect-1",
        "sweep",
    ]


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if load_recipe(name).sweep])
def test_every_shipped_sweep_is_valid(name: str) -> None:
    check_sweep(load_recipe(name))


@pytest.mark.slow
def test_the_documented_sweep_is_valid() -> None:
    (block,) = (b.text for b in blocks(DOCS / "sweeps.md") if b.language == "yaml")
    body = recipe(fields={"edges.sigma": [1]}).model_dump(mode="json", exclude_unset=True)
    check_sweep(parse_recipe(body | yaml.safe_load(block)))
