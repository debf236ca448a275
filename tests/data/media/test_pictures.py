"""Pictures of every kind of file against what was drawn, the standards' formulas and FFmpeg's own conversion."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest

from engine.data.media import tone
from engine.data.media.decode import MediaError, decode_window, probe
from engine.data.media.frames import to_i420
from tests.data.films import write_film

PATCHES = np.array(
    [[235, 235, 235], [180, 40, 40], [40, 160, 60], [50, 60, 190], [200, 190, 60], [20, 20, 20]],
    np.uint8,
)
X264 = {"preset": "ultrafast", "qp": "4"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:qp=4"}


def patches(height: int, width: int) -> np.ndarray:
    """Six blocks of colour."""
    column = np.minimum(np.arange(width) * 3 // width, 2)
    row = np.minimum(np.arange(height) * 2 // height, 1)
    return PATCHES[row[:, None] * 3 + column[None]]


def block_means(rgb: np.ndarray) -> np.ndarray:
    """Mean colour of the inner part of each of the six blocks."""
    h, w, _ = rgb.shape
    means = []
    for r in range(2):
        for c in range(3):
            inner = rgb[
                h * r // 2 + h // 8 : h * (r + 1) // 2 - h // 8,
                w * c // 3 + w // 12 : w * (c + 1) // 3 - w // 12,
            ]
            means.append(inner.mean(axis=(0, 1)))
    return np.array(means)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "size", "options"),
    [
        ("libx264", "yuv420p", (96, 144), X264),
        ("libx264", "yuv422p", (96, 144), X264),
        ("libx264", "yuv420p10le", (96, 144), X264),
        ("libx264", "yuv444p", (97, 145), X264),
        ("libx264rgb", "rgb24", (97, 145), X264),
        ("libx265", "yuv420p12le", (96, 144), X265),
        ("libx265", "yuv444p10le", (97, 145), X265),
        ("ffv1", "yuv422p10le", (241, 321), {}),
        ("ffv1", "yuv420p", (97, 145), {}),
        ("ffv1", "bgr0", (241, 321), {}),
        ("ffv1", "gray", (97, 145), {}),
        ("ffv1", "yuv420p16le", (96, 144), {}),
        ("mjpeg", "yuvj422p", (97, 145), {"qmin": "2", "qmax": "2"}),
        ("mjpeg", "yuvj444p", (241, 321), {"qmin": "2", "qmax": "2"}),
        ("prores_ks", "yuv422p10le", (96, 144), {}),
        ("prores_ks", "yuva444p10le", (97, 145), {}),
        ("libvpx", "yuv420p", (97, 145), {"deadline": "realtime", "crf": "4"}),
        ("libvpx-vp9", "yuv444p", (97, 145), {"deadline": "realtime", "cpu-used": "8"}),
        ("mpeg2video", "yuv420p", (97, 145), {"qmin": "1", "qmax": "2"}),
        ("mpeg4", "yuv420p", (96, 144), {"qmin": "1", "qmax": "2"}),
    ],
)
def test_every_format_shows_what_was_drawn(
    tmp_path: Path, codec: str, pix_fmt: str, size: tuple[int, int], options: dict[str, str]
) -> None:
    height, width = size
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg was built without {codec}")
    path = write_film(
        tmp_path / "film.mkv",
        [patches(height, width)] * 3,
        codec=codec,
        pix_fmt=pix_fmt,
        options=options,
    )
    window = decode_window(path, probe(path), start=0, seconds=0.12, fps=25, short_side=64)
    assert window.frames.shape[0] == 3
    assert window.frames.shape[2] == pytest.approx(64 * width / height, abs=1.01)
    drawn = block_means(patches(height, width))
    if pix_fmt == "gray":
        drawn = np.repeat(drawn @ [[0.299], [0.587], [0.114]], 3, axis=1)
    assert np.abs(block_means(window.rgb()[1]) - drawn).max() < 6


def converted(frame: Any, size: tuple[int, int], **options: str) -> np.ndarray:
    """FFmpeg's own: its scale filter, to full-range BT.601 I420."""
    graph = av.filter.Graph()
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base="1/25",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    scale = graph.add(
        "scale",
        w=str(size[0]),
        h=str(size[1]),
        flags="area",
        out_color_matrix="bt601",
        out_range="pc",
        **options,
    )
    form, sink = graph.add("format", "yuv420p"), graph.add("buffersink")
    source.link_to(scale)
    scale.link_to(form)
    form.link_to(sink)
    graph.configure()
    frame.pts = 0
    graph.push(frame)
    found: np.ndarray = graph.pull().to_ndarray()
    return found


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "bt601_full_range.mp4",
        "bt601_limited_range.mp4",
        "bt709_full_range.mp4",
        "h265_10bits.mp4",
        "testsrc2_444_12bit_hevc.mp4",
        "testsrc2_odd_height_and_width_444_10bit.mp4",
        "testsrc2_odd_height_and_width_vp9_10bit.mp4",
        "testsrc2_av1_10bit.mp4",
        "nasa_13013.mp4",
    ],
)
def test_real_files_match_ffmpegs_conversion(real_data: Path, name: str) -> None:
    with av.open(str(real_data / "odd/torchcodec" / name)) as file:
        frame = next(file.decode(video=0))
    size = (96, 64)
    expected = converted(frame, size)
    assert np.abs(to_i420(frame, size, 0).astype(int) - expected.astype(int)).mean() < 1.5


