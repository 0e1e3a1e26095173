"""The table, first part: flags of the model, its precision and its layout over ranks."""

from megatron_infifpo.megatron_flags.group import (
    ARCHITECTURE,
    BUFFERS,
    CAPACITY,
    CHANCE,
    CONTEXT,
    DISPATCH,
    FSDP,
    GRAPHS,
    HEAD,
    INFERENCE,
    LOGITS,
    NO_EFFECT,
    OPTIMIZER,
    ROUTER,
    SHARD,
    SOFTMAX,
    UNPROVEN,
    WEIGHTS,
    Group,
)

_OFFLOADING = f"{UNPROVEN}; use --recompute-granularity"

MODEL: dict[str, Group] = {
    "transformer configuration": Group(
        works="""tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel
            context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
            moe_z_loss_coeff
            perform_initialization fp16 bf16 overlap_p2p_comm_warmup_flush
            microbatch_group_size_per_vp_stage account_for_embedding_in_pipeline_split
            account_for_loss_in_pipeline_split recompute_granularity recompute_method
            recompute_num_layers recompute_modules distribute_saved_activations
            clone_scatter_output_in_embedding mlp_chunks_for_training transformer_impl""",
        gpu="""deterministic_mode attention_backend flash_attention_version
            disable_bf16_reduced_precision_matmul fp8 fp8_recipe fp8_margin fp8_amax_history_len
            fp8_amax_compute_algo fp8_wgrad first_last_layers_bf16 num_layers_at_start_in_bf16
            num_layers_at_end_in_bf16""",
        checkpoint="""num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size
            kv_channels layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias
            normalization qk_layernorm moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax
            moe_shared_expert_intermediate_size moe_shared_expert_gate""",
        fixed="""hidden_dropout attention_dropout calculate_per_token_loss
            moe_token_dispatcher_type moe_router_dtype""",
        device={WEIGHTS: "use_cpu_initialization"},
        refused={
            CONTEXT: """hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank
                hybrid_context_parallel""",
            ROUTER: """moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor
                moe_router_score_function moe_router_enable_expert_bias moe_router_bias_update_rate
                moe_router_quantile_balancing_ema moe_apply_probs_on_input moe_latent_size
                moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size
                moe_enable_routing_replay use_fused_weighted_squared_relu""",
            CHANCE: """moe_input_jitter_eps moe_router_force_load_balancing
                moe_router_force_biased""",
            CAPACITY: """moe_expert_capacity_factor moe_expert_rank_capacity_factor
                moe_pad_expert_input_to_capacity moe_token_drop_policy
                moe_pad_experts_for_cuda_graph_inference""",
            DISPATCH: """moe_enable_deepep moe_flex_* moe_deepep_* moe_hybridep_* moe_ncclep_*
                moe_permute_fusion_into_hybridep overlap_moe_expert_parallel_comm
                overlap_dispatch_backward_with_experts_wgrad moe_shared_expert_overlap
                ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream""",
            "the layers decide it: Transformer Engine's group experts, local ones do not": """
                moe_grouped_gemm""",
            "use --recompute-modules moe": "moe_layer_recompute",
            ARCHITECTURE: """mtp_* dsa_* linear_* mup_* mamba_* use_mup use_mamba_mem_eff_path
                multi_latent_attention experimental_attention_variant is_hybrid_model
                mrope_section softmax_type apply_residual_connection_post_layernorm
                glu_linear_offset activation_func_clamp_value rotary_interleaved qk_l2_norm
                attention_output_gate""",
            SHARD: "tensor_parallel_num_weight_shards",
            HEAD: """cross_entropy_loss_fusion cross_entropy_fusion_impl fp8_output_proj
                defer_embedding_wgrad_compute wgrad_deferral_limit""",
            BUFFERS: "tp_comm_*",
            GRAPHS: "enable_cuda_graph external_cuda_graph cuda_graph_*",
            _OFFLOADING: """cpu_offloading_* fine_grained_* offload_modules
                min_offloaded_tensor_size delay_offload_until_cuda_graph
                delta_offload_bytes_across_pp_ranks activation_offload_fraction""",
            WEIGHTS: "init_method_std embedding_init_method_std init_model_with_meta_device",
            INFERENCE: """inference_* flash_decode nccl_all_reduce_for_prefill symmetric_ar_type
                mlp_chunks_for_prefill""",
            SOFTMAX: "apply_query_key_layer_scaling",
            LOGITS: "qk_clip*",
            UNPROVEN: """pipeline_model_parallel_comm_backend fused_residual_rmsnorm
                use_transformer_engine_op_fuser use_te_activation_func use_kitchen_attention
                kitchen_attention_backend batch_invariant_mode fp8_quantizer_factory fp4*
                moe_router_padding_* moe_single_grouped_* moe_paged_stash* moe_per_layer_logging
                moe_permute_fusion moe_router_fusion
                use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp
                delay_wgrad_compute expert_tensor_parallel_num_weight_shards""",
            "the log-prob head takes hidden states in the model's precision": """
                fp32_residual_connection""",
            "it needs a PyTorch with ring exchange, which no release has": "use_ring_exchange_p2p",
            "Transformer Engine ignores it": "fp8_interval",
            "Megatron fails to write it, since process groups cannot be pickled": """
                config_logger_dir""",
        },
    ),
    "network size": Group(
        works="make_vocab_size_divisible_by",
        checkpoint="""group_query_attention window_size window_attn_skip_freq
            max_position_embeddings position_embedding_type use_rotary_position_embeddings
            rotary_base rotary_percent use_rope_scaling rope_scaling_factor add_position_embedding
            swiglu untie_embeddings_and_output_weights""",
        refused={
            ARCHITECTURE: """encoder_num_layers decoder_num_layers yarn_* relative_attention_*
                rotary_seq_len_interpolation_factor no_rope_freq openai_gelu squared_relu
                quick_geglu bert_binary_head""",
            NO_EFFECT: "onnx_safe",
        },
    ),
    "mixed precision": Group(
        works="""grad_reduce_in_bf16 loss_scale initial_loss_scale min_loss_scale loss_scale_window
            hysteresis accumulate_allreduce_grads_in_fp32""",
        refused={
            SOFTMAX: "attention_softmax_in_fp32",
            HEAD: "fp16_lm_cross_entropy",
            ARCHITECTURE: "mamba_training_ssm_states_dtype",
            "parameters are not kept in FP8": "reuse_grad_buf_for_mxfp8_param_ag",
        },
    ),
    "distributed init": Group(
        works="""distributed_timeout_minutes distributed_timeout_seconds_after_init local_rank
            use_tp_pp_dp_mapping use_gloo_process_groups disable_jit_fuser align_grad_reduce
            decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
            pipeline_model_parallel_layout num_layers_per_virtual_pipeline_stage
            num_virtual_stages_per_pipeline_rank overlap_p2p_comm overlap_grad_reduce
            ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw
            ddp_reduce_scatter_with_fp32_accumulation
            ddp_param_name_patterns_for_fp32_local_accumulation overlap_param_gather
            align_param_gather use_distributed_optimizer""",
        gpu="nccl_communicator_config_path high_priority_stream_groups flight_recorder_*",
        device={"GPUs talk over nccl, and the CPU over gloo": "distributed_backend"},
        refused={
            SHARD: "use_megatron_fsdp use_torch_fsdp2",
            FSDP: """fsdp_* data_parallel_sharding_strategy outer_dp_sharding_strategy
                gradient_reduce_div_fusion suggested_communication_unit_size
                keep_fp8_transpose_cache enable_full_sharding_in_hsdp create_all_gather_group
                torch_fsdp2_reshard_after_forward""",
            CONTEXT: "cp_comm_type",
            UNPROVEN: """use_sharp sharp_enabled_group nccl_ub disable_symmetric_registration
                num_distributed_optimizer_instances""",
            OPTIMIZER: "use_layer_wise_param_layout",
            "gradients are divided by the number of pairs once they are summed": """
                ddp_average_in_collective""",
            "Megatron does not have it for torch_dist checkpoints": """
                overlap_param_gather_with_optimizer_step""",
            "the program starts the process groups": "lazy_mpu_init fake_process_group",
            "it is an old flag; use --tensor-model-parallel-size": "model_parallel_size",
        },
    ),
    "Transformer-Engine": Group(
        refused={
            "parameters are kept in bfloat16 or float16": "fp4_param_gather fp8_param_gather",
            "all linear layers have one precision; use --fp8-format": "te_precision_config_file",
        },
    ),
    "biencoder": Group(rest=ARCHITECTURE),
    "vision": Group(rest=ARCHITECTURE),
    "moe": Group(
        works="moe_aux_loss_coeff",
        checkpoint="num_experts moe_layer_freq",
        refused={
            "it is aux_loss with --moe-aux-loss-coeff, and none without": """
                moe_router_load_balancing_type"""
        },
        rest=WEIGHTS,
    ),
    "mla": Group(rest=ARCHITECTURE),
    "experimental_attention_variant": Group(rest=ARCHITECTURE),
    "heterogeneous architecture": Group(rest=ARCHITECTURE),
    "inference": Group(
        refused={GRAPHS: "cuda_graph_modules cuda_graph_scope_deprecated"}, rest=INFERENCE
    ),
    "kitchen": Group(rest=UNPROVEN, optional=True),
}
