"""infifpo check of soft targets: every kind of damage is named, in them and in their sources."""

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.checks.data import DataJob, check_data
from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.references.soft_target_writer import SoftTargetWriter
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.storage.aside import Aside
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.training.identity import data_identity
from megatron_infifpo.training.provenance import FORMAT
from support.token_job import K, TokenJob

WAYS: dict[str, dict[str, Any]] = {
    "mince": {"include_initial": True},
    "mean": {"include_initial": True, "fusion": "mean"},
    "groups": {"ambiguous": "group"},
    "alone": {"only": ["b"]},
    "values": {"fusion": "none"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    job = TokenJob(tmp_path_factory.mktemp("tokens"))
    for name, options in WAYS.items():
        job.fuse(name, **options)
    return job


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the job's files, to be damaged; tokenizers stay where they are."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def checked(folder, name: str, **more) -> tuple[dict[str, str], dict[str, str]]:
    """Notes and errors of all checks, by what was looked at."""
    job = DataJob(
        str(folder / "data"), str(folder / "sources.yaml"), str(folder / name),
        input=[str(folder / "sft.jsonl")], **more,
    )  # fmt: skip
    checks = list(check_data(job))
    notes = {c.what: c.note for c in checks if c.error is None}
    return notes, {c.what: c.error for c in checks if c.error is not None}


@pytest.mark.parametrize("name", WAYS)
def test_good_ones(folder, name):
    """Tokens with a target are counted by a loop over them."""
    notes, errors = checked(folder, name)
    assert not errors
    store, tokens = SoftTargetStore(folder / name), TokenDataset(folder / "data")
    rows = taught = responses = 0
    for index, length in enumerate(tokens.scored_lengths[:, 0].tolist()):
        found = store.take(index, 0, length)
        here = [found.sources[t] > 0 for t in range(length)]
        if found.values is not None:
            here = [np.isfinite(found.values[t]).any() for t in range(length)]
        if name == "alone" and index not in (1, 5):
            assert not any(here), "another domain, or masked"
            continue
        responses, rows, taught = responses + 1, rows + length, taught + sum(here)
    fusion = {"values": "none", "mean": "mean"}.get(name, "mince")
    expected = f"{fusion}: {responses} responses, {taught / rows:.1%} of their {rows} tokens from "
    assert notes[str(folder / name)] == expected + ", ".join(store.sources)
    assert f"what {folder / name} was fused from" in notes
    assert notes["a, tokens"].endswith(f"tokenizer-a, their {K} most probable ones as expected")


def change(path, dtype, *values: tuple[int, float]) -> None:
    """Write values at some places of a file."""
    array = np.memmap(path, dtype, "r+")
    for place, value in values:
        array[place] = value
    array.flush()


def padded(folder, name: str) -> int:
    """Where the first row has no id, in the file of ids."""
    return int(np.flatnonzero(np.fromfile(folder / f"{name}_ids.bin", np.int32) == -1)[0])


NAN = np.float16(np.nan)
FLOAT, INT = np.float16, np.int32
DAMAGES = [
    ("mince", "_ids", INT, [(0, 5000)], r"'q0', 'chosen', token 0: .*mince_ids.bin has the ids "
     r"\[5000, .*expected ids below 272, -1 for none, and 0 groups from -2 down"),
    ("mince", "_ids", INT, [(K, -2)], r"token 1: .*_ids.bin has the ids \[-2, .* and 0 groups"),
    ("groups", "_ids", INT, [(2 * K, -9)], r"token 2: .*groups_ids.bin has the ids \[-9, .*groups"),
    ("groups", "_groups", INT, [(0, 5000)], r"groups_groups.bin has the group 0 of ids \[5000"),
    ("groups", "_groups", INT, [(0, -1)], r"groups_groups.bin has the group 0 of ids \[-1"),
    ("mince", "_logps", FLOAT, [(K + 1, NAN)], "token 1: .*_logps.bin has the log weights .nan"),
    ("mince", "_logps", FLOAT, [(K, 0.5)], "token 0: .*_logps.bin has the log weights .* 0.5.,"),
    ("mince", "_logps", FLOAT, [(0, -0.01)], "token 0: .*whose probabilities sum to 1.[0-9]+, exp"),
    ("mince", "_sources", np.uint8, [(3, 4)], "token 3: .*has the source 4, expected 0 .*, 1 to 3"),
    ("mince", "_sources", np.uint8, [(3, 0)], "token 3: .*has no source, but .*_ids.bin has the "),
    ("alone", "_chunks", INT, [(1, 99)], "'q1', 'chosen', chunk 0: .* as a chunk the tokens 0 to"),
    ("alone", "_chunks", INT, [(0, 2)], "chunk 0: .*_chunks.bin has as a chunk the tokens 2 to 2"),
    ("alone", "_chunks", INT, [(0, -1)], "chunk 0: .*_chunks.bin has as a chunk the tokens -1 to"),
    ("alone", "_chunks", INT, [(2, 0)], "chunk 1: .* 0 to 4 behind those from 0 on, expected asc"),
    ("alone", "_chunks", INT, [(1, 4)], "token 3: .*has chunks of a weight of 2.0000 tog"),
    ("alone", "_chunk_logps", np.float32, [(0, 0.5)], "chunk 0: .*_logps.bin has 0.5 as log-pr"),
    ("alone", "_chunk_logps", np.float32, [(2, np.nan)], "chunk 1: .*_logps.bin has nan as log"),
    ("mean", "_chunk_logps", np.float32, [(1, 0)], "chunk 0: .*_logps.bin has 0.0 as weight of a"),
    ("mean", "_chunk_logps", np.float32, [(1, 1.5)], "chunk 0: .*_logps.bin has 1.5 as weight"),
    ("values", "_values", FLOAT, [(1, 0.0)], "token 0: .*values_values.bin has the values .*fall"),
    ("values", "_values", FLOAT, [(2, NAN)], "token 0: .*values_values.bin has the values .*nan"),
    ("values", "_values", FLOAT, [(0, 0.5)], "token 0: .*_values.bin has the values ..0.5"),
    ("values", "_values", FLOAT, [(0, -0.3), (1, -0.4)], "token 0: .*values whose prob.* sum to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "dtype", "values", "expected"), DAMAGES)
def test_damage_is_named(folder, name, file, dtype, values, expected):
    change(folder / f"{name}{file}.bin", dtype, *values)
    _, errors = checked(folder, name)
    assert list(errors) == [str(folder / name)]
    assert re.search(expected, errors[str(folder / name)]), errors
    assert errors[str(folder / name)].endswith("fuse them again with infifpo fuse-targets")


def test_other_damage(folder):
    """An id twice; a weight where there is no id; and a change that leaves all as it may be."""
    kept = {path: path.read_bytes() for path in folder.glob("mince_*")}
    ids = np.fromfile(folder / "mince_ids.bin", np.int32)
    place = padded(folder, "mince")
    row = place // K * (K + 1) + place % K
    first = np.fromfile(folder / "mince_logps.bin", np.float16)[0]
    for file, dtype, value, expected in [
        ("_ids", INT, (1, ids[0]), "token 0: .*has the ids .*expected each of them once"),
        ("_logps", FLOAT, (row, -9), "has the log weights .*expected .* -inf where there is"),
        (
            "_logps",
            FLOAT,
            (0, first - 0.004),
            "has values of fingerprint .*, expected .* by",
        ),
        ("_ids", INT, (0, 7), "has values of fingerprint"),
    ]:
        change(folder / f"mince{file}.bin", dtype, value)
        _, errors = checked(folder, "mince")
        assert re.search(expected, errors[str(folder / "mince")]), errors
        for path, content in kept.items():
            path.write_bytes(content)
    assert not checked(folder, "mince")[1]


def rewrite(folder, shorten: int = 0, scale: float = 1, **fields: Any) -> None:
    """Write "mince" again, with fewer tokens of record 0, more mass or other manifest fields."""
    store, tokens = SoftTargetStore(folder / "mince"), TokenDataset(folder / "data")
    manifest = {**store.manifest, **fields}
    for name in ("responses", "fusion", "count"):
        del manifest[name]
    found = [store.take(i, 0, int(n)) for i, n in enumerate(tokens.scored_lengths[:, 0])]
    for one in found:
        one.probs, one.tail = one.probs * np.float32(scale), one.tail * np.float32(scale)
    for name in ("ids", "probs", "tail", "sources"):
        value = getattr(found[0], name)
        setattr(found[0], name, value[: len(value) - shorten])
    with SoftTargetWriter(
        folder / "mince", responses=tokens.responses, fusion="mince", manifest=manifest
    ) as writer:
        for each in found:
            writer.add([each])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"shorten": 1}, "record 0 has targets of another number of tokens than the 8 of"),
        ({"tokens_sha256": "f" * 64}, "the fingerprint of the tokens is ffffffffffff, expected"),
        ({"records_sha256": "f" * 64}, "the fingerprint of the records is ffffffffffff, expected"),
    ],
)
def test_targets_of_other_tokens(folder, fields, expected):
    rewrite(folder, **fields)
    _, errors = checked(folder, "mince")
    assert list(errors) == [str(folder / "mince")]
    assert re.search(expected, errors[str(folder / "mince")])


