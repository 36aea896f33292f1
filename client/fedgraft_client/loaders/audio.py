"""Sounds, one at a time, from files or from bytes inside a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.loaders.image import content_of
from fedgraft_client.loaders.table import Broken
from fedgraft_common.errors import DataError
from fedgraft_common.reading import Reading

ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au")


class AudioReader:
    """Reads sound files with libsndfile.

    Args:
        column: that holds them: a path, relative to `folder` or whole, or {bytes, path}.
        folder: see above.
        reading: sample rate and length.

    Raises:
        DataError: soundfile is not installed.
    """

    def __init__(self, column: str, folder: Path, reading: Reading) -> None:
        try:
            import soundfile  # noqa: F401 - here, so that one error stands for all files
        except (ImportError, OSError):
            raise DataError(
                "data.source", "audio files, and no soundfile on this machine",
                "soundfile, which reads them", "Install it: pip install 'fedgraft[audio]'.",
            ) from None  # fmt: skip
        self.columns = (column,)
        self._folder = folder
        self._reading = reading
        self._rate: int | None = reading.sample_rate

    def __call__(self, values: list[Any]) -> torch.Tensor:
        """(samples,) float32: the mean of the channels.

        Raises:
            Broken: missing, damaged, silent of length 0, or of another rate than the first where
                `data.sample_rate` does not say which to bring them to.
        """
        sound, rate = self._open(values[0])
        if len(sound) == 0:
            raise Broken("no samples")
        if self._rate is None:
            self._rate = rate
        if rate != self._rate:
            if self._reading.sample_rate is None:
                raise Broken(
                    f"{rate} Hz where others have {self._rate} Hz; state data.sample_rate to "
                    "bring all to one"
                )
            sound = _resampled(sound, rate, self._rate)
        return fit_length(torch.from_numpy(sound.astype(np.float32)), self._reading.samples)

    def _open(self, value: Any) -> tuple[NDArray[np.float64], int]:
        import soundfile

        source = content_of(value, self._folder)
        if isinstance(source, Path) and not source.is_file():
            raise Broken("no such file")
        try:
            sound, rate = soundfile.read(source, always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            raise Broken(f"damaged: {error}") from None
        return sound.mean(axis=1), int(rate)


def _resampled(sound: NDArray[np.float64], rate: int, wanted: int) -> NDArray[np.float64]:
    from scipy.signal import resample_poly

    common = int(np.gcd(rate, wanted))
    found: NDArray[np.float64] = resample_poly(sound, wanted // common, rate // common)
    return found


def fit_length(series: torch.Tensor, samples: int | None) -> torch.Tensor:
    """The first `samples` of a series (samples, ...), with zeros after its end."""
    if samples is None or len(series) == samples:
        return series
    found = series.new_zeros(samples, *series.shape[1:])
    kept = min(samples, len(series))
    found[:kept] = series[:kept]
    return found
