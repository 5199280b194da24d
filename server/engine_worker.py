"""What this service asks of vLLM's workers beyond their own calls: new weights in place, and what the router chose.

vLLM mixes this class into its worker by name, in the worker's own process, and `collective_rpc` calls its methods.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.triton_utils import HAS_TRITON


def keep_expert_kernels() -> None:
    """Have experts keep the kernels that they have without adapters.

    vLLM 0.32 gives them Triton's as soon as it applies any adapter, also where adapters are for attention and the
    router only and there is no Triton.
    """
    method: Any = unquantized_fused_moe_method
    select = method.select_unquantized_moe_backend
    method.select_unquantized_moe_backend = lambda moe_config: select(replace(moe_config, is_lora_enabled=False))


if not HAS_TRITON:
    # Here, because the worker imports this module before it loads the model, and calls nothing of it until after.
    keep_expert_kernels()


class WorkerExtension:
    """Mixed into vLLM's worker. Names begin with `bimedix_`, so that none of the worker's own is hidden."""

    model_runner: Any
    reload_weights: Any

    def bimedix_reload(self, path: str) -> None:
        """Replace all weights by those in the directory `path`. Raises whatever vLLM's loader raises."""
        self.reload_weights(weights_path=path)
        # CPU kernels read repacked copies of some matrices, which vLLM 0.32 makes at the first load only. After a
        # reload it would read plain experts as if they were packed, and the old matrix where the output's is the
        # embedding's: finite logits, and nonsense.
        for layer in self.model_runner.get_model().modules():
            method: Any = getattr(layer, "quant_method", None)
            experts: Any = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
            if hasattr(experts, "isa"):
                experts.process_weights_after_loading(layer)
            elif hasattr(layer, "cpu_linear") and layer.weight.numel():
                method.process_weights_after_loading(layer)

    def bimedix_watch_router(self, top_k: int) -> None:
        """Count, from now on, how many tokens each layer's router sends to each expert."""
        self.bimedix_counts: dict[str, torch.Tensor] = {}
        self.bimedix_hooks = [
            module.register_forward_hook(self._bimedix_counter(name, top_k))
            for name, module in self.model_runner.get_model().named_modules()
            if name.endswith("block_sparse_moe.gate")
        ]

    def _bimedix_counter(self, name: str, top_k: int) -> Any:
        def count(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            chosen = logits.float().topk(top_k, dim=-1).indices.flatten()
            counted = torch.bincount(chosen, minlength=logits.shape[-1])
            self.bimedix_counts[name] = self.bimedix_counts.get(name, 0) + counted

        return count

    def bimedix_read_router(self) -> list[list[int]]:
        """Tokens by layer and expert since `bimedix_watch_router`; none where a compiled model runs no hooks."""
        for hook in self.bimedix_hooks:
            hook.remove()
        return [counted.tolist() for counted in self.bimedix_counts.values()]
