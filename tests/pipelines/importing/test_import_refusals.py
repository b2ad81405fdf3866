"""Imports: refused files, each with one line that says what the file is and what to do."""

from __future__ import annotations

import argparse
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipelines.importing.import_checkpoint import import_checkpoint
from pipelines.importing.unsupported_checkpoints import UNSUPPORTED
from support.importing import State, import_error
from support.public_networks import NetG, deepfill_v1, deepfill_v2, edge_connect, local_critic, scrambled

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


class MaliciousObject:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.folder,)


def save_deepfill_v1(path: Path, change: Callable[[State], Any]) -> Path:
    state = deepfill_v1().state_dict()
    change(state)
    torch.save(state, path)
    return path


# -- tensors -------------------------------------------------------------------------------------------------------


def test_mismatched_tensors_are_listed(tmp_path):
    def change(state: State) -> None:
        for n in range(1, 8):
            state[f"new{n}.weight"] = torch.zeros(1)
        del state["fine_generator.pmconv9.conv.bias"]
        state["coarse_generator.conv3.conv.weight"] = torch.zeros(8, 8, 5, 5)

    message = import_error("deepfill_v1", save_deepfill_v1(tmp_path / "gen_1.pt", change))
    assert "1 missing (fine_generator.pmconv9.conv.bias)" in message
    assert "7 not used (new1.weight, new2.weight, new3.weight, new4.weight, new5.weight ...)" in message
    assert (
        "1 of another shape or type (coarse_generator.conv3.conv.weight [8, 8, 5, 5] instead of [8, 8, 3, 3])"
        in message
    )


def test_a_first_layer_with_other_channels_is_named(tmp_path):
    """The message shows the shape of the first layer and the model's channels."""
    state = deepfill_v2().state_dict()
    state["stage1.conv1.conv.weight"] = torch.zeros(8, 4, 5, 5)
    torch.save({"G": state}, tmp_path / "four.pth")
    message = import_error("deepfill_v2", tmp_path / "four.pth")
    assert "stage1.conv1.conv.weight [8, 4, 5, 5] instead of [8, 5, 5, 5]" in message
    assert (
        "the file has 42 convolutions, the first (stage1.conv1.conv) of 4 channels, our deepfill_v2 has 42"
        in message
    )

    grey = scrambled(NetG()).state_dict()
    grey["main.0.weight"], grey["main.29.weight"] = torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 4, 4)
    torch.save(grey, tmp_path / "grey.pth")
    assert "main.0.weight [4, 1, 4, 4] instead of [4, 3, 4, 4]" in import_error(
        "context_encoder", tmp_path / "grey.pth"
    )


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_weights_of_another_type_are_named(tmp_path, kind):
    file = save_deepfill_v1(
        tmp_path / "gen.pt", lambda s: s.update({k: v.to(kind) for k, v in s.items() if "bias" not in k})
    )
    message = import_error("deepfill_v1", file)
    assert f"of another shape or type (coarse_generator.conv1.conv.weight of {str(kind)[6:]}," in message


def test_a_weight_of_zeros_has_no_spectral_norm(tmp_path):
    g1, g2 = (net.state_dict() for net in edge_connect())
    folded = {key.replace("_orig", ""): v for key, v in g1.items() if not key.endswith(("_u", "_v"))}
    folded["encoder.4.weight"].zero_()
    torch.save({"edge_generator": folded, "inpaint_generator": g2}, tmp_path / "both.pth")
    assert "encoder.4.weight_orig of nothing but 0, which has no norm" in import_error(
        "edge_connect", tmp_path / "both.pth"
    )


def test_weights_that_are_not_finite_are_refused(tmp_path):
    file = save_deepfill_v1(
        tmp_path / "gen.pt", lambda state: state["coarse_generator.conv3.conv.bias"].fill_(torch.inf)
    )
    assert "is damaged: coarse.4.bias holds numbers that are not finite" in import_error("deepfill_v1", file)


# -- networks ------------------------------------------------------------------------------------------------------


