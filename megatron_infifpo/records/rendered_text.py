"""Text that a template has rendered already: each model's own template would render it again.

Templates write tokens of a few shapes around their turns. What begins or ends with one, whatever
its name, is rendered; some families have marks of other shapes, which are listed by name.
"""

import re

_ROLES = r"(?:system|developer|user|human|assistant|model|tool|ipython)"
# Marks of reasoning in data sets' own texts: no template writes them.
_PLAIN = r"(?!(?:begin|end)_of_(?:thought|solution)\b)"
_TOKEN = (
    rf"(?:<\|{_PLAIN}[A-Za-z][\w▁:.-]{{1,40}}\|>|<｜[^\s<>｜]{{2,40}}｜>"
    r"|\[\|(?i:system|user|human|assistant|ai|bot|tool|endofturn|eot|end)\|\])"  # F# has [|x|], too
)
# Gemma 4; Llama 2 and Mistral; Gemma; Seed; MiniMax; Baichuan; InternLM; Nemotron; Pangu; Ling;
# TeleChat; MiniCPM; NeMo; OpenChat.
_TURN = (
    rf"(?:{_TOKEN}(?:{_ROLES}\b)?|<\|(?:turn|channel|tool_call|tool_response|tool)>{_ROLES}?"
    r"|\[INST\]|<<SYS>>|\[(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    rf"|<start_of_turn>{_ROLES}|<seed:bos>|\]~b\]|<beginning_of_sentence>|<reserved_\d+>"
    r"|\[UNUSED_TOKEN_\d+\]|<SPECIAL_\d+>|\[unused\d+\]|<role>\w+</role>|<_(?:user|bot|system)>"
    r"|<用户>|<extra_id_\d>(?:System|User|Assistant)\b"
    r"|(?:GPT[34]|Code|Math) Correct (?:User|Assistant):)"
)
_BEGIN = r"(?:<s>|<bos>|<BOS_TOKEN>|\[BOS\]|\[gMASK\]\s*<?sop>?|\]~!b\[|<_start>)"
_END = (
    rf"(?:{_TOKEN}|<end_of_turn>|<eos>|<(?:turn|channel|tool_call|tool_response|tool)\|>|<EOS_TOKEN>"
    r"|\[EOS\]|\[/INST\]|\[/SYSTEM_PROMPT\]|<seed:eos>|\[e~\[|<end_of_sentence>|<reserved_\d+>"
    r"|\[UNUSED_TOKEN_\d+\]|<SPECIAL_\d+>|\[unused\d+\]|<eo[ahs]>|<_(?:bot|end)>|<AI>)"
)
_OPENS = re.compile(rf"(?:{_BEGIN}?\s*{_TURN}|<bos>|<BOS_TOKEN>|\[gMASK\])")
_CLOSES = re.compile(rf"{_END}\Z")
# A header of the assistant that is left open: behind a turn's mark, or behind the end of one.
_ASKS = re.compile(
    rf"(?:{_TURN}|{_END})\s*(?:GPT[34] Correct )?(?i:assistant|model|ai|bot)?\s*:?\s*"
    r"(?:<think>)?\Z"
)
_NEAR = 200  # characters within which a mark ends or begins; searching long texts takes long


def rendered_mark(text: str, *, reply: bool = False) -> str | None:
    """Return what shows that a text is rendered already, or None.

    Only what stands at the start or the end counts: a text may well speak of chat templates.
    Headings in words, such as Alpaca's, are text.

    Args:
        text: of a message.
        reply: it is an assistant's.
    """
    stripped = text.strip()
    begin, end = stripped[:_NEAR], stripped[-_NEAR:]
    found = _OPENS.match(begin) or _CLOSES.search(end) or (None if reply else _ASKS.search(end))
    if found is None and reply and end.endswith("</s>") and "<s>" not in text:
        return "</s>"  # and not the end of what HTML strikes out
    return found[0].strip() if found else None
