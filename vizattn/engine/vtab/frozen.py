"""Many trainings of a probe on the same frozen features as one computation.

Settings that differ only in learning rate and weight decay see the same batches from the same start, so they are
trained side by side: G linear heads are one stack of matrices, and G efficient probes of Q queries are one probe of G*Q
queries, whose products with the tokens are a few large ones instead of many small ones. Each setting's parameters get
the gradient of its own loss, so every one of them takes the steps it would take alone.

Shapes: G settings, B batch, N tokens, D their width, Q queries, E width of what is pooled, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn.adapters import attached
from vizattn.adapters.anatomy import core
from vizattn.adapters.efficient_probing import ProbeHead
from vizattn.data.loader import EpochSampler, training_batches
from vizattn.engine.optim import build_schedule

__all__ = ["OPTIMIZERS", "can_batch", "inputs_of", "put", "right_answers", "train_probes"]

Params = dict[str, Tensor]
"""Of G settings, stacked: "weight" (G, C, E) and "bias" (G, C) of the classifier; of efficient probing also "queries"
(G, Q, D), "v" (G, E, D), and the running statistics "mean" and "var" (G, E)."""

OPTIMIZERS = ("sgd", "momentum", "adamw")
"""As timm names them: "sgd" is Nesterov's, "momentum" is not."""

_TRAINED = ("weight", "bias", "queries", "v")
_NO_DECAY = ("bias",)
_BN_MOMENTUM, _BN_EPS = 0.1, 1e-6


def can_batch(model: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether `train_probes` does what the engine's loop would do for this model and resolved recipe."""
    methods = [adapter.method for adapter in attached(model)]
    optimizer, loss, data = config["optimizer"], config["loss"], config["data"]
    plain = not (config["ema"] or loss["mixup"] or loss["cutmix"] or optimizer["clip_grad"] or optimizer["layer_decay"])
    return (
        methods in (["linear_probe"], ["efficient_probing"])
        and _only_linear(model)
        and plain
        and data.get("augment", "none") == "none"  # features are those of unchanged images
        and config["schedule"]["min_lr"] == 0  # all learning rates fall by the same factors
        and optimizer["accumulate"] == 1
        and config["amp"] is None
        and optimizer["name"] in OPTIMIZERS
    )


def _only_linear(model: nn.Module) -> bool:
    """Whether nothing trains but the classifier and the probe in front of it, and nothing is dropped at random."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return False
    parts: list[nn.Module] = [_classifier(model)]
    probe = _probe(model)
    if probe is not None:
        parts.append(probe)
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    return isinstance(parts[0], nn.Linear) and own == {id(p) for p in model.parameters() if p.requires_grad}


def _classifier(model: nn.Module) -> Any:
    inner: Any = core(model)
    return inner.get_classifier()


def _probe(model: nn.Module) -> Any:
    return next((a.module for a in attached(model) if isinstance(a.module, ProbeHead)), None)


def inputs_of(model: nn.Module, features: Tensor) -> Tensor:
    """What the trained part reads of frozen features: (B, D), or the tokens (B, N, D) that the queries see."""
    probe = _probe(model)
    return features if probe is None else probe.tokens(features)


def _places(model: nn.Module) -> Params:
    """Where the model has what `Params` name."""
    head, probe = _classifier(model), _probe(model)
    found: Params = {"weight": head.weight, "bias": head.bias}
    if probe is not None:
        found |= {"queries": probe.probe.queries, "v": probe.probe.v.weight}
        found |= {"mean": probe.norm.running_mean, "var": probe.norm.running_var}
    return found


def _start(model: nn.Module, settings: int) -> Params:
    """The parameters as the model has them now, once for each setting."""
    places = _places(model)
    return {name: value.detach().expand(settings, *value.shape).clone() for name, value in places.items()}


def put(model: nn.Module, params: Mapping[str, Tensor], setting: int) -> None:
    """Give the model the parameters of one setting."""
    with torch.no_grad():
        for name, place in _places(model).items():
            place.copy_(params[name][setting])


def _logits(params: Mapping[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """Logits (G, B, C) of inputs (B, D) or (B, N, D); in training the running statistics move."""
    if "queries" not in params:
        z = x.expand(len(params["weight"]), *x.shape)
    else:
        queries, v = params["queries"], params["v"]
        settings, count, dim = queries.shape
        pooled = _Pool.apply(queries.flatten(0, 1) * dim**-0.5, x)  # B, GQ, D
        # One product for each query: its pooled tokens by its own share of the output channels.
        shares = v.unflatten(1, (count, -1)).flatten(0, 1).transpose(1, 2)  # GQ, D, E/Q
        z = torch.bmm(pooled.transpose(0, 1), shares)  # GQ, B, E/Q
        z = z.unflatten(0, (settings, count)).transpose(1, 2).flatten(2)  # G, B, E
        z = _normalised(z, params, training)
    return torch.baddbmm(params["bias"][:, None], z, params["weight"].transpose(1, 2))


class _Pool(torch.autograd.Function):
    """Tokens x (B, N, D) pooled by the softmax over them of queries (P, D): (B, P, D), in layouts that suit products.

    Four products of B * N * D * P in all, two in either direction: the tokens are data and get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, x: Tensor) -> Tensor:
        attention = (x @ queries.t()).softmax(dim=1)  # B, N, P
        ctx.save_for_backward(attention, x)
        return torch.bmm(attention.transpose(1, 2), x)

    @staticmethod
    def backward(ctx: Any, pooled: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        attention, x = ctx.saved_tensors
        gradient = torch.bmm(x, pooled.transpose(1, 2))
        gradient = torch._softmax_backward_data(gradient, attention, 1, attention.dtype)
        return gradient.flatten(0, 1).t() @ x.flatten(0, 1), None


def _normalised(z: Tensor, params: Mapping[str, Tensor], training: bool) -> Tensor:
    """Batch normalisation without affine parameters, over the batch of each setting: z (G, B, E)."""
    settings, batch, width = z.shape
    flat = z.transpose(0, 1).reshape(batch, settings * width)
    mean, var = params["mean"].view(-1), params["var"].view(-1)
    flat = F.batch_norm(flat, mean, var, training=training, momentum=_BN_MOMENTUM, eps=_BN_EPS)
    return flat.view(batch, settings, width).transpose(0, 1)


def train_probes(
    model: nn.Module,
    config: Mapping[str, Any],
    rates: Sequence[tuple[float, float]],
    length: int,
    inputs: Callable[[Tensor], Tensor],
    labels: Tensor,
) -> Params:
    """Train G settings by the recipe's optimizer, schedule, batches and epochs.

    Args:
        model: With the trained part as it shall begin.
        config: A resolved recipe, see `can_batch`; its seed gives the order of the samples, as in the engine's loop.
        rates: (learning rate, weight decay) of each setting.
        length: Number of samples.
        inputs: From indices (B,) to what `inputs_of` gives for these samples.
        labels: Classes (length,).

    Returns:
        The parameters of every setting after the last epoch. A setting that diverged has numbers that are not finite.
    """
    params = _start(model, len(rates))
    trained = [params[name].requires_grad_() for name in _TRAINED if name in params]
    decays = [0.0 if name in _NO_DECAY else 1.0 for name in _TRAINED if name in params]
    optimizer = _Optimizer(trained, decays, rates, config["optimizer"])
    batch_size, epochs = config["data"]["batch_size"], config["schedule"]["epochs"]
    batches = training_batches(length, batch_size)
    factors = iter(_lr_factors(config, batches))
    sampler = EpochSampler(range(length), shuffle=True, seed=config["seed"])  # type: ignore[arg-type]
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for indices in torch.tensor([*sampler]).split(batch_size)[:batches]:
            logits = _logits(params, inputs(indices), training=True)
            target = labels[indices].expand(len(rates), -1)
            smoothing = config["loss"]["label_smoothing"]
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=smoothing)
            gradients = torch.autograd.grad(loss / len(indices), trained)
            optimizer.step(gradients, next(factors))
    return {name: value.detach() for name, value in params.items()}


