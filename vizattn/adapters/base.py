"""Attach, detach, switch off and merge adapters; the registry of methods.

A method is a frozen dataclass of options, registered under a name, with a method
``attach(model, anatomy, edits) -> nn.Module | None``. The module it returns holds what the method adds; it may define
``forward_features``, ``forward_head``, ``forward_intermediates``, and ``forward_maps`` for the forward of timm's list
or dictionary of layers, each called as ``f(model, run, *args)`` where ``run`` is the model's own; and
``describe_maps(source, edits)`` where it gives other maps than the model. Everything else a method changes goes through
`edits`, so that it can be undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from vizattn.adapters.anatomy import Anatomy, classifiers, core, describe, map_source
from vizattn.adapters.edits import Edits, SetAttr, SetValues
from vizattn.adapters.frozen import lighten
from vizattn.adapters.selftest import check_gradients
from vizattn.errors import VizattnError, unknown
from vizattn.heads import Segmenter

__all__ = [
    "METHODS",
    "Attachment",
    "Method",
    "attach",
    "attached",
    "detach",
    "disabled",
    "list_adapters",
    "make_options",
    "merge",
    "register",
    "take_off",
]


class Method(Protocol):
    """What a registered dataclass declares, and does."""

    needs_anatomy: ClassVar[bool]
    """False for methods that work on any timm model."""
    mergeable: ClassVar[str | Literal[True]]
    """True, or the reason why the weights of the backbone cannot hold what was learnt."""
    hierarchical: ClassVar[bool]
    """Works on pyramids such as Swin."""
    extra_tokens: ClassVar[bool]
    """Puts tokens beside the model's own, which every attention must take."""
    composes_with: ClassVar[tuple[str, ...]]
    """Methods that may be attached to the same model."""
    cache_level: ClassVar[Literal["pooled", "tokens"] | None]
    """Which features stay frozen and can be computed once: the pooled ones, the tokens, or none."""
    trains_backbone: ClassVar[bool]
    """The whole model trains, dropout and drop path included."""

    def attach(self, model: nn.Module, anatomy: Anatomy | None, edits: Edits) -> nn.Module | None:
        """Change `model` through `edits`; return the module of what is added."""


