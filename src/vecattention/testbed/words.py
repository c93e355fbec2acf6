"""The words of the testbed's model, its tokenizer and its chat template, all plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vecattention.testbed.shapes import COLOURS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unknown|>",
)
PLAIN = tuple("user assistant system which what color colour was is of the a shape ? .".split())
VOCABULARY = SPECIAL + PLAIN + SHAPES + COLOURS
IDS = {word: i for i, word in enumerate(VOCABULARY)}

QUESTIONS = ("which colour was the {} ?", "what colour is the {} ?", "what was the color of the {} ?")
"""Ways of asking for the colour of a shape; the first is the one that `question_for` uses."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: one token a word of `VOCABULARY`, lower case, split at white space and punctuation."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(IDS), unk_token="<|unknown|>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|unknown|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[w for w in SPECIAL if w not in ("<|endoftext|>", "<|im_end|>", "<|unknown|>")],
        model_max_length=40960,
        clean_up_tokenization_spaces=False,
    )
