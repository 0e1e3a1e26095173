"""What follows `infifpo` in each stage of the recipe, word for word."""

TRAINING = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather --sequence-parallel --bf16 "
    "--preference-epochs {epochs} --lr {lr} --lr-decay-style cosine "
    "--lr-warmup-fraction 0.1 --global-batch-size 128 --micro-batch-tokens 8192 --seq-length 4096 "
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
