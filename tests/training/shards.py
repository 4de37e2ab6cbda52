"""A small image set in the format of TFDS, written without TensorFlow or a download."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

FEATURES = "tensorflow_datasets.core.features"


def write(root: Path, name: str = "tiny_set", train: int = 40, test: int = 20, side: int = 4) -> Path:
    """Write a set of grayscale images whose pixels are their index; returns its folder. TFDS does not know its name,
    and reads it from its files alone."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    splits = {"train": [train // 2, train - train // 2], "test": [test]}
    for split, lengths in splits.items():
        first = 0
        for number, length in enumerate(lengths):
            path = folder / shard(name, split, number, len(lengths))
            write_records(
                path, [record(np.full((side, side), i, np.uint8), i % 10) for i in range(first, first + length)]
            )
            first += length
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    described = [
        {"name": split, "shardLengths": [str(n) for n in lengths], "numBytes": "1000", "filepathTemplate": template}
        for split, lengths in splits.items()
    ]
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features(side)))
    return folder


def shard(name: str, split: str, number: int = 0, count: int = 1) -> str:
    """The name of a shard's file."""
    return f"{name}-{split}.array_record-{number:05}-of-{count:05}"


def features(side: int = 4) -> dict:
    """What features.json holds."""
    image = {"dtype": "uint8", "shape": {"dimensions": [str(side), str(side), "1"]}}
    parts = {
        "image": {"pythonClassName": f"{FEATURES}.image_feature.Image", "image": image},
        "label": {
            "pythonClassName": f"{FEATURES}.class_label_feature.ClassLabel", "classLabel": {"numClasses": "10"}
        },
    }  # fmt: skip
    return {"pythonClassName": f"{FEATURES}.features_dict.FeaturesDict", "featuresDict": {"features": parts}}


def record(pixels: np.ndarray, label: int) -> bytes:
    """A tf.train.Example of an image, as PNG, and its label."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return example(png.getvalue(), label)


def example(image: bytes, label: int) -> bytes:
    """A tf.train.Example by hand: features.feature is a map of names to lists of bytes (1) or integers (3)."""
    entries = {"image": _field(1, _field(1, image)), "label": _field(3, _field(1, _varint(label)))}
    return _field(1, b"".join(_field(1, _field(1, k.encode()) + _field(2, v)) for k, v in entries.items()))


def write_records(path: Path, records: list[bytes]) -> None:
    """An array_record file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for each in records:
        writer.write(each)
    writer.close()


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
