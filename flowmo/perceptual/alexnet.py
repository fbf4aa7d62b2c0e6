"""The convolutional part of AlexNet (one tower), under torchvision's names.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.
"""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = (64, 192, 384, 256, 256)  # of the five convolutions, after whose ReLU features are taken


class AlexNetFeatures(nn.Module):
    """Five convolutions; state dict `features.N.weight`, `features.N.bias` with N = 0, 3, 6, 8, 10."""

    least = 32  # pixels a side: smaller pictures leave nothing behind the second pooling

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(
        self,
        x: Tensor,  # [N, 3, H, W], H and W at least 32
    ) -> list[Tensor]:  # relu1 to relu5: [N, C_l, H_l, W_l]
        """The five feature maps."""
        taps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                taps.append(x)
        return taps
