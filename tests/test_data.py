"""Data sources: what they load, how inputs are scaled, and what they refuse."""

from __future__ import annotations

import sys
import types
import wave
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedq import ConfigError, FedqError, available, build
from fedq.data import Dataset, load
from fedq.data.base import stratified
from fedq.registry import from_config, lookup, to_config

RNG = np.random.default_rng(0)
BUILT_IN = [
    pytest.param(build("data", name, **options), id=f"{name}-{options}")
    for name in available("data")
    for options in lookup("data", name).examples
]


def uint8(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def of(x: NDArray, kind: str, y: NDArray | None = None) -> Dataset:
    y = np.arange(len(x)) % 3 if y is None else y
    return Dataset.of(x, y, x[:3], y[:3], kind=kind)


# --- every source that needs no file -----------------------------------------------------------


@pytest.mark.parametrize("data", BUILT_IN)
def test_built_in_sources_keep_the_contract(data) -> None:
    assert from_config("data", to_config(data)) == data
    loaded = load(data)
    assert load(from_config("data", to_config(data))) is loaded
    for x, y in ((loaded.x_train, loaded.y_train), (loaded.x_test, loaded.y_test)):
        assert len(x) == len(y)
        from_config("task", loaded.task).truths(x, y)
        if loaded.classes:
            assert np.array_equal(np.unique(y), np.arange(loaded.classes))
    inputs = loaded.train_inputs(np.array([5, 3]))
    assert inputs.shape == (2, *loaded.input_shape)
    assert np.array_equal(inputs[0], loaded.train_inputs(np.array([5]))[0])
    assert np.isfinite(loaded.test_inputs()).all()
    assert loaded.test_inputs().shape == (len(loaded.y_test), *loaded.input_shape)


@pytest.mark.parametrize("data", BUILT_IN)
def test_no_test_example_is_a_training_example(data) -> None:
    loaded = load(data)
    train = {row.tobytes() for row in loaded.x_train}
    shared = sum(row.tobytes() in train for row in loaded.x_test)
    assert shared <= 1  # digits has one pair of equal images


def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    data, theirs = load(build("data", "digits")), load_digits()
    _, test = stratified(theirs.target, 0.2, seed=0)
    assert np.array_equal(data.x_test, np.rint(theirs.images[test] * (255 / 16)))
    assert np.array_equal(data.y_test, theirs.target[test])
    monkeypatch.setattr("fedq.data.digits.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        build("data", "digits").load()


def test_mnist5k_is_stratified_and_seeded() -> None:
    data = load(build("data", "mnist5k"))
    assert data.x_train.shape == (4000, 28, 28)
    assert data.x_train.dtype == np.uint8
    assert (np.bincount(data.y_train) == 400).all()
    assert (np.bincount(data.y_test) == 100).all()
    inputs = data.test_inputs()
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert 0.12 < inputs.mean() < 0.14  # ink covers about 13 % of MNIST
    assert int(data.x_train.astype(np.int64).sum() + data.x_test.astype(np.int64).sum()) == int(
        load(build("data", "mnist5k", seed=1)).x_train.astype(np.int64).sum()
        + load(build("data", "mnist5k", seed=1)).x_test.astype(np.int64).sum()
    )
    assert not np.array_equal(load(build("data", "mnist5k", seed=1)).x_test, data.x_test)


# --- scaling and layout ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ((9, 5, 7), "image", (1, 5, 7)),
        ((9, 5, 7, 3), "image", (3, 5, 7)),
        ((9, 20, 6), "series", (6, 20)),
        ((9, 4), "features", (4,)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int16, bool])
def test_inputs_are_channels_first_float32(shape, kind, expected, dtype) -> None:
    x = (uint8(*shape) > 99) if dtype is bool else uint8(*shape).astype(dtype)
    data = of(x, kind)
    assert data.x_train.dtype == dtype
    assert data.input_shape == expected
    inputs = data.train_inputs(np.array([4, 1, 1]))
    assert inputs.shape == (3, *expected)
    assert inputs.dtype == np.float32
    assert inputs.flags.c_contiguous
    row = x[4].astype(float)
    last = row.T if kind == "series" else np.moveaxis(row, 2, 0) if row.ndim == 3 else row
    flat = np.corrcoef(inputs[0].reshape(-1), last.reshape(-1))[0, 1]
    assert flat > 0.9  # the same values in channel-first order, up to a scale per channel


def test_uint8_images_map_to_the_unit_interval_exactly() -> None:
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    inputs = of(x, "image").test_inputs()
    assert np.array_equal(inputs[0, 0].reshape(-1), np.arange(256, dtype=np.float32) / 255)


@pytest.mark.parametrize("kind", ["image", "series", "features"])
def test_other_inputs_are_standardised_by_channel_with_training_statistics(kind: str) -> None:
    shape = {"image": (3000, 4, 5, 3), "series": (3000, 8, 3), "features": (3000, 3)}[kind]
    offset, scale = np.array([1e6, 0, -5]), np.array([1.0, 1e-9, 1e4])
    x_train = RNG.normal(size=shape) * scale + offset
    x_test = RNG.normal(size=shape) * scale + offset + 2 * scale
    y = np.arange(3000) % 2
    data = Dataset.of(x_train, y, x_test, y, kind=kind)
    axes = (0, 2, 3)[: len(shape) - 1] if kind != "features" else (0,)
    train, test = data.train_inputs(np.arange(3000)), data.test_inputs()
    assert train.mean(axis=axes) == pytest.approx([0, 0, 0], abs=1e-4)
    assert train.std(axis=axes) == pytest.approx([1, 1, 1], abs=1e-4)
    assert test.mean(axis=axes) == pytest.approx([2, 2, 2], abs=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_constant_features_become_zero(dtype) -> None:
    x = RNG.normal(size=(50, 3)).astype(dtype)
    x[:, 1] = 0.1 if dtype != np.int32 else 7
    inputs = of(x, "features").train_inputs(np.arange(50))
    assert np.abs(inputs[:, 1]).max() < 1e-6
    assert np.isfinite(inputs).all()


def test_values_too_large_to_standardise_are_refused() -> None:
    data = of(np.array([[1e200], [-1e200], [3.0]]), "features")
    with pytest.raises(ConfigError, match="rescale"):
        data.test_inputs()


@pytest.mark.parametrize(
    ("train", "test", "codes"),
    [
        ([7, -2, 7, 100], [100, -2], [1, 0, 1, 2]),
        (["b", "a", "c", "a"], ["c", "a"], [1, 0, 2, 0]),
        ([0, 1, 1, 2], ["2", "0"], [0, 1, 1, 2]),
        (np.array([3, 1, 3, 2], np.uint8), np.array([1], np.int64), [2, 0, 2, 1]),
    ],
)
def test_labels_are_numbered_alike_in_training_and_test(train, test, codes) -> None:
    train, test = np.array(train), np.array(test)
    x = np.zeros((len(train), 2))
    data = Dataset.of(x, train, x[: len(test)], test, kind="features")
    assert data.y_train.tolist() == codes
    assert data.classes == 3
    for label, code in zip(test, data.y_test, strict=True):
        assert str(train[codes.index(code)]) == str(label)


def test_client_ids_are_numbered() -> None:
    x, y = np.zeros((4, 2)), np.arange(4) % 2
    ids = np.array(["pi-9", "pi-1", "pi-9", "pi-4"])
    data = Dataset.of(x, y, x, y, kind="features", client_train=ids)
    assert data.client_train.tolist() == [2, 0, 2, 1]


def test_stratified_split_is_seeded_disjoint_and_complete() -> None:
    y = np.repeat(["a", "b", "c"], [50, 10, 2])
    train, test = stratified(y, 0.2, 3)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(62))
    assert {label: int((y[test] == label).sum()) for label in "abc"} == {"a": 10, "b": 2, "c": 1}
    assert np.array_equal(stratified(y, 0.2, 3)[1], test)
    assert not np.array_equal(stratified(y, 0.2, 4)[1], test)
    with pytest.raises(ConfigError, match="single example"):
        stratified(np.array(["a", "a", "b"]), 0.5, 0)


# --- npz ---------------------------------------------------------------------------------------


def arrays(**changes) -> dict[str, NDArray]:
    base = {
        "x_train": RNG.normal(size=(12, 6)).astype(np.float32),
        "y_train": np.arange(12) % 3,
        "x_test": RNG.normal(size=(6, 6)).astype(np.float32),
        "y_test": np.arange(6) % 3,
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def npz(folder: Path, **changes):
    np.savez(folder / "own.npz", **arrays(**changes))
    return build("data", "npz", path=str(folder / "own.npz"))


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (np.zeros((12, 6)), "features"),
        (np.zeros((12, 28, 28), np.uint8), "image"),
        (np.zeros((12, 20, 30), np.uint8), "image"),
        (np.zeros((12, 28, 28)), "image"),
        (np.zeros((12, 128, 9)), "series"),
        (np.zeros((12, 8, 8, 3)), "image"),
    ],
)
def test_npz_tells_kinds_apart(tmp_path: Path, x: NDArray, kind: str) -> None:
    assert load(npz(tmp_path, x_train=x, x_test=x[:6])).kind == kind


