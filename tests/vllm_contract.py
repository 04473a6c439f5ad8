"""What ludic touches of vLLM, and nothing else: the list that `vllm_sources.problems` holds against a version's source files.

Each entry is a module and what ludic uses of it, written as ludic uses it: a name, an attribute, or a call, in which `_`
stands for any value and `...` for what vLLM itself passes. A call must fit the function's parameters. `Class.name` is a
method, a field, or what a method of the class assigns to `self.name`; of a function, `function.name` is what it assigns to
some object's `name`. `Name["text"]` is a string inside it, such as a flag; a string alone is one anywhere in the module, such
as a route.

`ALWAYS` must hold in every supported version. Of each of `EITHER`, one alternative must. `SUBCLASSES` are ludic's classes
that derive from vLLM's: they must define what is abstract there.
"""

from collections.abc import Mapping

Uses = Mapping[str, tuple[str, ...]]

ALWAYS: Uses = {
    # The server's command.
    "vllm": ("__version__", "LLM", "SamplingParams"),
    "vllm._custom_ops": (),
    "vllm.entrypoints.cli.main": ("main()",),
    "vllm.entrypoints.cli.serve": (
        "FlexibleArgumentParser(prog=_, usage=_, description=_)",
        "make_arg_parser(_)",
        'make_arg_parser["model_tag"]',
        'make_arg_parser["--headless"]',
        'make_arg_parser["--grpc"]',
        'make_arg_parser["--api-server-count"]',
        'make_arg_parser["--config"]',
        "ServeSubcommand()",
        "ServeSubcommand.validate(_)",
        "ServeSubcommand.cmd(_)",
    ),
    "vllm.engine.arg_utils": tuple(
        f"AsyncEngineArgs.{flag}"
        for flag in (
            "data_parallel_size", "disable_log_stats", "dtype", "enforce_eager", "generation_config",
            "gpu_memory_utilization", "kv_cache_memory_bytes", "logprobs_mode", "max_model_len", "model",
            "served_model_name", "trust_remote_code", "weight_transfer_config",
            "worker_extension_cls",
        )
    ),
    "vllm.platforms": (
        "current_platform.is_unspecified()",
        "current_platform.is_cpu()",
        "current_platform.is_cuda_alike()",
        "current_platform.device_type",
    ),
    "vllm.utils.cpu_resource_utils": (
        "get_visible_memory_node()", "get_memory_node_info(_)", "MemoryNodeInfo.available_memory",
    ),
    "vllm.envs": ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "VLLM_SERVER_DEV_MODE", "VLLM_WORKER_MULTIPROC_METHOD"),
    "vllm.v1.attention.backends.cpu_attn": ("CPUAttentionBackend.get_supported_head_sizes()",),
    # The route by which the worker's own methods are called.
    "vllm.entrypoints.serve.dev.rpc.api_router": ('"/collective_rpc"', '"method"', '"args"', '"results"'),
    # Generation, in the front end.
    "vllm.inputs": ("tokens_input(_, cache_salt=_)",),
    "vllm.sampling_params": (
        "RequestOutputKind.FINAL_ONLY",
        "SamplingParams(n=_, temperature=_, top_p=_, max_tokens=_, stop_token_ids=_, seed=_, logprobs=_, flat_logprobs=_,"
        " detokenize=_, output_kind=_, skip_clone=_)",
    ),
    "vllm.engine.protocol": (
        "EngineClient.model_config",
        "EngineClient.generate(_, _, _, lora_request=_)",
        "EngineClient.abort(_)",
        "EngineClient.collective_rpc(_, args=_)",
    ),
    "vllm.config.model": (
        "ModelConfig.max_model_len", "ModelConfig.dtype", "ModelConfig.head_dtype", "ModelConfig.model",
        "ModelConfig.logprobs_mode", "ModelConfig.generation_config", "ModelConfig.get_vocab_size()",
    ),
    "vllm.outputs": (
        "RequestOutput.outputs", "CompletionOutput.token_ids", "CompletionOutput.logprobs",
        "CompletionOutput.finish_reason",
    ),
    "vllm.logprobs": ("FlatLogprobs.logprobs", "FlatLogprobs.start_indices"),
    "vllm.exceptions": (),
    "vllm.v1.engine.exceptions": ("EngineDeadError", "EngineGenerateError"),
    # A trainer's adapter: what requests name it by in the front end, and its slot in the worker.
    "vllm.entrypoints.openai.models.serving": ("OpenAIServingModels.lora_requests",),
    "vllm.lora.request": ("LoRARequest(lora_name=_, lora_int_id=_, lora_path=_)",),
    "vllm.lora.worker_manager": (
        "WorkerLoRAManager.add_dummy_lora(_, rank=_)", "WorkerLoRAManager.pin_adapter(_)",
        "WorkerLoRAManager.list_adapters()",
    ),
    "vllm.lora.model_manager": (
        "LoRAModelManager.lora_index_to_id", "LoRAModelManager.modules", "LoRAModelManager.packed_modules",
        "LRUCacheLoRAModelManager.pin_adapter(_)", "LoRAModelManager.__init__.lora_manager",
    ),
    "vllm.lora.layers.base_linear": (
        "BaseLinearLayerWithLoRA.reset_lora(_)", "BaseLinearLayerWithLoRA.lora_a_stacked",
        "BaseLinearLayerWithLoRA.lora_b_stacked", "BaseLinearLayerWithLoRA.base_layer",
    ),
    "vllm.config.lora": ("LoRAConfig.max_lora_rank",),
    # The worker: its own class, the runner and the recorder of log-probs.
    "vllm.config": (
        "ModelConfig", "VllmConfig.model_config", "VllmConfig.parallel_config", "VllmConfig.speculative_config",
        "VllmConfig.weight_transfer_config", "VllmConfig.lora_config",
    ),
    "vllm.config.parallel": (
        "ParallelConfig.tensor_parallel_size", "ParallelConfig.pipeline_parallel_size", "ParallelConfig.world_size",
        "ParallelConfig.data_parallel_size", "ParallelConfig.data_parallel_index", "ParallelConfig.rank",
    ),
    "vllm.config.weight_transfer": ("WeightTransferConfig(backend=_)", "WeightTransferConfig.backend"),
    "vllm.logger": ("init_logger(_)",),
    "vllm.v1.request": ("Request(..., cache_salt=_)",),  # a sync keeps the prefix cache, whose blocks are keyed by it
    "vllm.v1.worker.gpu_worker": (
        "Worker.model_runner", "Worker.device", "Worker.vllm_config", "Worker._weight_update_active",
        "Worker.weight_transfer_engine",
        # What `ServerControl` knows an update by that another trainer left open.
        'Worker["already"]', 'Worker["without a matching"]',
    ),
    "vllm.v1.worker.gpu_model_runner": (
        "GPUModelRunner.get_model()", "GPUModelRunner.sampler", "GPUModelRunner.input_batch",
        "GPUModelRunner.optimistic_seq_lens_cpu", "GPUModelRunner.discard_request_mask",
    ),
    "vllm.v1.worker.gpu_input_batch": ("InputBatch.req_ids",),
    "vllm.v1.sample.sampler": ("Sampler.topk_topp_sampler",),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner.sample(_, _, _)", "GPUModelRunner.sampler"),
    "vllm.v1.worker.gpu.input_batch": (
        "InputBatch.req_ids", "InputBatch.num_reqs", "InputBatch.seq_lens_cpu_upper_bound",
        "InputBatch.prefill_len_np",
    ),
    # The model, and how weights come into it.
    "vllm.model_executor.layers.attention": ("Attention.impl",),
    "vllm.model_executor.layers.fused_moe.oracle.unquantized": ("UnquantizedMoeBackend.CPU",),
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method": (
        "UnquantizedFusedMoEMethod.unquantized_backend", "UnquantizedFusedMoEMethod.moe_kernel",
    ),
    "vllm.model_executor.layers.linear": ("UnquantizedLinearMethod.process_weights_after_loading(_)",),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizeMethodBase",),
    "vllm.model_executor.layers.utils": (
        "dispatch_cpu_unquantized_gemm(_, remove_weight=_)", "dispatch_cpu_unquantized_gemm.cpu_linear",
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding": (
        "ParallelLMHead", "VocabParallelEmbedding.embedding_dim",
        "UnquantizedEmbeddingMethod.process_weights_after_loading(_)",
    ),
    "vllm.model_executor.model_loader.reload": (
        "initialize_layerwise_reload(_)", "finalize_layerwise_reload(_, _)",
    ),
    "vllm.distributed.weight_transfer.base": (
        "WeightTransferInitInfo", "WeightTransferUpdateInfo",
        "WeightTransferEngine.init_transfer_engine(_)", "WeightTransferEngine.start_weight_update()",
        "WeightTransferEngine.update_weights(_)", "WeightTransferEngine.receive_weights(_)",
        "WeightTransferEngine.finish_weight_update()", "WeightTransferEngine.shutdown()",
        "WeightTransferEngine.parse_update_info(_)", "WeightTransferEngine.init_info_cls",
        "WeightTransferEngine.update_info_cls", "WeightTransferEngine.supports_draft_weight_update",
        "WeightTransferEngine.model", "WeightTransferEngine.model_config", "WeightTransferEngine.parallel_config",
        "WeightTransferEngine.device",
    ),
    "vllm.distributed.weight_transfer.factory": ("WeightTransferEngineFactory.register_engine(_, _)",),
    "vllm.distributed.weight_transfer.nccl_engine": (),
    "vllm.distributed.device_communicators.pynccl": (
        "PyNcclCommunicator(_, device=_)", "PyNcclCommunicator.broadcast(_, src=_, stream=_)",
        "PyNcclCommunicator.destroy()", "PyNcclCommunicator.disabled", "PyNcclCommunicator.comm",
        "PyNcclCommunicator.group",
    ),
    "vllm.distributed.utils": (
        "StatelessProcessGroup.create(host=_, port=_, rank=_, world_size=_, store_timeout=_)",
        "StatelessProcessGroup.store", "StatelessProcessGroup.broadcast_obj(_, src=_)",
    ),
}  # fmt: skip

