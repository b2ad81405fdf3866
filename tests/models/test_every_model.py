"""The contract of `models.base`, for every listed model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from models import build_model, list_models, model_class, options_class, takes_edges
from support.small_models import disable_torch_trace, scale_activations
from support.tiny_model import NAME as TINY

pytestmark = [pytest.mark.parametrize("name", [*list_models(), TINY]), pytest.mark.usefixtures("tiny")]

SIZES = [(1, 33, 47), (2, 61, 91), (3, 64, 64), (1, 250, 190), (1, 20, 24)]


def completion_input(b: int, h: int, w: int, edges_in_hole: bool = False) -> Tensor:
    """[B,5,H,W] with holes of different size and position per photograph, and random edges outside (or everywhere)."""
    x = torch.rand(b, 5, h, w)
    x[:, 3] = 0
    for i in range(b):
        x[i, 3, h // 3 : h // 3 + h // 5 + i, w // 4 + 2 * i : w // 4 + w // 5] = 1
    x[:, 4] = (x[:, 4] > 0.9) * (1 if edges_in_hole else 1 - x[:, 3])
    return x


def copy_state(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("size", SIZES)
def test_completes_any_size_without_reading_the_hole_or_changing_known_pixels(name, size, small) -> None:
    model = small(name)
    x = completion_input(*size)
    image, mask, edge = x[:, :3], x[:, 3:4], x[:, 4:]
    completed = model.complete(image, mask, edge)
    hole = (mask > 0).expand_as(image)
    assert completed.shape == image.shape
    assert completed.min() >= 0
    assert completed.max() <= 1
    assert torch.equal(completed[~hole], image[~hole])
    for contents in (0.0, 1.0, float("nan"), float("inf")):
        assert torch.equal(model.complete(torch.where(hole, contents, image), mask, edge), completed)


def test_a_batch_is_completed_like_its_photographs_one_by_one(name, small) -> None:
    model = small(name)
    x = completion_input(3, 40, 56)
    x[1, 3] = 0  # one of them without a hole
    completed = model.complete(x[:, :3], x[:, 3:4], x[:, 4:])
    for i in range(3):
        single = model.complete(x[i : i + 1, :3], x[i : i + 1, 3:4], x[i : i + 1, 4:])
        torch.testing.assert_close(completed[i : i + 1], single, atol=1e-5, rtol=0)
    assert torch.equal(completed[1], x[1, :3])


def test_complete_changes_neither_modes_nor_weights(name, small) -> None:
    model = small(name)
    model.set_phase(model.phases[0])
    before, modes = copy_state(model), [m.training for m in model.modules()]
    model.complete(*completion_input(1, 32, 32).split([3, 1, 1], dim=1))
    assert equal_states(before, copy_state(model))
    assert modes == [m.training for m in model.modules()]


def test_shapes_that_do_not_match_are_refused(name, small) -> None:
    with pytest.raises(ValueError, match=r"\[B,3,H,W\].*\(1, 1, 8, 8\)"):
        small(name).complete(torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 8, 8))


# test_onnx_export exports the other models
@pytest.mark.slow
@pytest.mark.soak_for("context_encoder", "deepfill_v2", "edge_connect")
def test_exported_equals_eager_at_every_size(name, small, batch, monkeypatch) -> None:
    """Within 1e-5, or within ten times the rounding error of float32, for contextual attention over many positions."""
    disable_torch_trace(monkeypatch)
    model = small(name)
    model.generate(batch, model.phases[0])  # changes the running statistics
    completion = scale_activations(model, completion_input(3, 64, 64, edges_in_hole=True)).frozen_completion()
    exact = copy.deepcopy(completion).double()
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        completion, (completion_input(2, 61, 91),), dynamic_shapes=(dynamic,)
    ).module()
    for size in SIZES:
        x = completion_input(*size, edges_in_hole=True)
        hole = (x[:, 3:4] > 0).expand(-1, 3, -1, -1)
        inverted = torch.cat([1 - x[:, :3], x[:, 3:]], dim=1)
        x[:, :3] = torch.where(hole, torch.nan, x[:, :3])
        result, eager = exported(x), completion(x)
        assert (eager - completion(inverted))[hole].abs().mean() > 0.01, (
            "the completion must depend on the photograph"
        )
        rounding = float((eager - exact(x.double())).abs().max())
        assert rounding < 1e-3
        allowed = max(1e-5, 10 * rounding)
        torch.testing.assert_close(result, eager, atol=allowed, rtol=0)
        torch.testing.assert_close(result, model.complete(*x.split([3, 1, 1], dim=1)), atol=allowed, rtol=0)


def test_the_completion_is_a_frozen_copy(name, small) -> None:
    model = small(name)
    completion = model.frozen_completion()
    assert not any(p.requires_grad for p in completion.parameters())
    x = completion_input(1, 32, 32)
    before = completion(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(completion(x), before)
    assert equal_states(copy_state(model), copy_state(copy.deepcopy(model)))


def test_gradients_reach_every_trained_parameter_and_no_frozen_one(name, small, batch, training) -> None:
    model = small(name)
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        frozen = {parameter for module in model.frozen_modules(phase) for parameter in module.parameters()}
        model.zero_grad()
        for _ in range(phase.critic_steps):
            trainer.step(batch)
        for network_name, network in model.networks.items():
            trained = network_name in (*phase.generators, *phase.discriminators)
            for key, parameter in network.named_parameters():
                label = f"{phase.name}: {network_name}.{key}"
                is_trained = trained and parameter not in frozen
                assert (parameter.grad is not None) == is_trained, label
                assert parameter.requires_grad == is_trained, label
                if is_trained and parameter.ndim > 1:  # the gradient of a bias before a normalisation is 0
                    assert parameter.grad.abs().sum() > 0, label
        model.set_phase(phase)


def test_each_step_changes_only_its_own_networks(name, small, batch, training) -> None:
    model = small(name)
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        steps = [
            (trainer.step_discriminators, phase.discriminators),
            (trainer.step_generators, phase.generators),
        ]
        for step, trained in steps:
            if not trained:
                continue
            out = model.generate(batch, phase)
            before = {n: copy_state(network) for n, network in model.networks.items()}
            step(batch, out)
            for n, network in model.networks.items():
                same = all(torch.equal(before[n][key], p) for key, p in network.named_parameters())
                assert same == (n not in trained), f"{phase.name}: {step.__name__} and {n}"


def test_a_discriminators_gradient_comes_from_its_own_loss_only(name, small, batch, training) -> None:
    """After a full step its .grad holds nothing of the generators' losses."""
    model = small(name)
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        twin = copy.deepcopy(model)  # before the step
        trainer.step(batch)
        losses = twin.discriminator_losses(batch, twin.generate(batch, phase), phase)
        if not losses:
            continue
        total = torch.stack([twin.weights(phase)[n] * value for n, value in losses.items()]).sum()
        for n in phase.discriminators:
            expected = torch.autograd.grad(total, [*twin.networks[n].parameters()], retain_graph=True)
            for gradient, parameter in zip(expected, model.networks[n].parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, gradient)


