"""bfloat16 on CPUs: known faults of oneDNN, the proven set, and the precision that `auto` stands for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bfloat16.__main__ import ISAS, Worker
from bfloat16.cases import Case, model_cases, random_cases

from models import build_model, list_models, model_class
from models.base import HardwareKind, Precision, make_schedule
from pipelines.contracts import TrainSchedule
from pipelines.recipe.load import load_recipe, shipped_recipes
from pipelines.recipe.sections import Train
from pipelines.training.bfloat16 import is_proven, proven_bfloat16
from pipelines.training.learner import Learner
from pipelines.training.precision import (
    TrainedPrecision,
    begin_precision,
    describe_resumed_precision,
    hardware_kind,
    resolve_precision,
)
from pipelines.training.step import precision_record
from pipelines.weights import CheckpointInfo

CPU = torch.device("cpu")
KIND = hardware_kind(CPU)
KINDS: tuple[HardwareKind, ...] = ("gpu", "amx", "avx512_bf16", "cpu")

PLAIN = Case(False, 16, 16, 3, 1, 1, 1, 1, 16, 16, 2, "contiguous")
DILATED = replace(PLAIN, padding=2, dilation=2, height=32, width=32, layout="channels_last")
KNOWN_FAULTS: dict[str, tuple[HardwareKind, Case]] = {
    "weight's gradient, stride 2, one pixel": (
        "avx512_bf16",
        replace(PLAIN, c_in=12, c_out=32, stride=2, height=1, width=1, layout="channels_last"),
    ),
    "weight's gradient, dilation, channels_last": ("avx512_bf16", replace(DILATED, c_in=24, c_out=48)),
    "weight's gradient, depthwise, dilation, channels_last": (
        "avx512_bf16",
        replace(DILATED, c_in=24, c_out=24, groups=24, padding=4, dilation=4, height=64, width=64),
    ),
    "input's gradient, transposed, stride 2, one column": (
        "amx",
        replace(PLAIN, transposed=True, c_in=256, c_out=2, kernel=5, stride=2, height=17, width=1),
    ),
}


def skip_without(kind: HardwareKind) -> None:
    if KIND not in {"amx": ("amx",), "avx512_bf16": ("amx", "avx512_bf16")}[kind]:
        pytest.skip(f"this CPU has no {kind} instructions")


# -- oneDNN --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", KNOWN_FAULTS)
def test_known_faults_are_outside_the_proven_set_and_still_there(fault: str) -> None:
    kind, case = KNOWN_FAULTS[fault]
    assert not case.is_proven()
    skip_without(kind)
    # unwritten memory may hold the right numbers by chance, so more than one process may be needed
    assert any(faults_in_new_processes(kind, case, count=3)), (
        f"torch {torch.__version__} has mended this: run `make bfloat16`, and widen is_proven"
    )


def faults_in_new_processes(kind: HardwareKind, case: Case, count: int) -> Iterator[str | None]:
    for _ in range(count):
        with Worker(kind) as worker:
            yield worker.fault(case)


@pytest.mark.slow
@pytest.mark.soak_for("avx512_bf16", "avx512")
@pytest.mark.parametrize("isa", ISAS)
def test_a_sample_of_the_proven_set_is_right(isa: str) -> None:
    skip_without("amx" if isa == "amx" else "avx512_bf16")
    cases = list(islice((case for case in random_cases(0, proven=True) if case.products() < 1e7), 60))
    with Worker(isa) as worker:
        assert {case.describe(): fault for case in cases if (fault := worker.fault(case))} == {}
    assert {case.layout for case in cases if case.dilation > 1} == {"contiguous", "channels_last gradient"}
    assert {case.layout for case in cases if case.dilation == 1} > {"channels_last", "channels_last input"}


def test_the_scan_knows_the_convolutions_of_a_model() -> None:
    cases = model_cases("deepfill_v2-small", batches=(1,))
    assert all(case.is_proven() for case in cases)
    assert {case.dilation for case in cases} == {1, 2, 4, 8, 16}
    assert {case.layout for case in cases if case.dilation > 1} == {"contiguous"}
    assert (5, 3, 1) in {(case.kernel, case.c_in, case.stride) for case in cases}


def test_the_scan_finds_a_wrong_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(PLAIN.errors()[0]) < 0.005
    convolve = Case._convolve

    def wrong(self: Case, x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        y = convolve(self, x, *args)
        return y if x.dtype == torch.float64 else torch.where(torch.arange(16) == 3, 0, y)

    monkeypatch.setattr(Case, "_convolve", wrong)
    errors, repeatable = PLAIN.errors()
    assert min(errors[:3]) > 0.1
    assert repeatable


# -- float32 outside the proven set -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "dilation", "groups", "contiguous", "proven"),
    [
        (16, 3, 1, 1, 1, True, True),
        (16, 3, 1, 1, 1, False, True),
        (16, 3, 1, 8, 1, True, True),
        (16, 3, 1, 8, 1, False, False),
        (16, 3, 1, 1, 16, True, False),
        (5, 5, 2, 1, 1, True, False),
        (6, 5, 2, 1, 1, True, True),
        (1, 1, 1, 1, 1, True, False),
    ],
)
def test_proven_set(
    side: int, kernel: int, stride: int, dilation: int, groups: int, contiguous: bool, proven: bool
) -> None:
    pairs = [(n, n) for n in (kernel, stride, dilation)]
    assert is_proven((64, side), *pairs, groups, contiguous) is proven
    assert is_proven((side, 64), *pairs, groups, contiguous) is proven


@pytest.mark.parametrize("transposed", [False, True])
def test_unproven_convolutions_run_in_float32(transposed: bool) -> None:
    name = "conv_transpose2d" if transposed else "conv2d"

    def convolve(*args: Any, **kwargs: Any) -> torch.Tensor:
        return getattr(F, name)(*args, **kwargs)

    weight = torch.randn(8, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16), proven_bfloat16():
        assert convolve(torch.randn(1, 8, 8, 8), weight, stride=2).dtype == torch.bfloat16
        x = torch.randn(1, 8, 3, 8).to(torch.bfloat16)
        y = convolve(x, weight, stride=2)
        assert y.dtype == torch.float32
        assert convolve(x, weight.bfloat16(), None, 2).dtype == torch.float32
    assert torch.equal(y, convolve(x.float(), weight, stride=2))
    with proven_bfloat16():
        # without autocast the types are the caller's
        assert convolve(x, weight.bfloat16(), stride=2).dtype == torch.bfloat16


def test_module_arguments_reach_the_rule() -> None:
    """Layers pass stride, dilation and groups by position."""
    x = torch.randn(1, 16, 9, 9)
    layers: dict[torch.nn.Module, torch.dtype] = {
        torch.nn.Conv2d(16, 16, 3, dilation=2): torch.bfloat16,
        torch.nn.Conv2d(16, 16, 3, dilation=2).to(memory_format=torch.channels_last): torch.float32,  # type: ignore[call-overload]
        torch.nn.Conv2d(16, 16, 3, groups=16): torch.float32,
        torch.nn.ConvTranspose2d(16, 16, 3, dilation=2).to(memory_format=torch.channels_last): torch.float32,  # type: ignore[call-overload]
        torch.nn.ConvTranspose2d(16, 16, 3, groups=4): torch.float32,
        torch.nn.ConvTranspose2d(16, 16, 3, output_padding=0): torch.bfloat16,
    }
    with torch.autocast("cpu", torch.bfloat16), proven_bfloat16():
        assert [layer(x).dtype for layer in layers] == [*layers.values()]


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_near_those_of_float32(channels_last: bool) -> None:
    """At this size oneDNN left parts of the gradients of dilated convolutions unwritten."""
    rng = np.random.default_rng(0)
    mask = np.zeros((2, 128, 128), np.uint8)
    mask[:, 32:96, 32:96] = 1
    batch = {"image": rng.integers(0, 256, (2, 128, 128, 3), np.uint8), "mask": mask}
    gradients = []
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        model = build_model("deepfill_v2", width=0.25, lambda_adv=0.01)
        learner = Learner(
            model, make_schedule(model, {"train": 1}), 0, bfloat16=bfloat16, channels_last=channels_last
        )
        assert all(torch.isfinite(value) for value in learner.step(0, batch).values())
        gradients.append(learner.flat_gradients["generator"].clone())
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.1 * exact.norm()


# -- precision ---------------------------------------------------------------------------------------------------


def schedule(**options: Any) -> TrainSchedule:
    train = Train(**options)
    return TrainSchedule(**{f.name: getattr(train, f.name) for f in fields(TrainSchedule)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list_models())
def test_auto_is_the_models_table(name: str, kind: HardwareKind) -> None:
    model = model_class(name)
    assert set(model.precisions) <= set(KINDS)
    expected = model.precisions.get(kind, Precision())
    assert resolve_precision(schedule(precision="auto"), model, kind) == expected
    assert resolve_precision(schedule(), model, kind) == Precision()
    chosen = schedule(precision="bfloat16", channels_last=True)
    assert resolve_precision(chosen, model, kind) == Precision(True, True)
    if kind in ("cpu", "gpu"):
        assert not expected.bfloat16  # slower without the instructions; not measured on a GPU


def test_auto_and_channels_last_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="precision = auto chooses the memory layout"):
        schedule(precision="auto", channels_last=True)


def test_small_recipes_and_the_demo_use_auto() -> None:
    names = [name for name in shipped_recipes() if name.endswith("-small") or name == "demo"]
    assert len(names) > 7
    for name in names:
        recipe = load_recipe(name)
        assert {recipe.train_for(key).precision for key in recipe.models} == {"auto"}, name


def test_the_precision_is_resolved_where_training_begins_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_class("edge_connect")
    monkeypatch.setattr("pipelines.training.precision.hardware_kind", lambda device: "amx")
    begun = begin_precision(schedule(precision="auto"), model, CPU, world_size=1)
    assert begun == TrainedPrecision(model.precisions["amx"], "amx")
    assert begun.describe() == "trains in bfloat16 on a CPU with AMX"
    assert describe_resumed_precision(begun, CPU) == ""
    monkeypatch.setattr("pipelines.training.precision.hardware_kind", lambda device: "cpu")
    assert describe_resumed_precision(begun, CPU) == (
        "this training began in bfloat16 on a CPU with AMX and goes on in bfloat16 on a CPU without bfloat16 "
        "instructions: its steps are slower here"
    )


def test_a_state_from_before_precisions_has_none() -> None:
    assert TrainedPrecision.from_state({"step": 3}) is None
    assert precision_record({"step": 3}) == {}


def test_a_checkpoint_and_its_weights_name_the_precision(small: Any) -> None:
    model = small("deepfill_v2", width=0.07)
    learner = Learner(
        model, make_schedule(model, {"train": 2}), 0, bfloat16=True, channels_last=True, hardware="amx"
    )
    state = copy.deepcopy(learner.state(0))
    assert TrainedPrecision.from_state(state) == TrainedPrecision(Precision(True, True), "amx")
    info = CheckpointInfo(name="deepfill_v2", **precision_record(state))
    assert info.as_json() == {
        "channels_last": True,
        "hardware": "amx",
        "name": "deepfill_v2",
        "options": {},
        "precision": "bfloat16",
    }
