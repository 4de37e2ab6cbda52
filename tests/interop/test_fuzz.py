"""Untrusted weights folders are read correctly or refused with one message; nothing hangs or runs code."""

import copy
import json
import os
import struct

import hypothesis.strategies as st
import numpy as np
import pytest

from tests.interop.reference import TINY, random_tensors
from tests.interop.test_folder import WEIGHTS, by_hand
from tests.interop.test_schedulers import GOOGLE
from tests.training.fuzzing import each_number, on_examples
from vdm_jax import interop
from vdm_jax.interop.schedulers import DIFFUSERS_DEFAULTS as NOISE
from vdm_jax.interop.unet_fields import DIFFUSERS_DEFAULTS
from vdm_jax.networks import inception

WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 10**9, 1e308, -1e-308, "linear", [], {}, [8], [8, 0], [2**40] * 3]),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5),
)
TENSORS = random_tensors(TINY)
GOOD = by_hand(TENSORS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(GOOGLE))
    (tmp_path / WEIGHTS).write_bytes(GOOD)
    return tmp_path


def refused(call):
    """The message of a call that may succeed or raise ValueError, but nothing else; short and printable."""
    try:
        call()
    except ValueError as error:
        message = str(error)
        assert len(message) < 3_000
        assert all(letter.isprintable() or letter == "\n" for letter in message)
        return message
    return None


@each_number
def test_any_network_config(number):
    """An accepted config has the shapes in the file; the message names every invalid field."""

    @on_examples(
        number, st.dictionaries(st.sampled_from(sorted(DIFFUSERS_DEFAULTS)) | st.text(), WILD, min_size=1, max_size=3)
    )
    def _(changes):
        message = refused(lambda: interop.from_unet_config(TINY | changes))
        unknown = {name for name in changes if name not in DIFFUSERS_DEFAULTS and not name.startswith("_")}
        assert message or not unknown


@pytest.mark.parametrize("field", DIFFUSERS_DEFAULTS)
def test_no_field_of_a_network_config_accepts_every_value(field):
    free = {"num_train_timesteps"}  # does not affect the network
    for value in (2**80, -3, "ten", [[]], {"a": 1}):
        message = refused(lambda value=value: interop.from_unet_config(TINY | {field: value}))
        assert field in free or f"{field} is " in message


@each_number
def test_any_scheduler_config(number):
    @on_examples(number, st.dictionaries(st.sampled_from(sorted(NOISE)), WILD, min_size=1, max_size=3))
    def _(changes):
        def build():
            scheduler = interop.from_scheduler_config(GOOGLE | changes)
            schedule = scheduler.discrete_schedule()
            assert schedule.num_steps == scheduler.num_steps
            assert np.isfinite(schedule.log_snr[1:]).all()

        refused(build)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_timesteps", 0), ("num_train_timesteps", 10**12), ("num_train_timesteps", 1.5),
        ("beta_start", float("nan")), ("beta_end", "x"), ("trained_betas", 7), ("trained_betas", ["a"] * 1000),
        ("clip_sample", "yes"), ("clip_sample_range", -1.0), ("beta_schedule", ["linear"]),
    ],
)  # fmt: skip
def test_invalid_scheduler_values_are_named(field, value):
    assert f"{field} is " in (refused(lambda: interop.from_scheduler_config(GOOGLE | {field: value})) or "")