def test_npz_loads_what_was_saved(tmp_path: Path) -> None:
    own = arrays(client_train=np.array(list("aabbccaabbcc")))
    np.savez_compressed(tmp_path / "own.npz", **own)
    data = load(build("data", "npz", path=str(tmp_path / "own.npz")))
    assert np.array_equal(data.x_train, own["x_train"])
    assert np.array_equal(data.y_test, own["y_test"])
    assert data.client_train.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert data.classes == 3


def test_npz_kind_can_be_set(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "own.npz", **arrays(x_train=np.zeros((12, 9, 9)), x_test=np.zeros((6, 9, 9)))
    )
    data = build("data", "npz", path=str(tmp_path / "own.npz"), kind="series").load()
    assert data.kind == "series"


NAN, INF = np.zeros((12, 6)), np.zeros((6, 6), np.float32)
NAN[3, 2], INF[5, 5] = np.nan, np.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None, "y_test": None}, "lacks x_test, y_test; it has x_train, y_train"),
        ({"y_train": np.arange(11) % 3}, "x_train has 12 rows but y_train has 11"),
        ({"y_test": np.arange(5) % 3}, "x_test has 6 rows but y_test has 5"),
        ({"client_train": np.arange(3)}, "x_train has 12 rows but client_train has 3"),
        ({"y_train": np.eye(3)[np.arange(12) % 3].astype(int)}, r"y_train must have shape \(N,\)"),
        ({"y_train": np.arange(12) / 3}, "y_train must hold integers or text, not float64"),
        ({"client_train": np.ones(12)}, "client_train must hold integers or text"),
        ({"x_train": np.zeros(12)}, "x_train has shape"),
        ({"x_train": np.zeros((12, 2, 2, 2, 2))}, "x_train has shape"),
        ({"x_test": np.zeros((6, 6, 2))}, "x_test must have shape"),
        ({"x_test": np.zeros((6, 7))}, "they must be equal"),
        ({"x_train": np.array([["a"] * 6] * 12)}, "x_train must hold numbers"),
        ({"x_train": np.zeros((12, 6), complex)}, "x_train must hold numbers"),
        ({"x_train": np.zeros((0, 6)), "y_train": np.zeros(0, int)}, "x_train is empty"),
        ({"x_test": np.zeros((0, 6)), "y_test": np.zeros(0, int)}, "x_test is empty"),
        ({"x_train": np.zeros((12, 0)), "x_test": np.zeros((6, 0))}, "x_train is empty"),
        ({"x_train": NAN}, "x_train holds NaN or infinity"),
        ({"x_test": INF}, "x_test holds NaN or infinity"),
        ({"y_test": np.array([0, 1, 2, 9, 8, 7])}, "y_test holds labels .* 7, 8, 9"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "single class"),
        ({"x_train": np.zeros((12, 3, 9, 9)), "x_test": np.zeros((6, 3, 9, 9))}, "channels-first"),
        ({"x_train": np.array([[0.5] * 6] * 12, object)}, "x_train is an object array"),
        ({"y_train": np.array(["a"] * 12, object)}, "y_train is an object array"),
    ],
)
def test_npz_refuses_in_one_line(tmp_path: Path, changes, message: str) -> None:
    data = npz(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load(data)
    assert "\n" not in str(caught.value)
    assert data.path in str(caught.value)


def test_npz_ignores_other_arrays_even_object_ones(tmp_path: Path) -> None:
    assert load(npz(tmp_path, notes=np.array([{"a": 1}], object))).classes == 3


def test_npz_names_the_missing_file_as_it_was_given(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("nowhere/own.npz", "~/surely-not-here.npz", "."):
        with pytest.raises(ConfigError, match="no such file") as caught:
            load(build("data", "npz", path=path))
        assert f"data.path={path}:" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut", b"\x80\x04N."])
def test_npz_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"not a readable \.npz file") as caught:
        load(build("data", "npz", path=str(tmp_path / "own.npz")))
    assert "\n" not in str(caught.value)


def test_npz_refuses_a_damaged_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **arrays())
    whole = (tmp_path / "own.npz").read_bytes()
    at = whole.index(b"NUMPY") + 200
    (tmp_path / "own.npz").write_bytes(whole[:at] + b"\xff\xfe" + whole[at + 2 :])
    with pytest.raises(ConfigError, match=r"not a readable \.npz file"):
        load(build("data", "npz", path=str(tmp_path / "own.npz")))


