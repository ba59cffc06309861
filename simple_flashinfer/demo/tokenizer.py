"""The demo model's tokenizer and chat template."""

import itertools
import json
from typing import Any

from simple_flashinfer.demo.corpus import training_conversations
from simple_flashinfer.demo.skills import Message

VOCABULARY = 3072
CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- if tools %}<tools>{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}</tools>{% endif %}<|im_end|>
{% endif -%}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


def answer_text(message: Message) -> str:
    """What an assistant's message looks like between its marks: what the model has to write."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return str(message["content"] or "") + "".join(
        f'<tool_call>{{"name": "{call["name"]}", "arguments": {json.dumps(call["arguments"])}}}</tool_call>'
        for call in calls
    )


def segments(messages: list[Message], tools: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The chat template's text in pieces; True for those that the assistant writes, its end mark included."""
    pieces: list[tuple[str, bool]] = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools or messages[0]["role"] == "system":
        shown = "".join(json.dumps(tool["function"]) + "\n" for tool in tools)
        pieces.append(
            (f"<|im_start|>system\n{system}" + (f"<tools>{shown}</tools>" if tools else "") + "<|im_end|>\n", False)
        )
    for message in messages[1:] if messages[0]["role"] == "system" else messages:
        if message["role"] == "assistant":
            pieces += [("<|im_start|>assistant\n", False), (answer_text(message) + "<|im_end|>", True), ("\n", False)]
        else:
            pieces.append((f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n", False))
    return pieces


def train_tokenizer() -> Any:
    """Byte-level BPE on the corpus. Each digit is a token of its own: sums are learnt digit by digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    some = itertools.islice(training_conversations(seed=0), 20_000)
    tokenizer.train_from_iterator((text for c in some for text, _ in segments(c.messages, c.tools)), trainer)
    for mark in ("<tool_call>", "</tool_call>"):  # tokens, but not special ones: they are part of the text
        tokenizer.add_tokens([mark])
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
