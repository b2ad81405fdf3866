"""The learner: a step is a function of state, step number and batch; ranks average; a failed step changes nothing."""

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
from torch import nn

from models import list_models
from models.base import Model, Phase, make_schedule
from pipelines.training.learner import Learner, NonFiniteLoss
from pipelines.training.numerics import compile_networks
from support.small_models import disable_torch_trace

CHEAP = {"lambda_p": 0, "lambda_s": 0, "lambda_perceptual": 0, "lambda_style": 0, "overlap": 0}  # for speed

WORLD_SIZES = (3,)  # 7 photographs: batches of 2, 2 and 3
CHANNELS_LAST = ("deepfill_v1", "edge_connect")  # the soak tests all models

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")


def make_learner(
    small,
    name: str,
    rank: int = 0,
    world_size: int = 1,
    ema: float = 0.9,
    phase_steps: int = 0,
    compiled: bool = False,
    channels_last: bool = False,
    bfloat16: bool = False,
    micro_batch_size: int | None = None,
    **options,
) -> Learner:
    """A learner with all phases, of `phase_steps` steps (0: one step more than the generators need for one update)."""
    torch.manual_seed(0)
    model = small(name, **{**CHEAP, "width": 0.07, **options})
    steps = {phase.name: phase_steps or phase.critic_steps + 1 for phase in model.phases}
    schedule = make_schedule(model, steps)
    return Learner(
        model,
        schedule,
        0,
        rank,
        world_size,
        ema_decay=ema,
        compiled=compiled,
        bfloat16=bfloat16,
        channels_last=channels_last,
        micro_batch_size=micro_batch_size,
    )