def wide_frame(signal: np.ndarray, transfer: int, *, primaries: int = 9) -> Any:
    """A 10-bit BT.2020 frame of grey columns at these signals in [0, 1], limited range."""
    frame: Any = av.VideoFrame(len(signal) * 16, 32, "yuv420p10le")
    for plane, values in zip(
        frame.planes, (np.round(64 + 876 * signal), [512], [512]), strict=True
    ):
        rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        rows[:, : plane.width] = np.resize(
            np.repeat(values, 16 if len(values) > 1 else 1), plane.width
        )
        plane.update(rows.tobytes())
    frame.colorspace, frame.color_range = 9, 1
    frame.color_trc, frame.color_primaries = transfer, primaries
    return frame


def luma(frame: Any, columns: int) -> np.ndarray:
    planes = to_i420(frame, (columns * 16, 32), 0)
    assert np.abs(planes[32:].astype(int) - 128).max() <= 1  # grey stays grey
    return planes[8, 8::16].astype(float) / 255


def test_pq_becomes_what_a_standard_display_shows() -> None:
    nits = np.array([0.0, 0.1, 1, 5, 20, 50, 80, 203, 500, 1000, 4000])
    power = (nits / 1e4) ** 0.1593017578125  # BT.2100
    signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    shown = luma(wide_frame(signal, 16), len(nits))
    below = nits <= 80  # the knee of the roll-off lies at 94 cd/m2
    expected = (nits[below] / 203) ** (1 / 2.4)  # BT.1886
    np.testing.assert_allclose(shown[below], expected, atol=0.015)
    assert 0.75 < shown[7] < 0.92  # reference white leaves room for what is brighter
    assert (np.diff(shown[:10]) > 0.005).all()
    assert shown[9:] == pytest.approx(1.0, abs=0.01)


def test_hlg_becomes_what_a_standard_display_shows() -> None:
    signal = np.array([0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0])
    scene = np.where(
        signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )
    nits = 1000 * scene**1.2  # BT.2100 for a display of 1000 cd/m2
    assert nits[6] == pytest.approx(203, rel=0.01)  # BT.2408: white is at 75 %
    shown = luma(wide_frame(signal, 18), len(signal))
    below = nits < 90
    np.testing.assert_allclose(shown[below], (nits[below] / 203) ** (1 / 2.4), atol=0.015)
    assert (np.diff(shown) > 0.005).all()
    assert shown[-1] == pytest.approx(1.0, abs=0.01)


def test_pq_agrees_with_ffmpeg_below_the_knee() -> None:
    """FFmpeg's relative conversion clips what is brighter than white, and leaves all else as it is."""
    signal = np.linspace(0.05, 0.48, 12)
    frame = wide_frame(signal, 16)
    ours = to_i420(frame, (192, 32), 0)[8, 8::16].astype(int)
    theirs = converted(
        frame,
        (192, 32),
        out_transfer="bt709",
        out_primaries="bt709",
        intent="relative_colorimetric",
    )[8, 8::16].astype(int)
    assert np.abs(ours - theirs).max() <= 4


def test_wide_gamut_becomes_bt709() -> None:
    red, green = np.array([[[0.6274, 0.0691, 0.0164], [0.3293, 0.9195, 0.0880]]]).transpose(1, 0, 2)
    # BT.2087: BT.709's pure red and green in linear BT.2020
    for light, pure in ((red, [1, 0, 0]), (green, [0, 1, 0])):
        signal = np.round(light ** (1 / 2.4) * 65535).astype(np.uint16)
        found = tone.to_standard(signal[None], 1)[0, 0]
        np.testing.assert_allclose(found**2.4, pure, atol=0.01)


