"""Reading files that others made, safely: nothing in them is ever run, and what is wrong is said with the file's name.

A `.pt` file is a pickle, which can hold any code; it is opened with `weights_only`, which builds tensors and plain containers
and refuses all else. Even so it is read by a worker or the command line, never by the web.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_core.errors import UnreadableSAE

MOST_JSON = 16 * 2**20  # bytes; a config is a few KB

Tensors = dict[str, Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise UnreadableSAE(f"{path} has {path.stat().st_size:,} bytes, far too many for a config; name the right file.")
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UnreadableSAE(f"{path} is missing; copy the whole folder.") from error
    except (OSError, ValueError) as error:
        raise UnreadableSAE(f"{path} cannot be read as JSON ({error}); copy it again.") from error
    if not isinstance(found, dict):
        raise UnreadableSAE(f"{path} holds no JSON object, so it is not an SAE's config.")
    return found


def read_safetensors(path: Path) -> Tensors:
    """The tensors in `path`, cloned: a mapped file that somebody cuts short takes the process down."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise UnreadableSAE(f"{path} is missing; copy the whole folder.") from error
    except (SafetensorError, OSError) as error:
        raise UnreadableSAE(f"{path} cannot be read ({error}); copy it again.") from error


def read_pt(path: Path) -> Tensors:
    """The state dict in a `.pt` file."""
    try:
        with warnings.catch_warnings():  # it warns of pickles that it does not know, before it refuses them
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UnreadableSAE(f"{path} is missing; copy it too.") from error
    except pickle.UnpicklingError as error:
        said = next((line.strip() for line in str(error).splitlines() if "global" in line.lower()), "it is no plain state dict")
        raise UnreadableSAE(
            f"{path} holds more than tensors, and opening it could run code, so it was not opened ({said[:200]}); "
            "save its state_dict() alone."
        ) from error
    except MemoryError:
        raise  # of the machine, not of the file
    except Exception as error:  # damaged bytes are taken for calls with any arguments, which fail in as many ways as there are
        raise UnreadableSAE(f"{path} cannot be read ({str(error)[:200] or 'it is empty'}); copy it again.") from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UnreadableSAE(f"{path} holds no state dict of tensors, so it is not an SAE.")
    return {str(name): value for name, value in found.items()}


def read_npz(path: Path) -> Tensors:
    """The arrays of an `.npz` file; arrays of objects, which are pickles, are refused."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: torch.from_numpy(np.asarray(found[name], dtype=np.float32)) for name in found.files}
    except FileNotFoundError as error:
        raise UnreadableSAE(f"{path} is missing; copy it too.") from error
    except ValueError as error:
        if "pickle" in str(error):
            raise UnreadableSAE(
                f"{path} holds Python objects, and opening them could run code, so it was not opened; save plain arrays."
            ) from error
        raise UnreadableSAE(f"{path} cannot be read ({error}); copy it again.") from error
    except (OSError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise UnreadableSAE(f"{path} cannot be read ({error}); copy it again.") from error


def taken(tensors: Tensors, names: Iterable[str], path: Path) -> Tensors:
    """The tensors of these names in fp32; UnreadableSAE where one is missing or holds what is no number."""
    found = {}
    for name in names:
        if name not in tensors:
            raise UnreadableSAE(f"{path} lacks the tensor {name}; it has {', '.join(sorted(tensors)) or 'none'}.")
        found[name] = tensors[name].to(torch.float32).contiguous()
        if not torch.isfinite(found[name]).all():
            raise UnreadableSAE(f"{name} in {path} holds values that are not finite.")
    return found


def whole(config: dict[str, Any], name: str, path: Path) -> int:
    """A field of a config that must be a whole number of at least 0."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        said = "lacks it" if value is None else f"says {value!r}"
        raise UnreadableSAE(f"{name} should be a whole number in {path}, which {said}.")
    return value
