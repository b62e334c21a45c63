"""ResNet-50 against a slow oracle, and what it shares with the published files."""

import numpy as np
import pytest
import torch

from backbones.resnet import STAGES, ResNet, ResNetSpec
from data.errors import InputError
from tests.oracles.resnet import resnet_last_map


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    """ResNet-50 in float64 whose norms are far from the identity."""
    torch.manual_seed(0)
    model = ResNet(ResNetSpec()).double().eval()
    for name, tensor in model.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            if name.endswith((".weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.uniform_(-0.5, 0.5)
    return model


@pytest.mark.parametrize(("H", "W"), [(64, 32), (33, 70)])
def test_every_cell_is_the_oracles(resnet: ResNet, H: int, W: int) -> None:
    image_CHW = torch.randn(3, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: tensor.numpy() for name, tensor in resnet.state_dict().items()}
    wanted = resnet_last_map(weights, image_CHW.numpy(), STAGES[50])
    np.testing.assert_allclose(resnet.last_map(image_CHW[None])[0].numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_outputs_are_the_mean_and_the_cells_of_the_last_map(resnet: ResNet) -> None:
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    last = resnet.last_map(pixels)
    outputs = resnet.outputs(pixels)
    assert last.shape == (2, 2048, 2, 3)
    assert set(outputs) == {"embedding", "patches"}
    assert outputs["patches"].shape == (2, 6, 2048)
    torch.testing.assert_close(outputs["patches"][:, 4], last[:, :, 1, 1])  # row-major: cell 4 is row 1, column 1
    torch.testing.assert_close(outputs["patches"].mean(dim=1), outputs["embedding"])
    torch.testing.assert_close(resnet(pixels), outputs["embedding"])
    assert outputs["embedding"].shape[1] == resnet.embed_dim


@pytest.mark.parametrize(("depth", "n_parameters"), [(50, 23_508_032), (101, 42_500_160), (152, 58_143_808)])
def test_sizes_are_the_published_ones_without_classifier(depth: int, n_parameters: int) -> None:
    with torch.device("meta"):
        model = ResNet(ResNetSpec(depth=depth))
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_names_are_torchvisions() -> None:
    with torch.device("meta"):
        state = ResNet(ResNetSpec()).state_dict()
    assert len(state) == 318  # torchvision's resnet50 has 320, fc.weight and fc.bias among them
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer2.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert state["layer4.2.bn3.running_var"].shape == (2048,)


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(InputError, match="depth is 18; want one of 50, 101, 152"):
        ResNetSpec(depth=18)
