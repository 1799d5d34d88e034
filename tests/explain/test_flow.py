"""Rollout and relevance against naive versions that read the weights where unfused attentions have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import rows
import torch
from torch import Tensor, nn

import vizattn
from vizattn import VizattnError
from vizattn.adapters import attached
from vizattn.adapters.anatomy import describe

CASES = [
    ("vit_va", None),
    ("vit_va", "vpt_deep"),
    ("vit_va", "vpt_shallow"),
    ("vit_va", "apla"),
    ("vit_va", "efficient_probing"),
    ("vit", None),
    ("vit", "efficient_probing"),
    ("vit", "gates"),
    ("deit_distilled", None),
    ("dinov2_reg", None),
    ("dinov3", None),
    ("beit", None),
    ("eva02", None),
]


def make(model: str, method: str | None) -> nn.Module:
    net = rows.create(model).double()
    if method == "gates":  # as an option of timm's attention, which no model of these has
        torch.manual_seed(5)
        for block in describe(net).blocks:
            block.attn.gate = nn.Linear(48, 48, dtype=torch.float64)
            block.attn.norm = nn.LayerNorm(48, dtype=torch.float64)
    elif method:
        torch.manual_seed(5)
        vizattn.attach(net, rows.METHODS[method][0], **rows.METHODS[method][1])
        rows.randomise(net.double())
    return net.requires_grad_(False)


def stored_weights(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Logits, and the weights of each layer and of the probe, all in one graph."""
    weights: list[Tensor] = []
    probed: list[Tensor] = []
    handles = []
    for block in describe(net).blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda m, args, out: weights.append(out)))
    for attachment in attached(net):
        probe: Any = getattr(attachment.module, "probe", None)
        if probe is not None:
            own = probe.attention

            def attention(tokens: Tensor, own: Callable[[Tensor], Tensor] = own) -> Tensor:
                probed.append(own(tokens))
                return probed[-1]

            probe.attention = attention
    logits = net(images.clone().requires_grad_())
    for handle in handles:
        handle.remove()
    return logits, weights, probed[0] if probed else None


def read(net: Any, total: Tensor, probe: Tensor | None, prompts: int) -> Tensor:
    """Rows of the tokens that the features are read from, over the patches."""
    own = net.num_prefix_tokens
    if probe is not None:
        row = (probe[:, None] @ total[:, prompts + own :])[:, 0]
    elif hasattr(net, "head_dist"):
        row = (total[:, 0] + total[:, 1]) / 2
    elif net.global_pool == "token":
        row = total[:, prompts]
    else:
        row = total[:, prompts + own :].mean(1)
    return row[:, prompts + own :].unflatten(1, (4, 4))


@pytest.mark.parametrize(("model", "method"), CASES)
def test_rollout(model: str, method: str | None) -> None:
    net, images = make(model, method), rows.images().double()
    got = vizattn.rollout(net, images)
    _, weights, probe = stored_weights(net, images)
    n = weights[0].shape[2]
    total = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    for layer in weights:  # what is paid to prompts beyond the n tokens is lost
        total = (0.5 * layer.mean(1)[..., :n] + 0.5 * torch.eye(n)) @ total
    expected = read(net, total, None if probe is None else probe.mean(1), 3 if method == "vpt_shallow" else 0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    if method is None:
        assert bool((got.sum((1, 2)) <= 1 + 1e-9).all())


@pytest.mark.parametrize(
    ("model", "method", "target"),
    [*((*case, None) for case in CASES), ("vit", None, 3), ("vit", None, torch.tensor([4, 0]))],
)
def test_relevance(model: str, method: str | None, target: Any) -> None:
    net, images = make(model, method), rows.images().double()
    got = vizattn.relevance(net, images, target)
    logits, weights, probe = stored_weights(net, images)
    classes = logits.argmax(1) if target is None else torch.as_tensor(target).expand(2)
    asked = [*weights, *([] if probe is None else [probe])]
    grads = torch.autograd.grad(logits[torch.arange(2), classes].sum(), asked)
    n = weights[0].shape[2]
    identity = torch.eye(n, dtype=torch.float64)
    total = identity.expand(2, n, n)
    for layer, grad in zip(weights, grads):
        total = total + (layer * grad).clamp(min=0).mean(1)[..., :n] @ total
    of_probe = None if probe is None else (probe * grads[-1]).clamp(min=0).mean(1)
    expected = read(net, total if probe is not None else total - identity, of_probe, 3 * (method == "vpt_shallow"))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)
    assert float(got.min()) >= 0
    assert float(got.max()) > 0


