"""Rounds: a run goes on with other data of the same references, and `run.json` keeps the chain.

A round begins at a checkpoint. Its data are the policy's own samples, so what is stored of the
models is of other texts; the models are the same, and so is everything else of the run.
"""

from typing import Any, NamedTuple

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.manifests import check_fields
from megatron_infifpo.training.identity import differences

# Of a round's data: what samples bring with them.
_OWN = {"records_sha256", "tokens_sha256", "scores_sha256", "logprobs_sha256", "takes_part_in"}
_OWN |= {"targets_sha256"}
CHANGED = "Give it what it had, save a new run elsewhere, or pass --allow-changed-run"


class Round(NamedTuple):
    """What a run is trained on since a step.

    Attributes:
        iteration: steps that were done when it began.
        data: what its data are, as `identity.data_identity` says it.
        files: where they were.
    """

    iteration: int
    data: dict[str, Any]
    files: dict[str, Any]


def read_rounds(content: dict[str, Any]) -> list[Round]:
    """Return the rounds that a `run.json` holds; older ones hold one.

    Raises:
        UserError: they are malformed.
    """
    attempts = content["attempts"] or [{"files": {}}]
    data, files = content["identity"]["data"], attempts[-1]["files"]
    found = content.get("rounds") or [{"iteration": 0, "data": data, "files": files}]
    check_fields(found, [{"iteration": int, "data": dict, "files": dict}], "run.json: rounds")
    return [Round(*(each[name] for name in Round._fields)) for each in found]


def so_far(before: list[Round], step: int) -> list[Round]:
    """Return the rounds of a checkpoint; what began after it is gone, if somebody went back."""
    return [each for each in before if each.iteration <= step] or before[:1]


def began(before: list[Round], data: dict[str, Any], step: int) -> int:
    """Return the step after which the round of these data begins; `step` are done."""
    last = so_far(before, step)[-1]
    return step if differences(last.data, data) else last.iteration


def continued(
    before: list[Round],
    now: Round,
    *,
    next_round: bool = False,
    changed: bool = False,
    finished: bool = False,
) -> list[Round]:
    """Return the rounds of a resumed run that goes on now.

    Args:
        before: its rounds so far.
        now: the data that it is started with, at the step of its checkpoint.
        next_round: `--next-round`.
        changed: `--allow-changed-run`.
        finished: whether no step is left to be done.

    Returns:
        Rounds, the last with the data of now: a new one, or the one that it is in.

    Raises:
        UserError: the data are not what they were, and no flag says that they may differ; or of
            other references, or of an earlier round; or the new round has no steps.
    """
    known = so_far(before, now.iteration)
    changes = differences(known[-1].data, now.data, "data.")
    if not changes:
        return known
    # A round that has begun here, and has no steps yet, gives way to another one.
    begun = known[:-1] if known[-1].iteration == now.iteration else known
    same = [n for n, each in enumerate(known, 1) if not differences(each.data, now.data)]
    if changed:
        return [*begun, now]
    if same and finished:
        return known
    if same:
        raise UserError(
            f"these are the data of round {same[-1]}, and the run is in round {len(known)} since "
            f"step {known[-1].iteration}: samples of a policy that is gone. {CHANGED}"
        )
    if not next_round:
        raise UserError(
            f"{'; '.join(changes)}. If these are new data of the same references, pass "
            f"--next-round: a new round begins. {CHANGED}"
        )
    if others := differences(_references(known[-1].data), _references(now.data), "data."):
        raise UserError(
            f"a round has other data of the same references, but {'; '.join(others)}: score its "
            f"records with the models of the rounds before. {CHANGED}"
        )
    if finished:
        raise UserError(
            f"--next-round begins a round at step {now.iteration}, where the run ends: give it "
            "more steps with --stop-at or --train-iters"
        )
    return [*begun, now]


def _references(data: Any) -> Any:
    """What of the data all rounds share: tokenizer, template, and whose log-probs there are."""
    if not isinstance(data, dict):
        return data
    return {name: _references(value) for name, value in data.items() if name not in _OWN}