def test_npz_refuses_a_single_array(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"numpy\.savez"):
        load(build("data", "npz", path=str(tmp_path / "one.npy")))


# --- smartwatch --------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch) -> dict:
    """A stand-in for seglearn whose every sample says where it is from."""
    recordings = [(label, subject) for label in range(3) for subject in (4, 7)]
    signals = []
    for index in range(len(recordings)):
        time = np.arange(400.0 + 10 * index)
        signals.append(np.stack([np.full_like(time, index), *[time + c for c in range(5)]], axis=1))
    content = {
        "X": signals,
        "y": np.array([label for label, _ in recordings]),
        "subject": np.array([subject for _, subject in recordings]),
    }
    package, module = types.ModuleType("seglearn"), types.ModuleType("seglearn.datasets")
    package.__spec__ = types.SimpleNamespace(name="seglearn")
    module.load_watch = lambda: content
    monkeypatch.setitem(sys.modules, "seglearn", package)
    monkeypatch.setitem(sys.modules, "seglearn.datasets", module)
    return content


def test_smartwatch_holds_out_time_without_overlap(watch) -> None:
    data = build("data", "smartwatch", window=40, step=10).load()
    assert data.x_train.shape[1:] == (40, 6)
    assert data.input_shape == (6, 40)

    def samples(x: NDArray) -> set[tuple[int, int]]:
        return {(int(r), int(t)) for row in x for r, t in zip(row[:, 0], row[:, 1], strict=True)}

    assert not samples(data.x_train) & samples(data.x_test)
    tested = {int(row[0, 0]) for row in data.x_test}
    assert tested == set(range(6))  # every recording, so every subject and class
    for row, y, client in zip(data.x_train, data.y_train, data.client_train, strict=True):
        recording = int(row[0, 0])
        assert y == watch["y"][recording]
        assert [4, 7][client] == watch["subject"][recording]
        assert np.array_equal(np.diff(row[:, 1]), np.ones(39))


