"""Training steps in PyTorch, with the losses and optimizers that our tasks have."""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.pytorch import NETWORKS

AUXILIARY_WEIGHT = 0.4
L1_WEIGHT = 100.0


class Setup:
    """Where and how a step runs.

    Products of float32 numbers are in TF32 on GPUs, as they are in JAX by default.

    Attributes:
      device: the GPU if there is one.
      compiled: whether networks are compiled.
      bfloat16: whether networks compute in bfloat16, by autocast.
    """

    def __init__(self, *, compiled: bool, bfloat16: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compiled = compiled
        self.bfloat16 = bfloat16
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # XLA tries algorithms out as well

    def network(self, name: str) -> nn.Module:
        """Make a network in training mode, in the layout that is fastest."""
        network = NETWORKS[name]().to(self.device, memory_format=torch.channels_last)
        return network.train()

    def forward(self, network: nn.Module) -> Callable[..., torch.Tensor]:
        return torch.compile(network) if self.compiled else network

    def images(self, *shape: int) -> torch.Tensor:
        images = torch.randn(shape, device=self.device)
        return images.to(memory_format=torch.channels_last)

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @property
    def fused(self) -> bool | None:
        """Whether optimizers update all arrays in one kernel."""
        return True if self.device.type == "cuda" else None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak_bytes(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """The most memory in use since the last reset; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated()


def supervised_step(
    name: str, batch_size: int, size: int, num_classes: int, setup: Setup
) -> Callable[[], None]:
    """Make a step of SGD on the cross-entropy of images, or of their pixels."""
    network = setup.network(name)
    forward = setup.forward(network)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        fused=setup.fused,
    )
    images = setup.images(batch_size, 3, size, size)
    with torch.no_grad():
        logits = first_of(network(images[:2]))
    shape = (batch_size, *logits.shape[2:])
    labels = torch.randint(num_classes, shape, device=setup.device)

    def step() -> None:
        optimizer.zero_grad()
        with setup.autocast():
            found = forward(images)
            loss = F.cross_entropy(first_of(found), labels)
            if isinstance(found, tuple):
                loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(found[1], labels)
        loss.backward()
        optimizer.step()

    return step


def first_of(found: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the logits, without auxiliary ones."""
    return found[0] if isinstance(found, tuple) else found


def pix2pix_step(
    generator: str, discriminator: str, batch_size: int, size: int, setup: Setup
) -> Callable[[], None]:
    """Make a step of Adam on the discriminator, and then on the generator."""
    networks = [setup.network(name) for name in (generator, discriminator)]
    generate, judge = map(setup.forward, networks)
    made, judged = (
        torch.optim.Adam(
            network.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=setup.fused
        )
        for network in networks
    )
    inputs, targets = (setup.images(batch_size, 3, size, size) for _ in range(2))

    def gan_loss(images: torch.Tensor, is_real: bool) -> torch.Tensor:
        logits = judge(torch.cat([inputs, images], 1))
        return F.softplus(-logits if is_real else logits).mean()

    def step() -> None:
        with setup.autocast():
            fakes = generate(inputs)
        networks[1].requires_grad_(True)
        judged.zero_grad()
        with setup.autocast():
            loss = (gan_loss(targets, True) + gan_loss(fakes.detach(), False)) / 2
        loss.backward()
        judged.step()
        # The generator needs no gradients of the discriminator's parameters.
        networks[1].requires_grad_(False)
        made.zero_grad()
        with setup.autocast():
            loss = gan_loss(fakes, True) + L1_WEIGHT * F.l1_loss(fakes, targets)
        loss.backward()
        made.step()

    return step
