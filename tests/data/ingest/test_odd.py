"""Broken and unusual real files: what each must end as, one row a file, and that every file has a row."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import av
import pytest

from engine.data.ingest.cut import Settings, cut_source
from engine.data.ingest.sources import find_videos
from engine.data.shards.writer import NewClip

pytestmark = pytest.mark.data
SETTINGS = Settings(
    fps=25, short_side=64, clip_seconds=10, clips_per_video=1, min_seconds=1, quality=85, seed=0
)


class Clip(NamedTuple):
    """The one clip that a file gives."""

    frames: int
    width: int
    height: int
    sound: bool = False
    note: str | None = None


ODD: dict[str, Clip | str] = {
    "decord/corrupted.mp4": Clip(70, 114, 64, note="decoding stops at 2.80 s"),
    "decord/flipping_a_pancake.mkv": Clip(250, 114, 64, sound=True),
    "decord/unordered.mov": "only 0.12 s of video, less than 1 s",
    "decord/video_0.mov": "only 0.08 s of video, less than 1 s",
    "decord/video_180.mov": "only 0.08 s of video, less than 1 s",
    "decord/video_270.mov": "only 0.08 s of video, less than 1 s",
    "decord/video_90.mov": "only 0.08 s of video, less than 1 s",
    "moviepy/-video-with-dash-.mp4": Clip(125, 64, 64),
    "moviepy/big_buck_bunny_0_30.webm": Clip(250, 114, 64, sound=True),
    "moviepy/big_buck_bunny_432_433.webm": Clip(25, 114, 64, sound=True),
    "moviepy/chaplin.mp4": Clip(241, 114, 64, sound=True),
    "moviepy/doc_medias_example.mp4": Clip(50, 86, 64),
    "moviepy/doc_medias_example2.mp4": Clip(50, 114, 64, sound=True),
    "moviepy/doc_medias_example3.mp4": Clip(50, 114, 64, sound=True),
    "moviepy/doc_medias_example_mask.mp4": Clip(250, 64, 64),
    "moviepy/doc_medias_long_examples_example.mp4": Clip(250, 86, 64),
    "moviepy/doc_medias_result.mp4": Clip(250, 86, 64),
    "moviepy/fire2.mp4": Clip(59, 114, 64, sound=True),
    "moviepy/no_duration.webm": Clip(123, 114, 64),
    "moviepy/smpte-2997.mp4": Clip(250, 114, 64, sound=True),
    "moviepy/transparent.webm": Clip(125, 64, 64),
    "moviepy/video_with_failing_audio.mp4": Clip(250, 114, 64, sound=True),
    "torchcodec/av1_video.mkv": Clip(125, 114, 64),
    "torchcodec/bt2020_10bit.mp4": Clip(50, 86, 64),
    "torchcodec/bt601_full_range.mp4": Clip(50, 86, 64),
    "torchcodec/bt601_limited_range.mp4": Clip(50, 86, 64),
    "torchcodec/bt709_full_range.mp4": Clip(25, 114, 64),
    "torchcodec/discard_first_keyframe.mp4": Clip(25, 64, 64),
    "torchcodec/h264_10bits.mp4": Clip(25, 64, 64),
    "torchcodec/h265_10bits.mp4": Clip(25, 64, 64),
    "torchcodec/h265_video.mp4": Clip(25, 64, 64),
    "torchcodec/nasa_13013.mp4": Clip(250, 114, 64, sound=True),
    "torchcodec/nasa_13013_hdr.mp4": Clip(250, 114, 64),
    "torchcodec/nasa_13013_rotated.mp4": "only 0.56 s of video, less than 1 s",
    "torchcodec/sine_mono_mp3.swf": "it holds no video, only sound",
    "torchcodec/test_non_zero_start.mp4": "only 0.40 s of video, less than 1 s",
    "torchcodec/testsrc2.mp4": Clip(50, 114, 64),
    "torchcodec/testsrc2_12bit_hdr.mp4": Clip(50, 114, 64),
    "torchcodec/testsrc2_444_10bit_hevc.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_444_12bit_hevc.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_444_8bit_hevc.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_av1_10bit.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_h265.mp4": Clip(50, 114, 64),
    "torchcodec/testsrc2_hdr.mp4": Clip(50, 114, 64),
    "torchcodec/testsrc2_mpeg4.avi": Clip(25, 114, 64),
    "torchcodec/testsrc2_mpeg4.mp4": "only 0.04 s of video, less than 1 s",
    "torchcodec/testsrc2_odd_height_444.mp4": Clip(25, 84, 64),
    "torchcodec/testsrc2_odd_height_and_width_444.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_odd_height_and_width_444_10bit.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_odd_height_and_width_mpeg2.mp4": "only 0.40 s of video, less than 1 s",
    "torchcodec/testsrc2_odd_height_and_width_vp9.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_odd_height_and_width_vp9_10bit.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_odd_height_vp9.mp4": Clip(25, 84, 64),
    "torchcodec/testsrc2_odd_height_vp9_10bit.mp4": Clip(25, 84, 64),
    "torchcodec/testsrc2_odd_width_444.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_odd_width_mpeg2.mp4": "only 0.40 s of video, less than 1 s",
    "torchcodec/testsrc2_odd_width_vp9.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_odd_width_vp9_10bit.mp4": Clip(25, 86, 64),
    "torchcodec/testsrc2_vp8.webm": Clip(25, 114, 64),
    "torchcodec/testsrc2_vp9.webm": Clip(25, 114, 64),
}
"""File -> its clip, or why it is rejected."""
HMDB51: dict[str, Clip | str] = {
    "cartwheel/cartwheel.avi": Clip(70, 86, 64),
    "cartwheel/hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi": Clip(69, 86, 64),
    "pour/KOREAN_TEA_CEREMONY_-_Simple_Demo_pour_u_nm_np1_fr_med_0.avi": Clip(250, 86, 64),
    "wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi": Clip(60, 150, 64),
    "wave/SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi": Clip(62, 86, 64),
    "wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi": Clip(40, 116, 64),
}


def seconds_of(path: Path) -> float:
    """Seconds that a file's video packets cover, read without decoding."""
    with av.open(str(path), metadata_errors="replace") as file:
        spans = [
            (float(p.dts * p.time_base), float((p.duration or 0) * p.time_base))
            for p in file.demux(video=0)
            if p.dts is not None and not p.is_discard
        ]
    return max(begin + length for begin, length in spans) - min(begin for begin, _ in spans)


def check(folder: Path, table: dict[str, Clip | str]) -> None:
    sources = {source.relative: source for source in find_videos([folder])}
    assert set(sources) == set(table)
    for name, expected in table.items():
        clips: list[NewClip] = []
        rejects = cut_source(sources[name], SETTINGS, clips.append, trying=lambda _: None)
        if isinstance(expected, str):
            assert [r.reason for r in rejects] == [expected], name
            assert clips == [], name
            continue
        assert rejects == [], name
        (clip,) = clips
        note = None if clip.note is None else clip.note.split(":")[0]
        found = Clip(
            clip.pictures.num_frames, clip.width, clip.height, clip.sound is not None, note
        )
        assert found == expected, name
        if note is None:
            whole = min(seconds_of(sources[name].path), SETTINGS.clip_seconds)
            assert abs(found.frames / SETTINGS.fps - whole) < 0.13, name


def test_odd_files(real_data: Path) -> None:
    check(real_data / "odd", ODD)


def test_hmdb51_files(real_data: Path) -> None:
    check(real_data / "hmdb51_subset", HMDB51)
