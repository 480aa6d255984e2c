"""Sources of sound, machines and series: features equal a reference, broken files one error."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.signal

from fedq import ConfigError, build
from fedq.data.sound import FLOOR, FrontEnd
from fedq.data.speech_commands import _half_of

RNG = np.random.default_rng(3)


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def tone(hertz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    noise = RNG.normal(size=int(rate * seconds))
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(noise.size) / rate) + 0.01 * noise


# --- features ------------------------------------------------------------------------------------


def reference(front: FrontEnd, samples: np.ndarray) -> np.ndarray:
    """Return what SciPy's spectrogram and cosine transform make of it, and textbook triangles."""
    size = 2 ** int(np.ceil(np.log2(front.window)))
    spectrum = scipy.signal.stft(
        samples.astype(np.float64),
        window="hann",
        nperseg=front.window,
        noverlap=front.window - front.step,
        nfft=size,
        boundary=None,
        padded=False,
    )[2]
    power = np.abs(spectrum * scipy.signal.get_window("hann", front.window).sum()) ** 2
    mel = np.linspace(
        *(2595 * np.log10(1 + hz / 700) for hz in (front.low_hz, front.high_hz)), front.bands + 2
    )
    hertz = 700 * (10 ** (mel / 2595) - 1)
    bins = np.arange(size // 2 + 1) * front.rate / size
    bands = [np.interp(bins, hertz[i : i + 3], [0, 1, 0]) for i in range(front.bands)]
    energies = np.log(power.T @ np.array(bands).T + FLOOR)
    if not front.coefficients:
        return energies
    return scipy.fft.dct(energies, type=2, norm="ortho", axis=1)[:, : front.coefficients]


@pytest.mark.parametrize(
    "front",
    [
        FrontEnd(rate=16000),
        FrontEnd(rate=8000),
        FrontEnd(rate=16000, window_s=0.025, step_s=0.01, bands=23, coefficients=13, high_hz=8000),
        FrontEnd(rate=16000, window_s=0.064, step_s=0.032, bands=128, coefficients=0, low_hz=0),
    ],
)
def test_features_are_those_of_the_reference(front: FrontEnd) -> None:
    for samples in (tone(440, front.rate), RNG.uniform(-1, 1, front.rate), np.zeros(front.rate)):
        sound = samples.astype(np.float32)
        np.testing.assert_allclose(front(sound), reference(front, sound), rtol=1e-4, atol=1e-4)


def test_a_second_is_the_shape_of_the_benchmark() -> None:
    assert FrontEnd(rate=16000)(np.zeros(16000, np.float32)).shape == (49, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 4000}, "do not fit 4000"),
        ({"rate": 16000, "coefficients": 41}, "0 to 40"),
        ({"rate": 16000, "step_s": 0.0}, "a sample or more"),
    ],
)
def test_a_front_end_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrontEnd(**options)


# --- keywords ------------------------------------------------------------------------------------


def speech_commands(root: Path) -> Path:
    for i, word in enumerate(("yes", "no", "bird")):
        for speaker in ("aa11", "bb22", "cc33"):
            for n in range(2):
                write_wav(
                    root / word / f"{speaker}_nohash_{n}.wav", tone(300 + 200 * i, 16000), 16000
                )
    write_wav(root / "_background_noise_" / "hum.wav", tone(50, 16000, 3.0), 16000)
    (root / "testing_list.txt").write_text("yes/cc33_nohash_0.wav\nno/cc33_nohash_0.wav\n")
    (root / "validation_list.txt").write_text("bird/bb22_nohash_1.wav\nyes/bb22_nohash_1.wav\n")
    return root


def test_speech_commands_keeps_its_lists_and_speakers(tmp_path: Path) -> None:
    path = str(speech_commands(tmp_path))
    every = build("data", "speech_commands", path=path, words=(), share=0.0)
    with pytest.raises(ConfigError, match="no folders of words up"):
        build("data", "speech_commands", path=path, words=("up",)).load()
    data = every.load()
    assert data.classes == 3
    assert (len(data.x_train), len(data.x_test)) == (18 - 4, 2)
    assert data.input_shape == (1, 49, 10)
    assert data.client_train is not None
    assert np.bincount(data.client_train).tolist() == [6, 4, 4]
    judged = build(
        "data", "speech_commands", path=path, words=("yes",), share=1.0, test="validation"
    )
    chosen = judged.load()
    assert chosen.classes == 3  # yes, unknown, silence
    assert len(chosen.x_test) == 4  # one of each, and as much silence as words
    standard = chosen.train_inputs(np.arange(len(chosen.x_train)))
    np.testing.assert_allclose(standard.mean((0, 1, 2)), 0, atol=1e-4)  # per coefficient
    assert judged.load().x_train.tobytes() == chosen.x_train.tobytes()