@torch.no_grad()
def right_answers(params: Mapping[str, Tensor], x: Tensor, labels: Tensor) -> list[int]:
    """How many samples of a batch each setting gets right; -1 where its parameters are no longer numbers."""
    finite = torch.stack([value.flatten(1).isfinite().all(1) for value in params.values()]).all(0)
    right = (_logits(params, x, training=False).argmax(-1) == labels).sum(1)
    return torch.where(finite, right, -1).tolist()


def _lr_factors(config: Mapping[str, Any], length: int) -> list[float]:
    """The recipe's schedule as factors of the learning rate, one an iteration: those of the engine's schedulers."""
    schedule, lr = config["schedule"], config["optimizer"]["lr"]
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
    schedulers = build_schedule(dummy, lr=lr, length=length, **schedule)
    factors = []
    for _ in range(schedule["epochs"] * length):
        factors.append(dummy.param_groups[0]["lr"] / lr)
        dummy.step()
        for scheduler in schedulers:
            scheduler.step()
    return factors


class _Optimizer:
    """SGD with momentum or AdamW, as torch has them, with a learning rate and a weight decay for each setting."""

    def __init__(
        self,
        params: list[Tensor],
        decays: list[float],
        rates: Sequence[tuple[float, float]],
        options: Mapping[str, Any],
    ) -> None:
        self.params, self.name, self.momentum = params, options["name"], options["momentum"]
        table = torch.tensor(rates, dtype=torch.float64)
        self.rates = [column.to(params[0].dtype) for column in table.t()]
        self.decays = decays
        self.first = [torch.zeros_like(p) for p in params]
        self.second = [torch.zeros_like(p) for p in params] if self.name == "adamw" else []
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], factor: float) -> None:
        self.steps += 1
        for i, (parameter, gradient) in enumerate(zip(self.params, gradients)):
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            lr, decay = (self.rates[0] * factor).view(shape), (self.rates[1] * self.decays[i]).view(shape)
            if self.name == "adamw":
                self._adamw(i, parameter, gradient, lr, decay)
            else:
                self._sgd(i, parameter, gradient, lr, decay)

    def _sgd(self, i: int, parameter: Tensor, gradient: Tensor, lr: Tensor, decay: Tensor) -> None:
        gradient = torch.addcmul(gradient, parameter, decay)
        self.first[i].mul_(self.momentum).add_(gradient)
        step = gradient.add(self.first[i], alpha=self.momentum) if self.name == "sgd" else self.first[i]
        parameter.addcmul_(step, lr, value=-1)

    def _adamw(self, i: int, parameter: Tensor, gradient: Tensor, lr: Tensor, decay: Tensor) -> None:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        parameter.mul_(1 - lr * decay)
        self.first[i].lerp_(gradient, 1 - beta1)
        self.second[i].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (self.second[i] / (1 - beta2**self.steps)).sqrt_().add_(eps)
        parameter.sub_(self.first[i].div(1 - beta1**self.steps).div_(scale).mul_(lr))