METHODS: dict[str, Any] = {}
T = TypeVar("T", bound=type)


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make an options dataclass known as adapter `name`. A second use of the name raises."""

    def add(method: T) -> T:
        if name in METHODS:
            raise ValueError(f"Adapter {name!r} is registered twice: {METHODS[name]} and {method}.")
        METHODS[name] = method
        return method

    return add


def list_adapters() -> list[str]:
    """Names for `attach`."""
    return sorted(METHODS)


def make_options(method: str, options: dict[str, Any]) -> Any:
    """The options of `method` as its dataclass.

    Raises:
        VizattnError: no such method, or no such option; the closest match is named.
    """
    if method not in METHODS:
        raise unknown("adapter", method, METHODS)
    names = [f.name for f in dataclasses.fields(METHODS[method])]
    for name in options:
        if name not in names:
            if not names:
                raise VizattnError(f"Adapter {method!r} has no options; got {name!r}.")
            raise unknown(f"option of adapter {method!r}:", name, names)
    types = get_type_hints(METHODS[method])
    for name, value in options.items():
        if not _is_a(value, types[name]):
            wanted = getattr(types[name], "__name__", None) or str(types[name])
            raise VizattnError(f"{method}: {name} must be {wanted}, got {value!r}.")
    return METHODS[method](**options)


def _is_a(value: Any, wanted: Any) -> bool:
    """Whether `value` is of the type of an option; an int is a float, and a list a tuple."""
    if get_origin(wanted) is tuple:
        return isinstance(value, (list, tuple)) and all(_is_a(v, get_args(wanted)[0]) for v in value)
    if get_args(wanted):
        return any(_is_a(value, choice) for choice in get_args(wanted))
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


@dataclass
class Attachment:
    """One adapter on one model, with all that is needed to take it off again."""

    method: str
    options: Any
    module: nn.Module | None
    edits: Edits
    values: SetValues | None
    flags: list[tuple[nn.Parameter, bool]]
    """`requires_grad` of the parameters before this attachment."""


class Adapted:
    """Mixed into the class of a model while adapters are attached."""

    adapters: nn.ModuleDict
    attachments: list[Attachment]

    def _route(self, name: str, *args: Any, **kwargs: Any) -> Any:
        run = getattr(super(), name)
        for module in self.adapters.values():
            own = getattr(module, "forward_maps" if name == "forward" else name, None)
            if own is not None:
                run = partial(own, self, run)
        return run(*args, **kwargs)

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm, through the adapters."""
        return self._route("forward_features", *args, **kwargs)

    def forward_head(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm, through the adapters."""
        return self._route("forward_head", *args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm, through the adapters."""
        return self._route("forward_intermediates", *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_adapted, (_original_class(self),), self.__dict__  # type: ignore[arg-type]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """A new head, trained and saved with the adapters, of the width that they feed it."""
        replace_head(self, num_classes, self.attachments[-1].edits, *args, **kwargs)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        """Frozen parts stay in evaluation mode: no dropout, no drop path, no moving statistics."""
        model: Any = super()
        if any(a.options.trains_backbone for a in self.attachments):
            return model.train(mode)
        model.train(False)
        self.adapters.train(mode)
        for module in self.modules():  # type: ignore[attr-defined]
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.training = mode
        self.training = mode
        return self


class AdaptedDict(Adapted):
    """For models that are a dictionary of layers and give maps: the adapters are not one of these."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm, through the adapters."""
        return self._route("forward", *args, **kwargs)

    def items(self) -> Any:
        """The layers by name."""
        return [(name, layer) for name, layer in super().items() if name != "adapters"]  # type: ignore[misc]


@cache
def _adapted_class(cls: Any) -> type[nn.Module]:
    mixin = AdaptedDict if issubclass(cls, nn.ModuleDict) else Adapted
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


@dataclass
class _Adapt:
    """The change of a model's class, as an edit that can be pickled."""

    model: nn.Module

    def redo(self) -> None:
        cls: Any = type(self.model)
        self.model.__class__ = _adapted_class(cls)

    def undo(self) -> None:
        self.model.__class__ = _original_class(self.model)


def _original_class(model: nn.Module) -> Any:
    return type(model).__mro__[type(model).__mro__.index(Adapted) + 1]


def _new_adapted(cls: Any) -> Any:  # a copy or an unpickled model gets its state after this
    adapted = _adapted_class(cls)
    return adapted.__new__(adapted)


def attached(model: nn.Module) -> list[Attachment]:
    """The adapters on `model`, oldest first."""
    return list(getattr(core(model), "attachments", []))


def replace_head(model: nn.Module, num_classes: int, edits: Edits, *args: Any, **kwargs: Any) -> None:
    """`reset_classifier` as a change that `edits` can take back."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    names = cfg["classifier"] if cfg else [name for name, _ in classifiers(model)]
    names = [names] if isinstance(names, str) else list(names)
    owners = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
    watched = list({id(m): m for m in (model, *(owner for owner, _ in owners))}.values())
    before = [_attributes(m) for m in watched]
    width = next((m.head_features for m in _adapters(model) if hasattr(m, "head_features")), None)
    if width is not None and num_classes > 0:
        like = next(model.parameters())
        head = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)  # type: ignore[arg-type]
        setattr(*owners[0], head.train(model.training))
        model.num_classes = num_classes  # type: ignore[assignment]
    elif isinstance(model, Adapted):
        super(Adapted, model).reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
    else:
        model.reset_classifier(num_classes, *args, **kwargs)  # type: ignore[operator]
    for module, old in zip(watched, before):
        for name, value in _attributes(module).items():
            if name in old and old[name] is not value:
                edits.note(SetAttr(module, name, value), old[name])


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Submodules and plain attributes."""
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") or k in ("_model_args", "_traits")}
    return {**plain, **module._modules}


def _adapters(model: nn.Module) -> list[nn.Module]:
    return list(getattr(model, "adapters", {}).values())


def attach(model: nn.Module, method: str, *, keep_original: bool = True, **options: Any) -> nn.Module:
    """Attach an adapter to a timm model, in place, and freeze what the method freezes.

    Args:
        model: Any model the method works on; timm's `features_only` models too. Attach before a `Segmenter` is built
            on it, before `torch.compile` and before wrapping for distributed training.
        method: One of `list_adapters()`.
        keep_original: Keep a copy of the weights that will be trained, which `detach` and `disabled` need.
        **options: Options of the method, see `vizattn info METHOD`.

    Returns:
        The same object.

    Raises:
        VizattnError: unknown method or option, a model the method does not work on, adapters that do not compose, or
            an adapter parameter that no gradient can reach. The model is left as it was.
    """
    opts = make_options(method, options)
    if isinstance(model, Segmenter):
        raise VizattnError(
            f"Attach {method!r} before the Segmenter is built, which reads what maps there are: backbone = "
            f"vizattn.attach(timm.create_model(name, features_only=True), {method!r}); Segmenter(backbone, ...)."
        )
    outer, model = model, core(model)
    if getattr(model, "adapters_disabled", False):
        raise VizattnError("Adapters cannot be attached while others are disabled: leave vizattn.disabled first.")
    if not any(hasattr(model, name) for name in ("forward_features", "pretrained_cfg", "_orig_mod", "module")):
        raise VizattnError(f"{type(model).__name__} is no timm model: create one with timm.create_model(...).")
    if hasattr(model, "_orig_mod") or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise VizattnError("Attach adapters before torch.compile and before wrapping a model for parallel training.")
    for other in attached(model):
        if method not in other.options.composes_with or other.method not in opts.composes_with:
            allowed = ", ".join(other.options.composes_with) or "nothing"
            raise VizattnError(
                f"Adapter {method!r} does not compose with {other.method!r}, which is attached and composes with "
                f"{allowed}. Call vizattn.detach(model) first."
            )
    source = map_source(outer)
    anatomy = _check_anatomy(outer, method, opts)
    edits = Edits()
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    try:
        if not attached(model):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            edits.set(model, "adapters", nn.ModuleDict())
            edits.set(model, "attachments", [])
            edits.make(_Adapt(model))
        originals = {id(p) for p, _ in flags}
        module = opts.attach(model, anatomy, edits)
        if module is not None:
            like = next(model.parameters())
            edits.set(model.adapters, method, module.to(device=like.device, dtype=like.dtype))
        if not opts.trains_backbone:
            lighten(model, edits)
        for _, head in classifiers(model):
            head.requires_grad_(True)
        if source is None and not any(p.requires_grad for p in model.parameters()):
            raise VizattnError(f"Cannot attach {method!r}: the model has no head. Create it with num_classes=...")
        values = None
        if keep_original:
            values = SetValues(_trained_tensors(model, originals))
        model.attachments.append(Attachment(method, opts, module, edits, values, flags))  # type: ignore[union-attr, operator, arg-type]
        if source is not None and hasattr(module, "describe_maps"):
            module.describe_maps(source, edits)
        model.train(training)
        check_gradients(outer, method)
    except BaseException:
        if attached(model) and attached(model)[-1].edits is edits:
            model.attachments.pop()  # type: ignore[union-attr, operator]
        edits.undo(next(model.parameters()))
        _restore(model, flags, training)
        raise
    return outer


def _check_anatomy(model: nn.Module, method: str, opts: Any) -> Anatomy | None:
    if not opts.needs_anatomy:
        return None
    try:
        anatomy = describe(model)
    except VizattnError as error:
        fitting = [n for n, m in sorted(METHODS.items()) if not m.needs_anatomy]
        raise VizattnError(f"Cannot attach {method!r}: {error} Any timm model takes: {', '.join(fitting)}.") from None
    unfit = _unfit(opts, anatomy)
    if unfit:
        fitting = [n for n, m in sorted(METHODS.items()) if not _unfit(m, anatomy)]
        raise VizattnError(
            f"Cannot attach {method!r} to {type(core(model)).__name__}: {unfit}. "
            f"These work on it: {', '.join(fitting)}."
        )
    return anatomy


def _unfit(method: Any, anatomy: Anatomy) -> str | None:
    """Why a method does not work on a model, if so."""
    if not anatomy.isotropic and not method.hierarchical:
        return "it needs tokens of one width on one grid"
    closed = [type(b.attn) for b in anatomy.blocks if not b.takes_extra_kv]
    if method.extra_tokens and closed:
        return f"{closed[0].__module__}.{closed[0].__name__} takes no tokens besides the image's own"
    return None


def _trained_tensors(model: nn.Module, originals: set[int]) -> list[Tensor]:
    """Tensors of the model itself that training will change: parameters, and the buffers that stand beside them."""
    tensors: list[Tensor] = [p for p in model.parameters() if p.requires_grad and id(p) in originals]
    everything = any(a.options.trains_backbone for a in attached(model))
    for module in model.modules():
        if everything or any(p.requires_grad and id(p) in originals for p in module.parameters(recurse=False)):
            tensors += [
                b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set
            ]
    return tensors


def _restore(model: nn.Module, flags: list[tuple[nn.Parameter, bool]], training: bool) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    model.train(training)


def _need_attached(model: nn.Module, verb: str) -> list[Attachment]:
    attachments = attached(model)
    if not attachments:
        raise VizattnError(f"Nothing to {verb}: no adapter is attached to this {type(core(model)).__name__}.")
    return attachments


def _need_unread(model: nn.Module, attachments: list[Attachment], verb: str) -> None:
    """The heads of a `Segmenter` are made for the maps that some adapters give."""
    for a in attachments:
        if isinstance(model, Segmenter) and hasattr(a.module, "describe_maps"):
            raise VizattnError(
                f"Cannot {verb} {a.method!r} in a Segmenter, whose heads read the maps that it gives. For the backbone "
                "alone pass segmenter.backbone."
            )


def _need_originals(attachments: list[Attachment]) -> None:
    for a in attachments:
        if a.values is None:
            raise VizattnError(f"{a.method!r} was attached with keep_original=False: the weights from before are gone.")


def detach(model: nn.Module) -> nn.Module:
    """Take all adapters off: bit for bit the model from before, head included.

    The heads of a `Segmenter` stay.

    Raises:
        VizattnError: nothing is attached, it was attached with ``keep_original=False``, or the heads of a `Segmenter`
            read maps that only an adapter gives.
    """
    attachments = _need_attached(model, "detach")
    _need_originals(attachments)
    _need_unread(model, attachments, "detach")
    inner = core(model)
    for a in reversed(attachments):
        a.values.undo()  # type: ignore[union-attr]
        a.edits.undo(next(inner.parameters()))
        _restore(inner, a.flags, inner.training)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model is the untouched backbone from before `attach`, its old head included.

    It is in evaluation mode there, so that no forward moves the statistics of its norms; afterwards every module has
    its mode from before again. The heads of a `Segmenter` stay.

    Raises:
        VizattnError: as `detach`.
    """
    attachments = _need_attached(model, "disable")
    _need_originals(attachments)
    _need_unread(model, attachments, "disable")
    inner = core(model)
    modes = [(m, m.training) for m in model.modules()]
    put_on = take_off(inner)
    model.eval()
    inner.adapters_disabled = True  # type: ignore[assignment]
    try:
        yield model
    finally:
        del inner.adapters_disabled
        put_on()
        for module, mode in modes:
            module.training = mode


def take_off(model: nn.Module) -> Callable[[], None]:
    """Take all adapters off a model without what is around it; what is returned puts them on again as they were."""
    attachments = attached(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for a in reversed(attachments):
        a.values.undo()  # type: ignore[union-attr]
        a.edits.undo(next(model.parameters()))
        _restore(model, a.flags, training=False)

    def put_on() -> None:
        for a in attachments:
            a.edits.redo(next(model.parameters()))
            a.values.redo()  # type: ignore[union-attr]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return put_on


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapters into the weights, exactly; what remains is a plain timm model with the trained head.

    Raises:
        VizattnError: nothing is attached, or a method cannot be merged; the message says why.
    """
    attachments = _need_attached(model, "merge")
    for a in attachments:
        if a.options.mergeable is not True:
            raise VizattnError(f"{a.method!r} cannot be merged: {a.options.mergeable}.")
    inner = core(model)
    parts: list[Any] = [m for m in inner.modules() if hasattr(m, "merged_weights")]
    merged = [m.merged_weights() for m in parts]
    heads = [
        (SetAttr(inner.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], m)) for n, m in classifiers(inner)
    ]
    num_classes = inner.num_classes if hasattr(inner, "num_classes") else None
    for a in reversed(attachments):
        a.edits.undo(next(inner.parameters()))
        _restore(inner, a.flags, inner.training)
    for head in heads:
        head.redo()
    if num_classes is not None:
        inner.num_classes = num_classes
    for pairs in merged:
        for tensor, value in pairs:
            tensor.data.copy_(value)
    return model