def batch(step: int, part: slice = slice(None), dtype: type = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    image = rng.random((7, 3, 32, 32))
    mask = np.zeros((7, 1, 32, 32))
    for i, width in enumerate((8, 10, 12, 14, 9, 11, 13)):  # ranks have different hole areas
        mask[i, 0, 8 : 8 + width, 8:20] = 1
    edge = rng.random((7, 1, 32, 32)) < 0.1
    return {
        "image": image[part].astype(dtype),
        "mask": mask[part].astype(dtype),
        "edge": edge[part].astype(dtype),
        "rank_slice": range(7)[part],
        "global_size": 7,
    }


def fingerprint(learner: Learner) -> list[torch.Tensor]:
    return [*learner.model.state_dict().values(), *learner.ema.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "float32") for name in list_models()),
        *(
            pytest.param(name, precision, marks=[] if name in CHANNELS_LAST else pytest.mark.soak)
            for precision in ("channels_last", "bfloat16")
            for name in list_models()
        ),
    ],
)
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(name: str, precision: str, small) -> None:
    options = {} if precision == "float32" else {precision: True}
    uninterrupted = make_learner(small, name, **options)
    total = uninterrupted.schedule.total_steps
    states = []
    for step in range(total):
        buffer = io.BytesIO()
        torch.save(uninterrupted.state(step), buffer)
        states.append(buffer.getvalue())
        uninterrupted.step(step, batch(step))
    for cut in sorted({1, total // 2, total - 1}):
        torch.manual_seed(99)  # the process's earlier random state must not matter
        resumed = make_learner(small, name, **options)
        start = resumed.load(torch.load(io.BytesIO(states[cut]), weights_only=True))
        assert start == cut
        for step in range(start, total):
            resumed.step(step, batch(step))
        for a, b in zip(fingerprint(uninterrupted), fingerprint(resumed), strict=True):
            assert torch.equal(a, b)


def gradients(
    learner: Learner, part: slice = slice(None), running_statistics: bool = False
) -> dict[str, torch.Tensor]:
    """The averaged gradients in the first step of each phase in which all its networks learn.

    The optimizers are replaced by ones that do nothing.
    """
    by_network = {}
    for phase, start, end in learner.schedule.phase_spans:
        learner.enter_phase(phase)
        for module in learner.model.modules() if running_statistics else ():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        learner.optimizers = {name: _Still([torch.zeros(1)], {}) for name in learner.optimizers}
        step = start + phase.critic_steps - 1
        assert step < end
        dtype = next(learner.model.networks.parameters()).numpy(force=True).dtype.type
        learner.step(step, batch(step, part, dtype))
        by_network |= {
            f"{phase.name}: {key}": gradient.clone() for key, gradient in learner.flat_gradients.items()
        }
    return by_network


def gradients_of_rank(
    small, name: str, rank: int, world_size: int, micro_batch_size: int | None = None
) -> dict[str, torch.Tensor]:
    """In float64, with batch norm's running statistics: while batch norm trains, each rank on CPUs has the statistics
    of its own photographs, so that results depend on the number of ranks."""
    torch.set_num_threads(1)
    terms = {"lambda_p": 0.02, "lambda_s": 1.0, "lambda_perceptual": 0.02}
    learner = make_learner(small, name, rank, world_size, ema=0, micro_batch_size=micro_batch_size, **terms)
    learner.model.double()
    return gradients(
        learner, slice(rank * 7 // world_size, (rank + 1) * 7 // world_size), running_statistics=True
    )


class _Still(torch.optim.Optimizer):
    def step(self, closure=None) -> None:
        pass


def _rank(rank: int, world_size: int, folder: str, small, names: list[str]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world_size}", rank=rank, world_size=world_size
    )
    for name in names:
        torch.save(
            gradients_of_rank(small, name, rank, world_size), f"{folder}/{name}-{world_size}-{rank}.pt"
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_by_rank(small, tmp_path_factory) -> Path:
    """A folder with the gradients of each world size and rank; the processes start once for all models."""
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in WORLD_SIZES:
        mp.spawn(_rank, args=(world_size, str(folder), small, list_models()), nprocs=world_size)
    return folder


@pytest.mark.parametrize("name", list_models())
def test_any_number_of_ranks_averages_to_the_gradients_of_one(
    name: str, small, gradients_by_rank: Path
) -> None:
    """With spectral norm, gradient penalties, random positions and 1 / mean(mask), and batches of unequal size."""
    expected = gradients_of_rank(small, name, 0, 1)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            averaged = torch.load(gradients_by_rank / f"{name}-{world_size}-{rank}.pt", weights_only=True)
            assert averaged.keys() == expected.keys()
            for key, gradient in expected.items():
                assert gradient.dtype == torch.float64
                torch.testing.assert_close(
                    averaged[key], gradient, rtol=1e-7, atol=1e-10, msg=f"{key}, {world_size} ranks"
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_accumulated_gradients_equal_those_of_the_whole_batch(name: str, small) -> None:
    """Micro-batches of 4 and 3 photographs use the same weights, power iterations and random numbers."""
    full_batch, accumulated = (
        gradients_of_rank(small, name, 0, 1, micro_batch_size) for micro_batch_size in (None, 4)
    )
    for key, gradient in full_batch.items():
        torch.testing.assert_close(accumulated[key], gradient, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ["edge_connect", "deepfill_v2"])
def test_spectral_norm_does_not_depend_on_the_micro_batch_size(name: str, small) -> None:
    """Micro-batches add no power iterations: the vectors after one step per phase are the same."""
    vectors = []
    for micro_batch_size in (None, 2):
        learner = make_learner(small, name, ema=0, micro_batch_size=micro_batch_size)
        learner.model.double()
        gradients(learner)
        vectors.append({k: v for k, v in learner.model.state_dict().items() if k.endswith(("._u", "._v"))})
    assert vectors[0]
    for key, value in vectors[0].items():
        torch.testing.assert_close(vectors[1][key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.slow
@pytest.mark.soak_for("context_encoder", "context_encoder_region", "deepfill_v2", "glcic", "partial_conv")
@pytest.mark.parametrize("name", list_models())
def test_accumulating_learners_resume_to_the_same_bits(name: str, small) -> None:
    uninterrupted = make_learner(small, name, micro_batch_size=4)
    uninterrupted.step(0, batch(0))
    resumed = make_learner(small, name, micro_batch_size=4)
    resumed.load(copy.deepcopy(uninterrupted.state(1)))
    for step in range(1, uninterrupted.schedule.total_steps):
        uninterrupted.step(step, batch(step))
        resumed.step(step, batch(step))
    for a, b in zip(fingerprint(uninterrupted), fingerprint(resumed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.soak_for("context_encoder_region", "deepfill_v1", "edge_connect", "glcic")
@pytest.mark.parametrize("name", list_models())
def test_bfloat16_losses_stay_finite_and_parameters_float32(name: str, small) -> None:
    learner = make_learner(small, name, bfloat16=True)
    for step in range(learner.schedule.total_steps):
        terms = learner.step(step, batch(step))
        assert all(torch.isfinite(value) for value in terms.values()), (step, terms)
    assert all(p.dtype == torch.float32 for p in learner.model.parameters())
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())


@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_last_gives_the_same_losses(name: str, small) -> None:
    plain, channels_last = make_learner(small, name), make_learner(small, name)
    torch.manual_seed(0)
    channels_last = Learner(channels_last.model, channels_last.schedule, 0, ema_decay=0.9, channels_last=True)
    for step in range(plain.schedule.total_steps):
        a, b = plain.step(step, batch(step)), channels_last.step(step, batch(step))
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=2e-2, atol=1e-3, msg=f"{key} at step {step}")


@pytest.mark.parametrize("before", [False, True])
def test_a_state_resumes_in_the_other_memory_format(before: bool, small) -> None:
    """Weights, moving averages and the optimizers' moments are the same state, channels_last or not."""
    uninterrupted, other = (
        make_learner(small, "deepfill_v2", phase_steps=4, channels_last=last) for last in (before, not before)
    )
    for step in range(2):
        uninterrupted.step(step, batch(step))
    other.load(copy.deepcopy(uninterrupted.state(2)))
    for step in range(2, 4):
        uninterrupted.step(step, batch(step))
        other.step(step, batch(step))
    for a, b in zip(fingerprint(uninterrupted), fingerprint(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # a step at this rate changes a weight by 1e-4


# -- compiled --------------------------------------------------------------------------------------------------


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Counter[str]]]:
    """A function that makes learners use a torch.compile backend; it returns the operation counts of the graphs."""
    disable_torch_trace(monkeypatch)

    def use(name: str) -> Counter[str]:
        operations: Counter[str] = Counter()
        compiler = torch._dynamo.lookup_backend(name)

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            operations.update(
                getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes
            )
            return compiler(graph, inputs)

        monkeypatch.setattr(
            "pipelines.training.learner.compile_networks",
            functools.partial(compile_networks, backend=backend),
        )
        return operations

    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield use
    torch._dynamo.reset()


class TinyModel(Model):
    """Two convolutions with batch norm, as a compiler takes a second per kernel."""

    name = "tiny"

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

    def _build_completion(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "backend", "options"),
    [
        pytest.param("tiny", "inductor", {}, marks=NEEDS_COMPILER),
        ("deepfill_v1", "aot_eager", {"attention": False}),  # gradient penalties
        ("edge_connect", "eager", {}),  # spectral norm, four phases
    ],
)
def test_compiled_networks_have_the_gradients_of_uncompiled_ones(
    name: str, backend: str, options: dict[str, Any], small, compile_with
) -> None:
    """As close to those in float64, in every phase; and every layer is compiled, for every way it is used."""
    operations = compile_with(backend)
    build = small if name in list_models() else lambda name, **options: TinyModel(**options)
    reference, learner, compiled_learner = (
        make_learner(build, name, ema=0, compiled=it, **options) for it in (False, False, True)
    )
    reference.model.double()
    expected, uncompiled, compiled = gradients(reference), gradients(learner), gradients(compiled_learner)
    for key, gradient in expected.items():
        allowed = 10 * (uncompiled[key] - gradient).abs().max() + 1e-6 * gradient.abs().max()
        assert (compiled[key] - gradient).abs().max() <= allowed, key
    layers = [
        m
        for phase in compiled_learner.model.phases
        for name in phase.lr
        for m in compiled_learner.model.networks[name].modules()
    ]
    assert operations["conv2d"] >= sum(type(layer) is torch.nn.Conv2d for layer in layers)


def test_compiled_and_uncompiled_learners_exchange_states(small, compile_with) -> None:
    compile_with("eager")
    plain, fast = (make_learner(small, "context_encoder", phase_steps=3, compiled=it) for it in (False, True))
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
    with plain.ema_weights(), fast.ema_weights():
        assert torch.equal(fast.model.complete(image, mask, edge), plain.model.complete(image, mask, edge))
        exported = fast.model.frozen_completion()(torch.cat([image, mask, edge], dim=1))
        assert torch.equal(exported, plain.model.complete(image, mask, edge))


def test_a_broken_compiler_is_reported_in_one_line(small, compile_with, monkeypatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        raise FileNotFoundError(
            "C++ compile error\nkernel.cpp:1:10: fatal error: Python.h: No such file\nand more"
        )

    monkeypatch.setattr(torch._dynamo, "lookup_backend", {"broken": broken}.get)
    compile_with("broken")
    learner = make_learner(small, "context_encoder", compiled=True)
    with pytest.raises(
        ValueError, match=r"^train\.compile does not work here: .*Python\.h.*\. It needs .*g\+\+"
    ) as caught:
        learner.step(0, batch(0))
    assert "\n" not in str(caught.value)


@pytest.mark.soak_for("context_encoder_region", "deepfill_v1", "deepfill_v2", "glcic", "partial_conv")
@pytest.mark.parametrize("name", list_models())
def test_a_non_finite_loss_is_named_and_changes_nothing(name: str, small) -> None:
    learner = make_learner(small, name)
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
    learner = make_learner(small, "edge_connect", phase_steps=2)
    edge = {k: v.clone() for k, v in learner.model.networks["edge_generator"].state_dict().items()}
    inpaint = {k: v.clone() for k, v in learner.model.networks["inpaint_generator"].state_dict().items()}
    learner.step(0, batch(0))
    learner.step(1, batch(1))
    now = learner.model.networks["inpaint_generator"].state_dict()
    assert all(torch.equal(inpaint[key], now[key]) for key in inpaint)
    now = learner.model.networks["edge_generator"].state_dict()
    assert not all(torch.equal(edge[key], now[key]) for key in edge)


def test_the_moving_average_has_its_decay_and_is_used_only_in_its_context(small) -> None:
    learner = make_learner(small, "context_encoder", ema=0.9, phase_steps=3)
    expected = {key: value.clone() for key, value in learner.ema.items()}
    for step in range(3):
        learner.step(step, batch(step))
        for key, value in learner.model.networks["generator"].state_dict().items():
            name = f"generator.{key}"
            trained = value if not value.is_floating_point() else 0.9 * expected[name] + 0.1 * value
            expected[name] = trained.clone()
    for key, value in expected.items():
        torch.testing.assert_close(learner.ema[key], value)
    trained = [tensor.clone() for tensor in learner.model.state_dict().values()]
    with learner.ema_weights():
        for key, value in learner.model.networks["generator"].state_dict().items():
            assert torch.equal(value, learner.ema[f"generator.{key}"])
    assert all(torch.equal(a, b) for a, b in zip(trained, learner.model.state_dict().values(), strict=True))


def test_learning_rates_drop_to_a_tenth_where_the_phase_says(small) -> None:
    learner = make_learner(small, "edge_connect", phase_steps=4, lr_drop_at=0.5)
    rates = []
    for step in range(4):
        learner.step(step, batch(step))
        rates.append(learner.optimizers["edge_generator"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


def test_generators_learn_at_every_fifth_step_of_five_critic_steps(small) -> None:
    learner = make_learner(small, "deepfill_v1", phase_steps=10)
    learned = ["l1" in " ".join(learner.step(step, batch(step))) for step in range(10)]
    assert learned == ([False] * 4 + [True]) * 2


def test_phases_follow_each_other_and_at_least_one_remains(small) -> None:
    model = small("edge_connect")
    schedule = make_schedule(model, {"edge": 2, "inpaint_canny": 0, "inpaint": 3, "joint": 0})
    assert [schedule.phase_at(step)[0].name for step in range(schedule.total_steps)] == ["edge"] * 2 + [
        "inpaint"
    ] * 3
    with pytest.raises(ValueError, match="leaves no phase"):
        make_schedule(model, {phase.name: 0 for phase in model.phases})