_RL_ROUTES = (
    '"/pause"', '"/resume"', '"/is_paused"', '"/init_weight_transfer_engine"', '"/start_weight_update"',
    '"/update_weights"', '"/finish_weight_update"', '"/get_world_size"', '"init_info"', '"update_info"',
)  # fmt: skip
_FRONT_END_FLAGS = tuple(
    f"FrontendArgs.{flag}"
    for flag in (
        "allowed_origins", "api_key", "disable_uvicorn_access_log", "host", "log_error_stack", "middleware", "port",
        "uds",
    )
)  # fmt: skip
_NCCL_TRAINER = (
    "NCCLTrainerInitInfo(master_address=_, master_port=_, world_size=_, rank=_)",
    "NCCLTrainerWeightTransferEngine.trainer_init(_, client=_, source=_)",
    "NCCLTrainerWeightTransferEngine.send_weights()",
)

EITHER: tuple[tuple[Uses, ...], ...] = (
    (
        {"vllm.entrypoints.common.cli_args": _FRONT_END_FLAGS},  # 0.33
        {"vllm.entrypoints.launchers.cli_args": _FRONT_END_FLAGS},
        {"vllm.entrypoints.openai.cli_args": _FRONT_END_FLAGS},  # 0.26
    ),
    (
        {"vllm.entrypoints.rl.online.api_router": _RL_ROUTES},
        {"vllm.entrypoints.serve.dev.rlhf.api_router": _RL_ROUTES},  # 0.26
    ),
    (
        {"vllm.logger": ("configure_logging_from_args(_)",)},
        {"vllm.entrypoints.cli.serve": ("ServeSubcommand",)},  # 0.26 has none, and needs none
    ),
    (
        {"vllm.exceptions": ("VLLMError", "VLLMClientError")},
        {"vllm.v1.engine.exceptions": ("EngineGenerateError",)},  # 0.26
    ),
    # The recorder of log-probs, in the newer model runner.
    ({"vllm.v1.worker.gpu.sample.sampler": ("Sampler.sample(..., return_logprobs=_)",)},),
    # vLLM's own `nccl` transport, from the trainer's side: a peer in `benchmarks/sync.py`.
    (
        {  # 0.33
            "vllm.distributed.weight_transfer.base": ("ParamMeta(_, _, _)", "WeightSource.iter_full()", "WeightSource.metadata"),
            "vllm.distributed.weight_transfer.nccl_engine": (*_NCCL_TRAINER, "NCCLTrainerWeightTransferEngine.shutdown()"),
        },
        {  # 0.28
            "vllm.distributed.weight_transfer.base": ("ParamMeta(_, _, _)", "WeightSource.__iter__()", "WeightSource.metadata()"),
            "vllm.distributed.weight_transfer.nccl_engine": (*_NCCL_TRAINER, "NCCLTrainerWeightTransferEngine.shutdown()"),
        },
        {  # 0.26
            "vllm.distributed.weight_transfer.nccl_engine": (
                "NCCLWeightTransferEngine.trainer_init(_)", "NCCLWeightTransferEngine.trainer_send_weights(_, _)",
            ),
        },
    ),
)  # fmt: skip

SUBCLASSES: Mapping[str, tuple[str, ...]] = {
    "vllm.distributed.weight_transfer.base:WeightTransferEngine": (
        "src/ludic/inference/worker/vllm_worker.py:SharedMemoryWeightTransferEngine",
        "src/ludic/inference/worker/vllm_nccl.py:BucketWeightTransferEngine",
    ),
    "vllm.distributed.weight_transfer.base:WeightSource": ("benchmarks/peers/vllm_nccl.py:Source",),
}
