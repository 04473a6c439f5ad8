"""Which architectures torch's attention kernels compute as they are meant, in packed rows and in decoding alike."""

from collections.abc import Collection

from transformers import PreTrainedModel

OTHER_FAMILY = "train one of another family, such as Llama, Qwen2, Qwen3, Mistral, Gemma 3, Phi-3, OLMo 2 or SmolLM3"
"""What to do about an architecture that cannot be trained: a setting of it cannot be changed without making it another model."""

_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def attention_problem(model: PreTrainedModel, *, layers: Collection[str] = _PACKED_LAYERS) -> str:
    """What the model's settings ask of attention that torch's kernels, or rows with these types of `layers`, cannot do.

    Words that follow the model's name; "" if nothing. transformers' sdpa attention would leave a cap out without a word.
    """
    config = model.config.get_text_config()
    kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or ()).difference(layers)))
    if kinds:
        return f"has layers of type {kinds}, which do not keep the sequences of a row apart here"
    cap = getattr(config, "attn_logit_softcapping", None)
    return "" if cap is None else f"caps its attention logits at {cap}, which torch's attention kernels cannot do"
