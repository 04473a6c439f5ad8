"""The digest that proves a weight transfer: what changes it, and what must not."""

import hashlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ludic.inference.weights import bucket_layout, digest
from ludic.inference.weights.bucket_layout import pack, plan_buckets, unpack
from ludic.inference.weights.digest import FlatDigest, digest_hex, tensor_digest, tensor_digests

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 4 words, 2 blocks a pass and buffers of 4 blocks, so that small tensors have many."""
    monkeypatch.setattr(bucket_layout, "BLOCK_BYTES", 32)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 32)
    monkeypatch.setattr(digest, "_BLOCK_WORDS", 4)
    monkeypatch.setattr(digest, "_PASS_BLOCKS", {"cpu": 2})
    monkeypatch.setattr(digest, "_GATHER_BYTES", 128)
    for cached in (digest._word_weights, digest._block_tables):
        cached.cache_clear()
    yield
    for cached in (digest._word_weights, digest._block_tables):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_depends_on_values_alone_and_not_on_how_they_lie_in_memory(dtype: torch.dtype) -> None:
    values = torch.arange(7 * 9).reshape(7, 9).remainder(2).to(dtype)
    expected = tensor_digest(values)
    assert tensor_digest(values.clone()) == expected
    assert tensor_digest(values.t().contiguous().t()) == expected
    shifted = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(7, 9)  # not aligned to a word
    assert tensor_digest(shifted) == expected
    assert tensor_digest(torch.nn.Parameter(values, requires_grad=False)) == expected


@given(st.integers(1, 60), st.data())
def test_a_change_of_any_single_element_changes_the_digest(size: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    values = torch.randint(-100, 100, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    changed = values.clone()
    changed[data.draw(st.integers(0, size - 1))] += data.draw(st.sampled_from([1, -1, 64]))
    assert tensor_digest(changed) != tensor_digest(values)


@pytest.mark.usefixtures("small_blocks")
def test_a_swap_of_any_two_elements_changes_the_digest_within_and_across_blocks() -> None:
    values = torch.arange(1, 41, dtype=torch.bfloat16)
    seen = {tensor_digest(values)}
    for first in range(40):
        for second in range(first):
            swapped = values.clone()
            swapped[[first, second]] = values[[second, first]]
            seen.add(tensor_digest(swapped))
    assert len(seen) == 1 + 40 * 39 // 2


@pytest.mark.usefixtures("small_blocks")
def test_every_flipped_bit_gives_another_digest() -> None:
    values = torch.zeros(13, dtype=torch.float32)
    seen = {tensor_digest(values)}
    for element in range(13):
        for bit in range(32):
            bits = torch.zeros(13, dtype=torch.int32)
            bits[element] = -(1 << 31) if bit == 31 else 1 << bit
            seen.add(tensor_digest(bits.view(torch.float32)))
    assert len(seen) == 1 + 13 * 32


def test_dtype_and_shape_are_part_of_the_digest() -> None:
    zeros = [
        torch.zeros(shape, dtype=dtype) for shape in [(6,), (2, 3), (3, 2), (7,), (0,), (0, 2), ()] for dtype in DTYPES
    ]
    assert len({tensor_digest(tensor) for tensor in zeros}) == len(zeros)


def test_two_flipped_signs_do_not_cancel() -> None:
    values = torch.ones(64, dtype=torch.bfloat16)
    seen = {tensor_digest(values)}
    for first in range(64):
        for second in range(first):
            flipped = values.clone()
            flipped[[first, second]] = -1
            seen.add(tensor_digest(flipped))
    assert len(seen) == 1 + 64 * 63 // 2


def test_negative_zero_and_the_bits_of_nan_count() -> None:
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert tensor_digest(nan) == tensor_digest(nan.clone())


def documented(values: torch.Tensor) -> int:
    """The formula of `tensor_digest` in plain integers, so that no device or version of torch can drift from it."""

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    def weight(number: int) -> int:
        return mix(number * digest._GOLDEN % 2**64) | 1

    raw = values.view(-1).view(torch.uint8).numpy().tobytes()
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    total = 0
    for place, word in enumerate(words):
        block, inside = divmod(place, digest._BLOCK_WORDS)
        product = word * weight(inside + 1) % 2**64
        total += (product ^ product >> 32) * weight(inside + 1) * weight(block + 2**32)
    salt = hashlib.blake2b(f"{values.dtype}{tuple(values.shape)}".encode(), digest_size=8).digest()
    return mix((total + int.from_bytes(salt, "little") + digest._GOLDEN) % 2**64)


@pytest.mark.parametrize("size", [0, 1, 5, 1023, 1024, 1025, 5000])
def test_the_digest_is_the_documented_sum(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert tensor_digest(values) == documented(values)


def test_a_digest_is_sent_as_sixteen_digits() -> None:
    assert digest_hex(255) == "00000000000000ff"


def some_tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 700), (1,), (0,), (4096,), (), (5, 7, 11), (2050,)]
    dtypes = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    return [
        torch.randint(0, 99, size, generator=generator).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)
    ]


def test_tensors_digested_together_have_the_digests_that_each_has_alone() -> None:
    tensors = some_tensors()
    assert tensor_digests(tensors) == [tensor_digest(tensor) for tensor in tensors]
    assert tensor_digests(tensors[::-1]) == tensor_digests(tensors)[::-1]
    assert tensor_digests([]) == []


@pytest.mark.parametrize("bucket_bytes", [4096, 8192, 1 << 20])
def test_a_digest_does_not_depend_on_the_cut_into_buckets_nor_on_their_order(bucket_bytes: int) -> None:
    tensors = some_tensors()
    buckets = plan_buckets([tensor.nbytes for tensor in tensors], bucket_bytes)
    assert max(bucket.num_bytes for bucket in buckets) <= bucket_bytes
    sums = FlatDigest(len(tensors), torch.device("cpu"))
    for bucket in reversed(buckets):
        buffer = torch.full((bucket.num_bytes,), 255, dtype=torch.uint8)  # what is in it before must not count
        pack(bucket, tensors, buffer)
        sums.add(bucket, buffer)
    assert sums.values([(t.dtype, tuple(t.shape)) for t in tensors]) == tensor_digests(tensors)


@given(st.lists(st.integers(0, 20_000), max_size=8), st.integers(1, 4))
def test_the_pieces_of_a_plan_cover_every_byte_once_in_buckets_of_bounded_size(sizes: list[int], blocks: int) -> None:
    buckets = plan_buckets(sizes, blocks * bucket_layout.BLOCK_BYTES)
    covered: list[list[range]] = [[] for _ in sizes]
    for bucket in buckets:
        end = 0
        for piece in bucket.pieces:
            assert piece.offset % bucket_layout.BLOCK_BYTES == piece.start % bucket_layout.BLOCK_BYTES == 0
            assert end <= piece.offset < piece.offset + piece.num_bytes <= bucket.num_bytes
            end = piece.offset + piece.num_bytes
            covered[piece.tensor].append(range(piece.start, piece.start + piece.num_bytes))
        assert bucket.num_bytes <= blocks * bucket_layout.BLOCK_BYTES
    for size, ranges in zip(sizes, covered, strict=True):
        assert [byte for part in ranges for byte in part] == list(range(size))


def test_what_is_packed_is_unpacked_bit_for_bit_and_a_cast_is_torchs() -> None:
    nan = torch.tensor([0x7F81, -0x7E, 3], dtype=torch.int16).view(torch.bfloat16)  # signalling NaNs keep their bits
    tensors = [*some_tensors(), nan]
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    for bucket in plan_buckets([tensor.nbytes for tensor in tensors], 4096):
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        pack(bucket, tensors, buffer)
        unpack(bucket, buffer, targets)
    for target, tensor in zip(targets, tensors, strict=True):
        assert torch.equal(target.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    masters = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    received = torch.zeros(3000, dtype=torch.bfloat16)
    for bucket in plan_buckets([6000], 4096):
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        pack(bucket, [masters], buffer, torch.bfloat16)
        unpack(bucket, buffer, [received])
    assert torch.equal(received, masters.bfloat16())


@pytest.mark.parametrize("bucket_bytes", [0, -4096, 100])
def test_a_bucket_size_that_blocks_do_not_fit_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"bucket_bytes is {bucket_bytes}; it must be a positive multiple of 4096"):
        plan_buckets([1], bucket_bytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_computes_the_same_digest_as_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 100, (3, 1_000_003), generator=generator).to(dtype)
    assert tensor_digest(values.cuda()) == tensor_digest(values)
    assert tensor_digest(values.cuda()[1:]) == tensor_digest(values[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_packs_casts_and_digests_many_tensors_as_the_cpu_does() -> None:
    tensors = [*some_tensors(), torch.randn(40_000_000, generator=torch.Generator().manual_seed(2))]
    on_gpu = [tensor.cuda() for tensor in tensors]
    assert tensor_digests(on_gpu) == tensor_digests(tensors)
    (bucket, *_) = plan_buckets([80_000_000], 64 << 20)
    buffers = [torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device) for device in ("cpu", "cuda")]
    for buffer, source in zip(buffers, (tensors[-1], on_gpu[-1]), strict=True):
        pack(bucket, [source], buffer, torch.bfloat16)
    assert torch.equal(buffers[0], buffers[1].cpu())
    back = torch.zeros(40_000_000, dtype=torch.bfloat16, device="cuda")
    unpack(bucket, buffers[1], [back])
    assert torch.equal(back[: 32 << 20].cpu(), tensors[-1][: 32 << 20].bfloat16())
