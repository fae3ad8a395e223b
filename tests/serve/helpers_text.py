"""A real byte-level tokenizer, trained in a moment, with a chat template that knows tools."""

from __future__ import annotations

from functools import cache
from importlib import resources

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TEMPLATE = """
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}
Call one by <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if "forbidden" in message.content %}
{{- raise_exception("a forbidden word") }}
{%- endif %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""  # noqa: E501


@cache
def make_tokenizer(size: int = 1500) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the built-in texts; characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = resources.files("halfbyte.data").joinpath("evaluation_technical.txt").read_text()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
