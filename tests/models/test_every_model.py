"""What every model of the registry keeps, tested for each by its being there."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import safetensors.torch
import torch
from small import liven, without_traces
from torch import Tensor

from models import build_model, list_models, model_options, model_type, takes_edges

pytestmark = pytest.mark.parametrize("name", list_models())

SIZES = [(1, 33, 47), (2, 61, 91), (3, 64, 64), (1, 250, 190), (1, 20, 24)]

# learning rate (None: the paper's) and steps of each phase in which eight photographs are learned by heart
LEARNS: dict[str, tuple[float | None, dict[str, int]]] = {
    "context_encoder": (2e-3, {"train": 100}),
    "context_encoder_region": (1e-3, {"train": 150}),
    "edge_connect": (2e-3, {"edge": 20, "inpaint": 100}),
    "glcic": (2e-3, {"completion": 150, "discriminator": 5, "joint": 60}),
    "partial_conv": (2e-3, {"train": 100, "finetune": 20}),
    "deepfill_v2": (2e-3, {"train": 200}),
    "deepfill_v1": (2e-3, {"train": 600}),
}


def request(b: int, h: int, w: int, edges: bool = False) -> Tensor:
    """[B,5,H,W] with a hole of another size and place in every photograph, and edges outside it."""
    x = torch.rand(b, 5, h, w)
    x[:, 3] = 0
    for i in range(b):
        x[i, 3, h // 3 : h // 3 + h // 5 + i, w // 4 + 2 * i : w // 4 + w // 5] = 1
    x[:, 4] = (x[:, 4] > 0.9) * (1 - x[:, 3] if not edges else 1)
    return x


def bits(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("size", SIZES)
def test_completes_any_size_without_reading_the_hole_or_touching_the_rest(name, size, small) -> None:
    model = small(name)
    x = request(*size)
    image, mask, edge = x[:, :3], x[:, 3:4], x[:, 4:]
    done = model.complete(image, mask, edge)
    hole = (mask > 0).expand_as(image)
    assert done.shape == image.shape
    assert done.min() >= 0
    assert done.max() <= 1
    assert torch.equal(done[~hole], image[~hole])
    for contents in (0.0, 1.0, float("nan"), float("inf")):
        assert torch.equal(model.complete(torch.where(hole, contents, image), mask, edge), done)


def test_a_batch_is_completed_as_its_photographs_one_by_one(name, small) -> None:
    model = small(name)
    x = request(3, 40, 56)
    x[1, 3] = 0  # one of them without a hole
    done = model.complete(x[:, :3], x[:, 3:4], x[:, 4:])
    for i in range(3):
        alone = model.complete(x[i : i + 1, :3], x[i : i + 1, 3:4], x[i : i + 1, 4:])
        torch.testing.assert_close(done[i : i + 1], alone, atol=1e-5, rtol=0)
    assert torch.equal(done[1], x[1, :3])


def test_completing_leaves_modes_and_weights_alone(name, small) -> None:
    model = small(name)
    model.set_phase(model.phases[0])
    before, modes = bits(model), [m.training for m in model.modules()]
    model.complete(*request(1, 32, 32).split([3, 1, 1], dim=1))
    assert equal(before, bits(model))
    assert modes == [m.training for m in model.modules()]


def test_shapes_that_do_not_go_together_are_named(name, small) -> None:
    with pytest.raises(ValueError, match=r"\[B,3,H,W\].*\(1, 1, 8, 8\)"):
        small(name).complete(torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 8, 8))


def test_exported_equals_eager_at_every_size(name, small, batch, monkeypatch) -> None:
    """To 1e-5; or, over many places of contextual attention, to ten times float32's own error."""
    without_traces(monkeypatch)
    model = small(name)
    model.generate(batch, model.phases[0])  # statistics that are not those of a new model
    completion = liven(model, request(3, 64, 64, edges=True)).completion()
    exact = copy.deepcopy(completion).double()
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(completion, (request(2, 61, 91),), dynamic_shapes=(dynamic,)).module()
    for size in SIZES:
        x = request(*size, edges=True)
        hole = (x[:, 3:4] > 0).expand(-1, 3, -1, -1)
        inverted = torch.cat([1 - x[:, :3], x[:, 3:]], dim=1)
        x[:, :3] = torch.where(hole, torch.nan, x[:, :3])
        result, eager = exported(x), completion(x)
        assert (eager - completion(inverted))[hole].abs().mean() > 0.01, (
            "a fill that ignores the photograph proves little"
        )
        rounding = float((eager - exact(x.double())).abs().max())
        assert rounding < 1e-3
        allowed = max(1e-5, 10 * rounding)
        torch.testing.assert_close(result, eager, atol=allowed, rtol=0)
        torch.testing.assert_close(result, model.complete(*x.split([3, 1, 1], dim=1)), atol=allowed, rtol=0)


