"""The losses of the paper (supplementary, section 1): non-saturating logistic GAN loss with R1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, C channels, H height, W width


def discriminator_loss(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """softplus(-D(x)) + softplus(D(G(z))) per picture; logits (B,) to losses (B,)."""
    return F.softplus(-real_B) + F.softplus(fake_B)


def generator_loss(fake_B: Tensor) -> Tensor:
    """softplus(-D(G(z))) per picture; logits (B,) to losses (B,)."""
    return F.softplus(-fake_B)


def r1_penalty(discriminator: nn.Module, real_BCHW: Tensor) -> Tensor:
    """Squared gradient norm of D at real pictures (Mescheder et al. 2018), per picture, without its weight.

    D's logits depend on the other pictures of a minibatch-stddev group too; as published, the gradient of their
    sum is taken. The result carries a graph, so that it can be differentiated by D's parameters.
    """
    real_BCHW = real_BCHW.detach().requires_grad_(True)
    logits_B = discriminator(real_BCHW)
    (gradient_BCHW,) = torch.autograd.grad(logits_B.sum(), real_BCHW, create_graph=True)
    # The last bias has no part in the gradient; DDP wants every parameter in the graph.
    return gradient_BCHW.square().sum(dim=(1, 2, 3)) + 0.0 * logits_B
