"""Data of another tokenizer or template, and ids that the model has no row for, are refused."""

import json
import shutil

import numpy as np
import pytest

from megatron_infifpo.convert.vocabulary import warn_of_tokens_beyond
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import METHODS
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training.token_check import check_tokens
from support import tiny
from support.soft_targets import write_soft_targets


@pytest.fixture
def data(setup) -> PreferenceDataset:
    return PreferenceDataset(setup.data)


def check(folder, data, mode="error", vocabulary=320):
    check_tokens(folder, data, vocabulary=vocabulary, mode=mode)


def test_its_own(setup, data):
    check(setup.pivot, data)


def test_the_largest_id(setup, data):
    """As the manifest has it, and as the file has it, where ids may be complements."""
    parts = [ids for i in range(len(data)) for ids in data.tokens.sequences(i)]
    largest = max(int(np.where(ids < 0, ~ids, ids).max()) for ids in parts if len(ids))
    assert data.tokens.largest_id() == largest == data.tokens.manifest.pop("largest_id")
    assert data.tokens.largest_id() == largest
    check(setup.pivot, data, vocabulary=largest + 1)
    for mode in ("error", "off"):
        with pytest.raises(UserError, match=f"the token id {largest}, but the model .* {largest}"):
            check(setup.pivot, data, mode, vocabulary=largest)


def test_the_largest_id_of_soft_targets(setup, data, tmp_path):
    """They come from the tokenizer's vocabulary, and may be beyond the model's rows."""
    groups = [np.array([5, 400])]
    prefix = write_soft_targets(setup.data, tmp_path / "soft", METHODS["fusellm"], groups=groups)
    held_out = PreferenceDataset(setup.data)
    held_out.targets = SoftTargetStore(prefix)
    check_tokens(setup.pivot, data, held_out, vocabulary=401)
    message = f"{prefix} holds the token id 400, but the model .* has 400 tokens.* Prepare and fuse"
    for mode in ("error", "off"):
        with pytest.raises(UserError, match=message):
            check_tokens(setup.pivot, data, held_out, vocabulary=400, mode=mode)
    values = write_soft_targets(setup.data, tmp_path / "values", METHODS["infifusion"])
    held_out.targets = SoftTargetStore(values)
    check(setup.pivot, held_out)


@pytest.mark.parametrize("what", ["chat template", "tokenizer"])
def test_another(setup, data, tmp_path, what):
    shutil.copytree(setup.pivot / "hf", tmp_path / "hf")
    if what == "tokenizer":
        tiny.save_tokenizer(tmp_path / "hf", 265)
    else:
        template = tmp_path / "hf" / "chat_template.jinja"
        template.write_text(template.read_text().replace("'<|end|>'", "' <|end|>'"))
    with pytest.raises(UserError, match=f"was prepared with another {what} .*--tokenizer-check"):
        check(tmp_path, data)
    with pytest.warns(UserWarning, match=what):
        check(tmp_path, data, "warn")
    check(tmp_path, data, "off")


def test_a_base_model_has_no_template(setup, data, tmp_path):
    shutil.copytree(setup.pivot / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    check(tmp_path, data)
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load a tokenizer .*--tokenizer-check off"):
        check(tmp_path, data)
    for path in (tmp_path / "hf").glob("tokenizer*"):
        path.unlink()
    check(tmp_path, data)


def test_import_warns_of_tokens_beyond(setup, tmp_path):
    content = json.loads((setup.hf / "tokenizer.json").read_text())
    largest = max(
        [*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])]
    )
    assert warn_of_tokens_beyond(setup.hf, largest + 1) is None
    said = warn_of_tokens_beyond(setup.hf, largest)
    assert said is not None and f"ids up to {largest}, the model {largest} tokens" in said
    assert warn_of_tokens_beyond(tmp_path, 1) is None
