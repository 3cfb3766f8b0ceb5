"""Mixtures of Gaussians and rows drawn from them, for `dpm_stats`."""

import torch


def mixture(n, k, d, kind, spread=1.0, variance=1.0, seed=0):
    """Rows around k means `spread` apart; precisions of uneven scale, for "full" of uneven direction too."""
    generator = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(k, d, generator=generator)
    owner = torch.randint(k, (n,), generator=generator)
    x = means[owner] + variance**0.5 * torch.randn(n, d, generator=generator)
    if kind == "full":
        root = torch.randn(k, d, 2 * d, generator=generator) * torch.logspace(-1, 1, d)[:, None]
        precisions = root @ root.mT / (2 * d * variance)
    else:
        precisions = torch.exp(torch.randn(k, d, generator=generator)) / variance
        precisions = precisions if kind == "diag" else precisions[:, 0].contiguous()
    return x, means, precisions, torch.randn(k, generator=generator).log_softmax(0), kind