def test_a_pooling_by_attention_is_the_last_step() -> None:
    """SigLIP: its learnt query reads the tokens."""
    net, images = make("siglip", None), rows.images().double()
    maps = vizattn.attention_maps(net, images)
    total = torch.eye(16, dtype=torch.float64)
    for layer in maps[:-1]:
        total = (layer.weights().mean(1) + torch.eye(16)) / 2 @ total
    expected = (maps[-1].weights().mean(1) @ total)[:, 0].unflatten(1, (4, 4))
    torch.testing.assert_close(vizattn.rollout(net, images), expected)
    assert vizattn.relevance(net, images).shape == (2, 4, 4)


def test_relevance_finds_what_decides() -> None:
    """A class token that reads the one bright patch, by a head that sums it up."""
    net = rows.create("vit").double()
    dark = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    bright = dark.clone()
    bright[..., 8:16, 16:24] = 3.0
    with torch.no_grad():
        change = net(bright) - net(dark)
    found = vizattn.relevance(net, bright, int(change.argmax()))[0]
    assert found.flatten().argmax() == 1 * 4 + 2


def test_gradients_and_modes_are_as_before() -> None:
    net = rows.create("vit")
    vizattn.attach(net, "vpt", num_tokens=3)
    net.train()
    modes = [m.training for m in net.modules()]
    vizattn.relevance(net, rows.images())
    vizattn.rollout(net, rows.images())
    assert all(p.grad is None for p in net.parameters())
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_within_inference_mode() -> None:
    net, images = rows.create("vit"), rows.images()
    expected = vizattn.relevance(net, images)
    with torch.inference_mode():
        torch.testing.assert_close(vizattn.relevance(net, images + 0), expected)
        assert vizattn.rollout(net, images).shape == (2, 4, 4)


def test_gradient_checkpointing_changes_nothing() -> None:
    net = rows.create("vit")
    expected = vizattn.relevance(net, rows.images())
    net.set_grad_checkpointing()
    torch.testing.assert_close(vizattn.relevance(net.train(), rows.images()), expected)


def test_linear_attention_is_brought_to_sum_one() -> None:
    net = rows.create("vit_attentions/linear", global_pool="avg", class_token=False)
    torch.testing.assert_close(vizattn.rollout(net, rows.images()).sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("explain", [vizattn.rollout, vizattn.relevance])
@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: rows.create("nat"), "a pyramid"),
        (lambda: vizattn.attach(rows.create("vit"), "hst", widths=(8,), num_heads=(2,)), "'hst' the answer comes"),
        (lambda: vizattn.attach(rows.create("vit"), "side_tuning", width=8), "'side_tuning' the answer comes"),
    ],
)
def test_what_cannot_be_followed_is_refused(explain: Any, net: Any, message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        explain(net(), rows.images())


@pytest.mark.parametrize(
    ("net", "target", "message"),
    [
        (lambda: rows.create("vit"), 5, "class from 0 to 4, not 5"),
        (lambda: rows.create("vit"), torch.tensor([0, -1]), "class from 0 to 4"),
        (lambda: rows.create("vit"), torch.tensor([0, 1, 2]), "one for each of the 2 images"),
        (lambda: rows.create("vit", num_classes=0), None, "needs a model that classifies"),
        (lambda: rows.create_segmenter("vit", "linear_probe"), None, "a segmenter has one for each position"),
    ],
)
def test_relevance_needs_a_class(net: Any, target: Any, message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        vizattn.relevance(net(), rows.images(), target)
