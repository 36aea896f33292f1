"""Sounds, series, tables, videos and pairs as a model's input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor

from fedgraft_common.errors import BackboneError, DataError
from fedgraft_common.preparations import (
    AudioPreparation,
    ImagePreparation,
    PairPreparation,
    SeriesPreparation,
    TablePreparation,
    TextPreparation,
    VideoPreparation,
    build,
)

IMAGE = ImagePreparation(channels=3, size=4, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_waves_are_normalised_one_by_one_and_brought_to_one_length() -> None:
    prepare = AudioPreparation(length=100, directory=Path())
    (short,) = prepare(3 + torch.rand(2, 60))
    (long,) = prepare(torch.rand(2, 160))
    assert short.shape == long.shape == (2, 100)
    torch.testing.assert_close(long.mean(dim=1), torch.zeros(2), rtol=0, atol=1e-5)
    own = Wav2Vec2FeatureExtractor()
    wave = torch.rand(1, 100)
    expected = own(wave[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values
    torch.testing.assert_close(prepare(wave)[0], expected)


def test_spectrograms_of_ast(tmp_path: Path) -> None:
    ASTFeatureExtractor(num_mel_bins=16, max_length=24).save_pretrained(tmp_path)
    prepare = AudioPreparation(
        length=4000, kind="audio-spectrogram-transformer", directory=tmp_path
    )
    (found,) = prepare(torch.rand(2, 4000))
    assert found.shape == (2, 24, 16)
    assert prepare.example(3, torch.Generator().manual_seed(0))[0].shape == (3, 24, 16)


def test_a_spectrogram_needs_its_settings(tmp_path: Path) -> None:
    prepare = AudioPreparation(kind="audio-spectrogram-transformer", directory=tmp_path)
    with pytest.raises(BackboneError, match=r"no preprocessor_config\.json"):
        prepare(torch.rand(1, 10))


def test_series_are_cut_in_front_or_marked_as_not_observed() -> None:
    prepare = SeriesPreparation(length=4, channels=2)
    rows = torch.arange(12.0).view(1, 6, 2)
    values, mask = prepare(rows)
    assert torch.equal(values, rows[:, 2:])
    assert mask.all()
    values, mask = prepare(rows[:, :3])
    assert torch.equal(values[:, 1:], rows[:, :3])
    assert mask[0, :, 0].tolist() == [False, True, True, True]
    with pytest.raises(DataError, match="3 channels"):
        prepare(torch.zeros(1, 4, 3))


def test_frames_at_even_distances() -> None:
    prepare = VideoPreparation(frames=3, image=IMAGE)
    video = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(1, 5, 3, 4, 4) / 4
    (found,) = prepare(video)
    assert found.shape == (1, 3, 3, 4, 4)
    torch.testing.assert_close(found[0, :, 0, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))
    (short,) = prepare(video[:, :1])
    assert torch.equal(short, -torch.ones(1, 3, 3, 4, 4))


def test_pairs_are_both() -> None:
    text = TextPreparation(vocabulary=9, length=5, directory=Path("/nowhere"))
    prepare = PairPreparation(image=IMAGE, text=text)
    assert prepare.input_names == ("pixel_values", "input_ids", "attention_mask")
    example = prepare.example(2, torch.Generator().manual_seed(0))
    assert [tuple(tensor.shape) for tensor in example] == [(2, 3, 4, 4), (2, 5), (2, 5)]
    with pytest.raises(DataError, match="a pair"):
        prepare((torch.rand(2, 3, 4, 4), ["a"]))


def test_colours_in_another_order() -> None:
    prepare = ImagePreparation(
        channels=3, size=1, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), order="BGR"
    )
    (found,) = prepare(torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.15, 0.3, 0.7]))


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(BackboneError, match=r"plan: preprocessing\.columns: found 0"):
        build({"columns": 0}, "tabular", Path(), "plan")
    with pytest.raises(BackboneError, match=r"plan: preprocessing\.image\.size: found -1"):
        build(
            {"frames": 2, "channels": 1, "size": -1, "mean": [0], "std": [1]},
            "video",
            Path(),
            "plan",
        )


def test_a_change_that_means_nothing_is_refused() -> None:
    settings = {"channels": 1, "size": 8, "mean": [0], "std": [1]}
    with pytest.raises(BackboneError, match=r"preprocessing\.lenght: found 64; allowed: .*order"):
        build(settings, "image", Path(), "plan", {"lenght": 64})
    text = {"vocabulary": 9}
    pair = build(
        {"image": settings, "text": text}, "image-text", Path(), "", {"length": 5, "size": 4}
    )
    assert isinstance(pair, PairPreparation)
    assert (pair.image.size, pair.text.length) == (4, 5)
    video = build({"frames": 2, **settings}, "video", Path(), "", {"frames": 3, "size": 4})
    assert isinstance(video, VideoPreparation)
    assert (video.frames, video.image.size) == (3, 4)


def test_a_table_has_the_plan_s_columns() -> None:
    assert TablePreparation(columns=2).input_names == ("values",)
    with pytest.raises(DataError, match="float32"):
        TablePreparation(columns=2)(torch.zeros(1, 2, dtype=torch.float64))
