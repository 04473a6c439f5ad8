"""A worker extension of vLLM that damages the weights of its own server, for `faults.weights`; never part of ludic.

A server is given it by `--worker-extension-cls benchmarks.faults.weight_hooks.DamagingWorker`. Each method is called over
`POST /collective_rpc` between the end of an update and its proof.
"""

import random

import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from benchmarks.faults.damage import flip_bit, other_values, same_shape_pairs
from ludic.inference.worker.vllm_packed import packed_layers, read_weight
from ludic.inference.worker.vllm_worker import LudicWorkerExtension

Place = tuple[str, torch.nn.Module | None]
"""A parameter in memory by name, or a layer that holds its weight packed."""


class DamagingWorker(LudicWorkerExtension):
    _remembered: dict[str, torch.Tensor]

    def damage_remember(self) -> int:
        """Keep what is held now, so that parts of it can come back as stale weights."""
        self._remembered = {name: self._read(name).clone() for name in self._places()}
        return len(self._remembered)

    def damage(self, kind: str, seed: str) -> str:
        """Damage what is held now; says where."""
        rng = random.Random(int(seed))
        places = sorted(self._places())
        heads = [name for name in places if self._is_head(name)]
        if kind == "one bit":
            name = rng.choice(places)
            tensor = self._read(name)
            flip_bit(tensor, rng)
            return self._write(name, tensor)
        if kind == "one tensor":
            name = rng.choice(places)
            return self._write(name, other_values(self._read(name), rng))
        if kind == "swapped":
            first, second = rng.choice(same_shape_pairs({name: self._read(name) for name in places}))
            one, other = self._read(first).clone(), self._read(second).clone()
            return f"{self._write(first, other)} and {self._write(second, one)}"
        stale = {
            "missing": [rng.choice(places)],
            "stale head": heads,
            "half an update": places[rng.randrange(1, len(places)) :],
        }[kind]
        return ", ".join(self._write(name, self._remembered[name]) for name in stale)

    def _places(self) -> dict[str, Place]:
        model = self.model_runner.get_model()
        places: dict[str, Place] = {
            name: (name, None) for name, parameter in model.named_parameters() if parameter.numel()
        }
        return places | {f"{names[0]} (packed)": (names[0], layer) for names, layer in packed_layers(model)}

    def _is_head(self, name: str) -> bool:
        _, layer = self._places()[name]
        return isinstance(layer, VocabParallelEmbedding)

    def _read(self, name: str) -> torch.Tensor:
        parameter, layer = self._places()[name]
        held = self.model_runner.get_model().get_parameter(parameter) if layer is None else read_weight(layer)
        return held.detach().clone()

    @torch.no_grad()
    def _write(self, name: str, tensor: torch.Tensor) -> str:
        parameter, layer = self._places()[name]
        if layer is None:
            self.model_runner.get_model().get_parameter(parameter).copy_(tensor)
            return name
        own = layer.weight
        layer.weight = torch.nn.Parameter(tensor, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        layer.weight = own
        if not torch.equal(read_weight(layer), tensor):
            # There is no packed copy: this processor's kernel takes the weight itself.
            assert isinstance(own, torch.nn.Parameter)
            own.copy_(tensor)
        return name
