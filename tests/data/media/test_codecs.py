"""Pictures stored frame by frame, as films, and as their sources have them: the frames asked for come."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from engine.core.recipe import Audio, Clip
from engine.data.ingest.run import IngestError, ingest
from engine.data.media.codecs import H264, JPEG, KEY_EVERY, MPEG4, VP9, VP9_MP4
from engine.data.pipeline import InputPipeline
from engine.data.plan import ClipPlan
from engine.data.shards.index import ClipIndex, DamagedClip
from tests.data.films import write_film

CPU = torch.device("cpu")
BITS, T, H, W = 7, 90, 128, 176
WANTED = [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [15, 17, 19, 21, 23, 25, 27, 29],
    [70, 60, 50, 40, 30, 20, 10, 0],
    [33, 33, 33, 31, 31, 48, 47, 48],
    [82, 83, 84, 85, 86, 87, 88, 89],
]


def picture(number: int) -> np.ndarray:
    """A number painted as bright and dark bars, over colours that change slowly."""
    rows, columns = np.mgrid[:H, :W]
    image = np.stack([columns + number, rows, 255 - columns], -1).astype(np.float64) / 2 + 30
    for bit in range(BITS):
        bar = slice(8 + 23 * bit, 26 + 23 * bit)
        image[40:90, bar] = 225 if number >> bit & 1 else 35
    return image.clip(0, 255).astype(np.uint8)


def number_in(image: np.ndarray) -> int:
    """The number painted, from a picture scaled to any size."""
    h, w, _ = image.shape
    grey = image.astype(np.float64).mean(-1)
    found = 0
    for bit in range(BITS):
        x = (8 + 23 * bit + 9) / W * w
        bright = grey[int(h * 0.45) : int(h * 0.6), int(x - 3) : int(x + 3)].mean()
        found |= int(bright > 128) << bit
    return found


def tone(t: np.ndarray) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 440 * t)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lossless film of numbers with sound."""
    path = tmp_path_factory.mktemp("film") / "numbers.mkv"
    options = {"preset": "ultrafast", "qp": "0"}
    pictures = [picture(i) for i in range(T)]
    return write_film(path, pictures, sound=tone, sound_to=T / 25, options=options)


