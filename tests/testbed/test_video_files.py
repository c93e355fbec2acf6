"""MP4 files: what is written is read; what is not whole is refused; what fails leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from vecattention.testbed import VideoError, files, movies


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return movies.render(movies.make(seed=0, tokens=64))


@pytest.fixture
def film(tmp_path: Path, frames: Tensor) -> Path:
    movies.write(frames, tmp_path / "film.mp4")
    return tmp_path / "film.mp4"


def test_round_trip(tmp_path: Path) -> None:
    movie = movies.make(seed=1, tokens=64, fps=3.0)
    movies.write(movie, tmp_path / "film.mp4")
    got, fps = movies.read(tmp_path / "film.mp4")
    wanted = movies.render(movie)
    assert fps == 3.0 and got.shape == wanted.shape and got.dtype == torch.uint8
    error = (got.float() - wanted.float()).pow(2).mean()
    assert 10 * torch.log10(255**2 / error) > 30, "PSNR in dB"


def test_the_first_frames_alone(film: Path) -> None:
    got, _ = movies.read(film, max_frames=5)
    assert torch.equal(got, movies.read(film)[0][:5])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wanted a video file; there is no such file"):
        movies.read(tmp_path / "none.mp4")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="is an empty file, wanted a video"):
        movies.read(tmp_path / "empty.mp4")


def test_a_file_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("Once upon a time.\n" * 200)
    with pytest.raises(VideoError, match="cannot be decoded .*, wanted a whole video file"):
        movies.read(tmp_path / "text.mp4")


def test_a_file_without_pictures(tmp_path: Path) -> None:
    import numpy as np

    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(VideoError, match="has no video stream"):
        movies.read(tmp_path / "sound.wav")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_file_that_is_cut_off(film: Path, share: float) -> None:
    data = film.read_bytes()
    film.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match="cut off"):
        movies.read(film)


@pytest.mark.parametrize("share", [0.4, 0.8, 0.99])
def test_a_file_whose_first_frames_still_decode_is_not_shortened_silently(film: Path, share: float) -> None:
    early = film.with_name("early.mp4")
    with av.open(str(film)) as source, av.open(str(early), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert len(movies.read(early)[0]) == 128
    data = early.read_bytes()
    early.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match="cut off"):
        movies.read(early)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(film: Path, frames: Tensor) -> None:
    before = film.read_bytes()

    def pieces() -> Iterator[Tensor]:
        yield frames
        raise RuntimeError("the disk of the camera is full")

    with pytest.raises(RuntimeError, match="camera"):
        files.write_frames(pieces(), film, 2.0)
    assert [path.name for path in film.parent.iterdir()] == ["film.mp4"]
    assert film.read_bytes() == before


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (torch.zeros(4, 56, 56, 3), TypeError, "frames is torch.float32, wanted a uint8 tensor"),
        ([1, 2], TypeError, "frames is list, wanted a uint8 tensor"),
        (torch.zeros(4, 3, 56, 56, dtype=torch.uint8), ValueError, r"frames has shape \(4, 3, 56, 56\)"),
        (torch.zeros(4, 55, 56, 3, dtype=torch.uint8), ValueError, "with H and W even"),
        (torch.zeros(0, 56, 56, 3, dtype=torch.uint8), ValueError, "frames has none, wanted at least one frame"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path: Path, bad: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        movies.write(bad, tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


def test_frames_of_two_sizes(tmp_path: Path) -> None:
    pieces = [torch.zeros(2, 56, 56, 3, dtype=torch.uint8), torch.zeros(2, 28, 28, 3, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"frames are \(28, 28\), wanted \(56, 56\) like the first"):
        files.write_frames(pieces, tmp_path / "film.mp4", 2.0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path, frames: Tensor) -> None:
    with pytest.raises(FileNotFoundError, match="wanted a file in an existing folder; create"):
        movies.write(frames, tmp_path / "none" / "film.mp4")


@pytest.mark.parametrize("call", ["fps", "max_frames"])
def test_numbers_that_make_no_sense(film: Path, frames: Tensor, call: str) -> None:
    with pytest.raises(ValueError, match=f"{call} is 0, wanted"):
        movies.write(frames, film, fps=0) if call == "fps" else movies.read(film, max_frames=0)
