"""Which texts a model of transformers may compute together.

Some rotary embeddings choose their frequencies by the longest text of a batch, and one of them
keeps those for the next batch. The numbers that are wanted are those of a text alone.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import Any

import torch

# Their frequencies follow from the configuration, whatever the length.
_FIXED = ("default", "linear", "yarn", "llama3", "proportional")
# How frequencies depend on the length: in one way up to a limit, and beyond it in one other way or
# in a way of each length.
_ONE_SWITCH, _EACH_LENGTH = "one switch", "each length"

# Attributes that every module has.
_MODULE = vars(torch.nn.Module()).keys()


class BatchRule:
    """Which lengths may share a batch of a model, and the model's state between batches.

    Attributes:
        by_length: whether there are texts that must not share a batch.
    """

    def __init__(self, model: torch.nn.Module, *, writes: bool = False):
        """Look at the model's rotary embeddings.

        Args:
            model: freshly loaded: what it has not run yet has left no trace in it.
            writes: it will go on writing texts, padded on the left; not all models can.
        """
        self._limits: set[tuple[str, int]] = set()
        self._states: list[tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]] = []
        known = type(model).__module__.startswith("transformers.")
        if not known:  # a model's own code: anything may follow from the length
            self._limits.add((_EACH_LENGTH, 0))
        for module in model.modules():
            limits = set(_limits_of(module))
            self._limits |= limits
            if limits or (not known and _is_rope(module)):
                self._states.append((module, *_state_of(module)))
        if writes and known and _sees_padding(model):
            self._limits.add((_EACH_LENGTH, 0))
        self.by_length = bool(self._limits)

    def key(self, length: int, grow: int = 0) -> tuple[int, ...]:
        """Texts of equal keys may share a batch.

        Args:
            length: tokens of the text.
            grow: tokens that the model will write after it.
        """
        return tuple(_side(kind, limit, length, grow) for kind, limit in sorted(self._limits))

    def batches(self, lengths: Sequence[int], size: int, grow: int = 0) -> list[list[int]]:
        """Put texts into batches: in their order, where the model allows all of them together.

        Args:
            lengths: `[N]` tokens of each text.
            size: texts of a batch.
            grow: tokens that the model will write after each.

        Returns:
            Indices of the texts, by batch.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault(self.key(length, grow), []).append(index)
        return [list(batch) for group in groups.values() for batch in batched(group, size)]

    def reset(self) -> None:
        """Make the model forget the batches before: to be called ahead of each."""
        for module, buffers, values in self._states:
            for name in vars(module).keys() - values.keys() - _MODULE:
                delattr(module, name)
            for name, buffer in buffers.items():
                module._buffers[name] = buffer.clone()
            vars(module).update({name: _copied(value) for name, value in values.items()})


def _side(kind: str, limit: int, length: int, grow: int) -> int:
    """0 up to the limit, -1 beyond its one switch; else only texts of this length are alike."""
    if length + grow <= limit:
        return 0
    return -1 if kind == _ONE_SWITCH and length > limit else length


def _limits_of(module: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """How a module's numbers depend on the length, if they do."""
    kinds = getattr(module, "rope_type", None)
    for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        if kind is None or kind in _FIXED:
            continue
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        if layer is not None:
            parameters = parameters.get(layer) or {}
        switch = parameters.get("original_max_position_embeddings")
        if kind == "longrope" and switch:
            yield _ONE_SWITCH, switch
        elif kind == "dynamic":
            yield _EACH_LENGTH, getattr(module, "original_max_seq_len", 0)
        else:
            yield _EACH_LENGTH, 0


@torch.inference_mode()
def _sees_padding(model: Any) -> bool:
    """Whether padding before a prompt changes what comes after it, as in recurrent models."""
    vocab = model.config.get_text_config().vocab_size
    prompt = (7 * torch.arange(1, 13, device=model.device) % vocab)[None]
    padded = torch.nn.functional.pad(prompt, (6, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (6, 0))
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    alone, behind = (
        model.generate(ids, attention_mask=seen, **how).logits[0].float().softmax(-1)
        for ids, seen in ((prompt, torch.ones_like(prompt)), (padded, mask))
    )
    # Half of it is the share of samples that would differ.
    return float((alone - behind).abs().sum()) > (1e-3 if model.dtype == torch.float32 else 0.2)


def _is_rope(module: torch.nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "rot" in name or "rope" in name


def _state_of(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copies of a module's buffers and of its own attributes."""
    buffers = {k: b.detach().clone() for k, b in module._buffers.items() if b is not None}
    values = {name: value for name, value in vars(module).items() if name not in _MODULE}
    return buffers, {name: _copied(value) for name, value in values.items()}


def _copied(value: Any) -> Any:
    """A copy of what a forward pass may change in place."""
    return copy.deepcopy(value) if isinstance(value, list | torch.Tensor) else value
