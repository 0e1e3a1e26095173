"""`rounds.json`: what all rounds of a folder have in common, compared whenever they go on."""

from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.rounds.job import RoundsJob
from megatron_infifpo.storage.aside import Aside
from megatron_infifpo.storage.manifests import Format
from megatron_infifpo.storage.sharded_job import different

FORMAT = Format(
    name="megatron_infifpo rounds",
    version=1,
    made_by="infifpo rounds",
    schema={"rounds": int, "settings": {"method": str, "optimizer": str, "steps": int}},
)


def claim(job: RoundsJob, pool: str) -> None:
    """Take a folder for rounds, or check that its rounds are these.

    Args:
        job: the rounds.
        pool: what tells the pool of prompts from others.

    Raises:
        UserError: its rounds have other settings, or there are more of them; or others where going
            on would not be what they say.
    """
    prefix, settings = job.output / "rounds", job.settings(pool)
    if prefix.with_name("rounds.json").exists():
        before = FORMAT.read(prefix)
        _check_run(job, before["settings"])
        difference = different(settings, before["settings"])
        if difference and not job.allow_changed_settings:
            raise UserError(
                f"{job.output} holds rounds with other settings: {difference}. Give them what they "
                "had, choose another --output, or pass --allow-changed-settings to go on with "
                "these from the first stage that is not done"
            )
        if job.rounds < before["rounds"]:
            raise UserError(
                f"--rounds is {job.rounds}, but {job.output} is to have {before['rounds']}: give "
                "as many or more; --until ends earlier"
            )
    with Aside() as files:
        FORMAT.write(prefix, FORMAT.fields | {"rounds": job.rounds, "settings": settings}, files)


def _check_run(job: RoundsJob, before: dict[str, Any]) -> None:
    """Refuse what the runs that are there cannot become, whether or not changes are allowed.

    Raises:
        UserError: it is that.
    """
    if job.optimizer != before["optimizer"]:
        raise UserError(
            f"{job.output} has --optimizer {before['optimizer']}, this is {job.optimizer}: its "
            "rounds cannot go on with it, since their checkpoints lie elsewhere. Give what they "
            "had, or choose another --output"
        )
    if job.carried and job.steps != before["steps"]:
        raise UserError(
            f"{job.output} has --steps {before['steps']}, this is {job.steps}: one training run "
            "goes through all rounds, and which of its steps a round ends at follows from --steps. "
            "Give what they had, or choose another --output"
        )