def test_without_lists_speakers_are_told_apart_as_the_authors_do() -> None:
    halves = [_half_of(f"{n:08x}") for n in range(4000)]
    assert _half_of("bb22") == _half_of("bb22")
    for half, share in (("test", 0.1), ("validation", 0.1), ("train", 0.8)):
        # Bernoulli of 4,000: five deviations, a chance of 1e-6.
        assert abs(halves.count(half) / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5


def digits(root: Path, speakers: int = 2, each: int = 7) -> Path:
    for digit in range(3):
        for speaker in range(speakers):
            for n in range(each):
                name = f"{digit}_speaker{speaker}_{n}.wav"
                write_wav(root / "recordings" / name, tone(200 + 150 * digit, 8000, 0.4), 8000)
    return root


def test_spoken_digits_hold_out_the_first_recordings(tmp_path: Path) -> None:
    data = build("data", "spoken_digits", path=str(digits(tmp_path))).load()
    assert (len(data.x_train), len(data.x_test), data.classes) == (12, 30, 3)
    assert data.client_train is not None
    assert np.bincount(data.client_train).tolist() == [6, 6]
    with pytest.raises(ConfigError, match="leaves nothing to train with"):
        build("data", "spoken_digits", path=str(tmp_path), held_out=7).load()


def strange_name(root: Path) -> None:
    write_wav(root / "yes" / "noone.wav", tone(1, 16000), 16000)


def no_wav(root: Path) -> None:
    (root / "yes" / "aa11_nohash_0.wav").write_bytes(b"RIFF not a sound")


def other_rate(root: Path) -> None:
    write_wav(root / "yes" / "aa11_nohash_0.wav", tone(1, 22050), 22050)


def half_a_list(root: Path) -> None:
    (root / "testing_list.txt").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (strange_name, "SPEAKER_nohash_N"),
        (no_wav, "not a PCM WAV"),
        (other_rate, "must divide"),
        (half_a_list, "testing_list.txt is missing"),
    ],
)
def test_a_broken_speech_folder_is_one_error(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    damage(speech_commands(tmp_path))
    with pytest.raises(ConfigError, match=message):
        build("data", "speech_commands", path=str(tmp_path), words=("yes", "no")).load()


@pytest.mark.parametrize("name", ["speech_commands", "spoken_digits", "machine_sounds"])
def test_an_absent_or_empty_folder_is_one_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        build("data", name, path=str(tmp_path / "absent")).load()
    with pytest.raises(ConfigError, match=str(tmp_path)):
        build("data", name, path=str(tmp_path)).load()


# --- machines ------------------------------------------------------------------------------------


def dcase(root: Path) -> Path:
    for machine in (0, 2):
        for n in range(3):
            name = f"id_{machine:02}_{n:08}.wav"
            write_wav(root / "train" / f"normal_{name}", tone(200, 16000), 16000)
            write_wav(root / "test" / f"normal_{name}", tone(200, 16000), 16000)
            write_wav(root / "test" / f"anomaly_{name}", tone(2000, 16000), 16000)
    return root


def mimii(root: Path) -> Path:
    for machine in (0, 2):
        for n in range(6):
            path = root / f"id_{machine:02}"
            write_wav(path / "normal" / f"{n:08}.wav", tone(200, 16000), 16000)
            if n < 3:
                write_wav(path / "abnormal" / f"{n:08}.wav", tone(2000, 16000), 16000)
    return root


@pytest.mark.parametrize("layout", [dcase, mimii])
def test_both_layouts_of_machine_sounds_are_the_same_data(
    layout: Callable[[Path], Path], tmp_path: Path
) -> None:
    data = build("data", "machine_sounds", path=str(layout(tmp_path))).load()
    assert (data.input_shape, data.outputs) == ((640,), 640)
    frames = 1 + (16000 - 1024) // 512
    each = 1 + (frames - 5) // 5
    assert len(data.x_train) == 2 * 3 * each
    assert data.y_test[:, 0].mean() == 0.5
    assert len(np.unique(data.y_test[:, 1])) == 12
    assert data.client_train is not None
    assert np.bincount(data.client_train).tolist() == [3 * each] * 2
    assert data.references["magnitude_auc"] == 1.0  # another tone is plain to see


def test_broken_machine_folders_are_one_error(tmp_path: Path) -> None:
    dcase(tmp_path)
    for file in (tmp_path / "test").glob("*_id_02_*"):
        file.unlink()
    with pytest.raises(ConfigError, match="machine 02 has no recordings to test"):
        build("data", "machine_sounds", path=str(tmp_path)).load()
    write_wav(tmp_path / "train" / "sound.wav", tone(1, 16000), 16000)
    with pytest.raises(ConfigError, match="not named normal_id_00"):
        build("data", "machine_sounds", path=str(tmp_path)).load()


def test_damage_is_to_be_heard_and_none_is_not() -> None:
    """Without damage, chance decides: 6 machines, AUC of 12 against 12; four deviations."""
    options = {"machines": 6, "recordings": 6, "tests": 24}
    sound = build("data", "vibration", severity=0.0, **options).load()
    damaged = build("data", "vibration", severity=4.0, **options).load()
    deviation = np.sqrt((24 + 1) / (12 * 12 * 12) / 6)
    assert abs(sound.references["magnitude_auc"] - 0.5) < 4 * deviation
    assert damaged.references["magnitude_auc"] > 0.9


# --- series --------------------------------------------------------------------------------------

WEEKS = {"window": 14, "horizon": 3, "step": 1, "season": 7}


def table(path: Path, columns: dict[str, np.ndarray], separator: str, decimal: str = ".") -> str:
    lines = [separator.join(columns)]
    for i in range(len(next(iter(columns.values())))):
        row = [str(values[i]).replace(".", decimal) for values in columns.values()]
        lines.append(separator.join(row))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(("separator", "decimal"), [(",", "."), (";", ","), ("\t", ".")])
def test_series_are_read_in_every_dialect(separator: str, decimal: str, tmp_path: Path) -> None:
    a, b = RNG.normal(size=(2, 100)).round(4) + 5
    dates = np.array([f"2012-01-01 {i}" for i in range(100)])
    path = table(tmp_path / "s.txt", {"": dates, "MT_001": a, "MT_002": b}, separator, decimal)
    data = build("data", "series_csv", path=path, **WEEKS).load()
    expected = ((a - a[:80].mean()) / a[:80].std()).astype(np.float32)
    np.testing.assert_allclose(data.x_train[0, :, 0], expected[:14], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.y_train[0], expected[14:17], rtol=1e-5, atol=1e-6)
    # The first test example forecasts the first test step, and sees what was before it.
    np.testing.assert_allclose(data.y_test[0], expected[80:83], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.x_test[0, :, 0], expected[66:80], rtol=1e-5, atol=1e-6)
    assert data.client_train is not None
    assert np.bincount(data.client_train).tolist() == [80 - 17 + 1] * 2


def test_references_are_the_errors_of_doing_nothing(tmp_path: Path) -> None:
    week = np.tile(np.arange(7.0), 20)
    path = table(tmp_path / "s.csv", {"a": week}, ",")
    data = build("data", "series_csv", path=path, **WEEKS).load()
    assert data.references["seasonal_mae"] == 0  # the week repeats
    x, y = data.x_test[:, -1, 0], data.y_test
    naive = np.mean([abs(x[i] - y[i, j]) for i in range(len(x)) for j in range(3)])
    assert data.references["persistence_mae"] == pytest.approx(naive)


def test_missing_values_are_the_ones_before(tmp_path: Path) -> None:
    values = np.array(["?", "1", "", "NA", "5"] + ["2", "3"] * 40)
    plain = np.array(["1", "1", "1", "1", "5"] + ["2", "3"] * 40)
    files = [
        table(tmp_path / f"{i}.csv", {"a": v, "b": plain}, ",")
        for i, v in enumerate((values, plain))
    ]
    gaps, whole = (build("data", "series_csv", path=path, **WEEKS).load() for path in files)
    assert gaps.x_train.tobytes() == whole.x_train.tobytes()


def test_rows_are_averaged_and_headings_are_optional(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("\n".join(f"{i % 5},{i % 3}" for i in range(400)))
    data = build("data", "series_csv", path=str(path), columns=("1",), every=4, **WEEKS).load()
    means = (np.arange(400) % 3).reshape(-1, 4).mean(1)
    standard = (means - means[:80].mean()) / means[:80].std()
    np.testing.assert_allclose(data.x_train[0, :, 0], standard[:14], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "is empty"),
        ("a,b\n1,2\n3\n", {}, "row 2 has 1 values"),
        ("a,b\nx,y\nz,w\n", {}, "no column of numbers"),
        ("a,b\n1,x\n2,y\n", {"columns": ("b",)}, "column b is no series"),
        ("a,b\n1,2\n", {"columns": ("c",)}, "no column c; it has a, b"),
        ("a\n1\n2\n3\n", {}, "series 'a' has"),
        ("a\n" + "1\n" * 200, {}, "is constant"),
        ("a\n" + "1\ninf\n" * 200, {}, "no column of numbers"),
    ],
)
def test_a_broken_table_is_one_error(
    text: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        build("data", "series_csv", path=str(path), **WEEKS, **options).load()


def test_what_is_no_text_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(ConfigError, match="not a readable text file"):
        build("data", "series_csv", path=str(path)).load()
    with pytest.raises(ConfigError, match="no such file"):
        build("data", "series_csv", path=str(tmp_path / "absent.csv")).load()


@pytest.mark.parametrize(
    ("option", "value"), [("window", 0), ("season", 200), ("test_fraction", 1.0), ("every", 0)]
)
def test_options_of_series_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"data.{option}"):
        build("data", "series_csv", path="x", **{option: value})
