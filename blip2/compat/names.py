"""A model's layers under Hugging Face's names.

The computing layers are those of `blip2.model`. The same objects are also in a second tree whose paths are the
published names: ``vision_model.encoder.layers.0.self_attn.qkv`` is ``vision.blocks.0.qkv``. So ``named_parameters``,
``state_dict``, freezing by name and LoRA's target modules work as in the reference, without a second copy. A product
that is one layer here and several there (q, k, v) is split into these (`Fused`).

The tree is made from the tables of `blip2.checkpoint.keys`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blip2.checkpoint.keys import published_names, rows_of_parts, table
from blip2.checkpoint.tensors import in_parts
from blip2.compat.config import TEXT
from blip2.errors import OptionError
from blip2.language import OPT, Decoder
from blip2.linear import Linear, Weight, is_worth_packing, readable
from blip2.model import Blip2, Blip2Matcher
from blip2.quantized import QuantizedLinear

HOOKS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
)  # fmt: skip


# The reference's order of registering layers: optimisers number parameters, and adapters draw numbers, in this order.
ORDERS = (
    ("vision_model", "embeddings", "qformer", "vision_projection", "text_projection", "itm_head"),
    ("embeddings", "pre_layernorm", "encoder", "post_layernorm"),
    ("word_embeddings", "position_embeddings", "layernorm"),
    ("self_attn", "layer_norm1", "mlp", "layer_norm2"),
    ("attention", "crossattention", "intermediate", "output", "intermediate_query", "output_query"),
    ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
    ("k_proj", "v_proj", "q_proj", "out_proj"),
    ("embed_tokens", "block", "final_layer_norm"),
    ("q", "k", "v", "o", "relative_attention_bias"),
    ("SelfAttention", "EncDecAttention", "DenseReluDense", "layer_norm"),
    ("embed_tokens", "layers", "norm"),
    ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
     "post_feedforward_layernorm"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_norm", "k_norm"),
    ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)  # fmt: skip


class Named(nn.Module):
    """A node of the tree. ``core``: our module that computes what this one stands for, if there is one.

    Assigning here also assigns in ``core``'s layers, so that a replaced layer (LoRA) is used.
    """

    core: nn.Module | None
    places: dict[str, tuple[nn.Module, str]]

    def __init__(self) -> None:
        super().__init__()
        # Kept outside the registered modules: each is registered once, under its public name.
        self.__dict__["core"] = None
        self.__dict__["places"] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        owner, attribute = self.__dict__.get("places", {}).get(name, (None, ""))
        if owner is not None:
            setattr(owner, attribute, value)
        elif isinstance(value, nn.Module) and name in self.__dict__.get("_modules", {}):
            raise OptionError(f"{name} cannot be replaced as a whole; replace the layers in it")
        super().__setattr__(name, value)

    def put(self, name: str, owner: nn.Module, attribute: str) -> None:
        """Expose a layer or a parameter of ``owner`` under a name."""
        value = getattr(owner, attribute)
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.add_module(name, value)
        self.places[name] = (owner, attribute)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise OptionError(
            f"{type(self).__name__} only holds layers and cannot be called; call the model, one of its "
            "parts (vision_model, qformer, language_model), or a layer"
        )

    def train(self, mode: bool = True) -> Any:
        if self.core is not None:
            self.core.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, (owner, attribute) in self.places.items():  # a parameter may have been replaced, not moved in place
            if name in self._parameters:
                setattr(owner, attribute, self._parameters[name])
        return self


def _hook(name: str) -> Callable[..., Any]:
    """Hooks are registered on the module that is called."""

    def register(self: Named, *args: Any, **kwargs: Any) -> Any:
        is_called = type(self).forward is not Named.forward
        if not is_called and self.core is None:
            raise OptionError(f"{type(self).__name__} is never called, so hooks have no effect; hook the layers in it")
        target = nn.Module if is_called else type(self.core)
        return getattr(target, name)(self if is_called else self.core, *args, **kwargs)

    register.__name__ = name
    return register


for _name in HOOKS:
    setattr(Named, _name, _hook(_name))


class Layers(nn.ModuleList):
    """Nodes by their numbers."""

    def __setitem__(self, index: int, module: nn.Module) -> None:
        raise OptionError("a model's layers cannot be replaced; replace the linear layers in them")


class Fused(nn.Module):
    """Several linear layers with the same input instead of one product; their outputs are concatenated."""

    @classmethod
    def of(cls, whole: Any, rows: Mapping[str, int]) -> Fused:
        """Split a layer into layers with so many rows. Each has separate memory, so that saving or sending its storage
        only covers the part."""
        parts = cls()
        sizes = list(rows.values())
        biases: list[Any] = [None] * len(rows)
        if whole.bias is not None:
            biases = [bias.clone() for bias in whole.bias.detach().split(sizes)]
        packs = isinstance(whole.weight, Weight)
        for name, weight, bias in zip(rows, readable(whole.weight).split(sizes), biases, strict=True):
            if not (packs and is_worth_packing(weight.dtype, weight.numel())):
                weight = weight.clone()
            part = layer(weight, bias, requires_grad=whole.weight.requires_grad, packs=packs)
            parts.add_module(name, part)
        return parts.train(whole.training)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def unfuse(model: Blip2 | Blip2Matcher) -> None:
    """Split layers that are one here and several in the reference; quantised layers are kept.

    Raises OptionError for a language model without names here.
    """
    config = model.config.language if isinstance(model, Blip2) else None
    if config is not None and config.model_type not in TEXT:
        raise OptionError(
            f"the language model is a {config.model_type}, and these classes only support an OPT, a T5, and "
            "decoders of the Llama kind; use blip2.load"
        )
    for ours, theirs in table(model.config).items():
        name, _, last = ours.rpartition(".")
        if "|" in theirs and last == "weight":
            whole: Any = model.get_submodule(name)
            if not isinstance(whole, Fused | QuantizedLinear):
                names = [each.split(".")[-2] for each in published_names(theirs)]
                rows = rows_of_parts(model.config, ours, whole.out_features, len(names))
                model.set_submodule(name, Fused.of(whole, dict(zip(names, rows, strict=True))))


class _Entry(NamedTuple):
    """A place: ``attribute`` of our module ``owner``."""

    owner: str
    attribute: str


def name_layers(root: Named, model: Blip2 | Blip2Matcher, parts: Mapping[str, Callable[[], Named]]) -> None:
    """Put all layers of a model under ``root``. ``parts``: the modules at paths that can be called."""
    entries: dict[str, _Entry] = {}  # public path -> our place
    stems: dict[str, set[str]] = {}  # our module -> the public paths of its content
    for ours, theirs in _pairs(model):
        owner, _, attribute = ours.rpartition(".")
        is_layer = owner and not any(True for _ in model.get_submodule(owner).children())
        if is_layer:
            entries[theirs.rpartition(".")[0]] = _Entry(*owner.rpartition(".")[::2])
        else:
            entries[theirs] = _Entry(owner, attribute)
        words = owner.split(".")
        for end in range(1, len(words) + 1):
            stems.setdefault(".".join(words[:end]), set()).add(theirs)
    cores = _cores(stems)

    places: dict[str, Named] = {"": root}

    def place(path: str) -> Named:
        if path not in places:
            above, _, name = path.rpartition(".")
            made = places[path] = parts.get(path, Named)()
            made.__dict__["core"] = made.core or (model.get_submodule(cores[path]) if path in cores else None)
            if name.isdigit():
                holder, _, list_name = above.rpartition(".")
                owner = place(holder)
                if list_name not in owner._modules:
                    owner.add_module(list_name, Layers())
                layers = owner._modules[list_name]
                assert isinstance(layers, Layers) and int(name) == len(layers), path
                layers.append(made)
            else:
                place(above).add_module(name, made)
        return places[path]

    for path, (owner, attribute) in entries.items():
        above, _, name = path.rpartition(".")
        place(above).put(name, model.get_submodule(owner) if owner else model, attribute)
    for made in places.values():
        _share_parameters(made)
    if isinstance(model, Blip2):
        _name_tied(place, model)
    for made in places.values():
        order = next((order for order in ORDERS if set(made._modules) <= set(order)), ())
        for name in order:
            if name in made._modules:
                made._modules[name] = made._modules.pop(name)


def _share_parameters(made: Named) -> None:
    """Let a node and the computing module share the dictionary of parameters, so that they stay the same when these are
    exchanged in the dictionary itself, as in `torch.func.functional_call`."""
    for owner, attribute in made.places.values():
        if made.places.get(attribute) == (owner, attribute) and made._parameters.keys() == owner._parameters.keys():
            made.__dict__["_parameters"] = owner._parameters


def _pairs(model: Blip2 | Blip2Matcher) -> Iterator[tuple[str, str]]:
    """Our names with the public ones, one weight each."""
    for ours, theirs in in_parts(model, table(model.config)).items():
        names = published_names(theirs)
        if len(names) > 1:  # quantised, so not split
            stem, last = names[0].rsplit(".", 2)[0], names[0].rsplit(".", 1)[1]
            theirs = f"{stem}.{'_'.join(name.split('.')[-2] for name in names)}.{last}"
        yield ours, theirs


def _cores(stems: Mapping[str, set[str]]) -> dict[str, str]:
    """Public paths whose content is exactly that of one of our modules."""
    inside_of = Counter(".".join(words[:end]) for words in _words(stems) for end in range(1, len(words)))
    found = {}
    for module, inside in stems.items():
        words = [name.split(".") for name in sorted(inside)]
        first, last = words[0], words[-1]
        length = 0
        while length < min(len(first), len(last)) - 1 and first[length] == last[length]:
            length += 1
        path = ".".join(first[:length])
        if path and inside_of[path] == len(inside):
            found[path] = module  # of several nested ones the innermost, which is the one that is called
    return found


def _words(stems: Mapping[str, set[str]]) -> list[list[str]]:
    return [name.split(".") for name in set().union(*stems.values())]


def _name_tied(place: Callable[[str], Named], model: Blip2) -> None:
    """Give a tied table all the names that it has in the reference."""
    language = model.language
    top = place("language_model")
    if language.config.has_encoder:
        for path in ("language_model.encoder", "language_model.decoder"):
            place(path).put("embed_tokens", language, "token_embedding")
        return
    if language.output is None:
        top.add_module("lm_head", tied_head(language))
        top.places["lm_head"] = (language, "output")  # for the case that it is replaced
    elif "lm_head" not in top._modules:
        top.put("lm_head", language, "output")


def layer(
    weight_ND: Tensor, bias_N: Tensor | None = None, *, requires_grad: bool = True, packs: bool = False
) -> Linear:
    """A linear layer with these weights, without a copy if their memory order allows it."""
    made = Linear.__new__(Linear)
    nn.Module.__init__(made)
    made.out_features, made.in_features = weight_ND.shape
    made.weight = nn.Parameter(weight_ND, requires_grad)
    made.keep(weight_ND, packs=packs)
    made.register_parameter("bias", None if bias_N is None else nn.Parameter(bias_N, requires_grad))
    return made


def tied_head(language: OPT | Decoder) -> Linear:
    """The token table as a linear layer."""
    head = layer(language.token_embedding.weight.detach())
    head.weight = language.token_embedding.weight
    return head


def put_weight(module: Any, weight: Tensor, name: str = "weight") -> None:
    """Replace the weights of a layer, in the layer's own memory order."""
    if name == "weight" and hasattr(module, "keep"):
        module.keep(weight)
    else:
        setattr(module, name, nn.Parameter(weight, requires_grad=getattr(module, name).requires_grad))