@pytest.fixture(scope="module")
def webm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as VP9, with a key frame every 30 frames and none between."""
    path = tmp_path_factory.mktemp("webm") / "numbers.webm"
    options = {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "0"}
    pictures = [picture(i) for i in range(T)]
    return write_film(path, pictures, codec="libvpx-vp9", gop=30, options=options)


def shards(source: Path, out: Path, codec: str, **options) -> ClipIndex:
    ingest([source], out, codec=codec, workers=1, short_side=H, **options)
    return ClipIndex([out])


def load(
    index: ClipIndex, wanted: list[list[int]], *, clips: list[int] | None = None, size: int = 128
):
    n, f = len(wanted), len(wanted[0])
    plan = ClipPlan(
        clip=np.array(clips or [0] * n),
        frames=np.array(wanted),
        box=np.full((n, 4), np.nan, np.float32),
        flip=np.zeros(n, bool),
        sound_start=np.zeros(n),
        shift=np.zeros(n),
        order=np.tile(np.arange(f), (n, 1)),
    )
    pipeline = InputPipeline(
        index, Clip(size=size), audio=Audio(), device=CPU, batch_size=n, num_frames=f, flow=False
    )
    return pipeline.load(plan)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def centre(number: int) -> np.ndarray:
    """The central square, in which the bars of bits 1 to 5 lie whole."""
    return picture(number)[:, (W - H) // 2 : (W + H) // 2]


@pytest.mark.parametrize("codec, kind", [("jpeg", JPEG), ("vp9", VP9)])
def test_frames_asked_for_are_those_that_come(film: Path, tmp_path: Path, codec, kind) -> None:
    index = shards(film, tmp_path / "out", codec)
    assert index.codecs == {kind} and index.num_frames.tolist() == [T]
    found = load(index, WANTED).rgb.numpy()
    for row, numbers in zip(found, WANTED, strict=True):
        for image, number in zip(row, numbers, strict=True):
            errors = [psnr(image, centre(n)) for n in range(T)]
            assert int(np.argmax(errors)) == number
            assert errors[number] > 33


def test_a_film_is_read_from_the_key_frame_before_it(film: Path, tmp_path: Path) -> None:
    index = shards(film, tmp_path / "out", "vp9")
    part = index.read(0, [21, 35])
    whole = index.read(0, [0, T - 1])
    assert part.film is not None and whole.film is not None and not part.frames
    assert part.places.tolist() == [21 - KEY_EVERY, 35 - KEY_EVERY]
    with av.open(io.BytesIO(part.film.tobytes())) as container:
        assert sum(1 for _ in container.decode(video=0)) == 35 - KEY_EVERY + 1
    assert part.film.nbytes < 0.5 * whole.film.nbytes


def test_vp9_takes_less_room_than_jpeg(real_data: Path, tmp_path: Path) -> None:
    videos = sorted((real_data / "ucf101_subset").rglob("*.avi"))[:2]
    sizes = {}
    for codec in ("jpeg", "vp9"):
        ingest(
            videos, tmp_path / codec, codec=codec, workers=1, clip_seconds=2.0, clips_per_video=1
        )
        sizes[codec] = sum(p.stat().st_size for p in (tmp_path / codec).glob("*.tar"))
    assert sizes["vp9"] < 0.5 * sizes["jpeg"]


def test_real_frames_as_vp9_are_those_as_jpeg(real_data: Path, tmp_path: Path) -> None:
    video = sorted((real_data / "ucf101_subset").rglob("*.avi"))[0]
    one, other = (
        shards(video, tmp_path / c, c, clip_seconds=2.0, clips_per_video=1) for c in ("jpeg", "vp9")
    )
    wanted = [[0, 7, 14, 21, 28, 35, 42, 49]]
    a, b = load(one, wanted, size=64).rgb.numpy(), load(other, wanted, size=64).rgb.numpy()
    assert psnr(a, b) > 30
    assert np.abs(a.mean((0, 1, 2, 3)) - b.mean((0, 1, 2, 3))).max() < 2.5  # no shift of colours


@pytest.mark.parametrize("codec", ["vp9", "h264", "copy"])
def test_equal_input_gives_equal_bytes(film: Path, tmp_path: Path, codec: str) -> None:
    for name in ("one", "two"):
        ingest([film], tmp_path / name, codec=codec, workers=1, short_side=H)
    one, two = ((tmp_path / n / "dataset.json").read_bytes() for n in ("one", "two"))
    assert one == two


def test_jpeg_and_films_in_one_batch(film: Path, tmp_path: Path) -> None:
    for codec in ("jpeg", "vp9"):
        shards(film, tmp_path / codec, codec)
    both = ClipIndex([tmp_path / "jpeg", tmp_path / "vp9"])
    wanted = WANTED[:4]
    together = load(both, wanted, clips=[0, 1, 1, 0])
    for codec, rows in (("jpeg", [0, 3]), ("vp9", [1, 2])):
        alone = load(ClipIndex([tmp_path / codec]), [wanted[i] for i in rows])
        torch.testing.assert_close(together.rgb[rows], alone.rgb, rtol=0, atol=0)
        torch.testing.assert_close(together.wave[rows], alone.wave, rtol=0, atol=0)


@pytest.mark.parametrize("codec", ["h264", "copy"])
def test_what_only_a_gpu_decodes_is_refused_on_a_cpu(
    film: Path, tmp_path: Path, codec: str
) -> None:
    index = shards(film, tmp_path / "out", codec)
    assert index.codecs == {H264}
    with pytest.raises(
        ValueError, match=r"h264, which only a GPU decodes.*--codec jpeg or vp9"
    ) as told:
        load(index, WANTED)
    assert str(tmp_path / "out") in str(told.value)


@pytest.mark.parametrize("codec", ["h264", "copy"])
def test_the_mp4_for_a_gpu_holds_the_frames_that_the_table_says(
    film: Path, tmp_path: Path, codec: str
) -> None:
    index = shards(film, tmp_path / "out", codec)
    read = index.read(0, [3, 40, 89])
    assert read.film is not None
    shown = decoded(read.film.tobytes())
    assert [number_in(shown[i]) for i in read.places] == [3, 40, 89]


def decoded(film: bytes) -> list[np.ndarray]:
    """All frames of a film, in the order of showing."""
    with av.open(io.BytesIO(film)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def test_a_copied_vp9_stream_is_read_on_a_cpu(webm: Path, tmp_path: Path) -> None:
    index = shards(webm, tmp_path / "out", "copy")
    assert index.codecs == {VP9_MP4} and index.num_frames.tolist() == [T]
    found = load(index, WANTED).rgb.numpy()
    for row, numbers in zip(found, WANTED, strict=True):
        for image, number in zip(row, numbers, strict=True):
            assert int(np.argmax([psnr(image, centre(n)) for n in range(T)])) == number


@pytest.mark.parametrize(
    "options", [{"bf": "3", "preset": "medium"}, {"bf": "2", "x264-params": "open-gop=1"}]
)
def test_copied_clips_start_at_key_frames_and_show_the_right_frames(
    tmp_path: Path, options: dict[str, str]
) -> None:
    """B-frames, whose order differs from time's, and clips that begin between key frames."""
    pictures = [picture(i) for i in range(T)]
    source = write_film(tmp_path / "b.mp4", pictures, gop=24, options={"crf": "12", **options})
    ingest(
        [source], tmp_path / "copy", codec="copy", workers=1, clip_seconds=1.0, clips_per_video=3
    )
    index = ClipIndex([tmp_path / "copy"])
    assert len(index) == 3
    for clip in range(3):
        first = round(index.facts(clip)["start"] * 25)
        n = int(index.num_frames[clip])
        assert n == 25
        read = index.read(clip, range(n))
        shown = decoded(read.film.tobytes())
        numbers = [number_in(shown[i]) for i in read.places]
        assert np.abs(np.array(numbers) - np.arange(first, first + n)).max() <= 1
        assert np.diff(numbers).tolist() == [1] * (n - 1)
        assert len(shown) < T


