"""What is computed again in the backward pass, as a plan names it, and training's flags for it.

Attention alone is worth it only for ranks that share rows, whose layers would each keep the keys
of all of them; elsewhere its kernel keeps its inputs and its output only. Under sequence
parallelism an MLP that is computed again gathers its rows and scatters its sums again, too.
"""

from megatron_infifpo.planning.layout import Layout

NONE, SELECTIVE, MLP, BOTH, FULL = "none", "selective", "mlp", "attn+mlp", "full"
# Those that compute attention again.
ATTENTION = (SELECTIVE, BOTH, FULL)
_PARTS = "--recompute-granularity selective"
FLAGS = {
    NONE: "",
    SELECTIVE: _PARTS,
    MLP: f"{_PARTS} --recompute-modules mlp",
    BOTH: f"{_PARTS} --recompute-modules core_attn mlp",
    FULL: "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


def plain(layout: Layout) -> str:
    """What is computed again where nothing has to be: attention of ranks that share rows."""
    return NONE if layout.context == 1 else SELECTIVE


def tried(layout: Layout, *, dense: bool) -> tuple[str, ...]:
    """What may be computed again, least first.

    Args:
        layout: of the ranks.
        dense: every layer has an MLP, and none has experts.
    """
    mlp = MLP if layout.context == 1 else BOTH
    return (plain(layout), mlp, FULL) if dense else (plain(layout), FULL)
