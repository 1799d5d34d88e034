"""Halo attention by plain operations, with all logits at once: what tracers see, and what other devices compute.

Shapes: g samples times heads, n x m blocks of Q queries, w x w keys of a block, E extra keys, d channels of a head, e
of its values.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attend_plain"]


def attend_plain(
    query: Tensor,
    by_axis: Tensor,
    key: Tensor,
    value: Tensor,
    extra_key: Tensor,
    extra_value: Tensor,
    block: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(query key^T / sqrt(d) + by_axis) value of blocks, over the keys around them and extra ones.

    Args:
        query: (n, g, m, Q, d).
        by_axis: Logits of each query for the w rows and for the w columns of keys, (n, g, m, Q, 2 * w); minus infinity
            where there are none.
        key: (g, (n - 1) * block + w, (m - 1) * block + w, d).
        value: The same with e channels.
        extra_key: (g, E, d).
        extra_value: (g, E, e).
        block: Rows and columns b between the windows of keys.
        dropout_p: Share of attention weights set to zero.

    Returns:
        (n, g, m, Q, e).
    """
    n, g, m, Q, d = query.shape
    vertical, horizontal = by_axis.chunk(2, dim=-1)
    bias = (vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).flatten(4).flatten(0, 2)
    key, value = _windows(key, block, n, m), _windows(value, block, n, m)
    if extra_key.shape[1] > 0:
        key = torch.cat([_of_every_block(extra_key, n, m), key], dim=1)
        value = torch.cat([_of_every_block(extra_value, n, m), value], dim=1)
        bias = F.pad(bias, [extra_key.shape[1], 0])
    query = (query * d**-0.5).reshape(-1, Q, d)
    # In place: the logits are by far the largest tensor. Autocast leaves it alone, so the types are made to match here.
    logits = bias.baddbmm_(query.to(bias.dtype), key.to(bias.dtype).transpose(1, 2))
    weights = logits.softmax(dim=-1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ value).view(n, g, m, Q, -1)


def _windows(x: Tensor, block: int, n: int, m: int) -> Tensor:
    """(g, (n - 1) * block + w, (m - 1) * block + w, d) -> (n * g * m, w * w, d): the neighborhoods of all blocks.

    Looked up like words, because the backward pass of `Tensor.unfold` takes ten times longer than that of a look-up.
    """
    g, height, width = x.shape[0], x.shape[1], x.shape[2]
    w = width - (m - 1) * block
    reach = torch.arange(w, device=x.device)
    rows = (torch.arange(n, device=x.device) * block).view(n, 1, 1, 1, 1) + reach.view(w, 1)
    columns = (torch.arange(m, device=x.device) * block).view(m, 1, 1) + reach
    maps = torch.arange(g, device=x.device).view(g, 1, 1, 1) * height
    return F.embedding(((maps + rows) * width + columns).view(n * g * m, w * w), x.reshape(-1, x.shape[3]))


def _of_every_block(x: Tensor, n: int, m: int) -> Tensor:
    """(g, E, d) -> (n * g * m, E, d)."""
    return x.unsqueeze(1).expand(n, x.shape[0], m, x.shape[1], x.shape[2]).flatten(0, 2)