def test_the_completion_is_a_frozen_copy(name, small) -> None:
    model = small(name)
    completion = model.completion()
    assert not any(p.requires_grad for p in completion.parameters())
    x = request(1, 32, 32)
    before = completion(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(completion(x), before)
    assert equal(bits(model), bits(copy.deepcopy(model)))


def test_gradients_reach_every_trained_parameter_and_no_frozen_one(name, small, batch, training) -> None:
    model = small(name)
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        frozen = {parameter for module in model.frozen(phase) for parameter in module.parameters()}
        model.zero_grad()
        for _ in range(phase.critic_steps):
            trainer.step(batch)
        for network_name, network in model.networks.items():
            trained = network_name in (*phase.generators, *phase.discriminators)
            for key, parameter in network.named_parameters():
                place = f"{phase.name}: {network_name}.{key}"
                learns = trained and parameter not in frozen
                assert (parameter.grad is not None) == learns, place
                assert parameter.requires_grad == learns, place
                if learns and parameter.ndim > 1:  # a bias in front of a normalisation has none
                    assert parameter.grad.abs().sum() > 0, place
        model.set_phase(phase)


def test_each_step_moves_its_own_networks_only(name, small, batch, training) -> None:
    model = small(name)
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        steps = [
            (trainer.discriminator_step, phase.discriminators),
            (trainer.generator_step, phase.generators),
        ]
        for step, own in steps:
            if not own:
                continue
            out = model.generate(batch, phase)
            before = {n: bits(network) for n, network in model.networks.items()}
            step(batch, out)
            for n, network in model.networks.items():
                same = all(torch.equal(before[n][key], p) for key, p in network.named_parameters())
                assert same == (n not in own), f"{phase.name}: {step.__name__} and {n}"


def test_a_discriminator_learns_from_its_own_loss_alone(name, small, batch, training) -> None:
    """After a whole step its .grad is what its own loss gave: none of the generators' loss has come in."""
    model = small(name)
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        twin = copy.deepcopy(model)  # before the step
        trainer.step(batch)
        losses = twin.discriminator_losses(batch, twin.generate(batch, phase), phase)
        if not losses:
            continue
        own = torch.stack([twin.weights(phase)[n] * value for n, value in losses.items()]).sum()
        for n in phase.discriminators:
            expected = torch.autograd.grad(own, [*twin.networks[n].parameters()], retain_graph=True)
            for gradient, parameter in zip(expected, model.networks[n].parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, gradient)


def test_every_term_has_a_weight_and_every_weight_a_term(name, small, batch) -> None:
    model = small(name)
    for phase in model.phases:
        model.set_phase(phase)
        out = model.generate(batch, phase)
        terms = [*model.discriminator_losses(batch, out, phase)]
        terms += [*model.generator_losses(batch, out, phase)] if phase.generators else []
        assert sorted(terms) == sorted(model.weights(phase))
        assert phase.lr.keys() == {*phase.generators, *phase.discriminators}


def test_the_same_seed_gives_the_same_bits(name, small, batch, training) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = small(name)
        for phase in model.phases:
            training.Trainer(model, phase).step(batch)
        states.append(bits(model))
    assert equal(*states)


def test_weights_pass_through_safetensors(name, small, batch, training, tmp_path) -> None:
    model = small(name)
    training.Trainer(model, model.phases[-1]).step(batch)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = small(name)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    x = request(2, 33, 47).split([3, 1, 1], dim=1)
    assert torch.equal(model.complete(*x), other.complete(*x))
    assert all(key.startswith("networks.") for key in model.state_dict())


def test_unknown_options_and_phases_name_the_nearest(name, small) -> None:
    with pytest.raises(ValueError, match="no option 'widht': did you mean 'width'"):
        build_model(name, widht=1)
    with pytest.raises(ValueError, match=f"unknown model '{name}r': did you mean '{name}'"):
        build_model(name + "r")
    model = small(name)
    with pytest.raises(ValueError, match=model.phases[0].name):
        model.phase("nonsense")
    assert model_options(name) is type(model.options)
    assert model_type(name) is type(model)


def test_learns_eight_photographs_by_heart(name, small, photos, batch, training) -> None:
    """The l1 error in the hole falls by at least 60 %."""
    model, (lr, steps) = small(name, overlap=0), LEARNS[name]

    def hole_l1() -> float:
        done = model.complete(batch["image"], batch["mask"], batch["edge"] * (1 - batch["mask"]))
        return float(((done - photos).abs() * batch["mask"]).mean())

    before = hole_l1()
    for phase in model.phases:
        trainer = training.Trainer(model, phase, lr)
        for _ in range(steps.get(phase.name, 0)):
            trainer.step(batch)
    assert hole_l1() < 0.4 * before


def test_the_registry_says_what_the_class_says(name: str, small) -> None:
    model = small(name)
    assert model_type(name).name == name
    assert takes_edges(name, dataclasses.asdict(model.options)) == model.takes_edges
    assert model.takes_edges == any(phase.uses_edges for phase in model.phases)
