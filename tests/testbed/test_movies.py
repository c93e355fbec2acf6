"""Movies: seeded, deterministic, and described truthfully."""

from __future__ import annotations

import itertools

import pytest
import torch

from vecattention.testbed import COLOURS, SHAPES, Movie, Needle, movies, paint, shapes


def test_same_seed_same_movie_and_another_seed_another() -> None:
    first, again, other = (movies.make(seed=s, tokens=64, depth=0.5) for s in (1, 1, 2))
    assert first == again and first != other
    assert torch.equal(movies.render(first), movies.render(again))
    assert not torch.equal(movies.render(first), movies.render(other))


def test_rendering_in_pieces_changes_nothing() -> None:
    movie = movies.make(seed=3, tokens=300)
    frames = movies.render(movie)
    assert frames.dtype == torch.uint8 and frames.shape == (600, 56, 56, 3)
    assert torch.equal(torch.cat(list(movies.chunks(movie))), frames)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tokens, needles", [(64, 4), (64, 8), (512, 6)])
def test_needles_differ_and_never_overlap(seed: int, tokens: int, needles: int) -> None:
    movie = movies.make(seed=seed, tokens=tokens, needles=needles)
    assert len({n.shape for n in movie.needles}) == len({n.colour for n in movie.needles}) == needles
    assert sum(n.is_asked for n in movie.needles) == 1
    spans = [(n.start_frame, n.end_frame) for n in movie.needles]
    assert spans == sorted(spans)
    assert all(0 <= a and b <= movie.frames and 4 <= b - a <= movies.LONGEST for a, b in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_depth_places_the_asked_needle(depth: float) -> None:
    movie = movies.make(seed=7, tokens=1024, depth=depth)
    centre = (movie.asked.start_frame + movie.asked.end_frame) / 2
    assert abs(centre - depth * movie.frames) <= movies.LONGEST / 2 + 1


def test_a_needle_is_on_screen_when_the_description_says_so() -> None:
    movie = movies.make(seed=5, tokens=256, needles=8)
    frames = movies.render(movie).float() / 255
    table = shapes.colour_table(torch.device("cpu"))
    for needle in movie.needles:
        shown = frames[(needle.start_frame + needle.end_frame) // 2]
        near = (shown - table[COLOURS.index(needle.colour)]).abs().amax(-1) < 0.12
        assert near.float().mean() > 0.05, needle


def test_every_shape_has_its_own_outline() -> None:
    rows = shapes.outlines(torch.device("cpu"))
    assert rows.shape == (len(SHAPES) + 1, shapes.ANGLES) and rows.min() > 0.1 and rows.max() < 1.3
    apart = (rows[:, None] - rows[None]).abs().mean(-1)
    assert apart[~torch.eye(len(rows), dtype=torch.bool)].min() > 0.02


def test_the_formula_for_compilers_paints_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    slots = movies.place(2, 128, 4, generator, repeat=True)
    script = paint.script(slots, 128, generator)
    torch.testing.assert_close(paint.compose(*paint.gather(script, 0, 256)), paint.paint(script, 0, 256))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seed": -1}, "seed is -1, wanted 0 <= seed < 2\\*\\*31"),
        ({"needles": 9}, "needles is 9, wanted 1 to 8"),
        ({"needles": 0}, "needles is 0, wanted 1 to 8"),
        ({"tokens": 31}, "tokens is 31, wanted at least 8 a needle \\(32\\)"),
        ({"depth": 1.5}, "depth is 1.5, wanted a fraction of the movie"),
        ({"fps": 0.0}, "fps is 0.0, wanted frames a second"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        movies.make(**arguments)  # type: ignore[arg-type]


def test_a_length_that_is_no_whole_number_is_named() -> None:
    with pytest.raises(TypeError, match="tokens is 64.5, wanted an int"):
        movies.make(tokens=64.5)  # type: ignore[arg-type]


def test_a_movie_without_an_asked_needle_says_so() -> None:
    movie = Movie(0, 128, 2.0, (Needle("star", "red", 0, 8),))
    with pytest.raises(ValueError, match="needles has none with is_asked=True"):
        _ = movie.asked
