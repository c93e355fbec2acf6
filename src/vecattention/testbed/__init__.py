"""Procedural movies, and a small trained Qwen2.5-VL model that answers questions about them.

    from vecattention.testbed import answer, load, movies, prepare, question_for

    movie = movies.make(seed=0, tokens=4096, needles=4, depth=0.5)
    movies.write(movie, "movie.mp4")
    frames, fps = movies.read("movie.mp4")
    model, processor = load()
    inputs = prepare(processor, frames, fps, question_for(movie.asked.shape))
    said = answer(model, processor, inputs)          # movie.asked.colour, with full attention

Importing needs only torch; PyAV and transformers are imported by the calls that use them.
"""

from vecattention.testbed import movies
from vecattention.testbed.errors import ModelError, QuestionError, VideoError
from vecattention.testbed.model import load
from vecattention.testbed.movies import Movie, Needle
from vecattention.testbed.prepare import prepare
from vecattention.testbed.questions import answer, question_for
from vecattention.testbed.shapes import COLOURS, SHAPES

__all__ = [
    "COLOURS",
    "SHAPES",
    "ModelError",
    "Movie",
    "Needle",
    "QuestionError",
    "VideoError",
    "answer",
    "load",
    "movies",
    "prepare",
    "question_for",
]
