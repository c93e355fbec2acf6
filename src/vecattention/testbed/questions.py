"""Questions and answers in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vecattention.testbed import words
from vecattention.testbed.errors import QuestionError
from vecattention.testbed.shapes import SHAPES

if TYPE_CHECKING:
    from torch import Tensor


def question_for(shape: str) -> str:
    """The question for the colour of a shape of `SHAPES`.

    >>> question_for("star")
    'which colour was the star ?'
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}, wanted one of {', '.join(SHAPES)}; ask about one of them")
    return words.QUESTIONS[0].format(shape)


def check_spelling(tokenizer: Any, question: str) -> None:
    """Raise QuestionError if `tokenizer` (of transformers) has no token for a word of `question`, or it has no word."""
    if not isinstance(question, str):
        raise TypeError(f"question is {type(question).__name__}, wanted text; pass a str")
    if not question.strip():
        raise QuestionError("question is empty, wanted words; ask for instance 'which colour was the star ?'")
    special = [token for token in tokenizer.all_special_tokens if token in question]
    if special:
        raise QuestionError(f"question holds the special token {special[0]!r}, wanted plain words; leave it out")
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    bad = [word for word in question.split() if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
    if bad:
        raise QuestionError(
            f"question has words that the tokenizer cannot spell: {', '.join(map(repr, dict.fromkeys(bad)))}; "
            f"wanted words it knows, such as {words.QUESTIONS[0].format(SHAPES[0])!r}"
        )


def answer(model: Any, processor: Any, inputs: dict[str, Tensor], max_new_tokens: int = 4) -> str:
    """What a Qwen2.5-VL model says to the inputs that `prepare` made, without sampling, special tokens left out."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return cast(str, said).strip()
