"""How ``codecs.py`` drives a peer: one JSON line per vector in, one line of figures out.

A request names the file of the vector, its layout, the seed and the peer's settings. The decoded
vector is written to the file named by ``decoded``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]


def serve(
    encode: Callable[[Arrays, dict[str, Any], int], Any],
    decode: Callable[[Any, dict[str, Any]], Arrays],
    size: Callable[[Any], int] = len,
) -> None:
    """Answer requests until the line closes.

    Args:
      encode: From named arrays, settings and seed to whatever the peer hands over.
      decode: The way back.
      size: Bytes of what is handed over.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        x = np.load(request["vector"])
        arrays, start = {}, 0
        for name, shape in request["layout"]:
            stop = start + int(np.prod(shape))
            arrays[name] = x[start:stop].reshape(shape)
            start = stop
        settings = request["settings"]
        begin = time.process_time()
        coded = encode(arrays, settings, request["seed"])
        between = time.process_time()
        decoded = decode(coded, settings)
        end = time.process_time()
        flat = [np.asarray(decoded[name], np.float32).reshape(-1) for name in arrays]
        np.save(request["decoded"], np.concatenate(flat))
        answer = {"bytes": size(coded), "encode_s": between - begin, "decode_s": end - between}
        print(json.dumps(answer), file=answers, flush=True)
