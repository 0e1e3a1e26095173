"""What becomes of each of Megatron's flags: it works, or it is refused in a sentence.

Megatron's parser has about 800 flags, for models and trainings of many kinds. `model` and `running`
are the table: every flag has a class. `conditions` says what else must be true. `check` acts on
both, and `page` shows them in docs/megatron-flags.md. `gpu_runs` are for `infifpo gpu-check`.
"""
