"""A ResNet with plain data parallelism: every rank has the whole network and its own images.

    mpirun -n 4 python examples/resnet.py

The images are drawn here (discs, squares, crosses and rings in noise), so nothing has to be fetched. The modules
stay your own: training changes them in place, and they are called directly to count what they get right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triloom

SIZE, CLASSES = 20, 4


class Block(nn.Module):
    """Two convolutions around which the input goes (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.past = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.past(x))


def resnet(width: int) -> list[nn.Module]:
    """Units: a stem, three blocks, each but the first halving the image, and the head."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))
    return [stem, *blocks, head]


def images(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Shapes of any place and size in noise, ``[count, 1, SIZE, SIZE]``, and which they are."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    middle = 7 + 6 * torch.rand(2, count, 1, 1, generator=draw)
    radius = 3 + 3 * torch.rand(count, 1, 1, generator=draw)
    grid = torch.arange(SIZE, dtype=torch.float32)
    dx, dy = (grid[None, None, :] - middle[0]).abs(), (grid[None, :, None] - middle[1]).abs()
    round_, square = (dx**2 + dy**2).sqrt() / radius, torch.maximum(dx, dy) / radius
    cross = torch.where(square < 1, torch.minimum(dx, dy) / 1.5, 2.0)
    ring = torch.where(round_ > 0.6, round_, 2.0)
    shapes = torch.stack([round_, square, cross, ring])[labels, torch.arange(count)] < 1
    noise = 0.7 * torch.randn(count, SIZE, SIZE, generator=draw)
    return (shapes.float() + noise).unsqueeze(1), labels


def main(steps: int = 150, batch: int = 64, width: int = 12) -> float:
    torch.manual_seed(0)
    units = resnet(width)
    with triloom.init() as world:
        rate = triloom.warmup_cosine(0.2, warmup=10, steps=steps)
        engine = triloom.Engine(
            units,
            triloom.mean_loss(F.cross_entropy),
            world=world.group,
            placement=triloom.zero0(),
            optimizer=triloom.SGD(lr=rate, momentum=0.9, weight_decay=1e-4),
        )
        for step in range(steps):
            metrics = engine.step(*images(step * world.size + world.rank, batch // world.size))
            if world.rank == 0 and step % 25 == 0:
                print(f"step {step:3}  loss {metrics.loss:.4f}")
        x, labels = images(-1 - world.rank, 256)
        with torch.no_grad():
            right = nn.Sequential(*units).eval()(x).argmax(1).eq(labels).double().mean().reshape(1)
        world.group.all_reduce(right).wait()
        if world.rank == 0:
            print(f"new images: {float(right) / world.size:.1%} right")
        return float(right) / world.size


if __name__ == "__main__":
    main()
