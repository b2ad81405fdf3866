"""One trial of a sweep: a training like any other, in durable steps, then scored. Ray Tune only hears of it.

Killed at any point it is found where it was: its steps have manifests and checkpoints of their own, in the storage.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.storage import Storage
from pipelines import tracking
from pipelines.durable.attempt import Progress
from pipelines.durable.lease import StorageBusy
from pipelines.durable.steps import Step, StepContext, StepFailed, Value, Workflow
from pipelines.recipe import Recipe
from pipelines.sweeps.result import SEED, in_words
from pipelines.sweeps.space import Link, Values, milestones, sweep_of, swept_model, trial_recipe
from pipelines.tracking import Tracking
from pipelines.workflow import Later, edge_sigmas, edges_name, edges_step, train_step

if TYPE_CHECKING:
    from collections.abc import Iterator

BUSY = 5.0  # seconds before looking again whether another trial has made what both need
POINTER = "chain.json"
VALIDATION = "val/psnr_rgb_hole"  # what schedulers compare, of the training's own journal


@dataclass(frozen=True)
class Trials:
    """What all trials of a sweep have in common; travels to each."""

    key: str
    recipe: Recipe
    storage: Storage
    given: dict[str, Value]
    """Manifests of the steps that all share: shards, edges, baselines, beginnings of trainings."""
    local: dict[str, Any]
    start: int
    """The step at which a trial begins; the steps before are of a shared beginning."""
    total: int
    run: str
    tracking: Tracking | None
    progress: Progress


def label(number: int, values: Mapping[str, Any]) -> str:
    """What a trial is called where it is shown."""
    return f"trial {number} {in_words(_short(values))}"


def run_trial(config: dict[str, Any], trials: Trials) -> None:
    """What Ray Tune runs. An error becomes the trial's result, with its reason; a killed process is started again."""
    from ray import tune

    name = tune.get_context().get_trial_name()  # population-based training copies configs, but no names
    trial = Trial(trials, int(name.rpartition("-")[2]), dict(config["values"]))
    chain = _read_pointer(tune.get_checkpoint()) or trial.known_chain()
    began = time.monotonic()
    tracking.be_patient()
    steps = chain[-1][0] if chain else trials.start
    try:
        with trial.tracked():
            for until in milestones(sweep_of(trials.recipe), trials.start, trials.total):
                if until <= steps:
                    continue
                chain = [*chain, (until, trial.values)]
                report = trial.learn(chain)
                if until == trials.total:
                    report |= trial.score(chain)
                steps = until
                report |= {"steps": until, "trained": until - trials.start, "chain": chain, "run": trial.run}
                report["seconds"] = time.monotonic() - began
                with _pointer(chain) as checkpoint:
                    tune.report(report, checkpoint=checkpoint)
    except (StepFailed, ValueError) as error:
        trial.show(1, 1, str(error), "failed")
        seconds = time.monotonic() - began
        tune.report({"failed": _reason(error), "steps": steps, "seconds": seconds, "run": trial.run})


