"""The learner: a step is a function of state, position and batch; ranks average; a wrong step changes nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models import build_model
from pipelines.learner import Learner, NonFiniteLoss, make_schedule

SMALL = {
    "context_encoder": {"size": 32, "width": 0.06, "overlap": 0, "lambda_adv": 0.1},
    "edge_connect": {"width": 0.07, "residual_blocks": 1, "lambda_p": 0, "lambda_s": 0},
}
STEPS = {
    "context_encoder": {"train": 6},
    "edge_connect": {"edge": 2, "inpaint_canny": 2, "inpaint": 1, "joint": 1},
}


def make(name: str, rank: int = 0, world: int = 1, ema: float = 0.9) -> Learner:
    torch.manual_seed(0)
    model = build_model(name, **SMALL[name])
    return Learner(model, make_schedule(model, STEPS[name]), 0, rank, world, ema_decay=ema)


def batch(step: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    image = rng.random((4, 3, 32, 32), np.float32)
    mask = np.zeros((4, 1, 32, 32), np.float32)
    for i, width in enumerate((8, 10, 12, 14)):  # different hole areas on the two ranks
        mask[i, 0, 8 : 8 + width, 8:20] = 1
    edge = (rng.random((4, 1, 32, 32)) < 0.1).astype(np.float32)
    return {"image": image[part], "mask": mask[part], "edge": edge[part]}


def fingerprint(learner: Learner) -> list[torch.Tensor]:
    return [*learner.model.state_dict().values(), *learner.ema.values()]


@pytest.mark.parametrize("name", SMALL)
def test_resumed_at_any_step_it_ends_with_the_same_bits(name: str) -> None:
    whole = make(name)
    states = []
    for step in range(6):
        buffer = io.BytesIO()
        torch.save(whole.state(step), buffer)
        states.append(buffer.getvalue())
        whole.step(step, batch(step))
    for cut in (1, 3, 5):
        torch.manual_seed(99)  # what the process did before must not matter
        resumed = make(name)
        start = resumed.load(torch.load(io.BytesIO(states[cut]), weights_only=True))
        assert start == cut
        for step in range(start, 6):
            resumed.step(step, batch(step))
        for a, b in zip(fingerprint(whole), fingerprint(resumed), strict=True):
            assert torch.equal(a, b)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    learner = make("edge_connect", rank, 2, ema=0)
    for step in range(6):
        learner.step(step, batch(step, slice(2 * rank, 2 * rank + 2)))
    torch.save(learner.model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_learns_from_the_whole_batch(tmp_path: Path) -> None:
    """EdgeConnect has instance norm, spectral norm and 1 / mean(mask), which the ranks must share."""
    alone = make("edge_connect", ema=0)
    for step in range(6):
        alone.step(step, batch(step))
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in alone.model.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=2e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(name: str) -> None:
    learner = make(name)
    learner.step(0, batch(0))
    before = [tensor.clone() for tensor in learner.model.parameters()]
    broken = batch(1)
    broken["image"][:] = np.nan
    broken["edge"][:] = np.nan
    with pytest.raises(NonFiniteLoss, match=r"loss term .* is not finite at step 1 .*lr_scale"):
        learner.step(1, broken)
    for a, b in zip(before, learner.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_phase_trains_its_own_networks_and_leaves_the_others() -> None:
    learner = make("edge_connect")
    edge = {k: v.clone() for k, v in learner.model.networks["edge_generator"].state_dict().items()}
    inpaint = {k: v.clone() for k, v in learner.model.networks["inpaint_generator"].state_dict().items()}
    learner.step(0, batch(0))
    learner.step(1, batch(1))
    now = learner.model.networks["inpaint_generator"].state_dict()
    assert all(torch.equal(inpaint[key], now[key]) for key in inpaint)
    now = learner.model.networks["edge_generator"].state_dict()
    assert not all(torch.equal(edge[key], now[key]) for key in edge)


def test_the_average_follows_with_its_decay_and_is_lent_not_kept() -> None:
    learner = make("context_encoder", ema=0.9)
    expected = {key: value.clone() for key, value in learner.ema.items()}
    for step in range(3):
        learner.step(step, batch(step))
        for key, value in learner.model.networks["generator"].state_dict().items():
            name = f"generator.{key}"
            own = value if not value.is_floating_point() else 0.9 * expected[name] + 0.1 * value
            expected[name] = own.clone()
    for key, value in expected.items():
        torch.testing.assert_close(learner.ema[key], value)
    own = [tensor.clone() for tensor in learner.model.state_dict().values()]
    with learner.averaged():
        for key, value in learner.model.networks["generator"].state_dict().items():
            assert torch.equal(value, learner.ema[f"generator.{key}"])
    assert all(torch.equal(a, b) for a, b in zip(own, learner.model.state_dict().values(), strict=True))


def test_phases_lie_end_to_end_and_none_may_be_left() -> None:
    model = build_model("edge_connect", **SMALL["edge_connect"])
    schedule = make_schedule(model, {"edge": 2, "inpaint_canny": 0, "inpaint": 3, "joint": 0})
    assert [schedule.at(step)[0].name for step in range(schedule.total)] == ["edge"] * 2 + ["inpaint"] * 3
    with pytest.raises(ValueError, match="leaves no phase"):
        make_schedule(model, dict.fromkeys(STEPS["edge_connect"], 0))
