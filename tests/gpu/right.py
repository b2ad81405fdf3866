"""Is training right on the GPU? Against the CPU in float64, against itself, and through checkpoints and programs."""

from __future__ import annotations

import io
import os
import re
import socket
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from gpu.kit import (
    MODELS,
    ModelSetup,
    Part,
    Settings,
    StepResult,
    free_memory,
    gradient_step,
    make_batch,
    peak_gib,
    relative_error,
    setup,
    synchronize,
    tf32,
)
from models.attention import ContextualAttention
from models.base import Model, make_schedule
from pipelines.evaluation.metrics import image_metrics
from pipelines.training.learner import Learner

FLOAT32_FACTOR = 10.0  # error of the GPU's float32 over that of the CPU's
SMALLEST_ERROR = 1e-6  # below it both are roundoff
BFLOAT16_LOSS_ERROR = 0.1
BFLOAT16_FACTOR = 2.0  # gradient error of the GPU's bfloat16 over that of the CPU's
CPU = torch.device("cpu")


def gradients(settings: Settings) -> Part:
    """Losses and gradients of one step of every model and phase: GPU float32 against CPU float64 and CPU float32."""
    part = Part()
    for name in MODELS:
        model = setup(name, settings, small=True)
        batch = make_batch(model, 2 if settings.toy else 4)
        for index, phase in enumerate(model.phases):
            truth = gradient_step(model, index, batch, CPU, torch.float64)
            on_cpu = gradient_step(model, index, batch, CPU)
            half_on_cpu = gradient_step(model, index, batch, CPU, bfloat16=True)
            with tf32(False):
                ours = gradient_step(model, index, batch, settings.device)
                half = gradient_step(model, index, batch, settings.device, bfloat16=True)
            what = f"{name}, phase {phase.name}"
            for network, gradient in truth.gradients.items():
                error = relative_error(ours.gradients[network], gradient)
                allowed = max(
                    FLOAT32_FACTOR * relative_error(on_cpu.gradients[network], gradient), SMALLEST_ERROR
                )
                half_error = relative_error(half.gradients[network], gradient)
                half_allowed = max(
                    BFLOAT16_FACTOR * relative_error(half_on_cpu.gradients[network], gradient), 0.05
                )
                part.rows.append(
                    {
                        "model": name,
                        "phase": phase.name,
                        "network": network,
                        "float32 error": error,
                        "allowed": allowed,
                        "bfloat16 error": half_error,
                        "allowed for bfloat16": half_allowed,
                    }
                )
                part.check(error <= allowed, f"{what}: the gradient of {network} is off by {error:.1e}")
                part.check(
                    half_error <= half_allowed,  # false for NaN
                    f"{what}: the bfloat16 gradient of {network} is off by {half_error:.1e}",
                )
            _check_losses(part, what, truth, on_cpu, ours, half)
    return part


def _check_losses(
    part: Part, what: str, truth: StepResult, on_cpu: StepResult, ours: StepResult, half: StepResult
) -> None:
    for term, value in truth.losses.items():
        scale = max(abs(value), 1e-3)
        allowed = max(FLOAT32_FACTOR * abs(on_cpu.losses[term] - value) / scale, SMALLEST_ERROR)
        error = abs(ours.losses[term] - value) / scale
        part.check(error <= allowed, f"{what}: the loss {term} is off by {error:.1e}")
        half_error = abs(half.losses[term] - value) / scale
        part.check(
            half_error <= BFLOAT16_LOSS_ERROR,
            f"{what}: the bfloat16 loss {term} is {half.losses[term]:.4g}, not {value:.4g}",
        )


def determinism(settings: Settings) -> Part:
    """The same seed twice over 50 steps: the same bits? And which operations torch calls nondeterministic."""
    part = Part()
    steps = 4 if settings.toy else 50
    for name in MODELS:
        model = setup(name, settings, small=True)
        batch = make_batch(model, model.batch)
        first, second = (_train(model, batch, settings, steps).state_dict() for _ in range(2))
        differing = sum(not torch.equal(first[key], second[key]) for key in first)
        part.rows.append(
            {
                "model": name,
                "steps": steps,
                "tensors that differ": f"{differing} of {len(first)}",
                "nondeterministic operations": ", ".join(_nondeterministic_operations(model, batch, settings))
                or "none",
            }
        )
        if not settings.on_gpu:
            part.check(not differing, f"{name}: the same seed gives other bits on the CPU")
        if settings.seconds_left < 0:
            part.notes.append("out of time: the other models were left out")
            break
    return part