class Trial:
    def __init__(self, trials: Trials, number: int, values: Values) -> None:
        self.trials, self.number, self.values = trials, number, values
        self.run, self.name = "", f"trial-{number:04d}"
        self.report = trials.progress.child(label(number, values))

    def show(self, done: float, total: float, note: str = "", state: str = "running") -> None:
        self.report(done, total, note, state)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """The trial's own MLflow run, below the sweep's; its end is the sweep's to say, which may stop a trial."""
        if self.trials.tracking:
            key = f"{self.trials.key}/{self.number}"
            place = self.trials.tracking
            self.run = tracking.open_run(
                place, key, self.name, self.trials.run, {"inpaint.trial": str(self.number)}
            )
            # said once: what population-based training changes later is logged as metrics
            tracking.log_params(place.client(), self.run, self._entry()["first"])
        yield

    def known_chain(self) -> list[Link]:
        """What an earlier life of the sweep has trained of it."""
        return [(int(until), values) for until, values in self._entry()["chain"]]

    def _entry(self) -> dict[str, Any]:
        path = f"{self.trials.local['trials']}/{self.number:04d}.json"
        found: dict[str, Any] = json.loads(self.trials.storage.read(path))
        return found

    def learn(self, chain: Sequence[Link]) -> dict[str, Any]:
        """Train up to the chain's end; what the scheduler compares."""
        last = self.steps(chain)[-1]
        value = self.perform(chain, last.name)
        journal = json.loads(self.trials.storage.read(f"{value['weights']}/curves.json"))["points"]
        curve = [(step, values[VALIDATION]) for step, values in journal if VALIDATION in values]
        if self.run and self.trials.tracking:
            client = self.trials.tracking.client()
            tracking.log_curves(client, self.run, [(step, values) for step, values in journal])
            if sweep_of(self.trials.recipe).scheduler == "pbt":
                changed = {f"value/{path}": float(x) for path, x in self.values.items() if _is_number(x)}
                tracking.log_curves(client, self.run, [(chain[-1][0], changed)])
        return {"val": curve[-1][1], "curve": curve, "weights": value["weights"]}

    def score(self, chain: Sequence[Link]) -> dict[str, Any]:
        value = self.perform(chain, "score", score_step(self.recipe, self.steps(chain)[-1].name))
        scores = {metric: value["scores"].get(metric) for metric in sweep_of(self.trials.recipe).metrics}
        self.show(1, 1, in_words({metric: x for metric, x in scores.items() if x is not None}), "finished")
        return {"scores": value["scores"], "evaluation": value["evaluation"]}

    def perform(self, chain: Sequence[Link], wanted: str, *more: Step) -> Value:
        """The value of a step of this trial, done unless it is found finished."""
        trials = self.trials
        where = None if trials.tracking is None else vars(trials.tracking)
        local = {**trials.local, "tracking": where, "run": self.run, "parent": trials.run}
        steps = [replace(step, local={**local, **step.local}) for step in [*self.steps(chain), *more]]
        workflow = Workflow(f"{trials.key}-{self.name}", steps, trials.storage, trials.given)
        while True:
            try:
                return workflow.run(self._show)[wanted]
            except StorageBusy as busy:  # another trial makes the same edges, or has the same values
                self.show(0, self.trials.total, str(busy))
                time.sleep(BUSY)

    def _show(self, name: str, state: str, done: float, total: float, note: str) -> None:
        if state == "retry":
            self.show(0, self.trials.total, f"{name}: once more: {note}")
        elif state == "running":
            trained = name.startswith("train-")
            at, of = (done, total) if trained and total else (self.trials.total if name == "score" else 0, 0)
            self.show(at, of or self.trials.total, note if trained else name)

    @property
    def recipe(self) -> Recipe:
        return trial_recipe(self.trials.recipe, self.values)

    def steps(self, chain: Sequence[Link]) -> list[Step]:
        """The chain's trainings, each going on from the one before, after edges that nobody has made yet."""
        key = swept_model(self.trials.recipe)
        steps: dict[str, Step] = {}
        before = [f"begin-{key}-{_seed(self.trials.recipe, self.values)}"] if self.trials.start else []
        for until, values in chain:
            recipe = trial_recipe(self.trials.recipe, values)
            sigmas = edge_sigmas(recipe, key)
            for sigma in sigmas:
                name = edges_name(sigma)
                if name not in self.trials.given:
                    steps[name] = edges_step(sigma)
            step = train_step(recipe, key, sigmas)
            if until < self.trials.total:
                step = replace(step, name=f"{step.name}-{until}", config={**step.config, "until": until})
            steps[step.name] = replace(step, needs=(*step.needs, *before))
            before = [step.name]
        return list(steps.values())


def begin_step(recipe: Recipe, values: Values, until: int) -> Step:
    """The training of the steps that are the same in every trial of a seed."""
    key = swept_model(recipe)
    trial = trial_recipe(recipe, values)
    step = train_step(trial, key, edge_sigmas(trial, key))
    return replace(step, name=f"begin-{key}-{_seed(recipe, values)}", config={**step.config, "until": until})


def score_step(recipe: Recipe, trained: str) -> Step:
    return Step(
        "score",
        Later("sweeps.trial", "score"),
        recipe.evaluate.model_dump(mode="json"),
        needs=("shard", "baselines", trained),
    )


