"""The table, second part: flags of a training, its optimizer, data, checkpoints and logs."""

from megatron_infifpo.megatron_flags.group import (
    ARCHITECTURE,
    BUFFERS,
    FSDP,
    GRAPHS,
    HEAD,
    LOGITS,
    NO_EFFECT,
    OPTIMIZER,
    PRIVATE,
    UNPROVEN,
    Group,
)

_RESTART = "the program ends at a failure, and the cluster starts it again"

RUNNING: dict[str, Group] = {
    "regularization": Group(
        works="""weight_decay apply_wd_to_qk_layernorm clip_grad adam_beta1 adam_beta2 adam_eps
            sgd_momentum""",
        refused={
            OPTIMIZER: "muon_* lion_*",
            "it is the old name of --apply-wd-to-qk-layernorm": "no_weight_decay_cond_type",
        },
    ),
    "profiling": Group(
        works="""profile profile_step_start profile_step_end use_pytorch_profiler
            pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack
            pytorch_profiler_collect_chakra profile_ranks""",
        gpu="record_memory_history memory_snapshot_path record_shapes nvtx_ranges",
    ),
    "training": Group(
        works="""micro_batch_size global_batch_size empty_unused_memory_level train_iters
            train_samples check_weight_hash_across_dp_replicas_interval train_sync_interval
            exit_interval exit_duration_in_mins exit_signal_handler exit_signal manual_gc
            manual_gc_interval manual_gc_eval recompute_activations check_for_large_grads
            check_for_nan_in_loss_and_grad optimizer""",
        gpu="""gpu_sniff_test_interval bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion
            gradient_accumulation_fusion optimizer_cpu_offload optimizer_offload_fraction
            overlap_cpu_optimizer_d2h_h2d pin_cpu_grads""",
        fixed="dataloader_type",
        device={
            "the layers of converted models have no such kernel": """masked_softmax_fusion
                bias_gelu_fusion no_persist_layer_norm"""
        },
        refused={
            "every step takes --global-batch-size pairs": """rampup_batch_size
                step_batch_size_schedule decrease_batch_size_if_needed""",
            NO_EFFECT: """exit_signal_handler_for_dataloader deprecated_use_mcore_models
                use_torch_optimizer_for_cpu_offload pin_cpu_params""",
            "it leaves without saving; use --exit-signal-handler": """
                exit_signal_handler_for_training""",
            "Megatron would skip batches of its own form; leave records out of the data": """
                iterations_to_skip result_rejected_tracker_filename""",
            "it is an old flag; use --micro-batch-size": "batch_size",
            "it is an old flag; use --recompute-granularity": "checkpoint_activations",
            "it is an old flag; packed rows go through a fused kernel in any case": """
                use_flash_attn""",
            BUFFERS: "tp_comm_overlap_cfg",
            ARCHITECTURE: "rope_type",
            GRAPHS: "optimizer_cuda_graph",
            FSDP: "dump_param_to_param_group_map",
        },
    ),
    "learning rate and weight decay": Group(
        works="""lr_decay_style lr_wsd_decay_style lr_decay_iters lr_decay_samples
            lr_wsd_decay_iters lr_wsd_decay_samples lr_warmup_fraction lr_warmup_iters
            lr_warmup_samples lr_warmup_init override_opt_param_scheduler
            use_checkpoint_opt_param_scheduler start_weight_decay end_weight_decay
            weight_decay_incr_style lr min_lr decoupled_lr decoupled_min_lr""",
        refused={
            "it is an old flag; use --lr-warmup-fraction": "warmup",
            NO_EFFECT: "freeze_all_layers",
        },
    ),
    "RNG and initialization": Group(
        works="seed",
        rest="nothing is drawn at random but the order of pairs: there is no dropout",
    ),
    "validation": Group(
        works="eval_interval start_eval_at_iter skip_train",
        rest="an evaluation takes every held-out pair once, in steps like those of training",
    ),
    "checkpointing": Group(
        works="""save save_interval save_params_interval save_wgrads_interval save_retain_interval
            load finetune pretrained_checkpoint ckpt_format ckpt_fully_parallel_save async_save
            async_strategy use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority
            ckpt_fully_parallel_load ckpt_assume_constant_structure
            ckpt_load_validate_sharding_integrity dist_ckpt_strictness dist_ckpt_workers
            dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient
            no_save_optim no_save_rng no_load_optim no_load_rng""",
        refused={
            "checkpoints are looked for, and checked, in --save and --load only": """
                non_persistent_* replication*""",
            "a run takes the step that latest_checkpointed_iteration.txt names; write it there": """
                ckpt_step""",
            "the checkpoint counts steps and pairs": "override_ckpt_iteration",
            "the architecture comes from the checkpoint in any case": "use_checkpoint_args",
            "the command line gives the layout": "use_mp_args_from_checkpoint_args",
            "a run without a checkpoint does not start in any case": "exit_on_missing_checkpoint",
            "the format is torch_dist": "auto_detect_ckpt_format",
            "infifpo import and export convert checkpoints": "ckpt_convert_*",
            "a converted pivot has no integrity.json": "verify_integrity",
            "Megatron's hooks for it fail without Transformer Engine": """
                save_activations_interval save_dgrads_interval""",
            UNPROVEN: """save_tokens_per_expert_interval ckpt_fully_parallel_save_process_group
                ckpt_fully_parallel_load_process_group""",
            "Megatron vouches for broadcast only": "ckpt_fully_parallel_load_exchange_algo",
            "it is for --async-strategy nvrx": "async_ckpt_use_cpu_shm",
            FSDP: "strict_fsdp_dtensor_load",
            NO_EFFECT: """use_tokenizer_model_from_checkpoint_args load_main_params_from_ckpt
                dist_ckpt_save_pre_mcore_014 stream_ckpt_dequant use_dist_ckpt_deprecated
                dist_ckpt_format_deprecated ckpt_fully_parallel_save_deprecated""",
        },
    ),
    "data and dataloader": Group(
        works="seq_length",
        device={"the training process reads its rows itself": "num_workers"},
        refused={
            "use --seq-length": "encoder_seq_length decoder_seq_length",
            "use --exit-interval": "phase_transition_iterations",
        },
        rest="pairs come from --preference-data",
    ),
    "tokenizer": Group(
        checkpoint="padded_vocab_size",
        rest="pairs are tokenized already, and the checkpoint carries vocabulary and tokenizer",
    ),
    "logging": Group(
        works="""log_interval log_params_norm log_throughput log_progress timing_log_level
            timing_log_option tensorboard_dir tensorboard_log_interval tensorboard_queue_size
            log_timers_to_tensorboard log_loss_scale_to_tensorboard
            log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_memory_interval
            log_num_zeros_in_grad barrier_with_L1_time log_world_size_to_tensorboard wandb_project
            wandb_exp_name wandb_save_dir wandb_entity logging_level""",
        gpu="log_device_memory_used log_energy",
        refused={LOGITS: "log_max_attention_logit", UNPROVEN: "moe_routing_trace_*"},
    ),
    "experimental": Group(
        gpu="""use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype
            exp_avg_sq_dtype""",
        refused={
            "it switches unfinished parts of Megatron on": "enable_experimental",
            "the model's family chooses the layers": "spec",
            ARCHITECTURE: "hybrid_layer_pattern hybrid_override_pattern",
            "Megatron would ignore the command line": "yaml_cfg",
            FSDP: "megatron_fsdp_* fsdp_db_use_persist_buf_on_alloc_fail",
        },
    ),
    "rerun engine": Group(
        works="rerun_mode",
        refused={
            "it spoils results on purpose, to test Megatron": "error_injection_*",
            "only Megatron's own loss function looks for spikes": "check_for_spiky_loss",
        },
    ),
    "one logger": Group(works="enable_one_logger", rest=PRIVATE),
    "rl": Group(rest="it trains on what a model generates meanwhile; see --method"),
    "sft": Group(rest="it expects other data; use --method sft"),
    "Logits Distillation": Group(rest=HEAD),
    "autoresume": Group(rest=PRIVATE),
    "workload inspector": Group(rest=PRIVATE),
    "straggler": Group(rest="it times sections that only Megatron's own forward step marks"),
    "In-process restart": Group(rest=_RESTART),
    "ft_package": Group(rest=_RESTART),
    "fault injector": Group(rest="it makes ranks fail on purpose, to test Megatron"),
    "msc": Group(rest="checkpoints and data are looked for in folders"),
}
