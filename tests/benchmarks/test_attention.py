"""ContextualAttention against its plain formulation with conv2d and conv_transpose2d, on one thread: time for the features
of a 256 px photograph, peak memory for those of larger ones. `make bench` prints the table."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import ContextualAttention

LIMIT_MIB = 6144  # memory that a formulation may use


def plain(foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """Patches as convolution kernels, one photograph after another, all scores at once."""
    h, w = foreground.shape[2] // 2, foreground.shape[3] // 2
    eye = torch.eye(3)[None, None]
    ones = torch.ones(h * w, 1, 4, 4)
    outputs = []
    for f, b, m in zip(foreground.split(1), background.split(1), mask.split(1)):
        kernels = F.unfold(b[:, :, ::2, ::2], 3, padding=1)[0].T
        kernels = kernels / kernels.norm(dim=1, keepdim=True).clamp_min(1e-4)
        scores = F.conv2d(f[:, :, ::2, ::2], kernels.view(h * w, -1, 3, 3), padding=1)  # [1,L,h,w]
        scores = scores.view(1, h * w, h * w)
        for _ in range(2):  # the map is square
            scores = F.conv2d(scores[:, None], eye, padding=1)
            scores = scores.view(h, w, h, w).permute(1, 0, 3, 2).reshape(1, h * w, h * w)
        valid = F.max_pool2d(m[:, :, ::2, ::2], 3, 1, 1).view(1, h * w, 1) == 0
        attention = (10 * scores).masked_fill(~valid, -torch.inf).softmax(1).view(1, h * w, h, w)
        patches = F.unfold(b, 4, stride=2, padding=1)[0].T.reshape(h * w, -1, 4, 4)
        pasted = F.conv_transpose2d(attention, patches, stride=2, padding=1)
        outputs.append(pasted / F.conv_transpose2d(attention.detach(), ones, stride=2, padding=1))
    return torch.cat(outputs)


def features(channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    f, b = torch.randn(2, 1, channels, side, side)
    mask = torch.zeros(1, 1, side, side)
    mask[:, :, side // 4 : side // 2, side // 4 : side // 2] = 1
    return f.requires_grad_(), b.requires_grad_(), mask


def measure_seconds(repeats: int = 7) -> dict[tuple[str, str], float]:
    """{(formulation, "forward" or "both"): seconds} of the fastest of several alternating calls."""
    f, b, mask = features(128, 64)
    durations: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for name, call in (("ours", ContextualAttention()), ("plain", plain)):
            start = time.perf_counter()
            with torch.no_grad():
                call(f, b, mask)
            durations.setdefault((name, "forward"), []).append(time.perf_counter() - start)
            start = time.perf_counter()
            call(f, b, mask).sum().backward()
            durations.setdefault((name, "both"), []).append(time.perf_counter() - start)
    return {key: min(values) for key, values in durations.items()}


def resident_mib(field: str) -> float:
    """This process's resident memory: VmRSS is the current one, VmHWM the peak. (getrusage's peak includes the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def limit_memory(mib: int) -> None:
    """Limit the memory that this process may still allocate: at 1024 px the plain formulation would use all of the
    machine's and take other processes down."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    max_bytes = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def print_peak_memory(name: str, side: int) -> None:
    """Print the MiB by which memory grows for forward, then for forward and backward; the limit if it was exceeded. Runs
    in a process of its own."""
    torch.set_num_threads(1)
    call = {"ours": ContextualAttention(), "plain": plain}[name]
    call(*features(32, 16)).sum().backward()  # loads the libraries
    f, b, mask = features(32, side)
    limit_memory(LIMIT_MIB)
    before = resident_mib("VmRSS")
    for backward in (False, True):
        try:
            with torch.set_grad_enabled(backward):
                output = call(f, b, mask)
            if backward:
                output.sum().backward()
            print(resident_mib("VmHWM") - before, flush=True)
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            print(float(LIMIT_MIB), flush=True)


def peak_memory(name: str, side: int) -> list[float]:
    """MiB for forward, and for forward and backward."""
    command = [sys.executable, __file__, name, str(side)]
    root = str(Path(__file__).parents[2])  # the models of this checkout, not installed ones
    process = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(x) for x in process.stdout.split()]


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_attention_against_its_plain_formulation(capsys) -> None:
    torch.set_num_threads(1)
    f, b, mask = features(128, 64)
    torch.testing.assert_close(ContextualAttention()(f, b, mask), plain(f, b, mask), atol=1e-4, rtol=1e-4)
    rows = ["one thread, 256 px, 128 channels      ours ms  plain ms  ratio"]
    seconds = measure_seconds()
    for direction in ("forward", "both"):
        ours, theirs = (seconds[name, direction] * 1e3 for name in ("ours", "plain"))
        rows.append(f"  {direction:33s} {ours:9.1f} {theirs:9.1f} {theirs / ours:6.1f}")
    rows.append(
        f"peak memory, 32 channels             ours MiB plain MiB  ratio (> : exceeded the limit of {LIMIT_MIB})"
    )
    ratios = []
    for side in (128, 256):
        for direction, ours, theirs in zip(
            ("forward", "both"), peak_memory("ours", side), peak_memory("plain", side)
        ):
            over_limit = ">" if theirs >= LIMIT_MIB else " "
            ratios.append(theirs / ours)
            rows.append(
                f"  {4 * side:4d} px {direction:25s} {ours:9.0f} {over_limit}{theirs:8.0f} {over_limit}{ratios[-1]:5.1f}"
            )
    with capsys.disabled():
        print("\nContextual attention", *rows, sep="\n")
    assert all(seconds["ours", direction] <= seconds["plain", direction] for direction in ("forward", "both"))
    assert min(ratios[2:]) >= 2


if __name__ == "__main__":
    print_peak_memory(sys.argv[1], int(sys.argv[2]))