@pytest.mark.parametrize("primaries", [9, 11, 12], ids=["bt2020", "dci-p3", "display-p3"])
@pytest.mark.parametrize("transfer", [1, 13, 14], ids=["bt709", "srgb", "bt2020-10"])
def test_wide_colours_are_those_of_ffmpeg(primaries: int, transfer: int) -> None:
    """Colours within BT.709, which both keep as they are; FFmpeg's own conversion of primaries."""
    signals = np.array([[0.5, 0.45, 0.4], [0.4, 0.5, 0.45], [0.42, 0.4, 0.5], [0.6, 0.6, 0.6]])
    patches = np.repeat(np.repeat(np.round(signals * 255), 16, 0)[None], 32, 0).astype(np.uint8)
    frame: Any = av.VideoFrame.from_ndarray(patches, format="rgb24")
    frame.color_trc, frame.color_primaries = transfer, primaries
    shown = to_i420(frame, (64, 32), 0)
    theirs = converted(
        frame,
        (64, 32),
        out_primaries="bt709",
        out_transfer=NAMES[transfer],
        intent="relative_colorimetric",
    )
    plain: Any = av.VideoFrame.from_ndarray(patches, format="rgb24")
    moved = np.abs(to_i420(plain, (64, 32), 0).astype(int) - theirs.astype(int)).max()
    apart = np.abs(shown.astype(int) - theirs.astype(int)).max()
    assert apart <= 3 < moved


NAMES = {1: "bt709", 13: "iec61966-2-1", 14: "bt2020-10"}
"""FFmpeg's names of transfer functions."""


def test_high_range_with_other_primaries_keeps_these() -> None:
    """PQ pictures of BT.709's or P3's primaries, whose code values a BT.2020 matrix would make too colourful."""
    signal = np.array([[[0.4, 0.3, 0.3]]])
    rgb = np.round(signal * 65535).astype(np.uint16)
    shown = {p: tone.to_standard(rgb, 16, p)[0, 0] for p in (1, 2, 9, 12)}
    span = {p: float(np.ptp(found)) for p, found in shown.items()}
    assert span[1] < span[12] < span[9]
    assert (shown[2] == shown[9]).all()


@pytest.mark.parametrize("matrix", [8, 10, 14])
def test_colours_that_no_matrix_converts_are_refused(matrix: int) -> None:
    frame: Any = av.VideoFrame(64, 32, "yuv420p")
    frame.colorspace = matrix
    with pytest.raises(MediaError, match=r"its colours are .* which is not converted"):
        to_i420(frame, (64, 32), 0)


def test_light_is_rolled_off_once_and_smoothly() -> None:
    nits = np.geomspace(0.1, 1000, 4000)
    out = tone.roll_off(nits)
    np.testing.assert_allclose(out[nits < 90], nits[nits < 90], rtol=1e-3)
    assert out[-1] == pytest.approx(203, rel=1e-3)
    slope = np.diff(out) / np.diff(nits)
    assert slope.min() >= -1e-4 and np.abs(np.diff(slope)).max() < 0.01


@pytest.mark.data
def test_real_hdr_is_no_longer_washed_out(real_data: Path) -> None:
    """The same scene as a standard and as a PQ file of 1000 cd/m2 and less."""
    folder = real_data / "odd/torchcodec"
    shown = {}
    for name in ("testsrc2_hdr.mp4", "testsrc2.mp4"):
        path = folder / name
        window = decode_window(path, probe(path), start=0, seconds=0.4, fps=25, short_side=64)
        shown[name] = window.rgb()[0].astype(float)
    assert shown["testsrc2_hdr.mp4"].std() > 0.6 * shown["testsrc2.mp4"].std()


