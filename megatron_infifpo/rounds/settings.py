"""`rounds.json`: what all rounds of a folder have in common, compared whenever they go on."""

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
        UserError: its rounds have other settings, or there are more of them.
    """
    prefix, settings = job.output / "rounds", job.settings(pool)
    if prefix.with_name("rounds.json").exists():
        before = FORMAT.read(prefix)
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
