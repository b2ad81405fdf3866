"""The learner: a step is a function of state, position and batch; ranks average; a wrong step changes nothing."""

from __future__ import annotations

import copy
import functools
import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from small import without_traces
from torch import nn

from models import list_models
from models.base import Model, Phase
from pipelines.training.compiling import compile_networks
from pipelines.training.learner import Learner, NonFiniteLoss, make_schedule

PLAIN = {"lambda_p": 0, "lambda_s": 0, "lambda_perceptual": 0, "lambda_style": 0, "overlap": 0}  # for speed

RANKS = (2, 3)  # of 7 photographs

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")


def make(
    small,
    name: str,
    rank: int = 0,
    world: int = 1,
    ema: float = 0.9,
    each: int = 0,
    compiled: bool = False,
    channels_last: bool = False,
    at_once: int | None = None,
    **options,
) -> Learner:
    """Every phase, of `each` steps (0: two, or as many as the generators need to learn once and a step more)."""
    torch.manual_seed(0)
    model = small(name, **{**PLAIN, "width": 0.07, **options})
    steps = {phase.name: each or phase.critic_steps + 1 for phase in model.phases}
    schedule = make_schedule(model, steps)
    return Learner(
        model,
        schedule,
        0,
        rank,
        world,
        ema_decay=ema,
        compiled=compiled,
        channels_last=channels_last,
        at_once=at_once,
    )


