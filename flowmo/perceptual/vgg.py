"""The convolutional part of VGG-16 (configuration D), under torchvision's names.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015.
"""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = (64, 128, 256, 512, 512)  # of the five stages, after whose last ReLU features are taken
_CONVS = (2, 2, 3, 3, 3)


class VGG16Features(nn.Module):
    """Thirteen 3 x 3 convolutions in five stages; state dict `features.N.weight`, `features.N.bias`."""

    least = 16  # pixels a side

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self._taps: list[int] = []  # index of the last ReLU of every stage
        before = 3
        for channels, convs in zip(CHANNELS, _CONVS):
            for _ in range(convs):
                # in place: no convolution needs its own output in the backward pass
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            self._taps.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)

    def forward(
        self,
        x: Tensor,  # [N, 3, H, W], H and W at least 16
    ) -> list[Tensor]:  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: [N, C_l, H / 2^l, W / 2^l]
        """The five feature maps; the last pooling is not computed."""
        taps = []
        for i in range(self._taps[-1] + 1):
            x = self.features[i](x)
            if i in self._taps:
                taps.append(x)
        return taps