def test_targets_with_the_mass_of_rounded_sources(folder):
    """float16 probabilities add up to a little more than 1: these are no damage."""
    rewrite(folder, scale=1.0003)
    assert not checked(folder, "mince")[1]


def other_weights(folder):
    manifest = json.loads((folder / "a.json").read_text())
    (folder / "a.json").write_text(json.dumps(manifest | {"weights_sha256": "e" * 64}))


def swap_sources(folder):
    text = (folder / "sources.yaml").read_text()
    (folder / "sources.yaml").write_text(text.replace("logprobs: a", "logprobs: pivot"))


def forget_a_source(folder):
    text = (folder / "sources.yaml").read_text()
    (folder / "sources.yaml").write_text(text.replace("name: b", "name: c"))


def other_values(folder):
    sums = np.load(folder / "a_sums.npy")
    sums[0, 0] -= 1
    np.save(folder / "a_sums.npy", sums)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            other_weights,
            "other log-probs of a than .*/a: their weights_sha256 was 11111111",
        ),
        (swap_sources, "other log-probs of a than .*/pivot: their weights_sha256 was 1111.* 00000"),
        (forget_a_source, "was fused from b, expected one of .*sources.yaml: a, c, initial"),
        (other_values, "other log-probs of a than .*/a: their logprobs_sha256 was"),
    ],
)
def test_fused_from_others(folder, damage, expected):
    damage(folder)
    _, errors = checked(folder, "mince")
    assert re.search(expected, errors[f"what {folder / 'mince'} was fused from"]), errors