def batch(step: int, part: slice = slice(None), dtype: type = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    image = rng.random((7, 3, 32, 32))
    mask = np.zeros((7, 1, 32, 32))
    for i, width in enumerate((8, 10, 12, 14, 9, 11, 13)):  # different hole areas on the ranks
        mask[i, 0, 8 : 8 + width, 8:20] = 1
    edge = rng.random((7, 1, 32, 32)) < 0.1
    return {
        "image": image[part].astype(dtype),
        "mask": mask[part].astype(dtype),
        "edge": edge[part].astype(dtype),
        "part": range(7)[part],
        "whole": 7,
    }


def fingerprint(learner: Learner) -> list[torch.Tensor]:
    return [*learner.model.state_dict().values(), *learner.ema.values()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", list_models())
def test_resumed_at_any_step_it_ends_with_the_same_bits(name: str, channels_last: bool, small) -> None:
    whole = make(small, name, channels_last=channels_last)
    total = whole.schedule.total
    states = []
    for step in range(total):
        buffer = io.BytesIO()
        torch.save(whole.state(step), buffer)
        states.append(buffer.getvalue())
        whole.step(step, batch(step))
    for cut in sorted({1, total // 2, total - 1}):
        torch.manual_seed(99)  # what the process did before must not matter
        resumed = make(small, name, channels_last=channels_last)
        start = resumed.load(torch.load(io.BytesIO(states[cut]), weights_only=True))
        assert start == cut
        for step in range(start, total):
            resumed.step(step, batch(step))
        for a, b in zip(fingerprint(whole), fingerprint(resumed), strict=True):
            assert torch.equal(a, b)


def gradients(
    learner: Learner, part: slice = slice(None), running_statistics: bool = False
) -> dict[str, torch.Tensor]:
    """The averaged gradients of each phase's first step of all its networks, as the optimisers would see them; they
    do nothing."""
    found = {}
    for phase, start, end in learner.schedule.parts:
        learner.enter(phase)
        for module in learner.model.modules() if running_statistics else ():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        learner.optimisers = {name: _Still([torch.zeros(1)], {}) for name in learner.optimisers}
        step = start + phase.critic_steps - 1
        assert step < end
        dtype = next(learner.model.networks.parameters()).numpy(force=True).dtype.type
        learner.step(step, batch(step, part, dtype))
        found |= {f"{phase.name}: {key}": flat.clone() for key, flat in learner.gradients.items()}
    return found


def gradients_of_rank(
    small, name: str, rank: int, world: int, at_once: int | None = None
) -> dict[str, torch.Tensor]:
    """In float64. Batch norm uses its running statistics here: while it learns, each rank's statistics are of its own
    photographs, which no number of ranks can share on CPUs."""
    torch.set_num_threads(1)
    terms = {"lambda_p": 0.02, "lambda_s": 1.0, "lambda_perceptual": 0.02}
    learner = make(small, name, rank, world, ema=0, at_once=at_once, **terms)
    learner.model.double()
    return gradients(learner, slice(rank * 7 // world, (rank + 1) * 7 // world), running_statistics=True)


class _Still(torch.optim.Optimizer):
    def step(self, closure=None) -> None:
        pass


def _rank(rank: int, world: int, folder: str, small, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    for name in names:
        torch.save(gradients_of_rank(small, name, rank, world), f"{folder}/{name}-{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(small, tmp_path_factory) -> Path:
    """What each number of ranks got, in files: one start of processes serves all models."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in RANKS:
        mp.spawn(_rank, args=(world, str(folder), small, list_models()), nprocs=world)
    return folder


@pytest.mark.parametrize("name", list_models())
def test_any_number_of_ranks_averages_to_the_gradients_of_one(name: str, small, of_ranks: Path) -> None:
    """Spectral norm, gradient penalties, random places and 1 / mean(mask) included, with parts that are not equal."""
    alone = gradients_of_rank(small, name, 0, 1)
    assert all(flat.abs().sum() > 0 for flat in alone.values())
    for world in RANKS:
        for rank in range(world):
            shared = torch.load(of_ranks / f"{name}-{world}-{rank}.pt", weights_only=True)
            assert shared.keys() == alone.keys()
            for key, flat in alone.items():
                assert flat.dtype == torch.float64
                torch.testing.assert_close(
                    shared[key], flat, rtol=1e-7, atol=1e-10, msg=f"{key}, {world} ranks"
                )


@pytest.mark.parametrize("name", list_models())
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str, small) -> None:
    """In parts of 4 and 3 photographs: the same generators, power iterations and random numbers."""
    whole, parts = (gradients_of_rank(small, name, 0, 1, at_once) for at_once in (None, 4))
    for key, flat in whole.items():
        torch.testing.assert_close(parts[key], flat, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ["edge_connect", "deepfill_v2"])
def test_spectral_norm_goes_on_alike_whatever_is_held_at_once(name: str, small) -> None:
    """Its vectors after a step of each phase: one power iteration for every time that the whole batch has."""
    vectors = []
    for at_once in (None, 2):
        learner = make(small, name, ema=0, at_once=at_once)
        learner.model.double()
        gradients(learner)
        vectors.append({k: v for k, v in learner.model.state_dict().items() if k.endswith(("._u", "._v"))})
    assert vectors[0]
    for key, value in vectors[0].items():
        torch.testing.assert_close(vectors[1][key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", list_models())
def test_accumulating_learners_resume_to_the_same_bits(name: str, small) -> None:
    whole = make(small, name, at_once=4)
    whole.step(0, batch(0))
    resumed = make(small, name, at_once=4)
    resumed.load(copy.deepcopy(whole.state(1)))
    for step in range(1, whole.schedule.total):
        whole.step(step, batch(step))
        resumed.step(step, batch(step))
    for a, b in zip(fingerprint(whole), fingerprint(resumed), strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("before", [False, True])
def test_a_state_goes_on_in_the_other_memory_layout(before: bool, small) -> None:
    """Weights, their averages and the optimisers' moments: channels_last or not, it is the same state."""
    whole, other = (make(small, "deepfill_v2", each=4, channels_last=last) for last in (before, not before))
    for step in range(2):
        whole.step(step, batch(step))
    other.load(copy.deepcopy(whole.state(2)))
    for step in range(2, 4):
        whole.step(step, batch(step))
        other.step(step, batch(step))
    for a, b in zip(fingerprint(whole), fingerprint(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # a step at this rate is 1e-4 a weight


# -- compiled --------------------------------------------------------------------------------------------------


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Counter[str]]]:
    """Make learners use a backend of torch.compile; returns how often each operation is in the graphs that it gets."""
    without_traces(monkeypatch)

    def use(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        compiler = torch._dynamo.lookup_backend(name)

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            found.update(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes)
            return compiler(graph, inputs)

        monkeypatch.setattr(
            "pipelines.training.learner.compile_networks",
            functools.partial(compile_networks, backend=backend),
        )
        return found

    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield use
    torch._dynamo.reset()


class Little(Model):
    """Two convolutions with batch norm, for a compiler that takes a second for each kernel."""

    name = "little"

    def __init__(self, width: float, **options: Any) -> None:
        super().__init__(options)
        layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 4, 2, 1)]
        self.networks = nn.ModuleDict({"generator": nn.Sequential(*layers)})
        self.phases = (Phase("train", 1, ("generator",), (), {"generator": 1e-3}),)

    def generate(self, batch, phase):
        return {"image": self.networks["generator"](batch["image"])}

    def discriminator_losses(self, batch, out, phase):
        return {}

    def generator_losses(self, batch, out, phase):
        return {"rec": (out["image"] - batch["image"]).square().mean()}

    def weights(self, phase):
        return {"rec": 1.0}

    def _completion(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "backend", "options"),
    [
        pytest.param("little", "inductor", {}, marks=NEEDS_COMPILER),
        ("deepfill_v1", "aot_eager", {"attention": False}),  # gradient penalties
        ("edge_connect", "eager", {}),  # spectral norm, four phases
    ],
)
def test_compiled_networks_have_the_gradients_of_uncompiled_ones(
    name: str, backend: str, options: dict[str, Any], small, compile_with
) -> None:
    """As near to float64's, in every phase; and every layer is compiled, in every way it is used."""
    found = compile_with(backend)
    build = small if name in list_models() else lambda name, **options: Little(**options)
    exact, plain, fast = (make(build, name, ema=0, compiled=it, **options) for it in (False, False, True))
    exact.model.double()
    wanted, usual, got = gradients(exact), gradients(plain), gradients(fast)
    for key, gradient in wanted.items():
        allowed = 10 * (usual[key] - gradient).abs().max() + 1e-6 * gradient.abs().max()
        assert (got[key] - gradient).abs().max() <= allowed, key
    layers = [
        m for phase in fast.model.phases for name in phase.lr for m in fast.model.networks[name].modules()
    ]
    assert found["conv2d"] >= sum(type(layer) is torch.nn.Conv2d for layer in layers)


def test_a_compiled_learners_state_is_any_learners(small, compile_with) -> None:
    compile_with("eager")
    plain, fast = (make(small, "context_encoder", each=3, compiled=it) for it in (False, True))
    plain.step(0, batch(0))
    fast.step(0, batch(0))
    assert [*fast.state(1)["networks"]] == [*plain.state(1)["networks"]]
    assert fast.state(1)["ema"].keys() == plain.state(1)["ema"].keys()
    states = [copy.deepcopy(learner.state(1)) for learner in (plain, fast)]
    fast.load(states[0])
    plain.load(states[1])
    for step in (1, 2):
        plain.step(step, batch(step))
        fast.step(step, batch(step))
    for a, b in zip(fingerprint(plain), fingerprint(fast), strict=True):
        assert torch.equal(a, b)
    image, mask, edge = (torch.from_numpy(batch(0)[key]) for key in ("image", "mask", "edge"))
    with plain.averaged(), fast.averaged():
        assert torch.equal(fast.model.complete(image, mask, edge), plain.model.complete(image, mask, edge))
        exported = fast.model.completion()(torch.cat([image, mask, edge], dim=1))
        assert torch.equal(exported, plain.model.complete(image, mask, edge))


def test_a_compiler_that_does_not_work_is_said_in_one_line(small, compile_with, monkeypatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        raise FileNotFoundError(
            "C++ compile error\nkernel.cpp:1:10: fatal error: Python.h: No such file\nand more"
        )

    monkeypatch.setattr(torch._dynamo, "lookup_backend", {"broken": broken}.get)
    compile_with("broken")
    learner = make(small, "context_encoder", compiled=True)
    with pytest.raises(
        ValueError, match=r"^train\.compile does not work here: .*Python\.h.*\. It needs .*g\+\+"
    ) as caught:
        learner.step(0, batch(0))
    assert "\n" not in str(caught.value)


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
