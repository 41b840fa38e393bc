"""ResNet and EfficientNet-lite, with batch normalisation folded into the convolutions."""

import torch.nn.functional as F
from torch import nn

from .transformer import Normalize


class ResNet(nn.Module):
    """A ResNet (He et al. 2015) with global average pooling.

    Each convolution is given as [input channels, output channels, kernel size, stride].
    """

    def __init__(self, stem, blocks, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = convolution(*stem)
        self.blocks = nn.ModuleList(ResidualBlock(**block) for block in blocks)

    def forward(self, pixels):
        """Pixels, [batch, height, width, 3], to [batch, channels]."""
        x = self.normalize(pixels).permute(0, 3, 1, 2)
        x = F.max_pool2d(F.relu(self.stem(x)), 3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class ResidualBlock(nn.Module):
    """Convolutions with ReLUs and a skip connection, which is projected if the shape changes."""

    def __init__(self, convolutions, shortcut):
        super().__init__()
        self.convolutions = nn.ModuleList(convolution(*shape) for shape in convolutions)
        self.shortcut = convolution(*shortcut) if shortcut else None

    def forward(self, x):
        """Height and width are divided by the stride, rounded up."""
        y = x
        for layer in self.convolutions[:-1]:
            y = F.relu(layer(y))
        y = self.convolutions[-1](y)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def convolution(features, output, kernel_size, stride):
    """A convolution with bias, padded by half the kernel's size, rounded down."""
    return nn.Conv2d(features, output, kernel_size, stride, kernel_size // 2)


class EfficientNet(nn.Module):
    """An EfficientNet-lite (Tan and Le 2019) with global average pooling.

    Each block is given as [input channels, output channels, kernel size, stride, expansion].
    """

    def __init__(self, stem, blocks, head, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = SameConv2d(3, stem, 3, 2)
        self.blocks = nn.ModuleList(InvertedResidual(*block) for block in blocks)
        self.head = SameConv2d(blocks[-1][1], head, 1, 1)

    def forward(self, pixels):
        """Pixels, [batch, height, width, 3], to [batch, channels]."""
        x = self.normalize(pixels).permute(0, 3, 1, 2)
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).mean((2, 3))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection; a skip connection if the shape is kept."""

    def __init__(self, features, output, kernel_size, stride, expansion):
        super().__init__()
        hidden = features * expansion
        self.expand = SameConv2d(features, hidden, 1, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = SameConv2d(hidden, output, 1, 1)
        self.skip = stride == 1 and features == output

    def forward(self, x):
        """Height and width are divided by the stride, rounded up."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skip else y


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding.

    The output's size is ceil(size / stride); an odd pixel of padding goes to the end.
    """

    def __init__(self, features, output, kernel_size, stride, groups=1):
        super().__init__(features, output, kernel_size, stride, groups=groups)

    def forward(self, x):
        """[batch, channels, height, width]."""
        padding = []
        for size in (x.shape[3], x.shape[2]):
            kernel_size, stride = self.kernel_size[0], self.stride[0]
            total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))