def test_wrong_names_and_options_are_refused(tmp_path):
    file = save_deepfill_v1(tmp_path / "gen_1.pt", lambda state: None)
    assert "did you mean 'deepfill_v1'?" in import_error("deepfil_v1", file)
    assert "there are context_encoder" in import_error("lama", file)
    assert "looks like deepfill_v1's (daa233/generative-inpainting-pytorch): inpaint import deepfill_v1" in (
        import_error("deepfill_v2", file)
    )
    message = import_error("deepfill_v2", tmp_path)
    assert "no generator of nipponjo/deepfillv2-pytorch there (one is called states_pt_*.pth); " in message
    assert "gen_1.pt cannot become deepfill_v2: it looks like deepfill_v1's" in message
    assert "there is no file" in import_error("deepfill_v1", tmp_path / "gen_2.pt")
    (tmp_path / "gen_2.pt").write_bytes(file.read_bytes())
    assert "both hold the generator" in import_error("deepfill_v1", tmp_path)
    assert "no option 'atention'" in import_error("deepfill_v1", file, settings={"atention": True})
    assert "did you mean 'attention" in import_error("deepfill_v1", file, settings={"atention": True})
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no generator of daa233" in import_error("deepfill_v1", empty)


@pytest.mark.slow
def test_an_unknown_network_is_described(tmp_path):
    layers = {f"layers.{i}.weight": torch.zeros(8, 7 if i == 0 else 8, 3, 3) for i in range(12)}
    save_file(layers, tmp_path / "other.safetensors")
    message = import_error("edge_connect", tmp_path / "other.safetensors")
    assert "are not those of EdgeModel_gen.pth or InpaintingModel_gen.pth of knazeri/edge-connect" in message
    assert "it has 12 convolutions, the first (layers.0) of 7 channels; edge_connect has 22" in message
    assert "missing" not in message
    message = import_error("deepfill_v2", tmp_path / "other.safetensors")
    assert message.endswith("deepfill_v2 has 42 convolutions, the first of 5 channels")


DISCRIMINATORS = {
    "context_encoder": local_critic,
    "edge_connect": lambda: (
        {f"conv{i}.0.weight_orig": torch.zeros(8, 3, 4, 4) for i in range(1, 6)}
        | {"features.0.weight": torch.zeros(8, 3, 4, 4)}
    ),
    "deepfill_v1": lambda: {"localD.dis_conv_module.conv1.conv.weight": torch.zeros(4, 3, 5, 5)},
    "deepfill_v2": lambda: {"conv1.conv_sn.parametrizations.weight.original": torch.zeros(8, 4, 5, 5)},
    "glcic": lambda: {"model_ld.conv1.weight": torch.zeros(4, 3, 5, 5)},
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_discriminator_is_refused(tmp_path, name):
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in DISCRIMINATORS[name]().items()}}, tmp_path / "netD.pth"
    )
    assert "holds a discriminator, which cannot complete images; name the generator's file" in import_error(
        name, tmp_path / "netD.pth"
    )


# Keys by which the unsupported checkpoints are recognized.
UNSUPPORTED_KEYS = {
    "MMagic's DeepFill v2": "generator.stage2.encoder_attention.enc1.conv.conv.weight",
    "MMagic's DeepFill v1": "generator.stage2.encoder_attention.enc1.conv.weight",
    "MMagic's GLCIC": "generator.dilation_neck.dilation_convs.0.conv.weight",
    "MMagic's partial convolutions": "generator.encoder.enc1.conv.weight_mask_updater",
    "AOT-GAN": "generator.encoder.encoder.1.conv.weight",
    "LaMa": "generator.model.5.conv1.ffc.convl2l.weight",
    "a diffusion model": "model.diffusion_model.input_blocks.0.0.weight",
    "csqiangwen/DeepFillv2_Pytorch": "refine_conv.0.conv2d.weight",
    "zhaoyuzhi/deepfillv2": "module.coarse.0.conv2d.weight",
    "networks_tf of nipponjo": "stage1.xconv1.conv.weight",
    "an early release of naoto0804": "enc_1.conv.conv2d.weight",
    "a classifier": "layer1.0.conv1.weight",
}


