"""Every reader of files that a stranger may have written: what it reads, and how.

A reader is called with a folder that holds a good set of files, one of them damaged.
"""

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.convert.hf_export import hf_tensors
from megatron_infifpo.convert.hf_folder import open_hf
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.families import megatron_args, weight_mapping
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.methods import METHODS
from megatron_infifpo.records.records import PreferenceRecord, iter_records, read_records
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.references.sources import check_domains, read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.measured import MeasuredResponse, read_measured, write_measured
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from megatron_infifpo.training.identity import differences
from megatron_infifpo.training.provenance import read_run
from support import tiny
from support.datasets import list_record, write_scores, write_tokens
from support.soft_targets import write_soft_targets


@dataclass(frozen=True)
class Reader:
    """One kind of input.

    Attributes:
        files: which of the good files are damaged, as patterns.
        read: reads the folder.
        text: whether values inside JSON are changed, beside bytes.
    """

    files: tuple[str, ...]
    read: Callable[[Path], object]
    text: bool = False


def read_tokens(folder: Path) -> None:
    tokens = TokenDataset(folder / "pairs")
    for i in range(len(tokens)):
        tokens.sequences(i), tokens.ids(i), tokens.domain(i)
    tokens.find("x")


def read_logprobs(folder: Path) -> None:
    store = LogprobStore(folder / "logprobs")
    store.check_against(TokenDataset(folder / "pairs"), same_tokenizer=True)
    for i in range(len(store)):
        store.note(i)
        for response in range(len(store.responses)):
            store.logprobs(i, response), store.top(i, response), store.byte_lengths(i, response)
    store.texts.tolist()


def read_soft_targets(folder: Path, name: str = "soft") -> None:
    tokens, store = TokenDataset(folder / "pairs"), SoftTargetStore(folder / name)
    store.check_against(tokens)
    store.largest_id()
    for i in range(len(store)):
        for response, length in enumerate(tokens.scored_lengths[i].tolist()):
            store.take(i, response, length)


def read_joined(folder: Path) -> None:
    dataset = PreferenceDataset(folder / "pairs", read_sources(folder / "sources.yaml"))
    for i in dataset.eligible(512):
        dataset[i]


def read_joined_lists(folder: Path) -> None:
    sources = read_sources(folder / "listed.yaml")
    dataset = PreferenceDataset(folder / "listed", sources, responses=None, rewards=True)
    assert dataset.initial is not None
    for i in dataset.eligible(512):
        dataset[i]
        for response in range(len(dataset.names(i))):
            dataset.initial.logprobs(i, response)


def read_sources_yaml(folder: Path) -> None:
    check_domains(read_sources(folder / "sources.yaml"), ("math", "code", "general"))


def read_config(folder: Path) -> None:
    config = read_hf_config(folder / "hf")
    megatron_args(config)
    weight_mapping(config)


def read_safetensors(folder: Path) -> None:
    weights, _, _ = open_hf(folder / "hf")
    for name in weights.names():
        weights.load(name)


def read_checkpoint(folder: Path) -> None:
    checkpoint, mapping, _ = open_checkpoint(folder / "pivot")
    for _ in hf_tensors(checkpoint, mapping):
        pass


def read_rounds_file(folder: Path) -> None:
    from megatron_infifpo.report.rounds import read_rounds, rounds_page

    rounds_page(folder, read_rounds(folder / "rounds.jsonl"))


def read_run_file(folder: Path) -> None:
    found = read_run(folder)
    if found is not None:
        differences(found["identity"], {"seed": 1})


READERS = {
    "jsonl": Reader(("a.jsonl",), lambda f: list(iter_records([f / "a.jsonl"])), text=True),
    "json": Reader(("a.json",), lambda f: list(iter_records([f / "a.json"])), text=True),
    "gzip": Reader(("a.jsonl.gz",), lambda f: list(iter_records([f / "a.jsonl.gz"]))),
    "parquet": Reader(("a.parquet",), lambda f: list(iter_records([f / "a.parquet"]))),
    "forms": Reader(("forms.jsonl",), lambda f: list(iter_records([f / "forms.jsonl"])), text=True),
    "lists": Reader(("lists.jsonl",), lambda f: list(iter_records([f / "lists.jsonl"])), text=True),
    "csv": Reader(("a.csv",), lambda f: list(iter_records([f / "a.csv"]))),
    "zstd": Reader(("a.jsonl.zst",), lambda f: list(iter_records([f / "a.jsonl.zst"]))),
    "folder": Reader(("folder/*",), lambda f: list(iter_records([f / "folder"]))),
    "sources.yaml": Reader(("sources.yaml",), read_sources_yaml),
    "token manifest": Reader(("pairs.json",), read_tokens, text=True),
    "token dataset": Reader(("pairs.*", "pairs_*"), read_tokens),
    "log-prob manifest": Reader(("logprobs.json",), read_logprobs, text=True),
    "log-prob dataset": Reader(("logprobs.*", "logprobs_*"), read_logprobs),
    "soft-target manifest": Reader(("soft.json",), read_soft_targets, text=True),
    "soft targets": Reader(("soft.*", "soft_*"), read_soft_targets),
    "source values": Reader(("values.*", "values_*"), lambda f: read_soft_targets(f, "values")),
    "joined": Reader(("pairs*", "logprobs*", "sources.yaml"), read_joined),
    "joined lists": Reader(("listed*",), read_joined_lists),
    "rounds.jsonl": Reader(("rounds.jsonl",), read_rounds_file, text=True),
    "config.json": Reader(("hf/config.json",), read_config, text=True),
    "safetensors": Reader(("hf/model.safetensors",), read_safetensors),
    "checkpoint": Reader(("pivot/*.txt", "pivot/release/*", "pivot/release/.*"), read_checkpoint),
    "run.json": Reader(("run.json",), read_run_file, text=True),
    "measured": Reader(("measured",), lambda f: read_measured(f / "measured"), text=True),
}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
CALLING = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "chat_template_kwargs": {"enable_thinking": True},
    "prompt": [{"role": "user", "content": [{"type": "text", "text": "f?"}]}],
    "chosen": [
        {"role": "assistant", "content": None, "reasoning_content": "f", "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c"},
        {"role": "assistant", "content": "1"},
    ],
    "rejected": "no",
}


