"""Both models of a conversion, run layer by layer: for models that are larger than memory.

Each side carries its own hidden states through its own layers, so a difference grows as it would in
the whole model, and the layer that it comes from is named.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_infifpo.convert.hf_folder import open_hf
from megatron_infifpo.convert.hf_weights import fill
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.engine.gpt import build_model
from megatron_infifpo.engine.hf_names import load_tensors
from megatron_infifpo.engine.packed import packed_params
from megatron_infifpo.engine.parallel import ModelLayout
from megatron_infifpo.families import (
    PER_LAYER,
    check_expert_parallel,
    check_tensor_parallel,
    family,
    megatron_args,
    one_layer,
)
from megatron_infifpo.families.mapping import OUTPUT_LAYER, Entry, WeightMapping

_EMBEDDING, _FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
_SMALL_VOCABULARY = 128  # of models whose embedding is never used


@torch.no_grad()
def layer_logprobs(
    hf_dir: str | Path,
    load_dir: str | Path,
    ids: list[np.ndarray],
    layout: Mapping[str, Any],
    architecture: str | Path | None = None,
) -> tuple[list[Tensor], list[Tensor], str] | None:
    """Log-probs `[tokens - 1]` of each text under both models, on the first rank; else None.

    With a sentence about the layer in which the two sides part most.

    Args:
        hf_dir, load_dir: Hugging Face folder and Megatron checkpoint.
        ids: token ids of each text.
        layout: of Megatron's layers, as `ModelLayout` takes it; both sides compute in its type.
        architecture: of a checkpoint that carries no config.json, the folder that has it.

    Raises:
        UserError: unusable folders or layout.
    """
    ours = _MegatronLayers(load_dir, ModelLayout(**layout), architecture)
    theirs = _HfLayers(hf_dir, ours.dtype)
    first = torch.distributed.get_rank() == 0
    states = [side.embed(ids) for side in (theirs, ours)]
    gaps = []
    for layer in tqdm(range(ours.mapping.num_layers), desc="verify", disable=not first):
        if first:
            states[0] = theirs.run(layer, states[0])
        states[1] = ours.run(layer, states[1])
        if first:
            pairs = zip(*states, strict=True)
            gaps.append(max(float((a - b).norm() / a.norm()) for a, b in pairs))
    if not first:
        return None
    # Rounding apart, a difference is made in one layer and only carried on by the others.
    before = [1e-6, *gaps]
    growth = [after / max(1e-6, gap) for gap, after in zip(before, gaps, strict=False)]
    worst = int(np.nan_to_num(growth, nan=np.inf).argmax())
    layer = (
        f"hidden states part most in layer {worst}: from {before[worst]:.1e} to "
        f"{gaps[worst]:.1e} of their norm"
    )
    both = [side.logprobs(hidden, ids) for side, hidden in ((theirs, states[0]), (ours, states[1]))]
    return both[0], both[1], layer


def _at_targets(logits: Tensor, text: np.ndarray) -> Tensor:
    """Log-probs of all tokens but the first."""
    logprobs = logits[:-1].float().log_softmax(-1)
    return logprobs.gather(1, torch.from_numpy(text[1:]).long()[:, None]).squeeze(1)


def _head_key(mapping: WeightMapping) -> str:
    """Megatron's name of the output layer's weight: the embedding's where they are tied."""
    return OUTPUT_LAYER if OUTPUT_LAYER in mapping.rows else _EMBEDDING