def test_well_known_unsupported_networks_are_named(tmp_path):
    """The error names them and the difference for every target model; it never lists missing tensors."""
    assert len(UNSUPPORTED_KEYS) == len(UNSUPPORTED)
    for description, key in UNSUPPORTED_KEYS.items():
        state = {key: torch.zeros(32, 5, 5, 5), "generator.decoder.dec7.conv.bias": torch.zeros(3)}
        torch.save(
            {"meta": {"mmedit_version": "0.6.0", "config": "model = {}"}, "state_dict": state},
            tmp_path / "f.pth",
        )
        for name in ("deepfill_v1", "deepfill_v2", "glcic", "partial_conv"):
            for path in (tmp_path / "f.pth", tmp_path):
                message = import_error(name, path)
                assert f"f.pth cannot become {name}: it is " in message
                assert description in message
                assert "missing" not in message
    message = import_error(
        "deepfill_v2", save_deepfill_v1(tmp_path / "f.pth", lambda s: s.update({"x.y": torch.ones(2)}))
    )
    assert "looks like deepfill_v1's" in message


def test_mmagics_training_checkpoint_is_recognized_by_its_keys(tmp_path):
    """It holds Python objects, but saving only its weights would not help."""
    state = {"generator.stage2.encoder_attention.enc1.conv.conv.weight": torch.zeros(32, 5, 5, 5)}
    torch.save({"state_dict": state, "message_hub": argparse.Namespace(a=1)}, tmp_path / "iter_100.pth")
    message = import_error("deepfill_v2", tmp_path / "iter_100.pth")
    assert "it is MMagic's DeepFill v2, and it pads by reflection" in message
    assert "its second stage sees 5 channels" in message


# -- files ---------------------------------------------------------------------------------------------------------