def write_tables(folder: Path, table: Any) -> None:
    """Write a table in the other forms that records come in."""
    import pyarrow
    import pyarrow.csv

    with pyarrow.output_stream(folder / "a.jsonl.zst", compression="zstd") as stream:
        stream.write((folder / "a.jsonl").read_bytes())
    texts = [n for n in table.column_names if pyarrow.types.is_string(table.schema.field(n).type)]
    pyarrow.csv.write_csv(table.select(texts), folder / "a.csv")
    (folder / "folder").mkdir()
    with pyarrow.ipc.new_stream(folder / "folder" / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "folder" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')


def write_logprobs(folder: Path, records: list[PreferenceRecord], tokens: TokenDataset) -> None:
    """Write log-probs, with the two most probable tokens."""
    import numpy as np

    from megatron_infifpo.references.logprob_writer import REQUIRED, LogprobWriter
    from megatron_infifpo.references.top_k import Packed, pack_logps, text_identity

    manifest = dict.fromkeys(REQUIRED, "x") | {"versions": {}, "weights_sha256": "0" * 64}
    manifest |= {"tokenizer": tokens.manifest["tokenizer"], "records_sha256": tokens.records_sha256}
    two = {"k": 2, "responses": "all", "vocab_size": 320, "end_of_turn_ids": [0]}
    with LogprobWriter(
        folder / "logprobs", responses=tokens.responses, manifest=manifest, top_k=two
    ) as writer:
        for i, record in enumerate(records):
            values = [np.linspace(-3, -1, len(ids)) for ids in tokens.response_ids(i)]
            top = [
                Packed(np.tile(ids[:, None], 2), pack_logps(np.full((len(ids), 2), -1.0)), *text)
                for ids in tokens.response_ids(i)
                for text in [(np.full(len(ids), 3, np.uint16), text_identity(b"x"))]
            ]
            writer.add(record.id, values, note="cut" if i == 2 else None, top=top)


def write_good_files(folder: Path) -> None:
    """Write one good set of everything."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    from megatron_infifpo.training.provenance import FORMAT

    tiny.save_model(folder / "hf", "llama", seed=1)
    tiny.write_records(folder / "a.jsonl", 6)
    lines = (folder / "a.jsonl").read_text().splitlines()
    (folder / "a.json").write_text(f"[{','.join(lines)}]")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    write_tables(folder, table)
    page = Path(__file__).resolve().parents[2] / "docs" / "file-formats.md"
    forms, lists = re.findall(r"```jsonl\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    (folder / "forms.jsonl").write_text(forms + json.dumps(CALLING) + "\n")
    (folder / "lists.jsonl").write_text(lists)
    records = read_records([folder / "a.jsonl"])
    tokenizer = ChatTokenizer.from_pretrained(folder / "hf")
    write_token_dataset(records, tokenizer, folder / "pairs", source_files=[folder / "a.jsonl"])
    tokens = TokenDataset(folder / "pairs")
    write_logprobs(folder, records, tokens)
    groups = [np.array([3, 4, 9]), np.array([1, 2])]
    write_soft_targets(folder / "pairs", folder / "soft", METHODS["fusellm"], groups=groups)
    write_soft_targets(folder / "pairs", folder / "values", METHODS["infifusion"])
    (folder / "sources.yaml").write_text(
        "initial: logprobs\nsources:\n  - name: a\n    logprobs: logprobs\n"
        "    domains: [code]\n    score: {model: models/a, bf16: true}\n"
    )
    ids = np.arange(1, 6, dtype=np.int32)
    sampled = MeasuredResponse("a", ids, ids[:3], np.linspace(-2, 0, 3, dtype=np.float32), "m")
    write_measured(folder / "measured", [sampled] * 3)
    lists = [list_record(i) for i in range(6)]
    lengths = write_tokens(folder, lists, "listed").scored_lengths
    write_scores(folder / "listed-logprobs", lists, lengths)
    (folder / "listed.yaml").write_text("initial: {logprobs: listed-logprobs, weight: 1}\n")
    done: dict[str, Any] = {
        "round": 0,
        "prompts": 2,
        "responses": 8,
        "cut": 1,
        "records": 2,
        "reward": 0.5,
    }
    done |= {"seconds": {"train": 1.5}, "training": {"first": {"loss": 0.5, "kl/a": 0.1}}}
    (folder / "rounds.jsonl").write_text(f"{json.dumps(done)}\n" * 2)
    import_checkpoint(folder / "hf", folder / "pivot")
    identity = {"seed": 1, "seq_length": 8, "method": {"beta": 0.1}, "data": {"a": "b"}}
    attempt = {"iteration": "0", "files": {}, "command": ["train"]}
    run = FORMAT.fields | {"identity": identity, "attempts": [attempt]}
    (folder / "run.json").write_text(json.dumps(run | {"started_from": {"checkpoint": "x"}}))
