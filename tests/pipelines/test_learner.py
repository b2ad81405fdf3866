"""The learner: a step is a function of state, position and batch; ranks average; a wrong step changes nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models import list_models
from pipelines.learner import Learner, NonFiniteLoss, make_schedule

PLAIN = {"lambda_p": 0, "lambda_s": 0, "lambda_perceptual": 0, "lambda_style": 0, "overlap": 0}  # for speed


def make(
    small, name: str, rank: int = 0, world: int = 1, ema: float = 0.9, each: int = 0, **options
) -> Learner:
    """Every phase, of `each` steps (0: two, or as many as the generators need to learn once and a step more)."""
    torch.manual_seed(0)
    model = small(name, **{**PLAIN, "width": 0.07, **options})
    steps = {phase.name: each or phase.critic_steps + 1 for phase in model.phases}
    return Learner(model, make_schedule(model, steps), 0, rank, world, ema_decay=ema)


def batch(step: int, part: slice = slice(None), dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    image = rng.random((6, 3, 32, 32))
    mask = np.zeros((6, 1, 32, 32))
    for i, width in enumerate((8, 10, 12, 14, 9, 11)):  # different hole areas on the ranks
        mask[i, 0, 8 : 8 + width, 8:20] = 1
    edge = rng.random((6, 1, 32, 32)) < 0.1
    return {
        "image": image[part].astype(dtype),
        "mask": mask[part].astype(dtype),
        "edge": edge[part].astype(dtype),
    }


def fingerprint(learner: Learner) -> list[torch.Tensor]:
    return [*learner.model.state_dict().values(), *learner.ema.values()]


@pytest.mark.parametrize("name", list_models())
def test_resumed_at_any_step_it_ends_with_the_same_bits(name: str, small) -> None:
    whole = make(small, name)
    total = whole.schedule.total
    states = []
    for step in range(total):
        buffer = io.BytesIO()
        torch.save(whole.state(step), buffer)
        states.append(buffer.getvalue())
        whole.step(step, batch(step))
    for cut in sorted({1, total // 2, total - 1}):
        torch.manual_seed(99)  # what the process did before must not matter
        resumed = make(small, name)
        start = resumed.load(torch.load(io.BytesIO(states[cut]), weights_only=True))
        assert start == cut
        for step in range(start, total):
            resumed.step(step, batch(step))
        for a, b in zip(fingerprint(whole), fingerprint(resumed), strict=True):
            assert torch.equal(a, b)


def gradients(small, name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The averaged gradients of each phase's last step in float64, as the optimisers would see them; they do nothing.

    Batch norm uses its running statistics here: while it learns, each rank's statistics are of its own photographs,
    which no number of ranks can share on CPUs.
    """
    torch.set_num_threads(1)
    learner = make(small, name, rank, world, ema=0, lambda_p=0.02, lambda_s=1.0, lambda_perceptual=0.02)
    learner.model.double()
    found = {}
    mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
    for phase, start, end in learner.schedule.parts:
        learner.enter(phase)
        for module in learner.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        learner.optimisers = {name: _Still([torch.zeros(1)], {}) for name in learner.optimisers}
        step = start + phase.critic_steps - 1
        assert step < end
        learner.step(step, batch(step, mine, np.float64))
        found |= {f"{phase.name}: {key}": flat.clone() for key, flat in learner.gradients.items()}
    return found


class _Still(torch.optim.Optimizer):
    def step(self, closure=None) -> None:
        pass