def test_no_code_in_a_file_is_run(tmp_path):
    file = tmp_path / "gen_2.pt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "config": MaliciousObject(tmp_path / "made")}, file)
    assert "holds a Python object (os.makedirs)" in import_error("deepfill_v1", file)
    torch.save(
        {"a": torch.zeros(1), "b": MaliciousObject(tmp_path / "made")},
        file,
        _use_new_zipfile_serialization=False,
    )
    assert "holds a Python object (os.makedirs)" in import_error("deepfill_v1", file)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps({"config": MaliciousObject(tmp_path / "made")}, protocol=protocol))
        assert "is refused" in import_error("deepfill_v1", file)
    # NumPy's globals are placeholders while a file is read, and not allowed afterwards
    loads = np.array([MaliciousObject(tmp_path / "made")], dtype=object)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "b": loads}, file)
    assert "holds a Python object (os.makedirs)" in import_error("deepfill_v1", file)
    assert not (tmp_path / "made").exists()
    torch.save({"a": np.float64(1)}, file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_model_is_refused(tmp_path, old, wrapped):
    file, net = tmp_path / "netG.pth", Network()
    torch.save({"netG": net} if wrapped else net, file, _use_new_zipfile_serialization=not old)
    message = import_error("context_encoder", file)
    assert f"holds a whole model as a Python object ({Network.__module__}.Network)" in message
    assert "save only its weights: torch.save(model.state_dict(), 'weights.pth')" in message


def test_other_pickled_objects_are_refused(tmp_path):
    torch.save(
        {"state_dict": deepfill_v1().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "gen.pt"
    )
    message = import_error("deepfill_v1", tmp_path / "gen.pt")
    assert "holds a Python object (argparse.Namespace), not only tensors" in message
    assert "if you trust the file, save only its state dict" in message


def write_bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def torchscript_file(path: Path) -> None:
    torch.jit.trace(Network(), torch.zeros(1, 3, 8, 8)).save(str(path))


def exported_program(path: Path) -> None:
    torch.export.save(torch.export.export(Network(), (torch.zeros(1, 3, 8, 8),)), path)


def zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("weights/netG.pth", b"x")


def tar_archive(path: Path) -> None:
    torch.save({}, path.with_suffix(".inner"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_suffix(".inner"), "netG.pth")


def truncated_file(path: Path) -> None:
    torch.save(deepfill_v1().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_safetensors(path: Path) -> None:
    save_file({"main.0.weight": torch.zeros(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def adam_state() -> dict[str, Any]:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    (optimizer := torch.optim.Adam([weight])).step()
    return optimizer.state_dict()


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (write_bytes(b""), "is empty (0 bytes): download it again"),
    "lfs.pth": (
        write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`",
    ),
    "lfs.safetensors": (write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
    "page.pth": (
        write_bytes(b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning"),
        "is a web page (HTML)",
    ),
    "page2.pth": (write_bytes(b"\xef\xbb\xbf<HTML>\n<head>"), "is a web page (HTML)"),
    "denied.pth": (write_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), "is XML"),
    "text.pth": (write_bytes(b"404: Not Found"), 'is text, not weights ("404: Not Found")'),
    "weights.h5": (write_bytes(b"\x89HDF\r\n\x1a\n"), "is HDF5"),
    "snap-0.index": (write_bytes(b"\x00\x00\x01\x02"), "is a TensorFlow file"),
    "inpaint.t7": (write_bytes(b"\x04\x00\x00\x00"), "is a file of Torch 7"),
    "g.pth.gz": (write_bytes(b"\x1f\x8b\x08\x00"), "is compressed (gzip): unpack it"),
    "noise.pth": (write_bytes(bytes(range(256))), "is refused: it is damaged, or not a state dict"),
    "g.onnx": (write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x062.13.0"), "is an ONNX program"),
    "onnx.pth": (write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x062.13.0"), "is an ONNX program"),
    "script.pt": (torchscript_file, "is a TorchScript program"),
    "export.pt2": (exported_program, "is an exported program"),
    "zipped.pth": (zip_archive, "is a zip archive (weights/netG.pth): unpack it"),
    "netG.pth.tar": (tar_archive, "is a tar archive: unpack it"),
    "cut.pt": (truncated_file, "is damaged: its end is missing"),
    "cut.safetensors": (truncated_safetensors, "is damaged"),
    "arrays.pt": (lambda p: torch.save({"main.0.weight": np.ones((4, 3, 4, 4))}, p), "holds NumPy arrays"),
    "meta.pt": (
        lambda p: torch.save({"main.0.weight": torch.ones(4, 3, 4, 4, device="meta")}, p),
        "holds the shapes of tensors only",
    ),
    "one.pt": (lambda p: torch.save(torch.zeros(3), p), "holds a single tensor, not a state dict"),
    "number.pt": (lambda p: torch.save(3, p), "holds a value of type int, not a state dict"),
    "nothing.pt": (lambda p: torch.save({}, p), "holds an empty dict, no weights"),
    "none.safetensors": (lambda p: save_file({}, p), "holds an empty dict, no weights"),
    "no tensors.pt": (lambda p: torch.save({"epoch": 3, "lr": 0.1}, p), "holds no tensors (epoch, lr)"),
    "optimizer.pt": (lambda p: torch.save(adam_state(), p), "holds only an optimizer's state"),
    "optimizers.pt": (
        lambda p: torch.save({"gen": adam_state(), "dis": adam_state(), "iter": 3}, p),
        "only an optimizer's state",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_without_a_state_dict_is_refused(tmp_path, kind):
    write, expected = FILES[kind]
    write(tmp_path / kind)
    for name in ("deepfill_v1", "edge_connect"):
        message = import_error(name, tmp_path / kind)
        assert expected in message
        assert str(tmp_path / kind) in message


def test_a_broken_link_and_a_missing_network_are_named(tmp_path):
    link = tmp_path / "gen.pt"
    link.symlink_to(tmp_path / "gone")
    assert "there is no file" in import_error("deepfill_v1", link)
    g1, _ = edge_connect()
    torch.save(g1.state_dict(), tmp_path / "EdgeModel_gen.pth")
    with pytest.raises(ValueError, match=r"needs InpaintingModel_gen\.pth too"):
        import_checkpoint("edge_connect", [tmp_path])