def test_losses_and_weights_have_the_same_names(name, small, batch) -> None:
    model = small(name)
    for phase in model.phases:
        model.set_phase(phase)
        out = model.generate(batch, phase)
        names = [*model.discriminator_losses(batch, out, phase)]
        names += [*model.generator_losses(batch, out, phase)] if phase.generators else []
        assert sorted(names) == sorted(model.weights(phase))
        assert phase.lr.keys() == {*phase.generators, *phase.discriminators}


def test_the_same_seed_gives_the_same_bits(name, small, batch, training) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = small(name)
        for phase in model.phases:
            training.Trainer(model, phase).step(batch)
        states.append(copy_state(model))
    assert equal_states(*states)


def test_a_model_survives_a_round_trip_through_safetensors(name, small, batch, training, tmp_path) -> None:
    model = small(name)
    training.Trainer(model, model.phases[-1]).step(batch)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = small(name)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    x = completion_input(2, 33, 47).split([3, 1, 1], dim=1)
    assert torch.equal(model.complete(*x), other.complete(*x))
    assert all(key.startswith("networks.") for key in model.state_dict())


def test_errors_for_unknown_options_and_phases_name_the_known_ones(name, small) -> None:
    with pytest.raises(ValueError, match="no option 'widht': did you mean 'width'"):
        build_model(name, widht=1)
    with pytest.raises(ValueError, match=f"unknown model '{name}r': did you mean '{name}'"):
        build_model(name + "r")
    model = small(name)
    with pytest.raises(ValueError, match=model.phases[0].name):
        model.phase("nonsense")
    assert options_class(name) is type(model.options)
    assert model_class(name) is type(model)


@pytest.mark.slow
@pytest.mark.soak_for("context_encoder_region", "deepfill_v1", "deepfill_v2", "glcic")
def test_overfits_eight_photographs(name, small, photos, batch, training) -> None:
    """The l1 error in the hole falls by at least 60 %."""
    config = model_class(name).small_config
    model = small(name, **config.overfit_options)

    def hole_l1() -> float:
        completed = model.complete(batch["image"], batch["mask"], batch["edge"] * (1 - batch["mask"]))
        return float(((completed - photos).abs() * batch["mask"]).mean())

    before = hole_l1()
    for phase in model.phases:
        trainer = training.Trainer(model, phase, config.overfit_lr)
        for _ in range(config.overfit_steps.get(phase.name, 0)):
            trainer.step(batch)
    assert hole_l1() < 0.4 * before


def test_takes_edges_is_the_same_with_and_without_torch(name: str, small) -> None:
    model = small(name)
    assert model_class(name).name == name
    assert takes_edges(name, dataclasses.asdict(model.options)) == model.takes_edges
    assert model.takes_edges == any(phase.uses_edges for phase in model.phases)