def _learner(model: ModelSetup, steps: int, device: torch.device, **options: Any) -> Learner:
    network = model.build()
    per_phase = -(-steps // len(network.phases))
    schedule = make_schedule(network, {phase.name: per_phase for phase in network.phases})
    return Learner(network, schedule, 0, device=device, **options)


def _train(model: ModelSetup, batch: Mapping[str, Any], settings: Settings, steps: int) -> Model:
    learner = _learner(model, steps, settings.device)
    for step in range(steps):
        learner.step(step, batch)
    return learner.model


def _nondeterministic_operations(
    model: ModelSetup, batch: Mapping[str, Any], settings: Settings
) -> list[str]:
    """Names from torch's warnings in one step of each phase."""
    learner = _learner(model, len(model.phases), settings.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(learner.schedule.total_steps):
                learner.step(step, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    matches = (re.match(r"(\S+) does not have a deterministic", str(w.message)) for w in caught)
    return sorted({match[1] for match in matches if match})


def checkpoints(settings: Settings) -> Part:
    """A state from the CPU to the GPU and back keeps every bit, and training goes on with it."""
    part = Part()
    for name in MODELS[:2] if settings.toy else MODELS:
        model = setup(name, settings, small=True)
        batch = make_batch(model, model.batch)
        start = _learner(model, 6, CPU)
        for step in range(2):
            start.step(step, batch)
        there = _learner(model, 6, settings.device)
        there.load(_saved(start.state(2)))
        part.check(
            _same_tensors(start.state(2), there.state(2)), f"{name}: the state differs after CPU to GPU"
        )
        losses = there.step(2, batch)
        part.check(
            all(torch.isfinite(value).all() for value in losses.values()),
            f"{name}: a loss is not finite after a checkpoint of the CPU",
        )
        back = _learner(model, 6, CPU)
        back.load(_saved(there.state(3)))
        part.check(
            _same_tensors(there.state(3), back.state(3)), f"{name}: the state differs after GPU to CPU"
        )
        back.step(3, batch)
        part.rows.append({"model": name, "tensors": len(list(_tensors(there.state(3))))})
    return part


def _saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """Written and read as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return loaded


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [tensor for child in children for tensor in _tensors(child)]


def _same_tensors(first: Any, second: Any) -> bool:
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def exported(settings: Settings) -> Part:
    """The exported program on the GPU against the eager completion on the CPU."""
    part = Part()
    auto = torch.export.Dim.AUTO
    for name in MODELS[1:2] if settings.toy else MODELS:
        completion = setup(name, settings, small=True).build().frozen_completion()
        x = _completion_input(2, 61, 91)
        program = torch.export.export(completion, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
        with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
            torch.export.save(program, file.name)
            program = torch.export.load(file.name)
        if settings.on_gpu:
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, settings.device)
        x = _completion_input(1, 64, 96)
        with tf32(False), torch.no_grad():
            difference = float((program.module()(x.to(settings.device)).cpu() - completion(x)).abs().max())
        part.rows.append({"model": name, "largest difference": difference})
        part.check(difference <= 1e-4, f"{name}: the program differs by {difference:.1e}")
    return part


def _completion_input(batch: int, height: int, width: int) -> Tensor:
    """[B,5,H,W]: image, a centred hole of less than half the side, edges."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 5, height, width, generator=generator)
    x[:, 3:] = 0
    x[:, 3, height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 1
    x[:, 4] = (torch.rand(batch, height, width, generator=generator) > 0.9).float()
    return x


def attention(settings: Settings) -> Part:
    """Contextual attention at photographs of 512 and 1024 px: time and peak memory; at 512 px against the CPU."""
    part = Part()
    for pixels in (64,) if settings.toy else (512, 1024):
        side = pixels // 4
        layer = ContextualAttention()
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(1, 96, side, side, generator=generator)
        mask = torch.zeros(1, 1, side, side)
        mask[..., side // 4 : side // 2, side // 4 : side // 2] = 1
        inputs = [tensor.to(settings.device) for tensor in (features, features, mask)]
        with tf32(False), torch.no_grad():
            layer(*inputs)
            free_memory(settings.device)
            synchronize(settings.device)
            start = time.perf_counter()
            result = layer(*inputs)
            synchronize(settings.device)
        row = {
            "photograph, px": pixels,
            "seconds": time.perf_counter() - start,
            "peak memory, GiB": peak_gib(settings.device),
        }
        if pixels <= 512:
            with torch.no_grad():
                expected = layer(features, features, mask)
            error = relative_error(result.double().cpu(), expected.double())
            row["difference to the CPU"] = error
            part.check(error < 1e-3, f"attention at {pixels} px differs from the CPU by {error:.1e}")
        part.rows.append(row)
    return part


def ranks(settings: Settings) -> Part:
    """Two gloo ranks on the one device give the gradients of one; NCCL works with one rank (it refuses two on a GPU)."""
    part = Part()
    # batch norm of context_encoder: synchronised on GPUs only
    for name in ("deepfill_v2", "context_encoder") if settings.on_gpu else ("deepfill_v2",):
        model = setup(name, settings, small=True)
        batch = make_batch(model, 4)
        with tempfile.TemporaryDirectory() as folder:
            arguments = (model, batch, str(settings.device), folder, _free_port())
            multiprocessing.spawn(_rank_step, arguments, nprocs=2)
            gradients = torch.load(Path(folder, "gradients.pt"), weights_only=True)
        with tf32(False):
            single = gradient_step(model, 0, batch, settings.device)
        for network, expected in single.gradients.items():
            error = relative_error(gradients[network], expected)
            part.rows.append({"model": name, "network": network, "two ranks against one": error})
            part.check(error < 1e-4, f"{name}: the averaged gradient of {network} is off by {error:.1e}")
    if settings.on_gpu:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        dist.init_process_group("nccl", rank=0, world_size=1)
        ones = torch.ones(1000, device=settings.device)
        dist.all_reduce(ones)
        part.check(bool((ones == 1).all()), "NCCL's all_reduce of one rank changes the values")
        dist.destroy_process_group()
    return part


def _rank_step(rank: int, model: ModelSetup, batch: Any, device: str, folder: str, port: int) -> None:
    """Half of the batch in one of two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    indices = range(2 * rank, 2 * rank + 2)
    local = {key: value[indices.start : indices.stop] for key, value in batch.items()}
    with tf32(False):
        result = gradient_step(
            model,
            0,
            {**local, "rank_slice": indices, "global_size": 4},
            torch.device(device),
            rank=rank,
            world_size=2,
        )
    if rank == 0:
        torch.save(result.gradients, Path(folder, "gradients.pt"))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def memory(settings: Settings) -> Part:
    """Memory that really runs out gives our message, and what follows still works."""
    from pipelines.durable.memory import explain_out_of_memory

    part = Part()
    if not settings.on_gpu:
        part.notes.append("needs a GPU")
        return part
    advice = "set scaling.micro_batch_size"
    model = setup("edge_connect", settings, small=True)
    total = torch.cuda.get_device_properties(settings.device).total_memory
    free_memory(settings.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2 * 2**30 / total), settings.device)
    try:
        gradient_step(model, 1, make_batch(model, 512), settings.device)
        part.check(False, "512 photographs fit into 2 GiB: nothing ran out of memory")
    except torch.OutOfMemoryError as error:
        message, retry = explain_out_of_memory(str(error), advice)
        part.rows.append({"torch's message": str(error).splitlines()[0], "ours": message, "retried": retry})
        part.check(message == advice and not retry, f"our message is {message!r}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, settings.device)
        free_memory(settings.device)
    gradient_step(model, 1, make_batch(model, 4), settings.device)
    return part


def scores(settings: Settings) -> Part:
    """Completions on the GPU are scored as those on the CPU: within 0.01 dB."""
    part = Part()
    for name in MODELS[:2] if settings.toy else MODELS:
        model = setup(name, settings, small=True)
        batch = make_batch(model, 2)
        if name == "context_encoder":  # fills one centred square
            batch["mask"][:] = 0
            quarter = model.size // 4
            batch["mask"][:, quarter:-quarter, quarter:-quarter] = 1
        image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() / 255
        mask, edge = (torch.from_numpy(batch[key])[:, None].float() for key in ("mask", "edge"))
        values = []
        for device in (CPU, settings.device):
            with tf32(False):
                filled = model.build(device).complete(image.to(device), mask.to(device), edge.to(device))
            pixels = (filled.cpu().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
            triples = zip(batch["image"], pixels, batch["mask"], strict=True)
            values.append(np.mean([image_metrics(*triple)["psnr_rgb_hole"] for triple in triples]))
        difference = abs(float(values[0] - values[1]))
        part.rows.append({"model": name, "CPU, dB": float(values[0]), "difference, dB": difference})
        part.check(difference <= 0.01, f"{name}: the score differs by {difference:.3f} dB")
    return part
