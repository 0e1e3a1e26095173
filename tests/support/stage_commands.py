"""What follows `infifpo` in each stage of the recipe, word for word."""

TRAINING = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
    "--micro-batch-tokens 8192 --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather --bf16 "
    "--preference-epochs {epochs} --lr {lr} --lr-decay-style cosine "
    "--lr-warmup-fraction 0.1 --global-batch-size 128 --seq-length 4096 "
    "--pretrained-checkpoint run/{load} --save run/{save} --save-interval 100 --log-interval 1 "
    "--tensorboard-dir run/{save}/tensorboard --exit-signal-handler"
)
SFT = TRAINING.format(epochs=3, lr="1e-06", load="pivot", save="sft")
INFIFPO = TRAINING.format(epochs=1, lr="1e-07", load="sft", save="infifpo")
# (stage, options) -> what follows `infifpo`
GOLDEN = {
    ("convert", ""): "import --hf models/phi-4 --save run/pivot --dtype bf16",
    ("prepare", "split=sft"): "prepare --input run/data/sft.jsonl "
    "--tokenizer models/phi-4 --output run/data/sft",
    ("score", ""): "score --bf16 --backend megatron --tensor-model-parallel-size 2 "
    "--pipeline-model-parallel-size 1 --model run/sft --name initial "
    "--input run/data/preference.jsonl --output run/logprobs/initial",
    ("score", "index=4"): "score --bf16 --backend megatron "
    "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 "
    "--model models/Qwen2.5-Coder-14B-Instruct --name qwen2.5-coder-14b "
    "--input run/data/preference.jsonl --output run/logprobs/qwen2.5-coder-14b --domains code",
    ("sft", ""): f"train --method sft --preference-data run/data/sft {SFT}",
    ("infifpo", "method=infifpo beta=2.5"): "train --method infifpo "
    "--preference-data run/data/preference --preference-sources run/sources.yaml --beta 2.5 "
    + INFIFPO,
    ("export", ""): "export --load run/infifpo --save run/infifpo-hf",
}
# Of long texts; not a part of the paper's run.
SHARED_ROWS = {
    ("score", "context=4"): "score --bf16 --backend megatron --tensor-model-parallel-size 2 "
    "--pipeline-model-parallel-size 1 --context-parallel-size 4 --model run/sft --name initial "
    "--input run/data/preference.jsonl --output run/logprobs/initial",
    ("infifpo", "context=4"): "train --method infifpo --preference-data run/data/preference "
    "--preference-sources run/sources.yaml "
    + INFIFPO.replace("--sequence-par", "--context-parallel-size 4 --sequence-par"),
}


def _token_training(method: str, save: str) -> str:
    words = TRAINING.format(epochs=3, lr="1e-06", load="pivot", save=save)
    data = f"--preference-data run/data/sft --soft-targets run/fusion/{save}"
    return f"train --method {method} {data} {words}"


_FUSE = "fuse-targets --data run/data/sft --sources run/fusion/sources.yaml --output run/fusion/"
_SCORE = (
    "score --bf16 --backend megatron --tensor-model-parallel-size {} "
    "--pipeline-model-parallel-size 1 --top-k 16 --top-k-responses chosen --model {} --name {} "
    "--input run/data/sft.jsonl --output run/fusion/logprobs/{}"
)
_SOURCES = (
    "qwen2.5-14b", "mistral-small-24b", "gemma-3-12b", "qwen2.5-coder-14b", "qwen2.5-math-7b",
)  # fmt: skip
_SECOND = "fusechat-mistral-small-24b"
FUSION = {
    ("score", "split=sft"): _SCORE.format(2, "run/pivot", "initial", "initial"),
    ("score", "split=sft index=2"): _SCORE.format(
        8, "models/Mistral-Small-24B-Instruct-2501", _SOURCES[1], _SOURCES[1]
    ),
    ("fuse", ""): _FUSE + "fusellm --fusion mince --include-initial",
    ("fuse", "method=fusechat index=2"): _FUSE
    + f"{_SECOND} --fusion mince --include-initial --only mistral-small-24b",
    ("fuse", "method=infifusion ambiguous=id"): _FUSE + "infifusion --fusion none",
    ("sft", "method=fusellm"): _token_training("fusellm", "fusellm"),
    ("sft", "method=fusechat index=2"): _token_training("fusechat", _SECOND),
    ("sft", "method=infifusion"): _token_training("infifusion", "infifusion"),
    ("export", "method=fusechat index=2"): f"export --load run/{_SECOND} --save run/{_SECOND}-hf",
    ("merge", ""): "merge --method sce --base models/phi-4 --models "
    + " ".join(f"run/fusechat-{name}-hf" for name in _SOURCES)
    + " --output run/fusechat-hf",
}
"""The same of token-level fusion, with a link from run/fusion/sources.yaml to run/sources.yaml."""
