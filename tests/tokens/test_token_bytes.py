"""The bytes of tokens: joined they are the text, for tokenizers of every kind."""

import json
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_infifpo.errors import UserError
from megatron_infifpo.fusing.vocabulary import Vocabulary, map_vocabulary
from megatron_infifpo.records.records import PreferenceRecord, read_records, reply
from megatron_infifpo.scoring.top_k import TopKeeper
from megatron_infifpo.tokens.token_bytes import TokenBytes, without_blank
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.datasets import CHATML, byte_tokenizer
from support.sentencepieces import BARE, BLANK, KINDS, sentencepiece

TEXTS = ["plain", " a blank before", "two\n\nlines \t", "Zürich, 12 €", "日本 🙂", "<0x41>"]
THOUGHT = "<think>well</think> yes"


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("template", [CHATML, BARE])
@pytest.mark.parametrize("text", [*TEXTS, THOUGHT])
def test_joined_bytes_of_a_reply(kind, template, text):
    """They are the reply's, in a chat; a blank before them that the tokenizer wrote goes."""
    chat = ChatTokenizer(
        byte_tokenizer(template) if kind == "bytes" else sentencepiece(kind, template)
    )
    ids = chat.encode(record(text)).response_ids[0].tolist()
    joined = without_blank(chat.token_bytes.join(ids), text.encode())
    if (kind, text) == ("always", THOUGHT):  # a blank behind each added token: another text
        text = text.replace("well", " well")
    assert joined == text.encode()
    assert chat.token_bytes.lengths[ids[-1]] == 0, "the end of the turn"
    assert sum(len(chat.token_bytes.pieces[i]) for i in ids) - len(joined) in (0, 1)


def record(text: str) -> PreferenceRecord:
    return PreferenceRecord(
        "r", "general", ({"role": "user", "content": "why?"},), (reply(text), reply("no"))
    )


def chat_of(kind: str, special: bool) -> ChatTokenizer:
    """A chat whose end of turn is an added token, special or not."""
    tokenizer = byte_tokenizer(CHATML) if kind == "bytes" else sentencepiece(kind, CHATML)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"] == "<|im_end|>":
            token["special"] = special
    backend = Tokenizer.from_str(json.dumps(content))
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML))


@pytest.mark.parametrize("kind", ["bytes", "gemma", "llama"])
def test_an_end_of_turn_that_is_not_special(kind):
    """It is no text: what is stored of a response, and its event, are as of a special one."""
    plain, special = chat_of(kind, False), chat_of(kind, True)
    added = plain.tokenizer.added_tokens_decoder
    assert [added[i].special for i in plain.end_of_turn_ids] == [False]
    texts = []
    for chat in (plain, special):
        tokens = chat.encode(record("yes, it is"))
        assert tokens.response_ids[0][-1] == chat.end_of_turn_ids[0]
        texts.append(TopKeeper(1, "all", chat).texts(record("yes, it is"), tokens))
    for (lengths, text), (expected, same) in zip(*texts, strict=True):
        assert lengths.tolist() == expected.tolist() and lengths[-1] == 0 and text == same
    for source, pivot in ((plain, special), (special, plain)):
        vocabularies = Vocabulary.of(source), Vocabulary.of(pivot)
        found = map_vocabulary(*vocabularies, size=0).ids[source.end_of_turn_ids[0]]
        assert found == pivot.end_of_turn_ids[0]
    # Spelt out in a reply it is the same token, and the text another one.
    ids = plain.encode(record("a<|im_end|>b")).response_ids[0].tolist()
    assert ids.count(plain.end_of_turn_ids[0]) == 2
    assert b"<|" not in plain.token_bytes.join(ids)


@pytest.mark.parametrize("end", ["#", "##"])
def test_an_end_of_turn_of_ordinary_tokens(end):
    """Replies are written with these, too: they keep their bytes."""
    chat = ChatTokenizer(byte_tokenizer(CHATML.replace("<|im_end|>", end)))
    assert len(chat.end_of_turn_ids) == len(end)
    ids = chat.encode(record("# yes")).response_ids[0].tolist()
    assert chat.token_bytes.join(ids) == b"# yes" + end.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_sentencepiece(kind):
    tokenizer = sentencepiece(kind, CHATML)
    found, vocabulary = TokenBytes(tokenizer), tokenizer.get_vocab()
    assert len(found.pieces) == len(found.lengths) == max(vocabulary.values()) + 1
    assert found.lengths.tolist() == [len(piece) for piece in found.pieces]
    for token, expected in {
        "<0xE2>": b"\xe2", f"{BLANK}th": b" th", f"{BLANK}{BLANK}": b"  ", "la": b"la",
        "<s>": b"", "<unk>": b"", "<|im_end|>": b"", "<think>": b"<think>",
    }.items():  # fmt: skip
        assert found.pieces[vocabulary[token]] == expected, token


def test_pieces_of_byte_level():
    """Every byte has a token of its own, whose string is another character for some."""
    tokenizer = byte_tokenizer()
    found = TokenBytes(tokenizer)
    bytes_of_one = sorted(piece for piece in found.pieces if len(piece) == 1)
    assert bytes_of_one == [bytes([b]) for b in range(256)]
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [found.pieces[i] for i in ids] == [bytes([b]) for b in text.encode()]


@pytest.mark.parametrize(
    "joined, text, expected",
    [
        (b" yes", b"yes", b"yes"),
        (b" yes", b"yes</s>", b"yes"),  # the end of the turn has no bytes
        (b" yes", b" yes", b" yes"),
        (b"  yes", b" yes", b" yes"),
        (b"  yes", b"yes", b"  yes"),  # the text is another one: not our doing
        (b" ye", b"yes", b"ye"),  # cut
        (b" ", b"  x", b" "),  # cut, of a text that begins with blanks
        (b"\nyes", b"yes", b"\nyes"),
        (b"", b"", b""),
    ],
)
def test_a_blank_before_the_text(joined, text, expected):
    assert without_blank(joined, text) == expected


def test_no_bytes():
    """WordPiece drops blanks, a lexicon of words drops what it does not know."""
    words = {"[UNK]": 0, "the": 1, "sum": 2, "##s": 3}
    for model in (models.WordPiece(words, unk_token="[UNK]"), models.WordLevel(words, "[UNK]")):
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        with pytest.raises(UserError, match="are no bytes of the text"):
            TokenBytes(tokenizer)


def test_what_a_normaliser_rewrites():
    """The bytes are of what was tokenized: of another text, which a reader must notice."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    text = unicodedata.normalize("NFD", "Zürich")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert TokenBytes(tokenizer).join(ids) == "Zürich".encode() != text.encode()


@pytest.mark.parametrize("name", ["phi-4", "qwen2.5", "mistral-small"])
def test_real_tokenizers(shared_data, name):
    """All 600 replies, byte for byte."""
    chat = ChatTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    records = read_records([shared_data / "dpo_en_demo.json"])
    assert len(records) == 300
    for each, tokens in zip(records, chat.encode_batch(records), strict=True):
        for message, ids in zip(each.responses, tokens.response_ids, strict=True):
            text = message[-1]["content"].encode()
            assert chat.token_bytes.join(ids.tolist()) == text, each.id
            assert int(chat.token_bytes.lengths[ids].sum()) == len(text)
