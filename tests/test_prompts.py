"""Many prompts at once are the prompts one by one."""

import pytest

from ludic.task.prompts import encode_prompt, encode_prompts
from ludic.types import ChatMessage
from tests.vllm_helpers import CHAT_TEMPLATE, make_tiny_tokenizer

CHATS: list[list[ChatMessage]] = [
    [{"role": "user", "content": "2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " <|end|> ünïcode \n"}],
    [{"role": "user", "content": ""}],
]


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE, CHAT_TEMPLATE + "{{ strftime_now('%H:%M:%S.%f') }}"],
    ids=["plain", "with a first token", "dated"],
)
def test_prompts_that_are_encoded_together_have_the_ids_that_each_has_alone(template: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|end|>"})
    tokenizer.chat_template = template
    together = encode_prompts(tokenizer, iter(CHATS))
    assert together == [encode_prompt(tokenizer, chat) for chat in CHATS] and len(set(map(len, together))) == 3
    assert encode_prompts(tokenizer, []) == []


def test_one_chat_that_the_template_refuses_is_said_as_it_is_alone() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(ValueError, match=r"the chat template refuses the messages \(system, user\): no system"):
        encode_prompts(tokenizer, CHATS)