def test_smartwatch_refuses_what_does_not_fit(watch, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="shorter window"):
        build("data", "smartwatch", window=200).load()
    for options in ({"window": 0}, {"step": 0}, {"test_fraction": 0.0}, {"test_fraction": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            build("data", "smartwatch", **options)
    monkeypatch.setattr("fedq.data.smartwatch.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[data-imu\]'"):
        build("data", "smartwatch").load()


def test_smartwatch_recordings_are_what_the_docstring_says() -> None:
    pytest.importorskip("seglearn")
    data = load(build("data", "smartwatch"))
    assert data.classes == 7
    assert data.client_train.max() == 9
    assert set(np.bincount(data.client_train) > 100) == {True}


# --- folder ------------------------------------------------------------------------------------


def draw(path: Path, value: int, size=(6, 4), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "P", "I;16") else (value,) * 3).save(path)


def sound(path: Path, samples: NDArray, rate: int = 8000, width: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = samples.reshape(len(samples), -1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2" if width == 2 else np.uint8).tobytes())


def folder(path: Path, **options):
    return build("data", "folder", path=str(path), **options).load()


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    for part, first in (("train", 10), ("test", 60)):
        for i, label in enumerate(("cat", "dog")):
            for k in range(3):
                draw(tmp_path / part / label / f"{k}.png", first + 20 * i + k)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = folder(tmp_path)
    assert data.x_train[:, 0, 0].tolist() == [10, 11, 12, 30, 31, 32]
    assert data.x_test[:, 0, 0].tolist() == [60, 61, 62, 80, 81, 82]
    assert data.y_train.tolist() == data.y_test.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.input_shape == (1, 4, 6)
    assert data.client_train is None


def test_folder_splits_by_class(tmp_path: Path) -> None:
    for i, label in enumerate("ab"):
        for k in range(10):
            draw(tmp_path / label / f"{k}.jpg", 100 * i + 10 * k, mode="RGB")
    data, again = folder(tmp_path), folder(tmp_path)
    assert np.bincount(data.y_test).tolist() == [2, 2]
    assert np.array_equal(data.x_test, again.x_test)
    assert not np.array_equal(data.x_test, folder(tmp_path, seed=1).x_test)
    assert data.input_shape == (3, 4, 6)


def test_folder_images_of_several_sizes_and_modes(tmp_path: Path) -> None:
    for label in "ab":
        draw(tmp_path / label / "0.png", 7, (5, 5), "RGB")
        draw(tmp_path / label / "1.png", 7, (9, 5), "L")
        draw(tmp_path / label / "2.png", 7, (5, 5), "P")
    with pytest.raises(ConfigError, match=r"several sizes \(5 x 5, 9 x 5\); set data.size"):
        folder(tmp_path)
    assert folder(tmp_path, size=8).x_train.shape[1:] == (8, 8, 3)


def test_folder_keeps_the_high_bits_of_deep_grey(tmp_path: Path) -> None:
    for label in "ab":
        for k in range(2):
            draw(tmp_path / label / f"{k}.png", 0x1234 + (k << 14), mode="I;16")
    data = folder(tmp_path, test_fraction=0.5)
    values = {*data.x_train.reshape(-1).tolist(), *data.x_test.reshape(-1).tolist()}
    assert values == {0x12, 0x52}


def test_folder_of_sounds(tmp_path: Path) -> None:
    tone = (20000 * np.sin(np.arange(4000) / 5)).astype(np.int16)
    for label in "ab":
        sound(tmp_path / label / "anna_1.wav", tone)
        sound(tmp_path / label / "anna_2.wav", tone[:1000])
        sound(tmp_path / label / "bert_1.wav", np.concatenate([tone, tone, tone]))
        sound(tmp_path / label / "bert_2.wav", tone)
    data = folder(tmp_path, seconds=0.5, client_separator="_", test_fraction=0.25)
    assert data.kind == "series"
    assert data.input_shape == (1, 4000)
    x = np.concatenate([data.x_train, data.x_test])
    assert np.abs(x).max() <= 1
    lengths = sorted(int(np.flatnonzero(row[:, 0]).max()) + 1 for row in x)
    assert lengths[0] == lengths[1] == 1000
    assert lengths[-1] == 4000
    whole = [row for row in x if row[3000, 0] != 0]
    assert all(np.array_equal(row[:, 0], tone / np.float32(32768)) for row in whole)
    assert set(data.client_train.tolist()) == {0, 1}
    slow = folder(tmp_path, seconds=0.5, rate=2000, test_fraction=0.25)
    assert slow.input_shape == (1, 2000 // 2)
    row = next(row for row in slow.x_train if row[900, 0] != 0)
    assert np.allclose(row[:, 0], (tone / 32768).reshape(-1, 4).mean(axis=1), atol=1e-6)


def test_folder_of_eight_bit_stereo_sounds(tmp_path: Path) -> None:
    for label in "ab":
        for k in range(2):
            sound(tmp_path / label / f"{k}.wav", np.array([[0, 128], [255, 192]]), 10, width=1)
    data = folder(tmp_path, seconds=0.2, test_fraction=0.5)
    assert data.x_train[0].tolist() == [[-1, 0], [127 / 128, 0.5]]


def test_folder_refuses_in_one_line(tmp_path: Path, monkeypatch) -> None:
    def refused(match: str, **options) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            folder(Path("own"), **options)
        assert "\n" not in str(caught.value)
        assert "own" in str(caught.value)

    monkeypatch.chdir(tmp_path)
    refused("data.path=own: no such folder")
    own = tmp_path / "own"
    own.mkdir()
    refused("no class folders")
    (own / "a").mkdir()
    refused("class folder a has no png, jpg or wav files")
    draw(own / "a" / "x_0.png", 1)
    draw(own / "b" / "x_0.png", 1)
    with pytest.raises(ConfigError, match="class 'a' has a single example"):
        folder(own)
    (own / "a" / "x_1.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    draw(own / "b" / "1.png", 1)
    refused("own/a/x_1.png is not a readable image")
    draw(own / "a" / "x_1.png", 1)
    assert folder(Path("own")).classes == 2
    refused("has no '_' after a client's name", client_separator="_", seed=1, test_fraction=0.01)
    sound(own / "a" / "2.wav", np.zeros(10))
    refused("both images and sounds")


def test_folder_refuses_odd_sounds(tmp_path: Path) -> None:
    for label in "ab":
        for k in range(2):
            sound(tmp_path / label / f"{k}.wav", np.zeros(100), 8000)
    with pytest.raises(ConfigError, match=r"data\.rate=3000 must divide"):
        folder(tmp_path, rate=3000)
    sound(tmp_path / "a" / "1.wav", np.zeros(100), 16000)
    with pytest.raises(ConfigError, match=r"several rates \(8000, 16000"):
        folder(tmp_path)
    assert folder(tmp_path, rate=8000, seconds=0.01).input_shape == (1, 80)
    sound(tmp_path / "a" / "1.wav", np.zeros((100, 2)), 8000)
    with pytest.raises(ConfigError, match="mono and stereo"):
        folder(tmp_path)
    (tmp_path / "a" / "1.wav").write_bytes(b"RIFF____WAVE")
    with pytest.raises(ConfigError, match=r"1\.wav is not a PCM WAV file"):
        folder(tmp_path)


def test_folder_options_are_validated() -> None:
    for options in (
        {"size": -1},
        {"rate": -1},
        {"seconds": 0.0},
        {"seconds": 1e9},
        {"test_fraction": 1.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            build("data", "folder", path=".", **options)


# --- hub ---------------------------------------------------------------------------------------


class Split:
    """What Flower Datasets returns, as far as we use it."""

    def __init__(self, columns: dict[str, list]) -> None:
        self._columns = columns
        self.column_names = list(columns)

    def __getitem__(self, column: str) -> list:
        return self._columns[column]


@pytest.fixture
def hub(monkeypatch) -> dict:
    """A stand-in for flwr_datasets with splits to fill in; nothing is downloaded."""
    content: dict = {"splits": {}, "asked": None}

    class FederatedDataset:
        def __init__(self, *, dataset, subset, partitioners, shuffle) -> None:
            content["asked"] = (dataset, subset)
            assert partitioners == {}
            assert shuffle is False

        def load_split(self, split: str) -> Split:
            if "error" in content:
                raise content["error"]
            return Split(content["splits"][split])

    module = types.ModuleType("flwr_datasets")
    module.__spec__ = types.SimpleNamespace(name="flwr_datasets")
    module.FederatedDataset = FederatedDataset
    monkeypatch.setitem(sys.modules, "flwr_datasets", module)
    return content


def images(count: int, mode: str = "L") -> list[Image.Image]:
    return [Image.new(mode, (6, 4), k if mode == "L" else (k, k, k)) for k in range(count)]


def hugging(**options):
    return build("data", "huggingface", dataset="ylecun/mnist", **options)


def test_huggingface_images(hub) -> None:
    hub["splits"] = {
        "train": {"image": images(6), "label": [0, 1, 2] * 2, "writer": list("aabbcc")},
        "test": {"image": images(3), "label": [2, 1, 0], "writer": list("xyz")},
    }
    data = hugging(client_column="writer", subset="plain").load()
    assert hub["asked"] == ("ylecun/mnist", "plain")
    assert data.x_train.dtype == np.uint8
    assert data.x_train[:, 0, 0].tolist() == list(range(6))
    assert data.y_test.tolist() == [2, 1, 0]
    assert data.client_train.tolist() == [0, 0, 1, 1, 2, 2]
    assert hugging(size=8).load().input_shape == (1, 8, 8)
    assert hub["asked"] == ("ylecun/mnist", None)


def test_huggingface_without_a_test_split(hub) -> None:
    hub["splits"] = {"train": {"img": images(20, "RGB"), "fine": ["a", "b"] * 10}}
    data = hugging(input_column="img", label_column="fine", test_split="").load()
    assert data.x_train.shape == (16, 4, 6, 3)
    assert np.bincount(data.y_test).tolist() == [2, 2]


@pytest.mark.parametrize(("shape", "kind"), [((7,), "features"), ((9, 3), "series")])
def test_huggingface_numbers(hub, shape, kind) -> None:
    part = {"x": RNG.normal(size=(6, *shape)).tolist(), "label": [0, 1, 2] * 2}
    hub["splits"] = {"train": part, "test": part}
    assert hugging(input_column="x").load().kind == kind


def test_huggingface_refuses_columns_that_do_not_fit(hub) -> None:
    part = {"image": ["text"] * 4, "ragged": [[1], [1, 2], [1], [1]], "label": [0, 1, 0, 1]}
    hub["splits"] = {"train": part, "test": part}
    for options, match in (
        ({"input_column": "img"}, "no column 'img'; it has image, ragged, label"),
        ({}, "neither images nor numbers"),
        ({"input_column": "ragged"}, "several shapes"),
    ):
        with pytest.raises(ConfigError, match=match):
            hugging(**options).load()
    part["image"] = images(4)
    with pytest.raises(ConfigError, match="no column 'y'"):
        hugging(label_column="y").load()
    hub["splits"]["test"] = part | {"label": [0, 1, 7, 1]}
    with pytest.raises(ConfigError, match="ylecun/mnist: y_test holds labels"):
        hugging().load()


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("")])
def test_huggingface_says_when_the_hub_is_out_of_reach(hub, error: Exception) -> None:
    hub["error"] = error
    with pytest.raises(
        FedqError, match=r"cannot load split 'train' of ylecun/mnist.*data=npz"
    ) as e:
        hugging().load()
    assert not isinstance(e.value, ConfigError)
    assert "\n" not in str(e.value)


def test_huggingface_needs_its_extra(monkeypatch) -> None:
    monkeypatch.setattr("fedq.data.huggingface.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[data-hub\]'"):
        hugging().load()
    for options in ({"size": -1}, {"test_fraction": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            hugging(**options)
    with pytest.raises(ConfigError, match=r"data\.name"):
        build("data", "huggingface", dataset="")


# --- registered sources ------------------------------------------------------------------------


def test_every_source_is_an_option_of_the_command_line() -> None:
    assert " ".join(available("data")) == (
        "digits energy faces folder huggingface machine_sounds mnist5k npz series_csv smartwatch"
        " speech_commands spoken_digits vibration"
    )
    with pytest.raises(ConfigError, match=r"needs data\.path"):
        build("data", "npz")
    with pytest.raises(ConfigError, match="did you mean 'mnist5k'"):
        build("data", "mnist")
