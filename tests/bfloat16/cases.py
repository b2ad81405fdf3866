"""Convolutions to scan: their description, their errors in bfloat16, random ones, and those of the models."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models import build_model
from models.base import RANDOMS_PER_SAMPLE, Model
from pipelines.private.torch import convolutions_replaced
from pipelines.recipe.load import load_recipe
from pipelines.training.bfloat16 import is_proven

MAX_ERROR = 0.02
"""Relative, in the norm of a tensor. Rounding to bfloat16 gives about 0.002, a part that was not written 0.5 and more."""
OUTPUTS = ("output", "input's gradient", "weight's gradient", "bias's gradient")
LAYOUTS = (
    "contiguous",
    "channels_last",
    "channels_last input",
    "channels_last weight",
    "channels_last gradient",
)
Layout = Literal[
    "contiguous", "channels_last", "channels_last input", "channels_last weight", "channels_last gradient"
]

CHANNELS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 31, 32, 40, 48, 64, 96, 128, 192, 256)
SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 128)
MAX_PRODUCTS = 1.2e9  # multiplications of a random case: about a second in float64


@dataclass(frozen=True)
class Case:
    """A convolution, or a transposed one, of square kernels with a bias."""

    transposed: bool
    c_in: int
    c_out: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    height: int
    width: int
    batch: int
    layout: Layout
    threads: int = 1

    def is_proven(self) -> bool:
        """Whether training would run it in bfloat16."""
        sides, pairs = (self.height, self.width), [(n, n) for n in (self.kernel, self.stride, self.dilation)]
        return is_proven(sides, *pairs, self.groups, self.layout in ("contiguous", "channels_last gradient"))

    def products(self) -> float:
        """Multiplications of the forward pass, about."""
        weights = self.c_in * self.c_out * self.kernel**2 / self.groups
        return self.batch * weights * self.height * self.width

    def describe(self) -> str:
        values = asdict(self)
        size = f"{self.height}x{self.width}"
        name = "transposed convolution" if values.pop("transposed") else "convolution"
        options = [f"{key} {values[key]}" for key in ("stride", "padding", "dilation", "groups")]
        return (
            f"{name} {self.kernel}x{self.kernel} {self.c_in}->{self.c_out}, {', '.join(options)}, map {size}, "
            f"batch {self.batch}, {self.layout}, {self.threads} threads"
        )

    def errors(self, repeats: int = 2) -> tuple[list[float], bool]:
        """Relative errors of OUTPUTS against float64 on the same rounded numbers, the largest of the repeats (not a
        number counts as infinite); and whether all repeats had the same bits."""
        torch.set_num_threads(self.threads)
        generator = torch.Generator().manual_seed(0)

        def rounded(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(torch.bfloat16)

        channels = (self.c_in, self.c_out) if self.transposed else (self.c_out, self.c_in)
        inputs = [
            rounded(self.batch, self.c_in, self.height, self.width),
            rounded(channels[0], channels[1] // self.groups, self.kernel, self.kernel),
            rounded(self.c_out),
        ]
        exact = [value.double().requires_grad_() for value in inputs]
        expected = self._convolve(*exact)
        gradient = rounded(*expected.shape)
        expected.backward(gradient.double())
        references = [expected.detach(), *(value.grad for value in exact)]
        formats = [
            torch.channels_last
            if self.layout in ("channels_last", f"channels_last {part}")
            else torch.contiguous_format
            for part in ("input", "weight", "gradient")
        ]
        errors, first, repeatable = [0.0] * len(OUTPUTS), None, True
        for _ in range(repeats):
            x, weight, bias = (value.clone().requires_grad_() for value in inputs)
            x.data = x.data.contiguous(memory_format=formats[0])
            weight.data = weight.data.contiguous(memory_format=formats[1])
            output = self._convolve(x, weight, bias)
            output.backward(gradient.contiguous(memory_format=formats[2]))
            results = [value.clone() for value in (output.detach(), x.grad, weight.grad, bias.grad)]  # type: ignore[union-attr]
            first = first or results
            repeatable &= all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
            for index, (result, reference) in enumerate(zip(results, references, strict=True)):
                error = float((result.double() - reference).norm() / reference.norm().clamp_min(1e-30))
                errors[index] = max(errors[index], error if error == error else float("inf"))
        return errors, repeatable

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.transposed:
            return F.conv_transpose2d(
                x, weight, bias, self.stride, self.padding, 0, self.groups, self.dilation
            )
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def random_cases(seed: int, proven: bool | None = None) -> Iterator[Case]:
    """Endless; with `proven` only those inside, or outside, the proven set."""
    rng = random.Random(seed)
    while True:
        transposed = rng.random() < 0.2
        kernel, stride = rng.choice((1, 2, 3, 3, 3, 4, 5, 7)), rng.choice((1, 1, 2))
        dilation = 1 if transposed else rng.choice((1, 1, 1, 2, 4, 8, 16))
        c_in, c_out = rng.choice(CHANNELS), rng.choice(CHANNELS)
        depthwise = not transposed and rng.random() < 0.1
        height = rng.choice(SIDES)
        case = Case(
            transposed=transposed,
            c_in=c_in,
            c_out=c_in if depthwise else c_out,
            kernel=kernel,
            stride=stride,
            padding=dilation * (kernel // 2) if rng.random() < 0.7 else 0,
            dilation=dilation,
            groups=c_in if depthwise else 1,
            height=height,
            width=height if rng.random() < 0.7 else rng.choice(SIDES),
            batch=rng.choice((1, 2, 3, 4, 8, 16)),
            layout=rng.choice(LAYOUTS),  # type: ignore[arg-type]
            threads=rng.choice((1, 1, 2, 4)),
        )
        if case.products() < MAX_PRODUCTS and _has_output(case) and proven in (None, case.is_proven()):
            yield case


def _has_output(case: Case) -> bool:
    shortest = min(case.height, case.width)
    if case.transposed:
        return (shortest - 1) * case.stride - 2 * case.padding + case.kernel > 0
    return shortest + 2 * case.padding > case.dilation * (case.kernel - 1)


# -- the convolutions of the models ---------------------------------------------------------------------------


@contextmanager
def _recorded(cases: dict[Case, None], batches: tuple[int, ...]) -> Iterator[None]:
    """Inside this context every convolution is added to `cases`, once per batch size and layout."""
    conv2d, conv_transpose2d = F.conv2d, F.conv_transpose2d

    def record(transposed: bool, x: Tensor, weight: Tensor, *options: int | tuple[int, int]) -> None:
        stride, padding, dilation, groups = (n if isinstance(n, int) else n[0] for n in options)
        c_out = weight.shape[1] * groups if transposed else weight.shape[0]
        numbers = (weight.shape[2], stride, padding, dilation, groups, x.shape[2], x.shape[3])
        for batch in batches:
            for layout in LAYOUTS[:2]:
                cases[Case(transposed, x.shape[1], c_out, *numbers, batch, layout)] = None  # type: ignore[arg-type]

    def plain(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore[no-untyped-def]
        record(False, x, weight, stride, padding, dilation, groups)
        return conv2d(x, weight, bias, stride, padding, dilation, groups)

    def transposed(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):  # type: ignore[no-untyped-def]
        record(True, x, weight, stride, padding, dilation, groups)
        return conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)

    with convolutions_replaced(plain, transposed):
        yield


def model_cases(recipe_name: str, size: int | None = None, batches: tuple[int, ...] = (1, 2)) -> list[Case]:
    """The convolutions of all phases of a recipe's first model, at the recipe's size or at `size` pixels."""
    recipe = load_recipe(recipe_name)
    section = next(iter(recipe.models.values()))
    size = size or recipe.data.size
    options = dict(section.options)
    if "size" in options:
        options["size"] = size
    if not recipe_name.endswith(
        "-small"
    ):  # features at the paper's width need a download; they are plain 3x3
        options |= dict.fromkeys(build_model(section.name).feature_loss_options, 0)
    model: Model = build_model(section.name, **options)
    batch = {
        "image": torch.rand(2, 3, size, size),
        "mask": torch.zeros(2, 1, size, size),
        "edge": torch.zeros(2, 1, size, size),
        "uniform": torch.full((2, RANDOMS_PER_SAMPLE), 0.5),
    }
    hole = slice(size // 4, size // 4 + size // 2)
    batch["mask"][..., hole, hole] = 1
    cases: dict[Case, None] = {}
    for phase in model.phases:
        model.set_phase(phase)
        with _recorded(cases, batches):
            out = model.generate(batch, phase)
            model.generator_losses(batch, out, phase)
            model.discriminator_losses(batch, out, phase)
    return [case for case in cases if case.is_proven()]
