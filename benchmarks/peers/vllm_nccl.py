"""vLLM's own NCCL transfer, as a plain trainer drives it. Its trainer-side API changed at vLLM 0.28 and 0.33; all are used."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch

from ludic.inference.client.server_control import ServerControl
from ludic.inference.weights.background import BackgroundCall
from ludic.inference.weights.nccl_transport import rendezvous
from ludic.inference.weights.weight_transport import WireWeights


class NCCLTransport:
    """vLLM's packed NCCL broadcast from the trainer's GPU (rank 0) to every worker of the server.

    The server's half is vLLM's own and has no deadline: where the trainer breaks a transfer off, the server must be restarted.
    """

    def __init__(self, control: ServerControl, weights: WireWeights) -> None:
        world = control.request("GET", "/get_world_size")["world_size"]
        address, port = rendezvous(control.base_url)
        self._group, self._send = _open_nccl(control, weights, address, port, int(world) + 1)

    def send(self, weights: WireWeights) -> None:
        """Send all of them, and return when the server has them."""
        self._send(weights)

    def close(self) -> None:
        """Leave the group."""
        # The trainer-side engine of vLLM 0.28 and later, or before its communicator.
        leave = self._group.shutdown if hasattr(self._group, "shutdown") else self._group.destroy
        leave()


def _open_nccl(
    control: ServerControl,
    weights: WireWeights,
    master_address: str,
    master_port: int,
    world_size: int,
) -> tuple[Any, Callable[[WireWeights], None]]:
    """Join the server's workers in one NCCL group, by the trainer-side API that the installed vLLM has; how to send."""
    from vllm.distributed.weight_transfer import nccl_engine

    if hasattr(nccl_engine, "NCCLTrainerInitInfo"):  # vLLM 0.28 and later: the engine drives the whole round
        engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(
                master_address=master_address, master_port=master_port, world_size=world_size, rank=0
            ),
            client=control,
            source=_weight_source(weights),
        )
        return engine, lambda _weights: engine.send_weights()

    static = nccl_engine.NCCLWeightTransferEngine  # vLLM 0.26 and 0.27: static functions, the caller drives the round
    init_info = {
        "master_address": master_address,
        "master_port": master_port,
        "rank_offset": 1,
        "world_size": world_size,
    }
    with BackgroundCall(lambda: control.init_weight_transfer_engine(init_info)):
        group = static.trainer_init(init_info)

    def send(current: WireWeights) -> None:
        shapes = current.shapes()
        dtype_name = str(current.dtype).removeprefix("torch.")
        update_info = {
            "names": list(shapes),
            "dtype_names": [dtype_name] * len(shapes),
            "shapes": list(shapes.values()),
            "packed": True,
        }
        control.start_weight_update()
        with BackgroundCall(lambda: control.update_weights(update_info)):
            static.trainer_send_weights(iter(current), {"group": group, "packed": True})
            torch.cuda.current_stream().synchronize()
        control.finish_weight_update()

    return group, send


def _weight_source(weights: WireWeights) -> Any:
    """`weights` as the trainer-side engine of vLLM 0.28 and later wants them: names, dtypes and shapes, and the tensors."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    def described(_source: Any) -> list[Any]:
        return [ParamMeta(name, weights.dtype, tuple(shape)) for name, shape in weights.shapes().items()]

    class Source(WeightSource):  # type: ignore[misc, unused-ignore]
        # vLLM 0.33 reads `metadata` and calls `iter_full`; before, it called `metadata` and iterated.
        metadata = cached_property(described) if hasattr(WeightSource, "iter_full") else described

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(weights)

        iter_full = __iter__

    return Source()