def baselines(ctx: StepContext) -> Value:
    """The classical methods on the photographs that decide, and those photographs' features, once for all trials."""
    from pipelines.evaluation.completers import photographs
    from pipelines.evaluation.evaluate import EvaluationSpec, evaluate, truth_features
    from pipelines.evaluation.evaluate import baselines as methods

    photos = list(photographs(ctx.storage.sub(ctx.inputs["shard"]["shards"]), ctx.config["split"]))
    spec = replace(EvaluationSpec.of(ctx.config), samples=0)
    truth = truth_features(photos, spec)
    found = evaluate(methods(), photos, spec, progress=ctx.progress, truth=truth)
    out, first = ctx.storage.sub(ctx.work), next(iter(found.bands))
    return {
        "outputs": [f"{ctx.work}/{key}" for key in [*found.save(out.write), _save_array(out, truth)]],
        "evaluation": ctx.work,
        "scores": {method: _scores(found, method) for method in found.methods},
        "photographs": len(found.photos),
        "reasons": [row["reason"] for row in found.distances.get(first, {}).values() if "reason" in row],
    }


def score(ctx: StepContext) -> Value:
    """The trial's weights on the photographs that decide."""
    from pipelines.evaluation.completers import completer, photographs
    from pipelines.evaluation.evaluate import EvaluationSpec, evaluate
    from pipelines.evaluation.figures import encode_png, sample_grid
    from pipelines.training.weights import load_weights, local_folder

    (trained,) = [value for value in ctx.inputs.values() if "weights" in value]
    with local_folder(ctx.storage, trained["weights"]) as folder:
        model, about = load_weights(folder)
    photos = list(photographs(ctx.storage.sub(ctx.inputs["shard"]["shards"]), ctx.config["split"]))
    truth = _load_array(ctx.storage.sub(ctx.inputs["baselines"]["evaluation"]))
    found = evaluate({"trial": completer(model, about)}, photos, EvaluationSpec.of(ctx.config), truth=truth)
    keys = found.save(ctx.storage.sub(ctx.work).write)
    if run := ctx.local["run"]:
        client = Tracking(**ctx.local["tracking"]).client()
        tracking.log_values(client, run, found.flat("trial"))
        for grid in found.grids():
            tracking.log_picture(client, run, f"samples/{grid.title}.png", encode_png(sample_grid(grid)))
    return {
        "outputs": [f"{ctx.work}/{key}" for key in keys],
        "evaluation": ctx.work,
        "scores": _scores(found, "trial"),
    }


def _scores(found: Any, method: str) -> dict[str, float]:
    """A method's means and distances on the first kind of masks."""
    row = found.row(method)
    apart = found.distances.get(row.masks, {}).get(method, {})
    return row.metrics | {name: apart[name] for name in ("fd", "kid") if name in apart}


def _save_array(out: Storage, array: Any) -> str:
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "truth.npy", array, allow_pickle=False)
        out.upload(Path(folder) / "truth.npy", "truth.npy")
    return "truth.npy"


def _load_array(storage: Storage) -> Any:
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        storage.download("truth.npy", Path(folder) / "truth.npy")
        return np.load(Path(folder) / "truth.npy", allow_pickle=False)


@contextmanager
def _pointer(chain: Sequence[Link]) -> Iterator[Any]:
    """Tune's checkpoint of a trial: not weights, only which parts of trainings led here."""
    from ray.tune import Checkpoint

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / POINTER).write_text(json.dumps(list(chain)))
        yield Checkpoint.from_directory(folder)


def _read_pointer(checkpoint: Any) -> list[Link]:
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        return [(int(until), values) for until, values in json.loads((Path(folder) / POINTER).read_text())]


def _seed(recipe: Recipe, values: Mapping[str, Any]) -> int:
    seed = values.get(SEED)
    return recipe.seed_of(swept_model(recipe)) if seed is None else int(seed)


def _short(values: Mapping[str, Any]) -> Values:
    return {path.rpartition(".")[2]: value for path, value in values.items()}


def _reason(error: BaseException) -> str:
    """Without the step's name and where its traceback is: the table names the trial."""
    text = " ".join(str(error).split())
    with suppress(ValueError):
        text = text[text.index("failed: ") + 8 : text.rindex(" (")]
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