def _rank(rank: int, world: int, folder: str, small, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    for name in names:
        torch.save(gradients(small, name, rank, world), f"{folder}/{name}-{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(small, tmp_path_factory) -> Path:
    """What 2 and what 3 ranks got, in files: one start of processes serves all models."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (2, 3):
        mp.spawn(_rank, args=(world, str(folder), small, list_models()), nprocs=world)
    return folder


@pytest.mark.parametrize("name", list_models())
def test_two_and_three_ranks_average_to_the_gradients_of_one(name: str, small, of_ranks: Path) -> None:
    """Spectral norm, gradient penalties, random places and 1 / mean(mask) included."""
    alone = gradients(small, name, 0, 1)
    assert all(flat.abs().sum() > 0 for flat in alone.values())
    for world in (2, 3):
        for rank in range(world):
            shared = torch.load(of_ranks / f"{name}-{world}-{rank}.pt", weights_only=True)
            assert shared.keys() == alone.keys()
            for key, flat in alone.items():
                assert flat.dtype == torch.float64
                torch.testing.assert_close(
                    shared[key], flat, rtol=1e-7, atol=1e-10, msg=f"{key}, {world} ranks"
                )


@pytest.mark.parametrize("name", list_models())
def test_bfloat16_stays_finite_and_float32_where_it_counts(name: str, small) -> None:
    learner = make(small, name)
    learner.bfloat16 = True
    for step in range(learner.schedule.total):
        terms = learner.step(step, batch(step))
        assert all(torch.isfinite(value) for value in terms.values()), (step, terms)
    assert all(p.dtype == torch.float32 for p in learner.model.parameters())
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())


@pytest.mark.parametrize("name", ["deepfill_v1", "edge_connect"])
def test_channels_last_learns_the_same(name: str, small) -> None:
    plain, fast = make(small, name), make(small, name)
    torch.manual_seed(0)
    fast = Learner(fast.model, fast.schedule, 0, ema_decay=0.9, channels_last=True)
    for step in range(plain.schedule.total):
        a, b = plain.step(step, batch(step)), fast.step(step, batch(step))
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=2e-2, atol=1e-3, msg=f"{key} at step {step}")


@pytest.mark.parametrize("name", list_models())
def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(name: str, small) -> None:
    learner = make(small, name)
    learner.step(0, batch(0))
    before = [tensor.clone() for tensor in learner.model.parameters()]
    broken = batch(1)
    broken["image"][:] = np.nan
    broken["edge"][:] = np.nan
    with pytest.raises(NonFiniteLoss, match=r"loss term .* is not finite at step 1 .*lr_scale"):
        learner.step(1, broken)
    for a, b in zip(before, learner.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_phase_trains_its_own_networks_and_leaves_the_others(small) -> None:
    learner = make(small, "edge_connect", each=2)
    edge = {k: v.clone() for k, v in learner.model.networks["edge_generator"].state_dict().items()}
    inpaint = {k: v.clone() for k, v in learner.model.networks["inpaint_generator"].state_dict().items()}
    learner.step(0, batch(0))
    learner.step(1, batch(1))
    now = learner.model.networks["inpaint_generator"].state_dict()
    assert all(torch.equal(inpaint[key], now[key]) for key in inpaint)
    now = learner.model.networks["edge_generator"].state_dict()
    assert not all(torch.equal(edge[key], now[key]) for key in edge)


def test_the_average_follows_with_its_decay_and_is_lent_not_kept(small) -> None:
    learner = make(small, "context_encoder", ema=0.9, each=3)
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


def test_rates_fall_to_a_tenth_where_the_phase_says(small) -> None:
    learner = make(small, "edge_connect", each=4, lr_drop=0.5)
    rates = []
    for step in range(4):
        learner.step(step, batch(step))
        rates.append(learner.optimisers["edge_generator"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


def test_generators_learn_at_every_fifth_step_of_five_critic_steps(small) -> None:
    learner = make(small, "deepfill_v1", each=10)
    seen = ["l1" in " ".join(learner.step(step, batch(step))) for step in range(10)]
    assert seen == ([False] * 4 + [True]) * 2


def test_phases_lie_end_to_end_and_none_may_be_left(small) -> None:
    model = small("edge_connect")
    schedule = make_schedule(model, {"edge": 2, "inpaint_canny": 0, "inpaint": 3, "joint": 0})
    assert [schedule.at(step)[0].name for step in range(schedule.total)] == ["edge"] * 2 + ["inpaint"] * 3
    with pytest.raises(ValueError, match="leaves no phase"):
        make_schedule(model, {phase.name: 0 for phase in model.phases})