def bar(i: int, *, field_shift: int = 0) -> np.ndarray:
    """A bright bar that moves 4 pixels a frame, 2 of them between its fields."""
    frame = np.full((96, 128, 3), 30, np.uint8)
    for parity, extra in ((0, 0), (1, field_shift)):
        x = 10 + 4 * i + extra
        frame[parity::2, x : x + 12] = 220
    return frame


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_interlaced_pictures_lose_their_combs(tmp_path: Path, codec: str) -> None:
    options = {"mpeg2video": {"flags": "+ildct+ilme", "qmin": "1", "qmax": "2", "top": "1"}}
    x264 = {"preset": "ultrafast", "qp": "4", "flags": "+ildct+ilme", "x264-params": "tff=1"}
    path = tmp_path / "film.ts"
    with av.open(str(path), "w", format="mpegts") as out:
        stream: Any = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.options = options.get(codec, x264)
        graph = av.filter.Graph()
        chain = [
            graph.add_buffer(width=128, height=96, format="yuv420p", time_base=Fraction(1, 25)),
            graph.add("setfield", "tff"),
            graph.add("buffersink"),
        ]
        chain[0].link_to(chain[1])
        chain[1].link_to(chain[2])
        graph.configure()
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(bar(i, field_shift=2), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            graph.push(frame)
            out.mux(stream.encode(graph.pull()))
        out.mux(stream.encode(None))
    with av.open(str(path)) as film:
        assert next(film.decode(video=0)).interlaced_frame
    window = decode_window(path, probe(path), start=0, seconds=0.8, fps=25, short_side=96)
    assert len(window.frames) == 20
    light = window.frames[:, :96].astype(float)
    combs = np.abs(light[:, 2:-2:2] - (light[:, 1:-3:2] + light[:, 3:-1:2]) / 2).mean()
    stored = np.abs(bar(3, field_shift=2)[..., 0].astype(float))
    before = np.abs(stored[2:-2:2] - (stored[1:-3:2] + stored[3:-1:2]) / 2).mean()
    assert combs < before / 5
    for i in (2, 10, 18):  # the first field's place, at the frame's own time
        left = np.argmax(light[i, 48] > 125)
        assert left == pytest.approx(10 + 4 * i, abs=1.5)


def remuxed(source: Path, path: Path, shift: float, **options: str) -> None:
    """The same packets, earlier by ``shift`` seconds: what an editor's cut leaves, with an edit list in mp4."""
    with av.open(str(source)) as film, av.open(str(path), "w", container_options=options) as out:
        stream = out.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.dts is None:
                continue
            packet.pts -= round(shift / packet.time_base)
            packet.dts -= round(shift / packet.time_base)
            packet.stream = stream
            out.mux(packet)


def ramp(i: int) -> np.ndarray:
    return np.full((48, 64, 3), 20 + 2 * i, np.uint8)


@pytest.mark.parametrize("shift", [0.48, -0.72])
def test_edit_lists_are_kept(tmp_path: Path, shift: float) -> None:
    """A cut within a group of pictures starts where the list says; an empty edit delays the start."""
    whole = write_film(tmp_path / "whole.mp4", (ramp(i) for i in range(100)), gop=50)
    path = tmp_path / "cut.mp4"
    remuxed(whole, path, shift, avoid_negative_ts="disabled", use_editlist="1")
    facts = probe(path)
    window = decode_window(path, facts, start=0.0, seconds=1.0, fps=25, short_side=48)
    first = max(0, round(shift * 25))
    assert facts.start == pytest.approx(max(0.0, -shift), abs=0.001)
    assert facts.duration == pytest.approx(4.0 - max(shift, 0.0), abs=0.05)
    numbers = (window.rgb().mean(axis=(1, 2, 3)) - 20) / 2
    np.testing.assert_allclose(numbers, first + np.arange(25), atol=1.5)
    later = decode_window(path, facts, start=2.0, seconds=0.4, fps=25, short_side=48)
    numbers = (later.rgb().mean(axis=(1, 2, 3)) - 20) / 2
    np.testing.assert_allclose(numbers, first + 50 + np.arange(10), atol=1.5)


def test_missing_frames_leave_the_last_one_standing(tmp_path: Path) -> None:
    whole = write_film(
        tmp_path / "whole.mkv", (ramp(i) for i in range(60)), codec="mjpeg", pix_fmt="yuvj420p"
    )
    path = tmp_path / "holes.mkv"
    with av.open(str(whole)) as film, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(film.streams.video[0])
        for i, packet in enumerate(film.demux(video=0)):
            if packet.dts is not None and not 20 <= i < 35:
                packet.stream = stream
                out.mux(packet)
    window = decode_window(path, probe(path), start=0.0, seconds=2.4, fps=25, short_side=48)
    numbers = np.round((window.rgb().mean(axis=(1, 2, 3)) - 20) / 2).astype(int)
    expected = np.where((np.arange(60) >= 20) & (np.arange(60) < 35), 19, np.arange(60))
    assert np.abs(numbers - expected).max() <= 1


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turned_films_stand_upright(tmp_path: Path, turns: int) -> None:
    """By the matrix in mp4's track header, turned in the file itself."""
    path = write_film(
        tmp_path / "film.mp4", [patches(96, 144)] * 30, options={"preset": "ultrafast", "qp": "4"}
    )
    data = bytearray(path.read_bytes())
    plain = b"".join(
        n.to_bytes(4, "big", signed=True) for n in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    )
    at = data.index(plain, data.index(b"tkhd"))
    cos, sin = [(1, 0), (0, -1), (-1, 0), (0, 1)][turns]  # counter-clockwise quarter turns
    values = (cos * 65536, sin * 65536, 0, -sin * 65536, cos * 65536, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in values)
    path.write_bytes(data)
    facts = probe(path)
    window = decode_window(path, facts, start=0, seconds=1, fps=25, short_side=64)
    drawn = np.rot90(patches(96, 144), turns)
    assert (facts.height, facts.width) == drawn.shape[:2]
    shown = window.rgb()[0].astype(float)
    h, w = shown.shape[:2]
    for y, x in ((0.2, 0.15), (0.2, 0.85), (0.8, 0.15), (0.8, 0.85)):
        expected = drawn[int(y * drawn.shape[0]), int(x * drawn.shape[1])]
        assert np.abs(shown[int(y * h), int(x * w)] - expected).max() < 12