def test_copied_clips_have_a_constant_frame_rate(tmp_path: Path) -> None:
    """A film of 12 frames a second, as clips of 25 a second, shows each about twice."""
    source = write_film(tmp_path / "slow.mp4", [picture(i) for i in range(36)], fps=12)
    index = shards(source, tmp_path / "copy", "copy")
    read = index.read(0, range(int(index.num_frames[0])))
    assert len(read.places) == 75
    expected = np.arange(75) / 25 * 12
    assert np.abs(read.places - expected).max() <= 1
    assert set(np.diff(read.places).tolist()) <= {0, 1}


def test_copied_mpeg4_is_known_as_such(tmp_path: Path) -> None:
    source = write_film(tmp_path / "old.mp4", [picture(i) for i in range(40)], codec="mpeg4")
    assert shards(source, tmp_path / "copy", "copy").codecs == {MPEG4}


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("ten-bit.mp4", {"pix_fmt": "yuv420p10le"}, "yuv420p10le"),
        ("444.mp4", {"pix_fmt": "yuv444p"}, "yuv444p"),
        ("old.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, "mjpeg; only H.264, HEVC"),
        ("p3.mp4", {"options": {"x264-params": "colorprim=smpte432"}}, "gamut .Display P3"),
        ("wide.mp4", {"options": {"x264-params": "colorprim=bt2020"}}, "gamut .BT.2020"),
        ("constant.mp4", {"options": {"x264-params": "colormatrix=bt2020c"}}, "not converted"),
    ],
)
def test_what_copying_would_show_wrongly_is_rejected(
    tmp_path: Path, name: str, options: dict, told: str
) -> None:
    source = write_film(tmp_path / name, [picture(i) for i in range(30)], **options)
    with pytest.raises(IngestError, match=told):
        ingest([source], tmp_path / "out", codec="copy", workers=1)


def test_damaged_films_give_way_to_other_clips(film: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(film, tmp_path / f"{name}.mkv")
    ingest([tmp_path / "a.mkv", tmp_path / "b.mkv"], tmp_path / "out", codec="vp9", workers=1)
    (tar,) = (tmp_path / "out").glob("*.tar")
    data = bytearray(tar.read_bytes())
    told: list[str] = []
    index = ClipIndex([tmp_path / "out"], warn=told.append)
    healthy = load(index, WANTED[:2], clips=[0, 1])
    packets = index.read(0, [0]).film[32:].tobytes()
    at = data.index(packets)
    data[at + 14 : at + len(packets)] = bytes(len(packets) - 14)
    tar.write_bytes(data)
    batch = load(index, WANTED[:2], clips=[0, 1])
    torch.testing.assert_close(batch.rgb[1], healthy.rgb[1], rtol=0, atol=0)
    other = load(index, WANTED[:1], clips=[1])
    torch.testing.assert_close(batch.rgb[0], other.rgb[0], rtol=0, atol=0)
    assert index.substituted[0] >= 1 and any("checksum" in line for line in told)
    with pytest.raises(DamagedClip):
        index.read_strictly(0, [0], check=True)
