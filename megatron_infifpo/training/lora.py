"""Which adapters a run trains."""

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import weight_mapping
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.lora import Lora, choose
from megatron_infifpo.training.config import RunConfig
from megatron_infifpo.training.start import Start


def lora_of(config: RunConfig, start: Start) -> Lora | None:
    """Decide about the adapters of a run; None where it trains the whole model.

    Args:
        config: the run as it was asked for.
        start: what it begins with.

    Raises:
        UserError: the model cannot have such adapters, or a resumed run has others.
    """
    if config.lora_rank is None:
        return None
    mapping = weight_mapping(read_hf_config(start.folder))
    lora = choose(mapping, config.lora_rank, config.lora_alpha, config.lora_targets)
    before = start.adapters.lora if start.resumed and start.adapters else lora
    if (before.rank, before.targets) != (lora.rank, lora.targets):
        raise UserError(
            f"the run in {start.folder} trains adapters of rank {before.rank} of "
            f"{', '.join(before.targets)}: rank {lora.rank} of {', '.join(lora.targets)} would be "
            "others; give --lora-rank and --lora-targets as they were, or choose another --save"
        )
    return lora
