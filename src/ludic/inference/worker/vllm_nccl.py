"""The weight transport between GPUs inside vLLM's worker: a few NCCL broadcasts into the memory that the model computes with.

Names, shapes and the cut into buckets are agreed when it is opened. A round then carries bytes alone (`bucket_broadcast`),
and the trainer says what becomes of them: `copy` writes them in place, where `vllm_model.in_place_problem` finds nothing
against it; `load` hands them to vLLM's layerwise reload, as vLLM's own `nccl` backend does.

A trainer that dies or stops in the middle of a round would leave the worker in NCCL for ever. So each round has the trainer's
deadline, and is broken off as soon as the trainer is seen to have gone (`nccl_link`); what it wrote until then stays, and the
round is an error. The next sync forms a new group. Left out: sharded senders, and updates of a draft model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from ludic.inference.weights.bucket_broadcast import BucketReceiver, WireLayout
from ludic.inference.weights.nccl_link import LinkLeftError, NcclLink, NoNCCLError, Watch
from ludic.inference.worker.vllm_lora import write_adapter
from ludic.inference.worker.vllm_model import finish_reload, in_place_problem, in_place_targets, reload_policy


@dataclass
class BucketInitInfo(WeightTransferInitInfo):  # type: ignore[misc, unused-ignore]
    """`init_info` of `ludic_nccl`: where the trainer (rank 0) waits, and what every round will carry."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    names: list[str]
    shapes: list[list[int]]
    dtype: str
    bucket_bytes: int
    deadline_s: float
    """Of forming the group, in seconds."""


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc, unused-ignore]
    """`update_info` of `ludic_nccl`."""

    apply: str
    """`copy`, `load`, or `adapter`"""
    deadline_s: float
    """Of this round, in seconds."""


class BucketWeightTransferEngine(WeightTransferEngine[BucketInitInfo, BucketUpdateInfo]):  # type: ignore[misc, unused-ignore]
    """Receives whole policies as flat buckets. One `update_weights` between a start and a finish."""

    init_info_cls = BucketInitInfo
    update_info_cls = BucketUpdateInfo
    supports_draft_weight_update = False

    _receiver: BucketReceiver | None = None
    _link: NcclLink | None = None
    _may_copy = False
    _reloading = False

    def init_transfer_engine(self, init_info: BucketInitInfo) -> None:
        """Agree on the layout and join the trainer's NCCL group, in the place of any other. Raises ValueError."""
        self.shutdown()
        dtype = getattr(torch, init_info.dtype)
        layout = WireLayout.of(init_info.names, init_info.shapes, dtype, init_info.bucket_bytes)
        self._may_copy = False
        self._link = self._connect(init_info)
        self._receiver = BucketReceiver(layout, self._link, self.device)

    def _connect(self, init_info: BucketInitInfo) -> NcclLink:
        config = self.parallel_config
        rank = config.data_parallel_index * config.world_size + config.rank  # unique among all data-parallel groups
        link = NcclLink()
        try:
            with Watch(link, deadline_s=init_info.deadline_s) as watch:
                link.join(
                    init_info.master_address,
                    init_info.master_port,
                    rank=init_info.rank_offset + rank,
                    world_size=init_info.world_size,
                    timeout_s=init_info.deadline_s,
                )
        except NoNCCLError as error:
            raise ValueError(
                f'{error}: start the server with --weight-transfer-config \'{{"backend": "ludic_shm"}}\''
            ) from error
        except LinkLeftError as error:
            watch.check()
            raise ValueError(str(error)) from error
        return link

    def start_weight_update(self) -> None:
        """Nothing: a copy needs no preparation, and a reload begins when its data comes."""

    def receive_weights(self, update_info: BucketUpdateInfo) -> None:
        """Take one round and apply it. All errors are ValueErrors in one line; the round is taken off the wire first."""
        if self._receiver is None or self._link is None:
            raise ValueError("ludic_nccl is not open: POST /init_weight_transfer_engine first")
        apply = {"copy": self._copy, "load": self._load, "adapter": self._write_adapter}.get(update_info.apply)
        if apply is None:
            raise ValueError(f"update_info.apply is {update_info.apply!r}; it must be copy, load or adapter")
        watch = Watch(self._link, deadline_s=update_info.deadline_s)
        try:
            with watch:
                apply(self._receiver)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # what is stuck is stuck here, under the watch
            watch.check()
        except (LinkLeftError, ValueError) as error:
            watch.check()  # what broke the round off comes before what that led to
            raise ValueError(str(error)) from error
        finally:
            if self._link.left:
                self.finish_weight_update()
                self.shutdown()

    def _copy(self, receiver: BucketReceiver) -> None:
        dtype = receiver.layout.dtype
        shapes = dict(zip(receiver.layout.names, receiver.layout.shapes, strict=True))
        problem = "" if self._may_copy else in_place_problem(self.model, self.parallel_config, shapes, dtype)
        try:
            if problem:
                raise ValueError(f"the weights cannot be written in place: {problem}")
            targets = in_place_targets(self.model, shapes, dtype)
        except ValueError:
            _drain(receiver.tensors())
            raise
        self._may_copy = True
        if self.device.type == "cuda":
            # A step may still be running on another stream than ours: nothing may change under it.
            torch.cuda.synchronize(self.device)
        receiver.receive_into(targets)

    def _load(self, receiver: BucketReceiver) -> None:
        tensors = receiver.tensors()
        try:
            reload_policy(self.model, self.model_config, tensors)
            self._reloading = True
        finally:
            _drain(tensors)  # after an error the trainer still sends, and would wait for ever

    def receive_adapter(self, update_info: dict[str, object]) -> None:
        """Take one round of the trainer's adapter, outside of vLLM's weight updates. Raises as `receive_weights`."""
        self.receive_weights(self.parse_update_info(update_info | {"apply": "adapter"}))

    def _write_adapter(self, receiver: BucketReceiver) -> None:
        shapes = dict(zip(receiver.layout.names, receiver.layout.shapes, strict=True))
        tensors = receiver.tensors()
        try:
            write_adapter(self.model, shapes, tensors)
        finally:
            _drain(tensors)  # as above

    def finish_weight_update(self) -> None:
        """End a reload; after a copy there is nothing to do."""
        if self._reloading:
            self._reloading = False
            finish_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group and free the buffers."""
        if self._link is not None:
            self._link.leave()
        self._receiver = self._link = None

    @staticmethod
    def trainer_send_weights(iterator: Iterator[object], trainer_args: object) -> None:
        """Abstract until vLLM 0.27, so it must exist; ludic's sender is in `ludic.inference.weights.nccl_transport`."""
        raise NotImplementedError("ludic_nccl is sent by ludic.inference.weights.nccl_transport")


def _drain(tensors: Iterator[object]) -> None:
    for _ in tensors:
        pass
