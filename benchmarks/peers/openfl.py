"""OpenFL 1.9's EDEN pipeline: a protobuf message with every tensor's bytes and metadata."""

from __future__ import annotations

import sys
from typing import Any

import _protocol
import numpy as np

sys.path.remove(sys.path[0])  # this file has the package's name

from openfl.pipelines import EdenPipeline
from openfl.protocols import base_pb2

_pipelines: dict[int, EdenPipeline] = {}


def _pipeline(settings: dict[str, Any]) -> EdenPipeline:
    bits = settings["n_bits"]
    if bits not in _pipelines:
        _pipelines[bits] = EdenPipeline(n_bits=bits)
    return _pipelines[bits]


def encode(arrays: _protocol.Arrays, settings: dict[str, Any], seed: int) -> bytes:
    """Return the serialised model."""
    np.random.seed(seed % 2**32)  # noqa: NPY002 - where the pipeline draws from
    model = base_pb2.ModelProto()
    for name, array in arrays.items():
        data, metadata = _pipeline(settings).forward(array)
        tensor = model.tensors.add(name=name, data_bytes=data)
        for step in metadata:
            tensor.transformer_metadata.add(
                int_to_float=step.get("int_to_float"), int_list=step.get("int_list")
            )
    return model.SerializeToString()


def decode(payload: bytes, settings: dict[str, Any]) -> _protocol.Arrays:
    """Return the arrays."""
    model = base_pb2.ModelProto.FromString(payload)
    return {
        tensor.name: _pipeline(settings).backward(
            tensor.data_bytes,
            [
                {"int_to_float": step.int_to_float, "int_list": step.int_list}
                for step in tensor.transformer_metadata
            ],
        )
        for tensor in model.tensors
    }


_protocol.serve(encode, decode)