@each_number
def test_any_bytes_for_json(folder, number):
    @on_examples(
        number,
        st.sampled_from(["config.json", "scheduler_config.json"]),
        st.binary(max_size=200) | st.text().map(str.encode),
    )
    def _(name, data):
        (folder / name).write_bytes(data)
        assert name in refused(lambda: interop.load(folder))
        (folder / name).write_text(json.dumps(TINY if name == "config.json" else GOOGLE))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "1" * 5_000, '{"norm_eps": ' + "9" * 5_000 + "}", "\ud800"])
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_json_that_is_hard_to_read(folder, name, text):
    (folder / name).write_text(text, errors="surrogatepass")
    assert name in refused(lambda: interop.load(folder))


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@each_number
def test_any_entry_of_a_weights_file(folder, number):
    @on_examples(
        number,
        st.sampled_from(sorted(TENSORS)),
        st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets"]),
            st.sampled_from(["F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "X"])
            | st.lists(st.sampled_from([-1, 0, 1, 4, 8, 2**31, 2**62, 2**64]), max_size=5)
            | WILD,
            min_size=1,
        ),
    )
    def _(name, changes):
        header, data = header_of(GOOD)
        wrong = any(header[name][part] != value for part, value in changes.items())
        header[name] = {**header[name], **changes}
        (folder / WEIGHTS).write_bytes(with_header(header, data))
        message = refused(lambda: interop.load(folder))
        assert bool(message) == wrong


@each_number
def test_any_bytes_for_weights(folder, number):
    @on_examples(number, st.binary(max_size=300), st.sampled_from([0, 1, 2, 8, 100, 2**31, 2**63, 2**64 - 1]))
    def _(data, length):
        for whole in (data, struct.pack("<Q", length) + data, with_header(data, b"")):
            (folder / WEIGHTS).write_bytes(whole)
            assert refused(lambda: interop.load(folder))


def overlapping(header, data):
    """Two tensors of one shape at the same offset."""
    shape = header["mid_block.resnets.0.conv1.weight"]["shape"]
    same = [name for name, entry in header.items() if entry.get("shape") == shape]
    header[same[0]] = header[same[1]]
    return with_header(header, data)


def not_a_number(header, data):
    return with_header(header, data[:-4] + struct.pack("<f", float("nan")))


def strange_letters(header, data):
    header["\x1b[2J\u202e"] = header.pop("conv_in.bias")
    return with_header(header, data)


def nothing(header, data):
    return with_header({}, b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overlapping, "not a complete safetensors file"),
        (not_a_number, "non-finite values"),
        (strange_letters, r"not of this network \(1\): \\x1b\[2J"),
        (nothing, "missing"),
    ],
)
def test_a_malicious_weights_file_is_refused(folder, change, message):
    (folder / WEIGHTS).write_bytes(change(*copy.deepcopy(header_of(GOOD))))
    with pytest.raises(ValueError, match=message):
        interop.load(folder)


def as_folder(path):
    path.mkdir()


def as_pipe(path):
    os.mkfifo(path)


def as_link_to_itself(path):
    path.symlink_to(path)


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", WEIGHTS, WEIGHTS + ".sha256"])
@pytest.mark.parametrize("make", [as_folder, as_pipe, as_link_to_itself])
def test_a_special_file_is_not_read(folder, name, make):
    """Reading a pipe would block forever."""
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    message = refused(lambda: interop.load(folder))
    optional = make is as_link_to_itself and name in ("scheduler_config.json", WEIGHTS + ".sha256")
    assert optional or message  # a broken link counts as an absent file, and these two files are optional


@pytest.mark.parametrize("path", ["", "\0", "a\0b", "x" * 300, "/" + "y/" * 3_000, "\ud800", "..", "/dev/zero"])
def test_any_name_for_weights(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([path], [tmp_path / "weights.safetensors", path]):
        with pytest.raises(ValueError, match=r"does not exist|does not contain|is not a file"):
            interop.load(*arguments)


def test_names_in_a_pipeline_are_not_imported(folder, tmp_path_factory):
    """model_index.json, from which diffusers imports modules, is not read."""
    pipeline = tmp_path_factory.mktemp("pipeline")
    folder.rename(pipeline / "unet")
    (pipeline / "model_index.json").write_text('{"unet": ["antigravity", "../../x"], "scheduler": ["os", "system"]}')
    loaded = interop.load(pipeline)
    assert loaded.shape == (4, 4, 3)


def test_inception_weights_are_finite():
    weights = {name: np.zeros(shape, np.float32) for name, shape in inception.weight_shapes().items()}
    first = min(weights)
    weights[first].flat[0] = np.inf
    with pytest.raises(ValueError, match=f"{first}: not all finite"):
        inception.check_weights(weights)