def test_a_run_of_other_targets(folder):
    """A run's identity, as training writes it."""
    run = folder / "run"
    run.mkdir()

    def train_on(name: str | None) -> None:
        dataset = PreferenceDataset(folder / "data")
        dataset.targets = None if name is None else SoftTargetStore(folder / name)
        identity = {"method": {}, "seed": 1, "seq_length": 9, "data": data_identity(dataset)}
        rest = {"started_from": {"checkpoint": "p"}, "attempts": []}
        with Aside() as files:
            FORMAT.write(run / "run", FORMAT.fields | {"identity": identity} | rest, files)

    where = f"{run}/run.json"
    train_on("mince")
    assert checked(folder, "mince", run=str(run))[0][where] == "0 attempts on these data"
    _, errors = checked(folder, "groups", run=str(run))
    assert re.search("soft_targets.targets_sha256 is [0-9a-f]{12}, but was", errors[where])
    job = DataJob(str(folder / "data"), input=[str(folder / "sft.jsonl")], run=str(run))
    assert "the run has soft targets: give --soft-targets, too" in [
        c.error for c in check_data(job)
    ]
    train_on(None)
    _, errors = checked(folder, "mince", run=str(run))
    assert re.search("soft_targets is there, but was missing", errors[where])


def test_the_command(folder, capsys):
    words = ["--data", str(folder / "data"), "--soft-targets", str(folder / "mince")]
    words += ["--input", str(folder / "sft.jsonl")]
    assert not run_command("check", words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all is as it should be" and len(lines) == 4
    assert lines[2].startswith(f"ok      {folder / 'mince'}: mince: 6 responses, ")
    change(folder / "mince_sources.bin", np.uint8, (0, 9))
    assert run_command("check", words) == 2
    with pytest.raises(UserError, match="other.json"):
        run_command("check", [*words[:3], str(folder / "other")])
