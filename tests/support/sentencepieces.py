"""Tokenizers as SentencePiece's are converted, with and without a blank before a text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BLANK = "\u2581"
# A reply right behind a special token: there most kinds put a blank before it.
BARE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
KINDS = ("gemma", "llama", "first", "always", "never")


def sentencepiece(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A small vocabulary with byte fallback.

    Args:
        kind: "gemma" and "never" write no blank before a text; "llama" by a normaliser, "first" and
            "always" by a pre-tokenizer.
        template: of chats; its special tokens are `<|im_start|>` and `<|im_end|>`.
    """
    letters = [BLANK, *"abcdefghijklmnopqrstuvwxyz ,.?12"]
    words = [f"{BLANK}th", f"{BLANK}a", f"{BLANK}{BLANK}", "la", "nk", "is", "th"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *words]
    merges = [(BLANK, "a"), (BLANK, BLANK), ("l", "a"), ("n", "k"), ("i", "s")]
    merges += [("t", "h"), (BLANK, "th")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    replace = normalizers.Replace(" ", BLANK)
    ends = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        backend.normalizer = replace
    elif kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), replace])
        ends.append(decoders.Strip(" ", 1, 0))
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme=kind, split=False)
        ends = [decoders.ByteFallback(), decoders.Metaspace(BLANK, prepend_scheme=kind)]
    backend.decoder = decoders.Sequence(ends)
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token="</s>"
    )