class _HfLayers:
    """transformers' layers, one in memory."""

    def __init__(self, directory: str | Path, dtype: torch.dtype):
        self.weights, self.mapping, self.fields = open_hf(directory)
        config = AutoConfig.from_pretrained(directory)
        self.config = config.get_text_config()
        self.dtype = dtype
        self.models: dict[str, Any] = {}

    def _model(self, layer: int) -> Any:
        """A model of one layer, of this layer's kind."""
        # Kinds of layers, and which ones are rotated: lists with a value a layer.
        layers = self.config.num_hidden_layers
        own = {
            name: [value[layer]]
            for name, value in self.config.to_dict().items()
            if isinstance(value, list) and len(value) == layers
        }
        own |= family(self.fields).one_layer(self.fields, layer)
        kind = str(own)
        if kind not in self.models:
            config = copy.deepcopy(self.config)
            config.num_hidden_layers, config.vocab_size = 1, _SMALL_VOCABULARY
            for name, value in own.items():
                setattr(config, name, value)
            config.pad_token_id = config.bos_token_id = config.eos_token_id = None
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
            model.final_norm, model.model.norm = model.model.norm, torch.nn.Identity()
            self.models[kind] = model
        return self.models[kind]

    def embed(self, ids: list[np.ndarray]) -> list[Tensor]:
        model, table = self._model(0), self._weight(_EMBEDDING)
        states: list[Tensor] = []

        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states.append(inputs[0][0])

        # What enters the first layer: transformers scales embeddings where a model does.
        hook = model.model.layers[0].register_forward_pre_hook(keep)
        for text in ids:
            rows = table[torch.from_numpy(text).long()].to(self.dtype)
            model.get_input_embeddings().weight = torch.nn.Parameter(rows)
            model.model(torch.arange(len(text))[None], use_cache=False)
        hook.remove()
        return states

    def _weight(self, key: str) -> Tensor:
        """The one tensor that a tensor of Megatron's is made of, by the family's mapping."""
        (name,) = self.mapping.entry(key).hf_names
        return self.weights.load(name)

    def run(self, layer: int, states: list[Tensor]) -> list[Tensor]:
        model, prefix, first = self._model(layer), f"model.layers.{layer}.", "model.layers.0."
        missing = load_tensors(
            model,
            {
                name.replace(prefix, first, 1): self.weights.load(name).to(self.dtype)
                for name in self.weights.names()
                if name.startswith(prefix)
            },
        )
        assert not any(name.startswith(first) for name in missing), missing

        def enter(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return hidden[None], *inputs[1:]

        hook = model.model.layers[0].register_forward_pre_hook(enter)
        outputs = []
        for hidden in states:
            found = model.model(inputs_embeds=hidden[None], use_cache=False)
            outputs.append(found.last_hidden_state[0])
        hook.remove()
        return outputs

    def logprobs(self, states: list[Tensor], ids: list[np.ndarray]) -> list[Tensor]:
        model = self._model(0)
        model.model.norm = model.final_norm
        model.model.norm.load_state_dict({"weight": self._weight(_FINAL_NORM).to(self.dtype)})
        head = self._weight(_head_key(self.mapping)).to(self.dtype)
        model.get_output_embeddings().weight = torch.nn.Parameter(head)

        def leave(*_: Any) -> Tensor:
            return hidden[None]

        # What leaves the last layer: the model's own head follows, with whatever it does to logits.
        model.model.layers[0].register_forward_hook(leave)
        found = []
        for hidden, text in zip(states, ids, strict=True):
            logits = model(inputs_embeds=hidden[None], use_cache=False).logits[0]
            found.append(_at_targets(logits, text))
        return found


class _MegatronLayers:
    """Megatron's layers at a tensor-parallel size, one in memory."""

    def __init__(self, directory: str | Path, layout: ModelLayout, hf: str | Path | None):
        self.weights, self.mapping, config = open_checkpoint(directory, hf=hf)
        kind = family(config)
        self.rows, self.args = kind.rows, megatron_args(config)
        self.scale = kind.layers().embedding_scale(self.args["extras"])
        self.layout = layout
        check_tensor_parallel(self.args, layout.tensor_parallel)
        check_expert_parallel(self.args, layout.expert_parallel, layout.expert_tensor_parallel)
        self.dtype = torch.bfloat16 if layout.bf16 else torch.float32
        self.models: dict[str, Any] = {}
        self._model(0)  # and with it the process groups

    def _one_layer(self, layer: int) -> dict[str, Any]:
        """Megatron arguments of a model that has just this layer."""
        small = {"padded_vocab_size": _SMALL_VOCABULARY, "vocab_size": _SMALL_VOCABULARY}
        return one_layer(self.args, layer) | small

    def _model(self, layer: int) -> tuple[Any, Any, WeightMapping]:
        """A model of one layer, of this layer's kind; its final norm apart; its mapping."""
        args = self._one_layer(layer)
        kind = str([args.get(name) for name in PER_LAYER] + [args["extras"]])
        if kind not in self.models:
            (model,) = build_model(args, self.layout)
            self.models[kind] = (model, model.decoder.final_layernorm, args)
        model, norm, args = self.models[kind]
        model.decoder.final_layernorm = norm  # a parameter like the others, while it is filled
        return model, norm, WeightMapping(self.rows, args)

    def _fill(self, layer: int) -> tuple[Any, Any]:
        """Load a layer, and the final norm; the embedding of such a model is not used."""
        model, norm, small = self._model(layer)

        def read(entry: Entry) -> Tensor:
            key = entry.row.key
            if entry.layer is None and key != _FINAL_NORM:
                return torch.zeros(entry.shape)
            place = None if entry.layer is None else layer
            return self.weights.read(self.mapping.entry(key, place, entry.expert))

        fill([model], small, read)
        model.decoder.final_layernorm = None
        return model, norm

    def embed(self, ids: list[np.ndarray]) -> list[Tensor]:
        table = self.weights.read(self.mapping.entry(_EMBEDDING))
        # Rounded to the weights' dtype first, as the model does.
        factor = torch.tensor(self.scale, dtype=self.dtype)
        return [table[torch.from_numpy(text).long()].to(self.dtype) * factor for text in ids]

    def run(self, layer: int, states: list[Tensor]) -> list[Tensor]:
        model, _ = self._fill(layer)
        return [self._forward(model, hidden) for hidden in states]

    def _forward(self, model: Any, hidden: Tensor) -> Tensor:
        length, device = len(hidden), torch.cuda.current_device()
        borders = torch.tensor([0, length], dtype=torch.int32, device=device)
        positions = torch.arange(length, device=device)
        row = {"cu_seqlens": borders, "max_seqlen": length, "segment_lengths": [length]}
        row["position_ids"] = positions
        output: Tensor = model(
            None,
            None,
            None,
            decoder_input=hidden[:, None].to(device),
            packed_seq_params=packed_params(model, row),
            output_processor=_hidden_states,
            output_processor_context={},
        )
        return output.squeeze(1).cpu()

    def logprobs(self, states: list[Tensor], ids: list[np.ndarray]) -> list[Tensor]:
        _, norm = self._fill(self.mapping.num_layers - 1)
        entry = self.mapping.entry(_head_key(self.mapping))
        head = self.weights.read(entry).to(self.dtype)
        device = torch.cuda.current_device()
        normed = [norm(hidden.to(device)).cpu() for hidden in states]
        return [_at_targets(h @ head.t(), t) for h, t in zip(normed, ids, strict=True)]


def _hidden_states(*, hidden_states: Tensor, **_: Mapping[str, Any]) -> Tensor:
    """Megatron's `output_processor`: the last layer's output as it is."""
    return hidden_states
